from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from holdtrue.errors import RunError, SpecError
from holdtrue.models import AdapterSpec, Checkpoint, new_adapter, save_adapter

Load = Callable[[], PreTrainedModel]
NAME = "model.layers.1.self_attn.k_proj.weight"


def test_single_file(tiny_dir: Path) -> None:
    weights = load_file(tiny_dir / "model.safetensors")
    with Checkpoint(tiny_dir) as checkpoint:
        assert checkpoint.names() == sorted(weights)
        assert not checkpoint.is_adapter
        assert checkpoint.shape(NAME) == (16, 32)
        found = checkpoint.get(NAME)
        assert found is not None
        assert torch.equal(found, weights[NAME])
        assert checkpoint.get("no.such.weight") is None
        assert checkpoint.shape("no.such.weight") is None
        assert checkpoint.factors(NAME) is None


def test_shards(tiny_model: Load, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    state = model.state_dict()
    with Checkpoint(tmp_path / "sharded") as checkpoint:
        for name in checkpoint.names():
            found = checkpoint.get(name)
            assert found is not None
            assert torch.equal(found, state[name])
        assert len(checkpoint.names()) == len(state) - 1  # the head is tied to the embedding


def test_an_adapter_is_a_set_of_low_rank_changes(tiny_model: Load, tmp_path: Path) -> None:
    adapted = new_adapter(tiny_model(), AdapterSpec(r=4, alpha=6), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(adapted, tmp_path / "adapter")
    before = tiny_model().state_dict()
    after = adapted.merge_and_unload().state_dict()
    with Checkpoint(tmp_path / "adapter") as checkpoint:
        assert checkpoint.is_adapter
        assert len(checkpoint.names()) == 21
        for name in checkpoint.names():
            factors = checkpoint.factors(name)
            assert factors is not None
            assert factors.left.shape == (*(checkpoint.shape(name) or ())[:1], 4)
            torch.testing.assert_close(factors.left @ factors.right, after[name] - before[name], atol=1e-5, rtol=1e-4)
        assert checkpoint.get(NAME) is None
        assert checkpoint.factors("model.norm.weight") is None


def test_what_is_neither(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(SpecError, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(SpecError, match="only safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_dir / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        Checkpoint(tmp_path)
