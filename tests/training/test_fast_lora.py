"""The fast LoRA layers against PEFT's own, and against a float64 gradient check."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from holdtrue.models import causal_lm
from holdtrue.training.fast_lora import _Lora, fast_lora
from support import small_model


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = causal_lm(model).get_decoder()(input_ids=ids).last_hidden_state
    hidden.square().sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def changed(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, LoraLinear) and "forward" in vars(m)]


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_right(bias):
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, w, a, b = random(2, 3, 5), random(4, 5), random(2, 5).requires_grad_(), random(4, 2).requires_grad_()
    offset = random(4) if bias else None
    expected = nn.functional.linear(x, w, offset) + 0.7 * (x @ a.t() @ b.t())
    torch.testing.assert_close(_Lora.apply(x, w, offset, a, b, 0.7), expected)
    assert torch.autograd.gradcheck(lambda x, a, b: _Lora.apply(x, w, offset, a, b, 0.7), (x.requires_grad_(), a, b))
    assert torch.autograd.gradcheck(lambda a, b: _Lora.apply(x.detach(), w, offset, a, b, 0.7), (a, b))


def test_equals_peft_and_is_gone_afterwards():
    model = small_model().train()
    ids = torch.arange(1, 41).view(2, 20)
    hidden, expected = gradients(model, ids)
    with fast_lora(model):
        assert len(changed(model)) == 21
        fast, found = gradients(model, ids)
    assert not changed(model)
    torch.testing.assert_close(fast, hidden, atol=1e-5, rtol=1e-5)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    with pytest.raises(KeyError), fast_lora(model):
        raise KeyError
    assert not changed(model)


def test_the_adapter_can_be_switched_off_inside():
    model = small_model()
    ids = torch.arange(1, 21).unsqueeze(0)
    with model.disable_adapter(), torch.no_grad():
        expected = model(input_ids=ids).logits
    with fast_lora(model), model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_what_is_not_plain_is_left_to_peft():
    dropping = small_model(dropout=0.3)
    with fast_lora(dropping.train()):
        assert not changed(dropping)
    with fast_lora(dropping.eval()):
        assert changed(dropping)

    def around(**settings: object) -> nn.Module:
        base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
        return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **settings))  # type: ignore[arg-type]

    for settings in ({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}):
        model = around(**settings)
        with fast_lora(model):
            assert not changed(model), settings
    merged = around()
    merged.merge_adapter()
    two = around()
    two.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    two.base_model.set_adapter(["default", "other"])
    hooked = around()
    hooked.get_submodule("base_model.model.0.lora_A.default").register_forward_hook(lambda *_: None)
    for model in (merged, two, hooked):
        with fast_lora(model):
            assert not changed(model)


def test_mixed_precision_is_left_to_peft():
    model = small_model()
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        with fast_lora(model):
            assert torch.equal(layer(x), expected)
    assert expected.dtype == torch.bfloat16
