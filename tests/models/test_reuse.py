"""A kept base model must be one that was loaded afresh, whatever was done with the copies before."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from holdtrue.models import (
    AdapterSpec,
    ModelSource,
    base_model,
    keep_base_model,
    load_model,
    new_adapter,
    resolve,
    reuse,
)

IDS = torch.arange(1, 9).reshape(1, -1)


@pytest.fixture
def source(tiny_dir: Path) -> ModelSource:
    return resolve(str(tiny_dir))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_kept", None)
    keep_base_model()


def misuse(model: PreTrainedModel) -> None:
    """Leave behind all that a careless run could: an adapter with a gradient, hooks, flags, a mode, a patch."""
    adapted = new_adapter(model, AdapterSpec(r=4, alpha=8), seed=0)
    adapted.train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in list(model.modules()):
        module.register_forward_hook(lambda *_: None)
    model.forward = lambda *_, **__: None  # type: ignore[method-assign]
    model.config.use_cache = not model.config.use_cache
    model.config.hidden_size = 1
    for buffer in model.buffers():
        buffer.zero_()


def state(model: PreTrainedModel) -> tuple[object, ...]:
    modules = {name: (type(m), m.training, len(m._forward_hooks), sorted(vars(m))) for name, m in model.named_modules()}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)}
    return modules, flags, model.config.to_dict(), model.name_or_path, model.generation_config.to_dict()


def test_a_second_model_is_one_loaded_afresh_on_the_same_memory(source: ModelSource, kept: None) -> None:
    first = base_model(source)
    place = first.get_input_embeddings().weight.data_ptr()
    misuse(first)
    second, fresh = base_model(source), load_model(source)
    assert second.get_input_embeddings().weight.data_ptr() == place != fresh.get_input_embeddings().weight.data_ptr()
    assert state(second) == state(fresh)
    assert second.get_submodule("lm_head").weight is second.get_input_embeddings().weight
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (second, fresh)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    with torch.no_grad():
        assert torch.equal(second(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


def test_weights_that_somebody_wrote_into_are_loaded_again(
    source: ModelSource, kept: None, caplog: pytest.LogCaptureFixture
) -> None:
    weight = base_model(source).get_submodule("lm_head").weight
    assert isinstance(weight, torch.Tensor)
    weight.data[5, 3] += 1e-3  # past torch's own count of changes
    with caplog.at_level(logging.WARNING, "holdtrue.models"):
        again = base_model(source)
    assert "loaded again" in caplog.text
    assert torch.equal(again.get_submodule("lm_head").weight, load_model(source).get_submodule("lm_head").weight)  # pyright: ignore


def test_another_model_takes_its_place(source: ModelSource, kept: None) -> None:
    first = base_model(source)
    other = base_model(source._replace(revision="another"))
    assert other.get_input_embeddings().weight.data_ptr() != first.get_input_embeddings().weight.data_ptr()


def test_a_process_that_keeps_nothing_loads_each_time(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_kept", None)
    first, second = base_model(source), base_model(source)
    assert first.get_input_embeddings().weight.data_ptr() != second.get_input_embeddings().weight.data_ptr()
