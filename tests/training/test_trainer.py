"""Invariants of the defended training loop, on a small real model."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import sys
from collections.abc import Iterator
from threading import Event
from typing import Any, ClassVar

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from holdtrue.defenses import Defense, GradientContext
from holdtrue.errors import NeedError, RunError
from holdtrue.models import causal_lm, without_adapter
from holdtrue.training import DefendedTrainer
from holdtrue.training.batch import Batch
from holdtrue.training.reference import Reference
from holdtrue.training.reference_cache import ReferenceCache
from holdtrue.training.trainer import checkpoints
from support import small_model, small_rows

ALL = [{"kl": {"weight": 1.0}}, {"ldifs": {"weight": 1.0}}]
CASES = {
    "plain": [],
    "kl-all": [{"kl": {"weight": 1.0, "tokens": "all"}}],
    "kl-response": [{"kl": {"weight": 1.0, "tokens": "response", "direction": "reference||policy"}}],
    "kl-sampled": [{"kl": {"weight": 1.0, "tokens": "response", "sample": 0.4}}],
    "kl-pool": [{"kl": {"weight": 1.0, "on": "pool", "tokens": "response"}}],
    "kl-both": [{"kl": {"weight": 1.0, "on": "both", "direction": "reference||policy"}}],
    "ldifs": [{"ldifs": {"weight": 1.0}}],
    "ldifs-token": [{"ldifs": {"weight": 1.0, "normalize": "token"}}],
    "both": ALL,
}
EXACT = ("ce", "ce_task", "ce_safe", "kl_term", "ldifs_term")


class Spy(Defense):
    """Writes down the gradients, and what happens inside its forward context."""

    name = "spy"
    badge = "variant"
    paper = "none"
    gradients: ClassVar[list[dict[str, torch.Tensor]]] = []
    inside: ClassVar[list[bool]] = []

    def gradient(self, context: GradientContext) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in context.parameters.items() if p.grad is not None})

    @contextlib.contextmanager
    def forward(self, model: torch.nn.Module) -> Iterator[None]:
        self.inside.append(True)
        yield
        self.inside.append(False)


@pytest.fixture
def spy() -> Iterator[Spy]:
    Spy.gradients.clear()
    Spy.inside.clear()
    yield Spy()
    Spy.gradients.clear()


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def steps(folder: Any) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def with_pool_rows(rows: Any) -> Any:
    pool = small_rows(len(rows) // 2, seed=7).map(lambda row: {"kind": 2, "ce": False})
    return datasets.concatenate_datasets([rows, pool])


def test_stopped_and_resumed_equals_uninterrupted(train):
    whole, summary, folder = train(ALL, name="whole", epochs=2, validation=small_rows(9, seed=5))
    stop = Event()
    seen: list[int] = []

    def progress(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == 6:
            stop.set()

    _, first, parts = train(ALL, name="parts", epochs=2, stop=stop, progress=progress)
    assert first["interrupted"]
    assert first["steps"] == 7
    # What a kill leaves behind: a line of a step after the checkpoint, and half a line.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    resumed, second, _ = train(ALL, name="parts", epochs=2, validation=small_rows(9, seed=5))
    assert second["resumed_from"] == 7
    assert not second["interrupted"]
    assert all(torch.equal(a, adapter(resumed)[n]) for n, a in adapter(whole).items())
    assert [(r["step"], r["loss"]) for r in steps(parts)] == [(r["step"], r["loss"]) for r in steps(folder)]
    assert second["eval_loss"] == summary["eval_loss"]
    assert second["tokens"] == summary["tokens"]


def test_a_corrupt_checkpoint_is_named(train):
    stop = Event()
    stop.set()
    _, _, folder = train([], stop=stop)
    last = checkpoints(folder / "checkpoints")[-1]
    weights = last / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RunError, match=rf"{last.name} is corrupt: adapter_model.safetensors has changed"):
        train([])


def test_a_half_written_checkpoint_is_not_seen(train):
    _, _, folder = train([], epochs=1)
    whole = checkpoints(folder / "checkpoints")
    assert [p.name for p in whole] == ["checkpoint-8", "checkpoint-12"]
    (whole[-1] / "holdtrue_seal.json").unlink()
    _, summary, _ = train([])
    assert summary["resumed_from"] == 8


def test_the_reference_is_the_base_model_before_during_and_after(train):
    model = small_model(dropout=0.3)
    ids = torch.arange(1, 20).unsqueeze(0)
    config = causal_lm(model).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).eval()
    with torch.no_grad():
        expected = base(ids).logits
    during = []

    def progress(_: dict[str, Any]) -> None:
        assert model.training
        with without_adapter(model):
            during.append(torch.equal(model(input_ids=ids).logits, expected))
        head = causal_lm(model).get_output_embeddings()
        during.append(torch.allclose(head(reference_states(model, ids)), expected[0], atol=1e-5))
        assert model.training

    with without_adapter(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    train(ALL, model=model, progress=progress)
    assert during
    assert all(during)
    with without_adapter(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert not torch.equal(model(input_ids=ids).logits, expected)


SHARED = list(range(100, 112))


def rows_with_a_shared_start(count: int = 12) -> Any:
    rows = small_rows(count)
    return with_pool_rows(rows).map(
        lambda row: {
            "input_ids": SHARED + row["input_ids"],
            "trained": [False] * len(SHARED) + row["trained"],
            "length": len(SHARED) + row["length"],
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_fast_paths_and_the_cache_change_nothing_but_rounding(train, tmp_path, case):
    rows = rows_with_a_shared_start()
    settings = {"rows": rows, "epochs": 2, "kl_every": 2, "validation": rows}
    plain, slow, folder = train(CASES[case], name="slow", fast=False, **settings)
    with ReferenceCache(tmp_path / "cache", limit_bytes=10**8, namespace="small") as cache:
        for name in ("live", "cold", "warm"):
            extra = {} if name == "live" else {"reference_cache": cache}
            model, summary, other = train(CASES[case], name=name, **settings, **extra)
            for a, b in zip(steps(folder), steps(other), strict=True):
                for key in {*EXACT, "loss", "kl"} & set(a):
                    assert a[key] == pytest.approx(b[key], abs=1e-5), (name, key)
            for key in ("eval_loss", "eval_kl"):
                assert summary[key] == pytest.approx(slow[key], abs=1e-5)
            for n, weights in adapter(plain).items():
                assert float((adapter(model)[n] - weights).norm()) <= 1e-3 * float(weights.norm()) + 1e-4, (name, n)
        before = cache.stats()
        assert before.entries > 0
        train(CASES[case], name="again", reference_cache=cache, **settings)
        assert cache.stats().misses == before.misses


def test_a_sampled_term_is_unbiased(train):
    """The mean over many draws of the sampled term is the whole one: one step each, at a rate that moves nothing."""
    whole = [{"kl": {"weight": 1.0, "tokens": "response"}}]
    _, _, folder = train(whole, name="whole", learning_rate=1e-12, epochs=1)
    expected = sum(r["kl_term"] * r["target_tokens"] for r in steps(folder)) / sum(
        r["target_tokens"] for r in steps(folder)
    )
    half = [{"kl": {"weight": 1.0, "tokens": "response", "sample": 0.5}}]
    _, _, folder = train(half, name="half", learning_rate=1e-12, epochs=12)
    records = steps(folder)
    drawn = [r["kl_term"] * r["target_tokens"] for r in records]
    estimate = sum(drawn) / sum(r["target_tokens"] for r in records)
    spread = statistics.stdev(drawn) * len(drawn) ** 0.5 / sum(r["target_tokens"] for r in records)
    assert abs(estimate - expected) < 4 * spread < 0.2 * expected
    assert len({round(r["kl_term"], 9) for r in records}) > 100  # it is drawn anew


@pytest.mark.parametrize("on", ["pool", "both"])
def test_a_kl_on_rows_that_are_not_there_stops_the_run(train, on):
    kl = [{"kl": {"weight": 1.0, "on": on, "tokens": "response"}}]
    with pytest.raises(NeedError, match="kl holds rows of kind 'pool'"):
        train(kl, rows=small_rows(), name="none")
    mute = with_pool_rows(small_rows()).map(
        lambda row: {"trained": [False] * len(row["trained"])} if row["kind"] else {}
    )
    with pytest.raises(NeedError, match="has a token that it covers"):
        train(kl, rows=mute, name="mute")
    train([{"kl": {"weight": 0.0, "on": on}}], rows=small_rows(), name="off")


def test_ldifs_covers_no_row_that_rides_along(train):
    ldifs, pool = {"ldifs": {"weight": 1.0}}, {"kl": {"weight": 1e-9, "on": "pool", "tokens": "response"}}
    _, _, alone = train([ldifs], rows=small_rows(), name="alone")
    _, _, beside = train([ldifs, pool], rows=with_pool_rows(small_rows()), name="beside")
    for a, b in zip(steps(alone), steps(beside), strict=True):
        assert a["ldifs_term"] == pytest.approx(b["ldifs_term"], abs=1e-5)


def test_pool_rows_hold_the_policy_and_teach_nothing(train):
    """Only the pool's rows enter the term, their divergence falls, and their tokens are no targets."""
    rows = with_pool_rows(small_rows())
    _, plain, bare = train([], rows=rows, name="plain", kl_every=1)
    _, _, without = train([], name="without", kl_every=1)
    for a, b in zip(steps(bare), steps(without), strict=True):
        assert a["ce"] == pytest.approx(b["ce"], abs=1e-5)
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5)
        assert a["target_tokens"] == b["target_tokens"]
    assert plain["target_tokens"] == sum(sum(row["trained"][1:]) for row in small_rows())
    terms = {}
    for weight in (1e-9, 30.0):
        kl = [{"kl": {"weight": weight, "on": "pool", "tokens": "response"}}]
        _, _, folder = train(kl, rows=rows, name=f"pool{weight}", epochs=3)
        terms[weight] = steps(folder)[-1]["kl_term"]
        assert all("kl" not in r for r in steps(folder) if r["step"] % 10 != 1)
    assert terms[30.0] < 0.5 * terms[1e-9]


