"""Gradient projection: the projection itself in closed form, and the gradient of the rows aside in a real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments

from holdtrue.defenses import Defense, GradientContext, Needs
from holdtrue.defenses.gradient_projection import GradientProjection
from holdtrue.errors import NeedError
from holdtrue.models import causal_lm, without_adapter
from holdtrue.training import DefendedTrainer
from support import small_model, small_rows


def projected(task: list[torch.Tensor], aligned: list[torch.Tensor], weight: float = 1.0) -> tuple[list[Any], dict]:
    parameters = {str(i): nn.Parameter(torch.zeros_like(t)) for i, t in enumerate(task)}
    for parameter, gradient in zip(parameters.values(), task, strict=True):
        parameter.grad = gradient.clone()
    found = {str(i): t for i, t in enumerate(aligned)}
    context = GradientContext(parameters, 3, lambda: found)
    GradientProjection(weight=weight).gradient(context)
    return [p.grad for p in parameters.values()], context.metrics


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), weight=st.sampled_from([1.0, 0.5]))
def test_projection_over_all_parameters_together(seed, weight):
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 3), (4,), (1, 1)]
    task, aligned = ([torch.randn(s, generator=g, dtype=torch.float64) for s in shapes] for _ in range(2))
    t, a = (torch.cat([x.flatten() for x in group]) for group in (task, aligned))
    expected = t - weight * (t @ a) / (a @ a) * a if t @ a < 0 else t
    found, metrics = projected(task, aligned, weight)
    torch.testing.assert_close(torch.cat([x.flatten() for x in found]), expected, atol=1e-12, rtol=1e-9)
    assert metrics["gradient_projection_acted"] == float(t @ a < 0)
    assert metrics["gradient_projection_cosine"] == pytest.approx(float(t @ a / (t.norm() * a.norm())))


def test_nothing_but_rounding_changes_nothing():
    task = [torch.tensor([1.0, -2.0])]
    for aligned in (torch.zeros(2), torch.tensor([-1e-8, 0.0])):
        found, metrics = projected(task, [aligned])
        assert torch.equal(found[0], task[0])
        assert metrics["gradient_projection_acted"] == 0.0


class Witness(Defense):
    """Compares the gradient that it is given with a naive one of whole logits, and looks at its own afterwards."""

    name, badge, paper = "witness", "variant", "none"

    def needs(self) -> Needs:
        return Needs(aside=True)

    def gradient(self, context: GradientContext) -> None:
        before = {n: p.grad.clone() for n, p in context.parameters.items() if p.grad is not None}
        assert context.aside_gradient is not None
        found = context.aside_gradient()
        assert all(torch.equal(context.parameters[n].grad, g) for n, g in before.items())  # type: ignore[arg-type]
        SEEN.append((found, naive(context.parameters)))


SEEN: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = []
MODEL: dict[str, Any] = {}


def naive(parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    lm, total, count = causal_lm(MODEL["model"]), torch.zeros(()), 0
    for row in MODEL["aside"]:
        ids = torch.tensor([row["input_ids"]])
        wanted = torch.tensor(row["trained"])[1:]
        policy = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
        with without_adapter(MODEL["model"]):
            reference = lm(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total + ((policy.exp() * (policy - reference)).sum(-1) * wanted).sum()
        count += int(wanted.sum())
    return list(torch.autograd.grad(total / count, list(parameters.values())))


def with_aside(count: int = 5) -> tuple[datasets.Dataset, datasets.Dataset]:
    aside = small_rows(count, seed=9).map(lambda row: {"kind": 3, "ce": False})
    return datasets.concatenate_datasets([small_rows(), aside]), aside


def train(
    tmp_path: Any, defenses: list[Any], rows: Any, *, fresh: bool = False, fast: bool = True, **settings: Any
) -> tuple[Any, list[dict[str, Any]]]:
    model = small_model()
    MODEL["model"] = model
    if fresh:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
    values = {"num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_grad_norm": 1.0}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        **values | settings,
    )  # fmt: skip
    trainer = DefendedTrainer(model, arguments, train_dataset=rows, defenses=defenses, fast=fast)
    trainer.train()
    return model, [r for r in trainer.state.log_history if "loss" in r]


def test_the_gradient_of_the_rows_aside(tmp_path):
    SEEN.clear()
    rows, MODEL["aside"] = with_aside()
    train(tmp_path, [Witness()], rows)
    assert len(SEEN) == 12
    for found, expected in SEEN[1:]:
        for ours, theirs in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_fast_paths_change_the_gradient_of_the_rows_aside_by_rounding(tmp_path):
    rows, MODEL["aside"] = with_aside()
    found = []
    for fast in (True, False):
        SEEN.clear()
        train(tmp_path, [Witness()], rows, fast=fast, max_steps=1)
        found.append(torch.cat([gradient.flatten() for gradient in SEEN[0][0].values()]))
    assert float((found[0] - found[1]).norm()) <= 1e-5 * float(found[1].norm())
    assert float(found[1].norm()) > 0


def test_the_reference_reads_the_rows_aside_once(tmp_path):
    rows, aside = with_aside(6)
    read: list[tuple[int, int]] = []

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            read.append(tuple(kwargs["input_ids"].shape))

    class Counting(Witness):
        name = "counting"

        def gradient(self, context: GradientContext) -> None:
            assert context.aside_gradient is not None
            decoder = causal_lm(MODEL["model"]).get_decoder()
            handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
            context.aside_gradient()
            handle.remove()

    train(tmp_path, [Counting()], rows)
    lengths = sorted(aside["length"])
    assert sum(count for count, _ in read) == 5  # in twelve steps; one row has no answer
    assert [longest for _, longest in read] <= [lengths[3], lengths[5]], "rows of unlike length share a pass"


def test_it_acts_and_holds_the_rows_aside(tmp_path):
    rows, MODEL["aside"] = with_aside(12)

    def drift(defenses: list[Any]) -> float:
        model, log = train(tmp_path, defenses, rows, fresh=True, num_train_epochs=4)
        if defenses:
            assert log[0]["gradient_projection_acted"] == 0.0
            assert any(r["gradient_projection_acted"] for r in log)
        lm, total = causal_lm(model.eval()), 0.0
        with torch.no_grad():
            for row in MODEL["aside"]:
                ids = torch.tensor([row["input_ids"]])
                policy = lm(input_ids=ids).logits[0].log_softmax(-1)
                with without_adapter(model):
                    reference = lm(input_ids=ids).logits[0].log_softmax(-1)
                total += float((policy.exp() * (policy - reference)).sum(-1).mean())
        return total

    assert drift([GradientProjection()]) < 0.9 * drift([])


def test_without_rows_aside_it_stops(tmp_path):
    with pytest.raises(NeedError, match="gradient_projection needs rows of kind 'aside'"):
        train(tmp_path, [GradientProjection()], small_rows())


def test_gradients_that_fp16_has_scaled_are_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", fp16=True)
    with pytest.raises(NeedError, match="gradient_projection changes gradients, which fp16 has scaled"):
        DefendedTrainer(small_model(), arguments, train_dataset=small_rows(), defenses=["gradient_projection"])
    assert DefendedTrainer(small_model(), arguments, train_dataset=small_rows(), defenses=["kl"])
