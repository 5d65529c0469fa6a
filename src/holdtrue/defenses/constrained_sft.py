"""Token-wise constrained fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from holdtrue.defenses.base import LossDefense, Needs, TokenChunk

if TYPE_CHECKING:
    from torch import Tensor

_FIRST, _NEXT = 1, 4


class ConstrainedSFT(LossDefense):
    """Learn a token the less, the likelier the policy finds it already than the reference did.

    loss = (1/T) * sum over t of w_t * nll_t,    w_t = 2 * (1 − sigmoid(beta_t * (log policy_t − log reference_t)))

    w_t is a number, not differentiated; the gradient is that of
    −(2/beta_t) * log sigmoid(beta_t * log(policy_t / reference_t)). beta_t is ``beta * first`` for an answer's first
    token, ``beta * opening`` for its second to fifth, else ``beta``. At the untouched model every w_t is 1. With
    ``weight`` w the loss is (1 − w) times cross-entropy plus w times this.

    Qi et al. 2024 (arXiv 2406.05946). Variant: ``weight`` is ours, and 1 is the paper's.
    """

    name = "constrained_sft"
    badge = "faithful"
    paper = "arXiv 2406.05946"

    weight: float = Field(default=1.0, ge=0, le=1, description="how far cross-entropy is replaced; 0 is plain training")
    beta: float = Field(default=0.1, gt=0, description="how soon a token counts as learned, nearer 0 later")
    first: float = Field(default=5.0, gt=0, description="the factor on beta for an answer's first token")
    opening: float = Field(default=20.0, gt=0, description="the factor on beta for its second to fifth")

    def needs(self) -> Needs:
        return Needs(tokens="response", reference=True, kinds=("task", "safe"))

    def token_term(self, chunk: TokenChunk) -> Tensor:
        assert chunk.reference is not None
        target = chunk.targets.clamp_min(0).unsqueeze(-1)
        policy, reference = (x.gather(-1, target).squeeze(-1) for x in (chunk.policy, chunk.reference))
        beta = policy.new_full(policy.shape, self.beta)
        beta[chunk.place < _FIRST + _NEXT] *= self.opening
        beta[chunk.place < _FIRST] *= self.first / self.opening
        share = 2.0 * (beta * (reference - policy.detach())).sigmoid()
        return ((1.0 - share) * policy).where(chunk.trained, 0.0)
