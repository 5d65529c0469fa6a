from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from holdtrue.errors import RunError, SpecError
from holdtrue.models import (
    AdapterSpec,
    adapted_weights,
    causal_lm,
    decoder_blocks,
    load_model,
    load_tokenizer,
    new_adapter,
    placement,
    resolve,
)

Load = Callable[[], PreTrainedModel]


def test_a_model_comes_frozen_in_eval_mode_with_sdpa(tiny_model: Load) -> None:
    model = tiny_model()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert model.get_submodule("lm_head").weight is model.get_input_embeddings().weight


def test_the_reason_for_the_dtype_is_logged(tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "holdtrue.models"):
        load_model(resolve(str(tiny_dir)), device="cpu")
        load_model(resolve(str(tiny_dir)), device="cpu", dtype=torch.bfloat16)
    assert "fp32 on cpu: bf16 is slower here" in caplog.messages[0]
    assert "sha256:" in caplog.messages[0]
    assert "bf16 on cpu: as asked" in caplog.messages[1]


def test_a_device_that_is_not_here() -> None:
    with pytest.raises(SpecError, match="device 'nonsense'"):
        placement("nonsense")
    with pytest.raises(SpecError, match="GPUs found"):
        placement("cuda:99")


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert placement().device == torch.device("cuda")
    for rank, index in (("0", 0), ("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert placement().device == torch.device("cuda", index)
    assert placement("cpu").device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_a_gpu(tiny_dir: Path) -> None:
    model = load_model(resolve(str(tiny_dir)))
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16
    assert placement().reason.startswith("bf16 on GPU")


def test_the_tokenizer_keeps_its_template_and_splits_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("at 12  34\n\n 5", add_special_tokens=False).input_ids)
    assert pieces == ["at", "Ġ", "1", "2", "ĠĠ", "3", "4", "ĊĊĠ", "5"]
    assert tokenizer.model_max_length == 8192


def test_a_tokenizer_without_template_or_broken(tiny_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "copy"))
    source = resolve(str(folder))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SpecError, match="no chat template"):
        load_tokenizer(source)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(RunError, match="tokenizer"):
        load_tokenizer(source)


def test_missing_or_misshapen_tensors_are_not_made_up(tiny_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    kept = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(resolve(str(folder)), device="cpu")
    weights["model.layers.1.mlp.up_proj.weight"] = kept[:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"loaded|shape"):
        load_model(resolve(str(folder)), device="cpu")


def test_parts_are_found_through_wrappers(tiny_model: Load) -> None:
    model = tiny_model()
    blocks = decoder_blocks(model)
    assert len(blocks) == 3
    assert adapted_weights(model) == {}
    adapted = new_adapter(model, AdapterSpec(r=4), seed=0)
    compiled = torch.compile(adapted)  # not run: only the wrapper matters
    for wrapped in (adapted, compiled):
        assert isinstance(wrapped, torch.nn.Module)
        assert causal_lm(wrapped) is model
        assert decoder_blocks(wrapped) is blocks
    found = adapted_weights(adapted)
    assert len(found) == 3 * 7
    assert found["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert found["model.layers.2.mlp.down_proj"] == (32, 64)
    with pytest.raises(SpecError, match="Linear"):
        causal_lm(torch.nn.Linear(2, 2))
