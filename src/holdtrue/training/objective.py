"""Cross-entropy and token terms from final hidden states, in chunks of positions.

No tensor of [positions, vocabulary] of the whole batch ever exists: each chunk's logits are made, turned into the
loss and its gradient with respect to the hidden states, and dropped. The head's weights are frozen, so the gradient
of the hidden states is all that the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from holdtrue.data.batching import RIDING
from holdtrue.defenses.base import TokenChunk
from holdtrue.training.comparison import Comparison
from holdtrue.training.head import Head, exact, head_for

LOGITS_PER_CHUNK = 3 * 2**21
"""Logits held at once, those of both models together: 24 MiB in float32 for a vocabulary of up to 98,304."""
LEAST_POSITIONS = 64
"""Positions of a chunk for a larger one, up to 128 MiB: a product with fewer rows takes longer than its arithmetic."""


@dataclass(frozen=True)
class TokenTerm:
    """One defense's token term.

    Attributes:
        name: the defense's.
        covered: (n,) bool, the positions whose values count.
        coefficient: weight / count, the factor on the sum of the values.
        values: the formula.
        reference: whether the formula reads the reference; then every covered position must have one.
    """

    name: str
    covered: Tensor
    coefficient: float
    values: Callable[[TokenChunk], Tensor]
    reference: bool


@dataclass(frozen=True)
class Positions:
    """The positions of a micro-batch that some term covers, flattened to (n,).

    Attributes:
        row, column: int64, where in (batch, length).
        targets: the next token's id, -1 where the row ends.
        trained: cross-entropy covers the position.
        response: the position predicts a response token (of any row, also of those without cross-entropy).
        place: place in the response from 0, -1 outside.
        kind: the row's kind.
    """

    row: Tensor
    column: Tensor
    targets: Tensor
    trained: Tensor
    response: Tensor
    place: Tensor
    kind: Tensor

    def take(self, index: Tensor | slice) -> Positions:
        """Return the positions ``index`` (int64, bool or a slice), in that order."""
        return Positions(*(getattr(self, f.name)[index] for f in fields(self)))


class TokenResult(NamedTuple):
    """``loss``: scalar with a gradient. ``sums``: detached sums over covered positions, by metric name."""

    loss: Tensor
    sums: dict[str, Tensor]


def chunk_size(vocabulary: int) -> int:
    """Return how many positions a chunk holds, so that its logits stay the same size while the vocabulary grows.

    A position of which both models' logits are wanted counts twice.
    """
    return max(1, LOGITS_PER_CHUNK // vocabulary, min(LEAST_POSITIONS, 2**25 // vocabulary))


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
    fast: bool = True,
) -> TokenResult:
    """Compute ``ce_coefficient * sum CE + sum over terms of coefficient * sum of the term's values``.

    Args:
        hidden: (n, width) the policy's final hidden states at ``positions``, after the final norm.
        head: the frozen output head, from (m, width) to (m, vocabulary) logits.
        positions: what lies at each of the n positions.
        ce_coefficient: one over the number of trained tokens of the accumulation window; 0 where it holds none.
        terms: the defenses' token terms.
        reference_hidden: (m, width) the reference's final hidden states at the first m <= n positions; the others
            have no reference, and no term that reads it may cover them. ``None``: no position has one.
        chunk: positions in a chunk, those that have a reference counted twice; by default :func:`chunk_size`.
        vocabulary: width of the logits.
        fast: ``False``: the head is called as it is, in place of its products in the order that is fast.

    Returns:
        the loss, and the sums in nats ``ce``, ``ce_task``, ``defense/<name>`` and, where a reference is given, ``kl``
        (policy to reference, over those response positions of rows in training that have one) and ``kl_count``; and
        ``right``, how many trained targets no other token beats.

    Log-probabilities are computed in float32, or in float64 where the hidden states are.
    """
    m = 0 if reference_hidden is None else reference_hidden.shape[0]
    for term in terms:
        if term.reference and bool(term.covered[m:].any()):
            raise ValueError(f"{term.name} covers positions that have no reference")
    most = max(1 if m == 0 else 2, chunk or chunk_size(vocabulary))
    names = [
        "ce",
        "ce_task",
        "right",
        *(["kl", "kl_count"] if reference_hidden is not None else []),
        *(f"defense/{t.name}" for t in terms),
    ]
    sums = {name: torch.zeros((), dtype=exact(hidden), device=hidden.device) for name in names}
    pieces = [slice(a, min(a + most // 2, m)) for a in range(0, m, max(1, most // 2))]
    pieces += [slice(a, min(a + most, hidden.shape[0])) for a in range(m, hidden.shape[0], most)]

    def part(hidden: Tensor, products: Head, at: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the chunk's loss and its gradient with respect to the hidden states, where it is wanted."""
        chunk = positions.take(at)
        other = reference_hidden[at] if reference_hidden is not None and at.start < m else None
        policy, reference, room, back = products.chunk(hidden, other, gradient=wanted)
        with torch.no_grad():
            comparison = None
            if reference is not None:
                comparison = Comparison(policy, reference, gradient=wanted, room=room)
        here = [t for t in terms if not t.reference or reference is not None]
        # A term of weight 0 is measured and has no gradient: not even one of zeros, which rounds the others otherwise.
        policy.requires_grad_(wanted and any(term.coefficient for term in here))
        compared = None if comparison is None else comparison.divergence
        view = TokenChunk(policy, reference, chunk.targets, chunk.trained, chunk.place, chunk.kind, compared)
        total = policy.new_zeros(())
        for term in here:
            with torch.set_grad_enabled(wanted and term.coefficient != 0):
                value = torch.where(term.covered[at], term.values(view), 0.0).sum()
            sums[f"defense/{term.name}"] += value.detach()
            total = total + term.coefficient * value if term.coefficient else total
        by_policy, by_divergence = _derived(total, policy, compared)
        with torch.no_grad():
            if compared is not None:
                measured = chunk.response & (chunk.kind != RIDING)
                sums["kl"] += torch.where(measured, compared, 0.0).sum()
                sums["kl_count"] += measured.sum()
            policy = policy.detach()
            targets = chunk.targets.clamp_min(0).unsqueeze(-1)
            own = policy.gather(-1, targets).squeeze(-1)
            ce = torch.where(chunk.trained, -own, 0.0)
            sums["ce"] += ce.sum()
            sums["right"] += (chunk.trained & (own >= policy.amax(-1))).sum()
            sums["ce_task"] += torch.where(chunk.kind == 0, ce, 0.0).sum()
            loss = total.detach() + ce_coefficient * ce.sum()
            if not wanted:
                return loss, None
            # What the softmax makes of the derivatives by log-probabilities and divergence is written down here, in
            # place: a graph would sweep over the logits half a dozen times more. CE's has one entry a row.
            share = chunk.trained.to(policy.dtype) * ce_coefficient
            weight = share if by_policy is None else share - by_policy.sum(-1)
            if comparison is not None and by_divergence is not None:
                slope = comparison.slope(by_divergence, weight)
            else:
                slope = policy.exp_().mul_(weight.unsqueeze(-1))
            if by_policy is not None:
                slope += by_policy
            return loss, back(slope.scatter_add_(-1, targets, -share.unsqueeze(-1)))

    products = head_for(head, hidden, min(most, max(2 * m, hidden.shape[0])), fast=fast)
    return TokenResult(_Chunked.apply(hidden, products, part, pieces), sums)  # type: ignore[return-value]


def _derived(total: Tensor, policy: Tensor, compared: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the derivatives of ``total`` by the log-probabilities and by the divergence, where it depends on them."""
    if not total.requires_grad:
        return None, None
    leaves = [policy] if compared is None else [policy, compared]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return found[0], found[1] if compared is not None else None


class _Chunked(torch.autograd.Function):
    """Sum ``part`` over chunks of rows of ``hidden``, and keep the gradient instead of the graph."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        products: Head,
        part: Callable[[Tensor, Head, slice, bool], tuple[Tensor, Tensor | None]],
        pieces: Sequence[slice],
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=exact(hidden), device=hidden.device)
        gradient = torch.zeros_like(hidden) if wanted else None
        with torch.set_grad_enabled(wanted):
            for at in pieces:
                loss, slope = part(hidden[at].detach(), products, at, wanted)
                total += loss
                if gradient is not None and slope is not None:
                    gradient[at] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
