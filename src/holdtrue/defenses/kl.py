"""KL divergence to the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from holdtrue.defenses.base import Coverage, LossDefense, Needs, TokenChunk

if TYPE_CHECKING:
    from torch import Tensor


class KL(LossDefense):
    """Keep the policy's next-token distribution near the reference's.

    loss += weight * mean over tokens of KL(policy ‖ reference), full vocabulary, temperature 1, in nats per token.

    Kaczér et al. 2025 (arXiv 2508.06249). Corrected: the published code adds the term once a micro-batch, so that its
    strength grows with accumulation; here it is a mean over the whole accumulation window.
    """

    name = "kl"
    badge = "corrected"
    paper = "arXiv 2508.06249"

    weight: float = Field(default=0.1, ge=0, description="lambda, the factor on the mean KL per token")
    direction: Literal["policy||reference", "reference||policy"] = Field(
        default="policy||reference", description="which distribution the expectation is taken under: the first"
    )
    tokens: Coverage = Field(
        default="all", description="all tokens that are not padding, prompt included, or response tokens only"
    )
    sample: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the share of each step's rows that the term is measured on, drawn anew; the mean is unbiased",
    )

    def needs(self) -> Needs:
        return Needs(tokens=self.tokens, reference=True, sample=self.sample)

    def token_term(self, chunk: TokenChunk) -> Tensor:
        if self.direction == "policy||reference":
            return chunk.divergence
        p, q = chunk.policy, chunk.reference
        assert q is not None
        return (q.exp() * (q - p)).sum(-1)