def reference_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    batch = Batch.of({"input_ids": ids, "labels": ids})
    return Reference(model).outputs(batch, batch.mask).hidden


def test_the_forward_hook_is_around_the_policys_passes_only(train, spy):
    calls: list[tuple[bool, bool]] = []
    model = small_model()

    def hook(module: Any, *_: Any) -> None:
        policy = torch.is_grad_enabled() and module.training
        calls.append((policy, bool(Spy.inside) and Spy.inside[-1]))

    causal_lm(model).get_decoder().register_forward_hook(hook)
    train([spy, {"kl": {"weight": 1.0}}], model=model, validation=small_rows(5))
    assert (True, True) in calls
    assert (False, False) in calls
    assert all(policy == inside for policy, inside in calls)


def test_each_defense_holds_what_it_promises(train):
    plain, _, folder = train([], name="plain", epochs=3, kl_every=1)
    far, _, _ = train([{"ldifs": {"weight": 200.0}}], name="ldifs", epochs=3)
    _, _, kl = train([{"kl": {"weight": 20.0}}], name="kl", epochs=3)
    assert steps(kl)[-1]["kl"] < 0.2 * steps(folder)[-1]["kl"]

    def distance(model: Any) -> float:
        ids = torch.arange(1, 40).unsqueeze(0)
        model.eval()
        with torch.no_grad():
            h = causal_lm(model).get_decoder()(input_ids=ids).last_hidden_state
        h0 = reference_states(model, ids)
        return float((h / h.norm() - h0 / h0.norm()).square().sum())

    assert distance(far) < 0.5 * distance(plain)


