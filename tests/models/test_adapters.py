from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from holdtrue.errors import NeedError, RunError, SpecError
from holdtrue.models import (
    AdapterSpec,
    adapted_weights,
    load_adapter,
    new_adapter,
    read_adapter,
    save_adapter,
    without_adapter,
    write_adapter,
)
from holdtrue.models.adapter_files import tensor_name

Load = Callable[[], PreTrainedModel]
IDS = torch.tensor([[1, 5, 9, 200, 4000, 2]])


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def saved(tiny_model: Load, tmp_path: Path) -> Path:
    model = new_adapter(tiny_model(), AdapterSpec(r=4, alpha=8), seed=0)
    _shake(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"r": True},
        {"r": 4.5},
        {"alpha": 0},
        {"alpha": -1},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"rslora": "yes"},
        {"target_modules": []},
        {"target_modules": [""]},
        {"target_modules": ["q_proj", "q_proj"]},
        {"target_modules": "q_proj"},
        {"rank": 4},
    ],
)
def test_a_wrong_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdapterSpec(**wrong)


def test_defaults_are_the_papers() -> None:
    spec = AdapterSpec()
    assert (spec.r, spec.alpha, spec.rslora, spec.dropout, spec.target_modules) == (32, 64, True, 0.0, "all-linear")


def test_a_fresh_adapter_changes_nothing_and_only_it_trains(tiny_model: Load) -> None:
    model = tiny_model()
    before = _logits(model)
    adapted = new_adapter(model, AdapterSpec(), seed=0)
    assert torch.equal(_logits(adapted), before)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in adapted.named_parameters())


def test_init_depends_on_the_seed_and_leaves_the_generator_alone(tiny_model: Load) -> None:
    def first(seed: int) -> Tensor:
        adapted = new_adapter(tiny_model(), AdapterSpec(r=4), seed=seed)
        return next(p.detach().clone() for name, p in adapted.named_parameters() if "lora_A" in name)

    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = first(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(first(7), one)
    assert not torch.equal(first(8), one)


def test_named_targets(tiny_model: Load) -> None:
    adapted = new_adapter(tiny_model(), AdapterSpec(r=2, target_modules=["q_proj", "down_proj"]), seed=0)
    assert {name.rsplit(".", 1)[1] for name in adapted_weights(adapted)} == {"q_proj", "down_proj"}
    with pytest.raises(SpecError, match="target_modules"):
        new_adapter(tiny_model(), AdapterSpec(target_modules=["no_such_proj"]), seed=0)
    with pytest.raises(SpecError, match="only linear layers"):
        new_adapter(tiny_model(), AdapterSpec(target_modules=["embed_tokens"]), seed=0)


def test_one_adapter_at_a_time(tiny_model: Load, saved: Path) -> None:
    adapted = new_adapter(tiny_model(), AdapterSpec(r=2), seed=0)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(SpecError, match="already"):
            new_adapter(model, AdapterSpec(r=2), seed=0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(SpecError, match="already"):
            load_adapter(model, saved)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rslora", [True, False])
def test_plain_peft_loads_a_saved_adapter_with_the_same_logits(tiny_model: Load, tmp_path: Path, rslora: bool) -> None:
    adapted = new_adapter(tiny_model(), AdapterSpec(r=4, alpha=8, rslora=rslora), seed=0)
    _shake(adapted)
    expected = _logits(adapted.eval())
    save_adapter(adapted, tmp_path / "adapter")
    assert not torch.allclose(expected, _logits(tiny_model()), atol=1e-3)
    assert torch.equal(_logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))), expected)
    ours = load_adapter(tiny_model(), tmp_path / "adapter")
    assert torch.equal(_logits(ours), expected)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    trainable = load_adapter(tiny_model(), tmp_path / "adapter", trainable=True)
    assert all(("lora_" in name) == p.requires_grad for name, p in trainable.named_parameters())


