"""The KL divergence of the policy from the reference, with few sweeps over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


class Comparison:
    """Two models' log-probabilities at some positions, their divergence, and how the logits should move for it.

    Args:
        policy: (n, vocabulary) log-probabilities, without a gradient.
        reference: the same of the frozen model.
        gradient: whether anything will be derived by the divergence.
        room: (2, n, vocabulary) memory to work in; ``None``: memory of its own.

    Attributes:
        divergence: (n,) KL(policy ‖ reference) in nats, a leaf: what is built on it has its gradient here.
    """

    def __init__(self, policy: Tensor, reference: Tensor, *, gradient: bool, room: Tensor | None = None) -> None:
        first, second = (None, None) if room is None else room
        self._probability, self._gap = torch.exp(policy, out=first), torch.sub(policy, reference, out=second)
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
