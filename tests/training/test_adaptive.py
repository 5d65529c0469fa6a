"""The runtime hook and adaptive, on a small model: held drift, plain at zero, resumed, accumulated, distributed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from holdtrue.errors import NeedError, RunError
from holdtrue.models import causal_lm, without_adapter
from holdtrue.training import DefendedTrainer
from holdtrue.training.runtimes import STATE
from support import LikelierThanRows, free_port, small_model, small_rows

KL = {"kl": {"tokens": "response", "weight": 0.3}}
TIMES = ("second", "runtime")


def adaptive(**settings: Any) -> dict[str, Any]:
    return {"adaptive": {"probe": "rows", "max_drift": 0.5, "every": 2} | settings}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in found]


def test_the_drift_is_held_where_it_would_be_far_larger(train):
    probe = LikelierThanRows()
    _, free, _ = train([KL, adaptive(lowest=0, highest=0)], name="free", epochs=3, probe=probe)
    undefended = free["runtimes"]["adaptive"]["final_drift"]
    bound = undefended / 3
    _, held, folder = train([KL, adaptive(max_drift=bound)], name="held", epochs=3, probe=probe)
    notes = held["runtimes"]["adaptive"]
    assert notes["held"]
    assert bound / 3 < notes["final_drift"] <= bound
    steps = [m for m in lines(folder) if "loss" in m]
    assert all(m["kl_weight"] == pytest.approx(0.3 * m["adaptive_multiplier"]) for m in steps)
    assert all(m["kl_weighted"] == pytest.approx(m["kl_weight"] * m["kl_term"]) for m in steps)
    measured = [m["step"] for m in steps if "adaptive_drift" in m]
    assert measured == sorted({*range(2, len(steps) + 1, 2), len(steps)})
    assert len({m["adaptive_multiplier"] for m in steps}) > 3


def test_the_last_drift_is_that_of_the_trained_model(train):
    probe = LikelierThanRows()
    model, summary, _ = train([KL, adaptive(every=5)], probe=probe)
    assert summary["steps"] % 5
    with without_adapter(model):
        untouched = probe(model)
    model.eval()
    with torch.no_grad():
        drift = untouched - probe(model)
    assert summary["runtimes"]["adaptive"]["final_drift"] == pytest.approx(drift, abs=1e-6)


@pytest.mark.parametrize(("defense", "fast"), [(KL, True), ({"ldifs": {"layers": 2}}, False)])
def test_held_at_zero_is_plain_training_bit_for_bit(train, defense, fast):
    # With dropout: a probe that moved the random numbers, or left a module's mode changed, would show.
    plain, _, there = train([], name="plain", model=small_model(0.2), kl_every=1, fast=fast)
    zero, _, here = train(
        [defense, adaptive(lowest=0, highest=0, every=1)], name="zero", model=small_model(0.2), kl_every=1, fast=fast,
        probe=LikelierThanRows(draws=True),
    )  # fmt: skip
    first, second = parameters(plain), parameters(zero)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = next(iter(defense))
    for a, b in zip(lines(there), lines(here), strict=True):
        assert a.get("ce") == b.get("ce")
        assert "train_loss" in b or (b[f"{name}_term"] >= 0 and b[f"{name}_weighted"] == 0)
    assert any(m.get(f"{name}_term", 0) > 0 for m in lines(here))


def test_resumed_is_uninterrupted(train):
    probe = LikelierThanRows()
    settings = {"defenses": [KL, adaptive(every=3)], "epochs": 2, "save_every": 100}
    whole, expected, there = train(name="whole", model=small_model(0.2), probe=probe, **settings)
    stop = Event()

    def halt(record: dict[str, Any]) -> None:
        if record["step"] in (4, 10, 15):
            stop.set()

    for _ in range(4):
        stop.clear()
        model, summary, here = train(
            name="parts", model=small_model(0.2), probe=probe, stop=stop, progress=halt, **settings
        )
    assert not summary["interrupted"]
    first, second = parameters(whole), parameters(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [m for m in lines(there) if "loss" in m] == [m for m in lines(here) if "loss" in m]
    assert summary["runtimes"] == expected["runtimes"]
    # Once more, with nothing left to train: it says the same.
    assert train(name="parts", model=small_model(0.2), probe=probe, **settings)[1]["runtimes"] == expected["runtimes"]


@pytest.mark.parametrize("damage", ["missing", "{}", '{"adaptive": {}}', "[1]", '{"adaptive": 3}'])
def test_a_checkpoint_without_the_state_is_refused(train, damage):
    stop = Event()
    stop.set()
    settings = {"defenses": [KL, adaptive()], "probe": LikelierThanRows(), "stop": stop}
    _, _, folder = train(**settings)
    checkpoint = next((folder / "checkpoints").glob("checkpoint-*"))
    state = checkpoint / STATE
    assert state.is_file()
    state.unlink() if damage == "missing" else state.write_text(damage)
    # Sealed anew, so that it is the state that is refused and not the seal.
    from holdtrue.training.trainer import SEAL, seal

    (checkpoint / SEAL).unlink()
    seal(checkpoint)
    with pytest.raises(RunError, match="state of adaptive"):
        train(**settings)


def test_accumulation_changes_nothing(train):
    probe = LikelierThanRows()
    one, _, a = train([KL, adaptive()], name="one", probe=probe, learning_rate=1e-3)
    four, _, b = train([KL, adaptive()], name="four", probe=probe, learning_rate=1e-3, micro_batch_size=1)
    for name, tensor in parameters(one).items():
        torch.testing.assert_close(parameters(four)[name], tensor, atol=2e-5, rtol=1e-4)
    for x, y in zip(lines(a), lines(b), strict=True):
        for key in ("adaptive_multiplier", "adaptive_drift", "kl_weight"):
            assert x.get(key) == pytest.approx(y.get(key), abs=1e-3)


class Scripted:
    """A probe that tells what it is told to, and looks at the model that it is given."""

    def __init__(self, *margins: float) -> None:
        self.margins, self.seen = list(margins), []

    def __call__(self, model: torch.nn.Module) -> float:
        modes = {module.training for module in model.modules()}
        self.seen.append(
            (modes, torch.is_grad_enabled(), all(p.requires_grad for n, p in model.named_parameters() if "lora" in n))
        )
        return self.margins.pop(0) if len(self.margins) > 1 else self.margins[0]


def test_the_probe_sees_an_evaluation_without_gradients(train):
    probe = Scripted(1.0)
    model = small_model(0.2)
    train([KL, adaptive(every=1)], probe=probe, model=model)
    assert probe.seen == [({False}, False, True)] * len(probe.seen)
    assert len(probe.seen) == 13  # the reference once, and twelve steps


def test_a_margin_that_is_no_number_stops_the_run(train):
    with pytest.raises(RunError, match=r"nan at step 4"):
        train([KL, adaptive()], probe=Scripted(1.0, 0.9, math.nan))
    with pytest.raises(RunError, match=r"inf at step 0"):
        train([KL, adaptive()], name="first", probe=Scripted(math.inf))


def test_a_bound_that_is_not_held_is_said_or_stops_the_run(train, caplog):
    _, summary, _ = train([KL, adaptive(highest=2)], probe=Scripted(1.0, 0.2))
    notes = summary["runtimes"]["adaptive"]
    assert not notes["held"]
    assert (notes["final_drift"], notes["max_drift"], notes["multiplier"]) == (pytest.approx(0.8), 0.5, 2.0)
    assert "bound not held" in caplog.text
    assert "as high as it may be" in notes["warning"]
    with pytest.raises(RunError, match="bound not held"):
        train([KL, adaptive(on_violation="stop")], name="stop", probe=Scripted(1.0, 0.2))


def test_a_share_is_of_the_untouched_margin(train):
    _, summary, _ = train([KL, adaptive(max_drift=0.25, unit="share")], probe=Scripted(2.0, 1.6))
    assert summary["runtimes"]["adaptive"]["max_drift"] == 0.5
    assert summary["runtimes"]["adaptive"]["held"]
    for margin in (0.0, -0.3):
        with pytest.raises(NeedError, match="no share of it can be held"):
            train([KL, adaptive(unit="share")], name=f"below {margin}", probe=Scripted(margin))


def test_a_weight_stays_within_its_own_bounds(train):
    _, _, folder = train(["constrained_sft", KL, adaptive(every=1)], probe=Scripted(1.0, 0.0))
    steps = [m for m in lines(folder) if "loss" in m]
    assert steps[-1]["adaptive_multiplier"] == 100
    assert steps[-1]["constrained_sft_weight"] == 1
    assert steps[-1]["kl_weight"] == pytest.approx(30)


@pytest.mark.parametrize(
    ("defenses", "probe", "words"),
    [
        ([adaptive()], Scripted(1.0), "this run has none above 0: add one, such as kl"),
        ([adaptive(), {"kl": {"weight": 0}}], Scripted(1.0), "this run has none above 0"),
        ([adaptive(), KL], None, "probe=MarginProbe"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(tmp_path, defenses, probe, words):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(NeedError, match=words):
        DefendedTrainer(small_model(), arguments, train_dataset=small_rows(8), defenses=defenses, probe=probe)


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from support import LikelierThanRows, small_model, small_rows
from holdtrue.defenses import parse
from holdtrue.training import TrainingSpec, fit
torch.set_num_threads(1)
folder = Path(sys.argv[2])
rank = __import__("os").environ.get("RANK", "0")
# What another process would measure is far off, and must not be heard.
probe = LikelierThanRows(offset=100.0 * int(rank))
model = small_model()
fit(
    model=model, tokenizer=None, rows=small_rows(), validation=None, folder=folder, resume=False, probe=probe,
    spec=TrainingSpec(batch_size=4, micro_batch_size=int(sys.argv[3]), learning_rate=3e-3, warmup_steps=2),
    defenses=parse([{"kl": {"weight": 0.3}}, {"adaptive": {"probe": "rows", "max_drift": 0.1, "every": 2}}]),
)
torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, folder / f"adapter-{rank}.pt")
"""


