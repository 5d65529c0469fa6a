"""Measure speed and memory in turns, and print the ratios beside the bars they are held to.

All figures are ratios taken within a round, in which the ways take turns of one step or one process: seconds alone say
little on a machine that does other things. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import memory, rounds, start, sweep
from benchmarks.arms import MissingError
from benchmarks.ratios import (
    DEFAULT,
    KNOWN,
    MEMORY,
    MORE_MEMORY,
    START,
    SWEEP,
    TIME,
    Ratio,
    peaks,
    spreads,
    table,
    timed,
    without,
)
from benchmarks.rounds import say
from benchmarks.workload import machine, versions

STEPS, SWEEP_STEPS, MEMORY_RUNS = 3, 4, 3


class Report:
    """The document, written anew whenever something was measured, so that a killed run keeps what it has."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.document: dict[str, Any] = {
            "ratios": {},
            "missing": {},
            "bars": {},
            "machine": machine(),
            "versions": versions(),
            "workload": {},
            "floor": {},
            "raw": {},
        }

    def add(self, ratios: dict[str, Ratio], found: dict[str, dict[str, Any]], **sections: Any) -> None:
        """Take up the spreads of some ratios, and merge ``sections`` into those of the document."""
        self.document["ratios"].update(found)
        bars = {k: {"bar": r.bar, "aim": r.aim} for k, r in ratios.items() if not math.isinf(r.bar)}
        self.document["bars"].update(bars)
        for name, values in sections.items():
            self.document[name].update(values)
        if self.out is not None:
            partial = self.out.with_name(f".{self.out.name}.tmp")
            partial.write_text(json.dumps(self.document, indent=2) + "\n", encoding="utf-8")
            partial.replace(self.out)


def measure(keys: Sequence[str], runs: int, steps: int, seed: int, report: Report, minutes: float = math.inf) -> None:
    """Measure what the ratios ``keys`` need, and no more."""
    wanted = {key: KNOWN[key] for key in keys}
    times = {key: ratio for key, ratio in wanted.items() if key in TIME}
    if times:

        def save(found: dict[str, Any]) -> None:
            report.add(
                times,
                timed(times, found["steps"], found["raw"]),
                missing=without(times, found["missing"]),
                workload=found["workload"],
                floor=found.get("floor", {}),
                raw={"seconds": found["raw"], "seconds_of_steps": found["steps"]},
            )

        rounds.measure(arms(times), runs=runs, steps=steps, seed=seed, save=save, minutes=minutes)
    starts = {key: ratio for key, ratio in wanted.items() if key in START}
    if starts:
        raw = start.measure(arms(starts), runs)
        report.add(starts, spreads(starts, raw), raw={"start": raw})
    sizes = {key: ratio for key, ratio in wanted.items() if key in MEMORY or key in MORE_MEMORY}
    if sizes:
        seen = memory.measure(arms(sizes), min(runs, MEMORY_RUNS), say)
        found = {key: spreads({key: ratio}, peaks(key, seen))[key] for key, ratio in sizes.items()}
        whole = spreads(sizes, {way: [peak for _, peak in values] for way, values in seen.items()})
        report.add(sizes, found, raw={"parameter_and_peak_bytes": seen, "ratios_of_whole_peaks": whole})
    if "sweep_over_naive" in wanted:
        try:
            raw = sweep.measure(max(1, runs // 3), SWEEP_STEPS, say)
            report.add(SWEEP, spreads(SWEEP, raw), raw={"sweep": raw})
        except MissingError as error:
            report.add(SWEEP, {}, missing={"sweep_over_naive": str(error)})


def arms(ratios: dict[str, Ratio]) -> list[str]:
    """Return the arms of some ratios, each once."""
    return list(dict.fromkeys(arm for r in ratios.values() for arm in (r.under, r.over) if arm))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--runs", type=int, default=5, help="rounds, in each of which every arm has its turn")
    parser.add_argument("--minutes", type=float, default=20, help="begin no round after the third that ends later")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of an arm in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn")
    parser.add_argument("--only", nargs="+", choices=sorted(KNOWN), metavar="KEY", help="these ratios alone")
    parser.add_argument("--out", type=Path, help="a file for the JSON document, written anew after each round")
    options = parser.parse_args()
    if options.runs < 1 or options.steps < 1:
        parser.error("--runs and --steps must be at least 1")
    report = Report(options.out)
    measure(options.only or list(DEFAULT), options.runs, options.steps, options.seed, report, options.minutes)
    document = report.document
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(f"rows: {document['workload'].get('data', 'none')}")
    print(table(document["ratios"], document["missing"]))
    for name, floor in document["floor"].get("arms", {}).items():
        print(f"{name:30} floor {floor['seconds']:.2f} s a step, {floor['share']:.0%} of the time measured")


if __name__ == "__main__":
    sys.exit(main())
