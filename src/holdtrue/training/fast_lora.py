"""LoRA's linear layers with fewer passes over memory, while training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


@contextlib.contextmanager
def fast_lora(model: nn.Module, *, on: bool = True) -> Iterator[None]:
    """While open, and ``on``, compute each plain LoRA layer as one function; afterwards the model is as it was.

    y = W x + b + s B (A x), and by hand its gradients: the products are summed in place, and of x, A x and the
    weights nothing is kept twice. The result is PEFT's up to rounding. A layer with dropout, merged weights, several
    adapters, another variant than plain LoRA, a bias of its own, or inputs of another precision is left to PEFT.
    """
    changed = []
    try:
        for module in model.modules() if on else ():
            if isinstance(module, LoraLinear) and "forward" not in vars(module) and _plain(module):
                module.forward = _faster(module, module.forward)  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _plain(module: LoraLinear) -> bool:
    base = module.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or len(module.active_adapters) != 1:
        return False
    (name,) = module.active_adapters
    if name not in module.lora_A or module.merged or name in module.lora_variant:
        return False
    a, b = module.lora_A[name], module.lora_B[name]
    dropout = module.lora_dropout[name]
    return (
        (isinstance(dropout, nn.Identity) or not dropout.training)
        and type(a) is nn.Linear
        and type(b) is nn.Linear
        and a.bias is None
        and b.bias is None
        and (base.bias is None or not base.bias.requires_grad)
        and a.weight.dtype == b.weight.dtype == base.weight.dtype
        and not any(hooked(layer) for layer in (base, a, b))
    )


def hooked(layer: nn.Module) -> bool:
    """Return whether somebody watches or changes what goes through the layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def _faster(module: LoraLinear, peft: Callable[..., Tensor]) -> Callable[..., Tensor]:
    (name,) = module.active_adapters
    base, a, b, scale = module.base_layer, module.lora_A[name], module.lora_B[name], float(module.scaling[name])

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = args or kwargs or module.disable_adapters or x.dtype != base.weight.dtype
        if other or torch.is_autocast_enabled(x.device.type):
            return peft(x, *args, **kwargs)
        return _Lora.apply(x, base.weight, base.bias, a.weight, b.weight, scale)  # type: ignore[return-value]

    return forward


class _Lora(torch.autograd.Function):
    """(…, d_in) to (…, d_out); ``weight`` (d_out, d_in) and ``bias`` are frozen, ``a`` (r, d_in), ``b`` (d_out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        low = flat @ a.t()
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        slope = grads[0].reshape(-1, grads[0].shape[-1])
        inner = (slope @ b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (slope @ weight).addmm_(inner, a).view_as(x)
        return dx, None, None, inner.t() @ x.reshape(-1, x.shape[-1]), (slope.t() @ low).mul_(ctx.scale), None
