"""Killed at any moment and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.runs import Run

PRELOAD = ["torch", "transformers", "peft", "datasets", "accelerate", "scipy.stats", "holdtrue.cli.main"]


def _work(arguments: list[str]) -> None:
    import torch

    from holdtrue.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start with the libraries already imported, so that kills fall on work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def outcome(out: Path) -> dict[str, Any]:
    """What must be equal: the adapters' bytes, every step's numbers, the measured ones."""
    run = Run(out)
    timing = ("second", "runtime")
    return {
        "adapter": (run.adapter / "adapter_model.safetensors").read_bytes(),
        "raw": (run.adapter_raw / "adapter_model.safetensors").read_bytes(),
        "config": (run.adapter / "adapter_config.json").read_bytes(),
        "metrics": [{k: v for k, v in m.items() if not any(t in k for t in timing)} for m in run.metrics()],
        "evaluations": [
            {k: v for k, v in r.items() if k in ("suite", "which", "n", "margin", "nll", "rows")}
            for r in run.evaluations()
        ],
    }


def steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Each sitting is killed a little after its moment; together they fall into every stage.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "rows are being encoded": lambda out: (out / "data").exists(),
    "the first step": lambda out: steps(out) >= 1,
    "a checkpoint is being written": lambda out: (out / "checkpoints" / "partial").exists(),
    "much later": lambda out: steps(out) >= 12,
    "training is over": lambda out: (out / "adapter_raw").exists(),
    "the adapter is there": lambda out: (out / "adapter").exists(),
    "the first evaluation": lambda out: any((out / "evaluations").glob("*.json")),
}


def test_killed_and_resumed_equals_uninterrupted(
    folder: Path, edit: Callable[[Callable[[dict[str, Any]], object]], Path], processes: Any
) -> None:
    # adaptive has a state of its own, which must come back too.
    (folder / "select.jsonl").write_text((folder / "probes.jsonl").read_text().replace("Should I", "Shall I"))
    adaptive = {"adaptive": {"probe": "select.jsonl", "max_drift": 0.1, "every": 2}}
    spec = str(edit(lambda values: values["defenses"].append(adaptive)))
    whole = folder / "a" / "whole"
    process = processes.Process(target=_work, args=(["train", spec, "--out", str(whole)],))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    expected = outcome(whole)

    # In another folder, so that nothing is taken from the whole run beside it.
    out = folder / "b" / "killed"
    draw = random.Random(0)
    kills = 0
    for moment in [*MOMENTS.values(), lambda out: False]:
        process = processes.Process(target=_work, args=(["train", spec, "--out", str(out)],))
        process.start()
        while process.exitcode is None and not moment(out):
            process.join(0.005)
        process.join(draw.uniform(0, 0.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
    assert Run(out).is_done("evaluate")
    assert kills >= 4
    assert outcome(out) == expected


def test_ctrl_c_saves_and_says_how_to_resume(folder: Path, tmp_path: Path) -> None:
    out = folder / "out"
    sets = ["--set", "training.epochs=60", "--set", "training.save_every=1000"]
    command = [sys.executable, "-m", "holdtrue.cli.main", "train", str(folder / "spec.yaml"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *sets, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        _wait_for_steps(process, out, 3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    document = json.loads(stdout)
    assert document["error"]["exit_code"] == 130
    assert f"holdtrue resume {out}" in document["error"]["message"]
    assert "Traceback" not in stderr
    steps = [m for m in Run(out).metrics() if "loss" in m]
    saved = [int(p.name.split("-")[1]) for p in (out / "checkpoints").glob("checkpoint-*")]
    assert saved == [len(steps)]
    assert not Run(out).is_done("train")


def test_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    out = folder / "out"
    command = [sys.executable, "-m", "holdtrue.cli.main", "train", str(folder / "spec.yaml"), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--set", "training.epochs=60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        _wait_for_steps(process, out, 1)
        # Stopped, so that the two signals are one after the other and the run is between them.
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if "stopping" in line:
                break
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 130


def _wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no step was taken")
