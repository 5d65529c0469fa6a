"""Measure each way in processes of their own, interleaved, and print the ratios."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

from benchmarks.memory import LENGTH, ROWS, WAYS

RATIOS = {
    "kl_memory_over_plain": ("kl", "plain"),
    "kl_all_memory_over_plain": ("kl-all", "plain"),
    "kl_ldifs_memory_over_plain": ("kl-ldifs", "plain"),
    "naive_kl_memory_over_plain": ("naive-kl", "plain"),
}


def peak(way: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", way, folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure(runs: int) -> dict[str, Any]:
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    for run in range(runs):
        for way in WAYS:
            print(f"run {run + 1} of {runs}: {way}", file=sys.stderr)
            peaks[way].append(peak(way))
    ratios = {}
    for name, (over, under) in RATIOS.items():
        found = [a / b for a, b in zip(peaks[over], peaks[under], strict=True)]
        spread = {"median": statistics.median(found), "min": min(found), "max": max(found), "runs": runs}
        ratios[name] = {key: round(value, 4) for key, value in spread.items()}
    return {
        "tokens": ROWS * LENGTH,
        "ratios": ratios,
        "peak_mib": {way: round(statistics.median(values) / 2**20) for way, values in peaks.items()},
        "machine": {"cpu": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--runs", type=int, default=3, help="how often each way is measured")
    options = parser.parse_args()
    found = measure(options.runs)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, spread in found["ratios"].items():
        print(f"{name:30} {spread['median']:.3f}  [{spread['min']:.3f}, {spread['max']:.3f}]")
    for way, mib in found["peak_mib"].items():
        print(f"{way:30} {mib} MiB")


if __name__ == "__main__":
    main()
