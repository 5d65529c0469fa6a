"""l2 distance in feature space (LDIFS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from holdtrue.defenses.base import Features, LossDefense, Needs, RunContext
from holdtrue.errors import NeedError

if TYPE_CHECKING:
    from torch import Tensor


class LDIFS(LossDefense):
    """Keep the policy's hidden states near the reference's.

    loss += weight * mean over examples of sum over layers l of ‖ h_l/‖h_l‖ − h0_l/‖h0_l‖ ‖²

    h_l is the output of block l for a whole example, flattened over its tokens (``normalize: example``, faithful), or
    each token's state on its own, averaged over the example's tokens (``normalize: token``, a variant for models whose
    first token carries most of the norm). Padding is left out; the final norm is not applied.

    Mukhoti et al. 2023 (arXiv 2308.13320), as used by Kaczér et al. 2025 (arXiv 2508.06249). Corrected: the published
    copy takes the trained model's features without a gradient, so its term cannot act.
    """

    name = "ldifs"
    badge = "corrected"
    paper = "arXiv 2508.06249, arXiv 2308.13320"

    weight: float = Field(default=1.0, ge=0, description="lambda, the factor on the distance per example")
    layers: int = Field(default=5, ge=1, description="how many evenly spaced blocks, the first and the last included")
    normalize: Literal["example", "token"] = Field(
        default="example", alias="normalise", description="divide by the norm of the whole example, or of each token"
    )

    def blocks(self, count: int) -> Sequence[int]:
        """Return ``layers`` indices evenly spaced over ``count`` blocks, rounded down: linspace(0, count − 1)."""
        if self.layers == 1:
            return [0]
        return [i * (count - 1) // (self.layers - 1) for i in range(self.layers)]

    def needs(self) -> Needs:
        return Needs(reference=True, blocks=self.blocks)

    def preflight(self, context: RunContext) -> None:
        if self.layers > context.blocks:
            raise NeedError(
                f"ldifs asks for {self.layers} layers and {context.model.name} has {context.blocks} blocks: "
                f"set layers to at most {context.blocks}"
            )

    def feature_term(self, features: Features) -> Tensor:
        assert features.reference is not None
        mask = features.mask.unsqueeze(-1)
        tokens = features.mask.sum(1).clamp_min(1) if self.normalize == "token" else 1
        distances = [
            (self._unit(h, mask) - self._unit(features.reference[layer], mask)).square().sum((1, 2)) / tokens
            for layer, h in features.policy.items()
        ]
        return sum(distances[1:], distances[0])

    def _unit(self, h: Tensor, mask: Tensor) -> Tensor:
        h = (h if h.itemsize == 8 else h.float()).where(mask, 0.0)
        over = (1, 2) if self.normalize == "example" else (2,)
        return h / h.square().sum(over, keepdim=True).clamp_min(1e-24).sqrt()
