"""The KL divergence between rows of log-probabilities, with a backward pass of two sweeps over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy ‖ reference) in nats for each row of two (n, vocabulary) log-probability tensors: (n,).

    The gradient flows to ``policy`` alone; ``reference`` is the frozen model's.
    """
    return _Divergence.apply(policy, reference)  # type: ignore[return-value]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor) -> Tensor:
        probability, gap = policy.exp(), policy - reference
        ctx.save_for_backward(probability, gap)
        return torch.linalg.vecdot(probability, gap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probability, gap = ctx.saved_tensors
        return gap.add(1.0).mul_(probability).mul_(grads[0].unsqueeze(-1)), None