def test_metrics_tell_task_and_safe_rows_apart(train):
    _, summary, folder = train(ALL, epochs=1)
    mixed = [r for r in steps(folder) if "ce_safe" in r]
    assert mixed
    for r in steps(folder):
        assert r["loss"] == pytest.approx(r["ce"] + r["kl_weighted"] + r["ldifs_weighted"], abs=1e-5)
        assert 0 <= r["padding"] < 0.3
    assert summary["tokens"] == sum(small_rows()["length"])


def test_a_step_without_any_target_is_a_step(train):
    rows = small_rows(8).map(lambda row: {"trained": [False] * len(row["input_ids"])})
    _, summary, folder = train([{"kl": {"weight": 1.0, "tokens": "response"}}], rows=rows)
    assert summary["steps"] == 2
    assert all(r["loss"] == 0.0 and r["ce"] == 0.0 and r["kl_term"] == 0.0 for r in steps(folder))


def test_divergence_stops_the_run(train):
    with pytest.raises(RunError, match="training diverged at step"):
        train([], learning_rate=1e30, epochs=3, max_grad_norm=0)


def test_full_fine_tuning_is_refused(tmp_path):
    base = causal_lm(small_model())
    plain = LlamaForCausalLM(base.config)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(NeedError, match="full fine-tuning is not supported"):
        DefendedTrainer(plain, arguments, train_dataset=small_rows(), defenses=["kl"])


