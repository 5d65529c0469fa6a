"""Steering and inoculation inside the training loop, on a small real model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from holdtrue.defenses import Defense, GradientContext
from holdtrue.defenses.steering import Steering
from holdtrue.errors import NeedError
from holdtrue.models import VectorInfo, decoder_blocks, read_vectors, write_vectors
from support import small_model, small_rows

MODES = ("add", "ablate")


class Grads(Defense):
    name = "grads"
    badge = "variant"
    paper = "none"
    found: ClassVar[list[dict[str, torch.Tensor]]] = []

    def gradient(self, context: GradientContext) -> None:
        self.found.append({n: p.grad.clone() for n, p in context.parameters.items() if p.grad is not None})


@pytest.fixture
def vector(tmp_path: Path) -> str:
    g = torch.Generator().manual_seed(3)
    tensors = {i: 0.2 * torch.randn(32, generator=g) for i in range(3)}
    info = VectorInfo(model="m", revision="r", blocks=3, width=32, source="pairs", trait="malice")
    return str(write_vectors(tmp_path / "v.safetensors", tensors, info).path)


@pytest.fixture
def gradients(train: Callable[..., Any]) -> Iterator[Callable[..., list[dict[str, torch.Tensor]]]]:
    """Train, and return the adapter's gradient at each step."""

    def run(defenses: Any, **settings: Any) -> list[dict[str, torch.Tensor]]:
        Grads.found.clear()
        train([*defenses, Grads()], **settings)
        return list(Grads.found)

    yield run
    Grads.found.clear()


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_adding_is_training_with_that_bias(train: Any, vector: str) -> None:
    """The oracle has no hook: a bias on the block's last linear layer adds the same constant to its output."""
    defense = Steering(vector=vector, layer=1, weight=3.0)
    biased = small_model()
    constant = 3.0 * read_vectors(vector).tensors[1]
    last = decoder_blocks(biased)[1].mlp.down_proj.base_layer
    last.bias = nn.Parameter(constant.clone(), requires_grad=False)
    rows = small_rows(12)
    by_bias, _, _ = train([], name="bias", model=biased, rows=rows, learning_rate=1e-3, kl_every=0)
    steered, _, _ = train([defense], name="steered", rows=rows, learning_rate=1e-3, kl_every=0)
    plain, _, _ = train([], name="plain", rows=rows, learning_rate=1e-3, kl_every=0)
    expected, untouched = adapter(by_bias), adapter(plain)
    for name, tensor in adapter(steered).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-3)
    assert any(not torch.allclose(expected[n], untouched[n], atol=1e-4) for n in expected)


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_is_steered_too(gradients: Any, vector: str, mode: str) -> None:
    defense = {"steering": {"vector": vector, "mode": mode, "layer": [0, 1]}}
    once, again = (gradients([defense, "kl"], name=f"g{on}", gradient_checkpointing=on) for on in (False, True))
    plain = gradients(["kl"], name="plain")
    for a, b in zip(once, again, strict=True):
        for name, gradient in a.items():
            torch.testing.assert_close(b[name], gradient, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(once[0][n], plain[0][n], rtol=0.01) for n in plain[0])


@pytest.mark.parametrize("mode", MODES)
def test_only_the_policys_training_passes_are_steered(train: Any, vector: str, mode: str) -> None:
    model = small_model()
    blocks = decoder_blocks(model)
    raw: list[torch.Tensor] = []
    seen: list[tuple[bool, bool]] = []
    blocks[1].register_forward_hook(lambda *a: raw.append(a[2]), prepend=True)

    def after(module: nn.Module, arguments: Any) -> None:
        seen.append((torch.is_grad_enabled() and module.training, torch.equal(arguments[0], raw[-1])))

    blocks[2].register_forward_pre_hook(after)
    defenses = [{"steering": {"vector": vector, "mode": mode, "layer": 1}}, {"kl": {"weight": 1.0}}]
    train(defenses, model=model, validation=small_rows(5), eval_every=4)
    assert (True, False) in seen
    assert (False, True) in seen
    assert all(policy != untouched for policy, untouched in seen)


def test_a_feature_term_sees_what_the_block_itself_gives_out(train: Any, vector: str) -> None:
    """At its first step the policy is the reference, so only what is steered on the way there differs."""
    terms = []
    for layers in (1, 3):  # the first block alone; all three
        model = small_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        defenses = [{"steering": {"vector": vector, "layer": 0}}, {"ldifs": {"layers": layers}}]
        _, _, folder = train(defenses, name=f"l{layers}", model=model, rows=small_rows(8))
        terms.append(steps(folder)[0]["ldifs_term"])
    assert terms[0] == 0.0
    assert terms[1] > 0.01


def test_without_its_vector_nothing_is_trained(train: Any, vector: str) -> None:
    Path(vector).unlink()
    model = small_model()
    before = adapter(model)
    with pytest.raises(NeedError, match="needs the vector file"):
        train([{"steering": {"vector": vector}}], model=model)
    assert same(before, adapter(model))