def test_the_base_is_recorded_and_a_saved_adapter_is_replaced_whole(tiny_model: Load, tmp_path: Path) -> None:
    model = tiny_model()
    adapted = new_adapter(model, AdapterSpec(r=2), seed=0)
    save_adapter(adapted, tmp_path / "adapter")
    (tmp_path / "adapter" / "stray").touch()
    _shake(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "stray").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.name_or_path
    with pytest.raises(NeedError, match="no adapter"):
        save_adapter(tiny_model(), tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        save_adapter(adapted, tmp_path / "file" / "adapter")


def test_read_change_and_write_give_what_the_arithmetic_says(tiny_model: Load, saved: Path, tmp_path: Path) -> None:
    adapter = read_adapter(saved)
    name = "model.layers.1.self_attn.v_proj"
    assert adapter.scaling[name] == pytest.approx(8 / 2)
    assert adapter.shapes()[name] == (16, 32)
    changed = dict(adapter.tensors)
    changed[tensor_name(name, "B")] = torch.zeros(4, 16).T  # a view that is not contiguous
    write_adapter(tmp_path / "changed", changed, adapter.config)
    again = load_adapter(tiny_model(), tmp_path / "changed")
    merged = tiny_model()
    with torch.no_grad():
        for module, scaling in adapter.scaling.items():
            if module != name:
                left, right = adapter.factors(module)
                weight = merged.get_submodule(module).weight
                assert isinstance(weight, Tensor)
                weight += scaling * left @ right
    torch.testing.assert_close(_logits(again), _logits(merged), atol=1e-4, rtol=1e-4)


def test_scaling_follows_patterns_as_peft_does(tiny_model: Load, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
        alpha_pattern={"q_proj": 9, r".*\.2\..*_proj": 5},
    )
    adapted = get_peft_model(tiny_model(), config)
    assert isinstance(adapted, PeftModel)
    save_adapter(adapted, tmp_path / "adapter")
    scaling = read_adapter(tmp_path / "adapter").scaling
    modules = dict(load_adapter(tiny_model(), tmp_path / "adapter").get_base_model().named_modules())
    assert len(scaling) == 21
    for name, value in scaling.items():
        layer: Any = modules[name]
        assert value == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"auto_mapping": {"base_model_class": "System", "parent_library": "os"}}, "auto_mapping"),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"megatron_core": "os", "megatron_config": {"a": 1}}, "megatron"),
        ({"layer_replication": [[0, 3]]}, "layer_replication"),
        ({"corda_config": {"cache_file": "evil.pt"}}, "corda_config"),
        ({"some_new_trick": 1}, "some_new_trick"),
    ],
)
def test_a_strangers_adapter_is_plain_lora_or_refused(
    tiny_model: Load, saved: Path, change: dict[str, Any], message: str
) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SpecError, match=message):
        load_adapter(tiny_model(), saved)


@pytest.mark.parametrize(
    "change",
    [{"r": 0}, {"r": "4"}, {"lora_alpha": None}, {"r": 5}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": [1]}],
)
def test_a_config_that_does_not_fit_the_tensors(tiny_model: Load, saved: Path, change: dict[str, Any]) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match="adapter"):
        load_adapter(tiny_model(), saved)


def test_config_and_tensors_must_name_the_same_modules(tiny_model: Load, saved: Path) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj"]}))
    with pytest.raises(RunError, match="disagree"):
        load_adapter(tiny_model(), saved)


