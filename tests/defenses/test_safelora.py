"""SafeLoRA against the dense projector, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from holdtrue.defenses import RunContext
from holdtrue.defenses.safelora import SafeLoRA, cosine
from holdtrue.errors import NeedError
from holdtrue.models import ModelSource

MODULES = {"layers.0.q": (12, 8), "layers.0.k": (4, 8), "layers.1.q": (12, 8)}


def dense_safelora(v, b, a, threshold):
    projector = v @ v.T / v.norm()
    pb = projector @ b
    x, y = (pb @ a).flatten(), (b @ a).flatten()
    cos = float(x @ y / (x.norm() * y.norm()))
    return (pb if cos <= threshold else b), cos


def model_folder(path, seed, base=None, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    tensors = {f"{m}.weight": scale * torch.randn(s, generator=g) for m, s in MODULES.items()}
    if base is not None:
        tensors = {n: base[n] + t for n, t in tensors.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return tensors


def adapter_folder(path, seed, r=3, alpha=6):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for m, (out, into) in MODULES.items():
        tensors[f"base_model.model.{m}.lora_A.weight"] = torch.randn(r, into, generator=g)
        tensors[f"base_model.model.{m}.lora_B.weight"] = torch.randn(out, r, generator=g)
    path.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "use_rslora": False}
    config |= {"target_modules": ["q", "k"], "bias": "none", "base_model_name_or_path": "aligned"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors, alpha / r


def update(tensors, scale, m):
    a, b = (tensors[f"base_model.model.{m}.lora_{x}.weight"].double() for x in "AB")
    return scale * b @ a


@pytest.fixture
def setting(tmp_path):
    base = model_folder(tmp_path / "aligned", 0)
    other = model_folder(tmp_path / "unaligned", 1, base=base, scale=0.1)
    trained, scale = adapter_folder(tmp_path / "trained", 2)
    context = RunContext(ModelSource("aligned", tmp_path / "aligned", "r", "path"), dict(MODULES), 2, tmp_path)
    return base, other, trained, dict.fromkeys(MODULES, scale), context


def check(defense, v, trained, scaling, context, threshold):
    defense.preflight(context)
    result = defense.weights(trained, scaling, context)
    changed = 0
    for m in MODULES:
        b, a = (trained[f"base_model.model.{m}.lora_{x}.weight"].double() for x in "BA")
        expected, cos = dense_safelora(v(m).double(), b, a, threshold)
        got = result[f"base_model.model.{m}.lora_B.weight"]
        assert context.notes["cosines"][m] == pytest.approx(cos, abs=1e-9)
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)
        assert torch.equal(
            result[f"base_model.model.{m}.lora_A.weight"], trained[f"base_model.model.{m}.lora_A.weight"]
        )
        changed += not torch.equal(got, trained[f"base_model.model.{m}.lora_B.weight"])
    return changed


@pytest.mark.parametrize("threshold", [-1.0, 0.35, 1.0])
def test_two_checkpoints(setting, threshold):
    base, other, trained, scaling, context = setting
    defense = SafeLoRA(unaligned="unaligned", threshold=threshold)
    changed = check(
        defense,
        lambda m: base[f"{m}.weight"].double() - other[f"{m}.weight"].double(),
        trained,
        scaling,
        context,
        threshold,
    )
    assert changed == len(context.notes["projected"])
    assert changed == {-1.0: 0, 1.0: 3}.get(threshold, changed)


def test_an_adapter_over_the_runs_own_base(setting, tmp_path):
    _, _, trained, scaling, context = setting
    end, scale = adapter_folder(tmp_path / "safe", 5)
    defense = SafeLoRA(aligned="safe", unaligned="aligned", threshold=1.0)
    assert check(defense, lambda m: update(end, scale, m), trained, scaling, context, 1.0) == 3


def test_two_adapters_and_an_adapter_against_a_checkpoint(setting, tmp_path):
    base, other, trained, scaling, context = setting
    safe, s1 = adapter_folder(tmp_path / "safe", 5)
    bad, s2 = adapter_folder(tmp_path / "bad", 6, r=2, alpha=1)
    check(
        SafeLoRA(aligned="safe", unaligned="bad", threshold=1.0),
        lambda m: update(safe, s1, m) - update(bad, s2, m),
        trained,
        scaling,
        context,
        1.0,
    )
    check(
        SafeLoRA(aligned="safe", unaligned="unaligned", threshold=1.0),
        lambda m: base[f"{m}.weight"].double() + update(safe, s1, m) - other[f"{m}.weight"],
        trained,
        scaling,
        context,
        1.0,
    )


def test_number_mode_takes_the_smallest_cosines(setting):
    *_, trained, scaling, context = setting
    SafeLoRA(unaligned="unaligned", mode="number", number=2).weights(trained, scaling, context)
    cosines = context.notes["cosines"]
    assert context.notes["projected"] == sorted(cosines, key=cosines.get)[:2]


def test_order_biases_and_r_equal_to_d_out_change_nothing(setting):
    *_, trained, scaling, context = setting
    g = torch.Generator().manual_seed(3)
    m = "layers.0.k"
    square = trained | {
        f"base_model.model.{m}.lora_A.weight": torch.randn(4, 8, generator=g),
        f"base_model.model.{m}.lora_B.weight": torch.randn(4, 4, generator=g),
    }
    defense = SafeLoRA(unaligned="unaligned", threshold=1.0)
    plain = defense.weights(square, scaling, context)
    shuffled = dict(reversed(list(square.items()))) | {f"base_model.model.{m}.base_layer.bias": torch.ones(4)}
    other = defense.weights(shuffled, dict(reversed(list(scaling.items()))), context)
    for name, tensor in plain.items():
        assert torch.equal(tensor, other[name])
    assert torch.equal(other[f"base_model.model.{m}.base_layer.bias"], torch.ones(4))


def test_an_untrained_weight_is_skipped(setting):
    *_, trained, scaling, context = setting
    name = "base_model.model.layers.0.q.lora_B.weight"
    zero = trained | {name: torch.zeros_like(trained[name])}
    result = SafeLoRA(unaligned="unaligned", threshold=1.0).weights(zero, scaling, context)
    assert context.notes["skipped"] == ["layers.0.q"]
    assert not result[name].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs two checkpoints"),
        ({"unaligned": "aligned"}, "the same in every adapted weight"),
        ({"unaligned": "nowhere/at-all"}, "needs its unaligned end 'nowhere/at-all'"),
    ],
)
def test_needs_that_cannot_be_met(setting, settings, words):
    with pytest.raises(NeedError, match=words):
        SafeLoRA(**settings).preflight(setting[-1])


def test_a_checkpoint_of_another_shape_is_named(setting, tmp_path):
    context = setting[-1]
    context.adapted["layers.9.q"] = (12, 8)
    with pytest.raises(NeedError, match=r"layers\.9\.q\.weight"):
        SafeLoRA(unaligned="unaligned").preflight(context)


def test_cosine_from_gram_matrices():
    g = torch.Generator().manual_seed(0)
    b, pb, a = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 3), (9, 3), (3, 7)))
    x, y = (pb @ a).flatten(), (b @ a).flatten()
    assert cosine(pb, b, a) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-12)