def test_report_to_reaches_the_tracker(train):
    pytest.importorskip("tensorboard")
    _, _, folder = train(ALL, report_to=("tensorboard",))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (folder / "checkpoints").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(log)).Reload()
    assert {"train/ce", "train/kl_term", "train/ldifs_weighted"} <= set(events.Tags()["scalars"])


def test_gradient_checkpointing_changes_nothing(train, spy):
    found = []
    for on in (False, True):
        Spy.gradients.clear()
        train([*ALL, spy], name=f"g{on}", gradient_checkpointing=on)
        found.append(list(Spy.gradients))
    for a, b in zip(*found, strict=True):
        for name, gradient in a.items():
            torch.testing.assert_close(b[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_is_not_seen(train, tmp_path):
    whole, _, _ = train(ALL, name="whole", epochs=1)

    def progress(fields: dict[str, Any]) -> None:
        if fields["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunError, match=r"checkpoint of step 8 cannot be written .* MiB are free now: .*resume"):
            train(ALL, name="full", epochs=1, progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == ["checkpoint-4"]
    model, summary, _ = train(ALL, name="full", epochs=1)
    assert summary["resumed_from"] == 4
    for name, weights in adapter(whole).items():
        torch.testing.assert_close(adapter(model)[name], weights, atol=1e-6, rtol=1e-5)


def test_gpus_that_nobody_starts_processes_for_are_left_alone(tmp_path, caplog):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", per_device_train_batch_size=4,
        num_train_epochs=1, disable_tqdm=True,
    )  # fmt: skip
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # as transformers counts where two GPUs are seen
    with caplog.at_level("WARNING", logger="holdtrue"):
        trainer = DefendedTrainer(small_model(), arguments, train_dataset=small_rows(), defenses=ALL)
    assert "torchrun --nproc-per-node 2" in caplog.text
    assert arguments.n_gpu == 1
    trainer.train()
    assert trainer.model_wrapped is trainer.model, "it is wrapped in nn.DataParallel"
    assert trainer.state.global_step == 12


def test_accuracy_is_the_share_of_targets_that_are_likeliest(train):
    rows = small_rows(8)
    model, summary, folder = train([], rows=rows, validation=rows, epochs=20, save_every=100)

    right = total = 0
    for row in rows:
        with torch.no_grad():
            best = causal_lm(model.eval())(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
        ids, trained = torch.tensor(row["input_ids"])[1:], torch.tensor(row["trained"])[1:]
        right, total = right + int((best == ids)[trained].sum()), total + int(trained.sum())
    assert summary["eval_accuracy"] == pytest.approx(right / total)
    assert right / total > 0.2
    last = steps(folder)[-2:]
    hits = sum(r["accuracy"] * r["target_tokens"] for r in last)
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert hits / total == pytest.approx(right / total, abs=0.2)
