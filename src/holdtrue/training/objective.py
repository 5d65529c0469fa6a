"""Cross-entropy and token terms from final hidden states, in chunks of positions.

No tensor of [positions, vocabulary] of the whole batch ever exists: each chunk's logits are made, turned into the
loss and its gradient with respect to the hidden states, and dropped. The head's weights are frozen, so the gradient
of the hidden states is all that the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from holdtrue.defenses.base import Coverage, TokenChunk

LOGITS_PER_CHUNK = 2**21
"""Logits held at once for one model: 8 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class TokenTerm:
    """One defense's token term: its name, its positions, its coefficient (weight / count) and its formula."""

    name: str
    covers: Coverage
    coefficient: float
    values: Callable[[TokenChunk], Tensor]


@dataclass(frozen=True)
class Positions:
    """The positions of a micro-batch that some term covers, flattened to (n,).

    Attributes:
        flat: int64 indices into (batch * length).
        targets: the next token's id, -1 where the row ends.
        trained: cross-entropy covers the position.
        response: the position predicts a response token (of any row, also of those without cross-entropy).
        place: place in the response from 0, -1 outside.
        kind: the row's kind.
    """

    flat: Tensor
    targets: Tensor
    trained: Tensor
    response: Tensor
    place: Tensor
    kind: Tensor


class TokenResult(NamedTuple):
    """``loss``: scalar with a gradient. ``sums``: detached sums over covered positions, by metric name."""

    loss: Tensor
    sums: dict[str, Tensor]


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy ‖ reference) in nats for each row of two (n, vocabulary) log-probability tensors: (n,)."""
    return (policy.exp() * (policy - reference)).sum(-1)


def chunk_size(vocabulary: int) -> int:
    """Return how many positions a chunk holds, so that its logits stay the same size in any vocabulary."""
    return max(1, LOGITS_PER_CHUNK // vocabulary)


def token_objective(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    positions: Positions,
    *,
    ce_coefficient: float,
    terms: Sequence[TokenTerm] = (),
    reference_hidden: Tensor | None = None,
    chunk: int | None = None,
    vocabulary: int,
) -> TokenResult:
    """Compute ``ce_coefficient * sum CE + sum over terms of coefficient * sum of the term's values``.

    Args:
        hidden: (n, width) the policy's final hidden states at ``positions``, after the final norm.
        head: the frozen output head, from (m, width) to (m, vocabulary) logits.
        positions: what lies at each of the n positions.
        ce_coefficient: one over the number of trained tokens of the accumulation window; 0 where it holds none.
        terms: the defenses' token terms.
        reference_hidden: (n, width) the reference's final hidden states, or ``None``.
        chunk: positions in a chunk; by default :func:`chunk_size`.
        vocabulary: width of the logits.

    Returns:
        the loss, and the sums ``ce``, ``kl`` (policy to reference over response positions, where a reference is
        given) and ``defense/<name>``, in nats.

    Log-probabilities are computed in float32, or in float64 where the hidden states are.
    """
    step = chunk or chunk_size(vocabulary)
    names = ["ce", "ce_task", *(["kl"] if reference_hidden is not None else []), *(f"defense/{t.name}" for t in terms)]
    exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    sums = {name: torch.zeros((), dtype=exact, device=hidden.device) for name in names}

    def add(name: str, value: Tensor) -> None:
        sums[name] += value

    def part(h: Tensor, at: slice) -> Tensor:
        policy = _log_probabilities(head(h))
        reference = None
        if reference_hidden is not None:
            with torch.no_grad():
                reference = _log_probabilities(head(reference_hidden[at]))
        trained, response, kind = positions.trained[at], positions.response[at], positions.kind[at]
        targets = positions.targets[at]
        nll = -policy.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        ce = torch.where(trained, nll, 0.0)
        loss = ce_coefficient * ce.sum()
        add("ce", ce.detach().sum())
        add("ce_task", torch.where(kind == 0, ce.detach(), 0.0).sum())
        if reference is not None:
            with torch.no_grad():
                add("kl", torch.where(response, kl_divergence(policy.detach(), reference), 0.0).sum())
        if terms:
            view = TokenChunk(policy, reference, targets, trained, positions.place[at], kind)
            for term in terms:
                values = term.values(view)
                if term.covers == "response":
                    values = torch.where(response, values, 0.0)
                total = values.sum()
                loss = loss + term.coefficient * total
                add(f"defense/{term.name}", total.detach())
        return loss

    return TokenResult(_Chunked.apply(hidden, part, step), sums)  # type: ignore[return-value]


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


class _Chunked(torch.autograd.Function):
    """Sum ``part`` over chunks of rows of ``hidden``, and keep the gradient instead of the graph."""

    @staticmethod
    def forward(ctx, hidden: Tensor, part: Callable[[Tensor, slice], Tensor], step: int) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        exact = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=exact, device=hidden.device)
        gradient = torch.zeros_like(hidden) if wants_gradient else None
        for start in range(0, hidden.shape[0], step):
            at = slice(start, min(start + step, hidden.shape[0]))
            with torch.set_grad_enabled(wants_gradient):
                piece = hidden[at].detach().requires_grad_(wants_gradient)
                loss = part(piece, at)
            total += loss.detach()
            if gradient is not None and loss.requires_grad:
                gradient[at] = torch.autograd.grad(loss, piece)[0]
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None
