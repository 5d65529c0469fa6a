"""The frozen output head at a chunk of positions: log-probabilities of both models, and the way back to the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdtrue.training.fast_lora import hooked

BLOCK = 4096
"""Rows of the head's weights in one product: its result stays in the processor's cache until it is turned round."""
COLUMNS = 16
"""Positions are filled up to a multiple of this: a product of 99 columns takes longer than one of 112."""


class Chunk(NamedTuple):
    """What the head says at n positions.

    Attributes:
        policy, reference: (n, vocabulary) log-probabilities without a gradient; ``None`` without a reference.
        room: (2, n, vocabulary) memory that may be written over, or ``None``.
        back: from the loss's gradient with respect to the policy's logits to that of its hidden states, once.
    """

    policy: Tensor
    reference: Tensor | None
    room: Tensor | None
    back: Callable[[Tensor], Tensor]


class Head:
    """Calls ``head``, from (n, width) states to (n, vocabulary) logits, at any chunks of positions."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self._head = head

    def chunk(self, hidden: Tensor, reference: Tensor | None, *, gradient: bool) -> Chunk:
        """Return what it says of the policy's and the reference's (n, width) states; ``gradient``: with a way back."""
        piece = hidden.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self._head(piece)
        with torch.no_grad():
            policy = _log_probabilities(logits)
            other = None if reference is None else _log_probabilities(self._head(reference))

        def back(slope: Tensor) -> Tensor:
            return torch.autograd.grad(logits, piece, slope.to(logits.dtype))[0]

        return Chunk(policy, other, None, back)


class ProcessorHead(Head):
    """The same for a linear layer without a bias on a processor, in the order of products that is fast there.

    Both models' states go through one product, weights first, in blocks of the vocabulary, and all chunks share two
    buffers. A chunk is valid until the next one is made.

    Args:
        weight: (vocabulary, width), float32 or float64.
        positions: the most positions of a chunk, both models' together.
    """

    def __init__(self, weight: Tensor, positions: int) -> None:
        self._weight = weight.detach()
        vocabulary, width = weight.shape
        columns = -(-positions // COLUMNS) * COLUMNS
        self._states = weight.new_zeros(columns, width)
        self._block = weight.new_empty(min(BLOCK, vocabulary), columns)
        self._logits = weight.new_empty(positions, vocabulary)
        self._logs = torch.empty_like(self._logits)

    @torch.no_grad()
    def chunk(self, hidden: Tensor, reference: Tensor | None, *, gradient: bool) -> Chunk:
        n = len(hidden)
        total = n if reference is None else 2 * n
        columns = -(-total // COLUMNS) * COLUMNS
        states, logits = self._states[:columns], self._logits[:total]
        states[:n] = hidden
        if reference is not None:
            states[n:total] = reference
        for start in range(0, len(self._weight), BLOCK):
            weight = self._weight[start : start + BLOCK]
            block = self._block.view(-1)[: len(weight) * columns].view(len(weight), columns)
            torch.mm(weight, states.t(), out=block)
            logits[:, start : start + BLOCK] = block[:, :total].t()
        logs = torch.log_softmax(logits, -1, out=self._logs[:total])
        other, room = (None, None) if reference is None else (logs[n:], logits.view(2, n, -1))
        return Chunk(logs[:n], other, room, lambda slope: torch.mm(self._weight.t(), slope.t()).t())


def head_for(head: Callable[[Tensor], Tensor], hidden: Tensor, positions: int, *, fast: bool = True) -> Head:
    """Return ``head`` in its fastest form, for chunks of at most ``positions`` positions, both models' together."""
    if not (fast and isinstance(head, nn.Linear) and type(head) is nn.Linear and head.bias is None):
        return Head(head)
    weight: Any = head.weight
    plain = (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.device.type == "cpu"
        and weight.dtype == hidden.dtype
        and weight.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not hooked(head)
    )
    return ProcessorHead(weight, positions) if plain else Head(head)


def exact(x: Tensor) -> torch.dtype:
    """Return the precision of log-probabilities: float32, or float64 where ``x`` is."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(exact(logits)), dim=-1)