def test_pickles_missing_and_broken_files(tiny_model: Load, saved: Path, tmp_path: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-8])
    with pytest.raises(RunError, match=r"adapter_model\.safetensors"):
        load_adapter(tiny_model(), saved)
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(SpecError, match=r"only safetensors.*adapter_model\.bin"):
        load_adapter(tiny_model(), saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(RunError, match="missing"):
        load_adapter(tiny_model(), saved)
    with pytest.raises(SpecError, match="not an adapter"):
        load_adapter(tiny_model(), tmp_path)
    save_file({"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    with pytest.raises(SpecError, match="no LoRA factor"):
        load_adapter(tiny_model(), saved)


def test_an_adapter_of_another_base(tiny_model: Load, saved: Path) -> None:
    def model(*, intermediate_size: int = 64, num_hidden_layers: int = 3) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config)

    with pytest.raises(RunError, match=r"shape \(32, 64\).*\(32, 48\).*another base"):
        load_adapter(model(intermediate_size=48), saved)
    with pytest.raises(RunError, match=r"layers\.2.*does not have.*another base"):
        load_adapter(model(num_hidden_layers=2), saved)
    with pytest.raises(RunError, match="disagree"), pytest.warns(UserWarning, match="missing adapter keys"):
        load_adapter(model(num_hidden_layers=4), saved)


def test_without_adapter_is_the_base_and_restores_everything(tiny_model: Load) -> None:
    base = _logits(tiny_model())
    adapted = new_adapter(tiny_model(), AdapterSpec(r=4, dropout=0.5), seed=0)
    _shake(adapted)
    policy = _logits(adapted.eval())
    adapted.train()
    frozen = next(p for name, p in adapted.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    quiet = adapted.get_base_model().get_submodule("model.layers.1").eval()
    before = (
        {name: module.training for name, module in adapted.named_modules()},
        {name: p.requires_grad for name, p in adapted.named_parameters()},
    )

    def peek() -> None:
        with without_adapter(adapted):
            assert not any(module.training for module in adapted.modules())
            assert not torch.is_grad_enabled()
            assert torch.equal(adapted(input_ids=IDS).logits, base)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        peek()
    assert torch.is_grad_enabled()
    assert not quiet.training
    assert before == (
        {name: module.training for name, module in adapted.named_modules()},
        {name: p.requires_grad for name, p in adapted.named_parameters()},
    )
    assert torch.equal(_logits(adapted.eval()), policy)


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradient_alone(tiny_model: Load) -> None:
    def gradient(peek: bool) -> Tensor:
        adapted = new_adapter(tiny_model(), AdapterSpec(r=4), seed=0)
        _shake(adapted)
        loss = adapted(input_ids=IDS, labels=IDS).loss
        if peek:
            with without_adapter(adapted):
                adapted(input_ids=IDS)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])

    assert torch.equal(gradient(peek=True), gradient(peek=False))


def test_no_adapter_no_reference(tiny_model: Load) -> None:
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model in (tiny_model(), prompts):
        with pytest.raises(NeedError, match="no adapter"), without_adapter(model):
            pass


def test_a_copied_adapter_needs_only_its_folder(tiny_model: Load, saved: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(saved, tmp_path / "elsewhere"))
    assert load_adapter(tiny_model(), moved)


def test_an_adapter_goes_on_from_a_saved_one(tiny_model: Load, saved: Path) -> None:
    spec = AdapterSpec(r=4, alpha=8, start=str(saved))
    continued = new_adapter(tiny_model(), spec, seed=7)
    assert torch.equal(_logits(continued), _logits(load_adapter(tiny_model(), saved)))
    with without_adapter(continued):
        assert torch.equal(_logits(continued), _logits(tiny_model()))
    assert all(p.requires_grad for n, p in continued.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("shape", [{"r": 8}, {"alpha": 4}, {"rslora": False}, {"target_modules": ["q_proj"]}])
def test_an_adapter_to_go_on_from_has_the_shape_asked_for(tiny_model: Load, saved: Path, shape: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"adapter\.start"):
        new_adapter(tiny_model(), AdapterSpec(**{"r": 4, "alpha": 8, "start": str(saved), **shape}), seed=0)


def test_a_fresh_adapter_is_written_without_a_start() -> None:
    assert "start" not in AdapterSpec().model_dump()
    assert AdapterSpec(start="there").model_dump()["start"] == "there"
