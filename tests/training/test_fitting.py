"""What a run says of its memory is its own, and what it holds of its steps does not grow with them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from holdtrue.training.fitting import _Recorder
from holdtrue.training.trainer import checkpoints
from support import small_rows

PEAK = """
import torch
from holdtrue.training.fitting import peak_memory
print(peak_memory(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own figure is all there is elsewhere")
def test_peak_memory_is_not_that_of_the_parent():
    def peak() -> int:
        return int(subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout)

    alone = peak()
    held = np.ones(3 * alone // 8)  # the parent holds three times as much
    assert abs(peak() - alone) < 0.2 * alone
    assert held.sum() == held.size


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def naive_summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [r for r in records if "loss" in r]
    tokens, seconds = sum(r["tokens"] for r in steps), sum(r["seconds"] for r in steps)
    return {
        "tokens": tokens,
        "target_tokens": sum(r["target_tokens"] for r in steps),
        "seconds": pytest.approx(seconds),
        "cpu_seconds": pytest.approx(sum(r["cpu_seconds"] for r in steps)),
        "tokens_per_second": pytest.approx(tokens / seconds),
        "padding": pytest.approx(1 - tokens / sum(r["tokens"] / (1 - r["padding"]) for r in steps)),
    }


def test_a_summary_is_of_all_steps_also_of_earlier_sittings(train):
    stop = Event()

    def halt(record: dict[str, Any]) -> None:
        if record["step"] in (5, 9):
            stop.set()

    for _ in range(3):
        stop.clear()
        _, summary, folder = train(["kl"], epochs=2, validation=small_rows(9, seed=5), stop=stop, progress=halt)
    assert not summary["interrupted"]
    expected = naive_summary(lines(folder))
    assert len([r for r in lines(folder) if "loss" in r]) == summary["steps"] == 24
    assert {key: summary[key] for key in expected} == expected


def test_the_validation_loss_is_measured_at_each_epochs_end_before_its_checkpoint(train):
    settings = {"epochs": 3, "save_epochs": True, "save_every": 12}
    plain, _, _ = train(["kl"], name="plain", **settings)
    told, stop, rows = [], Event(), small_rows(9, seed=5)

    def halt(record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            told.append((record["step"], record["steps"], record["eval_loss"]))
        if record["step"] == 11:  # the next one ends an epoch, and is the last of this sitting
            stop.set()

    whole, _, there = train(["kl"], name="whole", validation=rows, **settings)
    for _ in range(2):
        stop.clear()
        parts, _, here = train(["kl"], name="parts", validation=rows, stop=stop, progress=halt, **settings)
    measured = [[(r["step"], 36, r["eval_loss"]) for r in lines(f) if "eval_loss" in r] for f in (there, here)]
    assert [step for step, _, _ in told] == [12, 24, 36]
    assert measured[0] == measured[1] == told
    for model in (whole, parts):
        for name, weights in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], weights)


def test_checkpoints_do_not_grow_with_the_steps(train):
    _, _, folder = train(["kl"], epochs=3, validation=small_rows(9, seed=5), eval_every=2)
    kept = [json.loads((c / "trainer_state.json").read_text()) for c in checkpoints(folder / "checkpoints")]
    assert kept[-1]["global_step"] == 36
    assert [len(state["log_history"]) for state in kept] == [1, 1]


def test_what_is_held_in_memory_does_not_grow_with_the_steps(tmp_path: Path):
    recorder = _Recorder(tmp_path / "metrics.jsonl", 0, None, None, True, False, False)
    state, sizes = TrainerState(max_steps=3000), []
    for step in range(1, 2001):
        state.global_step = step
        logs = {"loss": 1.0 / step, "tokens": 90.0, "target_tokens": 40.0, "seconds": 0.1, "padding": 0.1}
        state.log_history.append(logs)  # as the Trainer does before it tells its callbacks
        recorder.on_log(None, state, TrainerControl(), logs)
        sizes.append(len(pickle.dumps((vars(recorder), state.log_history))))
    assert sizes[-1] < sizes[9] + 50
    assert recorder.summary()["tokens"] == 2000 * 90
    assert len(lines(tmp_path)) == 2000
