"""The KL divergence between rows of log-probabilities, with few sweeps over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy ‖ reference) in nats for each row of two (n, vocabulary) log-probability tensors: (n,).

    The gradient flows to ``policy`` alone; ``reference`` is the frozen model's.
    """
    return _Divergence.apply(policy, reference)  # type: ignore[return-value]


class Comparison:
    """Two models' log-probabilities at some positions, their divergence, and how the logits should move for it.

    Args:
        policy: (n, vocabulary) log-probabilities, without a gradient.
        reference: the same of the frozen model.
        gradient: whether anything will be derived by the divergence.

    Attributes:
        divergence: (n,) KL(policy ‖ reference) in nats, a leaf: what is built on it has its gradient here.
    """

    def __init__(self, policy: Tensor, reference: Tensor, *, gradient: bool) -> None:
        self._probability, self._gap = policy.exp(), torch.sub(policy, reference)
        self._value = torch.linalg.vecdot(self._probability, self._gap)
        self.divergence = self._value.detach().clone().requires_grad_(gradient)

    def slope(self, by_divergence: Tensor, by_probability: Tensor) -> Tensor:
        """Return p * (by_divergence * (log p − log q − divergence) + by_probability), (n, vocabulary), once.

        With ``by_divergence`` (n,) the loss's derivative by the divergence, its first part is the derivative by the
        policy's logits. The memory of the gap is used up.
        """
        start = (by_probability - by_divergence * self._value).unsqueeze(-1)
        slope = torch.addcmul(start, self._gap, by_divergence.unsqueeze(-1), out=self._gap)
        return slope.mul_(self._probability)


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
