"""The least time a training step can take: its floating-point operations over the machine's rate of sgemm.

A product of (m, k) and (k, n) counts as 2 m k n. Only products count: what norms, activations, the softmax and the
optimizer take is part of the distance to the floor. Padding counts nothing, since it need not be computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A Llama-like model with LoRA of rank ``rank`` on the seven linear layers of each block.

    Attributes:
        blocks, width, inner, vocabulary: of the model; ``inner`` is the width inside the MLP.
        heads, key_heads, head_width: of the attention.
    """

    blocks: int
    width: int
    inner: int
    vocabulary: int
    heads: int
    key_heads: int
    head_width: int
    rank: int

    @classmethod
    def of(cls, config: Any, rank: int) -> Shape:
        """Read a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            rank,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block as (d_in, d_out)."""
        query, key = self.heads * self.head_width, self.key_heads * self.head_width
        return {
            "q": (self.width, query),
            "k": (self.width, key),
            "v": (self.width, key),
            "o": (query, self.width),
            "gate": (self.width, self.inner),
            "up": (self.width, self.inner),
            "down": (self.inner, self.width),
        }


class Work(NamedTuple):
    """What a step computes: rows by their length in tokens, and the positions at which the head is multiplied."""

    lengths: Sequence[int]
    targets: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def forward(shape: Shape, work: Work, *, adapter: bool, causal: bool = True, prefix: int = 0) -> int:
    """Return the operations of the body's forward pass.

    Args:
        shape: of the model.
        work: the rows.
        adapter: whether LoRA's two products a layer are computed too.
        causal: count only the half of the attention that the mask leaves; kernels that skip nothing compute L² scores.
        prefix: tokens at the start of all rows that are computed only once, for all of them.
    """
    tokens = work.tokens - prefix * (len(work.lengths) - 1 if work.lengths else 0)
    weights = sum(i * o for i, o in shape.linears().values())
    low = shape.rank * sum(i + o for i, o in shape.linears().values()) if adapter else 0
    saved = _pairs([prefix], causal) * max(0, len(work.lengths) - 1)
    pairs = _pairs(work.lengths, causal) - saved
    return shape.blocks * (2 * tokens * (weights + low) + _attention(shape, pairs))


def backward(shape: Shape, work: Work, *, causal: bool = True) -> int:
    """Return the operations of the body's backward pass: gradients of inputs, and of the adapter alone.

    A frozen layer costs its input's gradient, as much as its forward pass; LoRA's two matrices cost that and their own
    gradient. The first block's q, k and v read the embeddings, whose gradient nobody wants.
    """
    layers = shape.linears()
    weights = sum(i * o for i, o in layers.values())
    low = shape.rank * sum(i + o for i, o in layers.values())
    unwanted = sum(i * o + shape.rank * i for i, o in (layers[name] for name in "qkv"))
    tokens = work.tokens
    return (
        shape.blocks * (2 * tokens * (weights + 2 * low) + 2 * _attention(shape, _pairs(work.lengths, causal)))
        - 2 * tokens * unwanted
    )


def head(shape: Shape, work: Work, *, gradient: bool) -> int:
    """Return the operations of the frozen head at the targets, and with ``gradient`` of its input's gradient."""
    return (2 if gradient else 1) * 2 * work.targets * shape.width * shape.vocabulary


def step(shape: Shape, work: Work, arm: str, *, prefix: int = 0, causal: bool = True) -> dict[str, int]:
    """Return the least operations of one arm's step by part, ``total`` among them.

    ``kl_sampled`` needs half of the reference. A cached reference costs the KL one product with the head, and LDIFS
    nothing. The naive arm and TRL's have the floor of what they train, since they could do the same.
    """
    share = {"kl": 1.0, "naive": 1.0, "kl_ldifs": 1.0, "ldifs": 1.0, "kl_sampled": 0.5}.get(arm, 0.0)
    scored = {"kl": 1.0, "naive": 1.0, "kl_ldifs": 1.0, "kl_cached": 1.0, "kl_sampled": 0.5}.get(arm, 0.0)
    parts = {
        "body_forward": forward(shape, work, adapter=True, causal=causal),
        "body_backward": backward(shape, work, causal=causal),
        "head": head(shape, work, gradient=True),
        "reference_body": int(share * forward(shape, work, adapter=False, causal=causal, prefix=prefix)),
        "reference_head": int(scored * head(shape, work, gradient=False)),
    }
    return parts | {"total": sum(parts.values())}


def _pairs(lengths: Sequence[int], causal: bool) -> int:
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def _attention(shape: Shape, pairs: int) -> int:
    return 2 * 2 * pairs * shape.heads * shape.head_width


def sgemm_rates(shape: Shape, tokens: int, seconds: float = 0.5) -> dict[str, float]:
    """Measure the machine's rate of float32 products at the model's shapes, operations per second by name.

    Each shape is multiplied for about ``seconds`` (weights (d_out, d_in) transposed, as a linear layer does it) and the
    fastest repetition counts: a floor wants the best that the machine can do.
    """
    import torch

    sizes = {name: (tokens, i, o) for name, (i, o) in shape.linears().items() if name in ("q", "gate", "down")}
    sizes["head"] = (64, shape.width, shape.vocabulary)
    sizes["adapter"] = (tokens, shape.width, shape.rank)
    rates = {}
    for name, (m, k, n) in sizes.items():
        a, b, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        torch.mm(a, b.t(), out=out)
        best, started = float("inf"), time.perf_counter()
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            best = min(best, time.perf_counter() - before)
        rates[name] = 2 * m * k * n / best
    return rates


def achieved(operations: int, rates: Mapping[str, float], measured: float) -> dict[str, float]:
    """Return the floor in seconds at the best of the rates, and the share of the measured seconds that it explains."""
    least = operations / max(rates.values())
    return {"seconds": round(least, 4), "measured": round(measured, 4), "share": round(least / measured, 4)}