def test_two_processes_hold_the_drift_as_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    port = free_port()
    workers = [_start(one, 4, 0, 1, port), *(_start(two, 2, rank, 2, port) for rank in range(2))]
    assert [w.wait(timeout=240) for w in workers] == [0, 0, 0]
    alone, both = torch.load(one / "adapter-0.pt"), [torch.load(two / f"adapter-{r}.pt") for r in range(2)]
    for name, tensor in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], tensor, atol=1e-4, rtol=1e-3)
    a, b = (lines(folder) for folder in (one, two))
    assert [m.get("kl_weight") for m in a] == [pytest.approx(m.get("kl_weight"), rel=1e-2) for m in b]
    assert len({m.get("kl_weight") for m in a}) > 3


def _start(folder: Path, micro: int, rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parents[1]), str(folder), str(micro)]
    return subprocess.Popen(command, env=environment)


def test_nothing_is_left_on_the_model(train):
    model = small_model()
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    train([KL, adaptive()], model=model, probe=LikelierThanRows())
    assert "forward" not in vars(causal_lm(model))
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before


class Slow(LikelierThanRows):
    """A probe that takes half a second more, of the processor as well."""

    def __call__(self, model: torch.nn.Module) -> float:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return super().__call__(model)


def test_what_it_measures_is_part_of_a_steps_time(train):
    _, summary, folder = train([KL, adaptive(every=3)], probe=Slow(), rows=small_rows(24))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in steps if "loss" in m]
    for clock in ("seconds", "cpu_seconds"):
        measured = [m["step"] for m in steps if m[clock] > 0.4]
        assert measured == [1, 3, 6], clock  # the untouched model's margin is measured before the first
    assert all(m["tokens_per_second"] == pytest.approx(m["tokens"] / m["seconds"]) for m in steps)
    assert summary["seconds"] == pytest.approx(sum(m["seconds"] for m in steps))
