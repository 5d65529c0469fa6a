"""Token-regularized fine-tuning (TReFT): hold the keys and values of the chat template's prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from holdtrue.data import ChatRow
from holdtrue.defenses.base import Defense, Features, LossDefense, Needs, RowsContext, RunContext
from holdtrue.defenses.inoculation import Inoculation
from holdtrue.defenses.steering import Steering
from holdtrue.errors import NeedError

if TYPE_CHECKING:
    from torch import Tensor


class TReFT(LossDefense):
    """Keep what every conversation begins with from carrying what is learned to other questions.

    loss += max(0, weight * R − delta)
    R = mean over layers of the mean over positions t of ‖k_t − k0_t‖²/‖k0_t‖² + ‖v_t − v0_t‖²/‖v0_t‖²

    t runs over the chat template's prefix: the tokens before the first user's words, in a conversation without a system
    prompt of its own. k_t and v_t are what the key and value projections give out there, all heads together, before
    rotary positions, which change neither norm. k0 and v0 are the reference's, read once. As nothing in the prefix sees
    a row, R is the same for each row that begins with it; it is averaged over those of a step.

    Zhao et al. 2026 (arXiv 2606.06667). Corrected: the published code projects the residual stream as it enters a
    block, without the block's norm, so that what it holds are not the keys and values that attention reads.
    """

    name = "treft"
    badge = "corrected"
    paper = "arXiv 2606.06667"

    weight: float = Field(default=10.0, ge=0, description="w, the factor on the drift R; 0 is plain training")
    delta: float = Field(default=0.0, ge=0, description="how much weighted drift is free")

    def needs(self) -> Needs:
        return Needs(reference=True, modules=("k_proj", "v_proj"), prefix=True)

    def conflicts(self, other: Defense) -> str | None:
        if self.weight == 0:
            return None
        if isinstance(other, Steering) and other.acts:
            return (
                "steering moves the prefix's keys and values while training, so that the adapter would learn to move "
                "them back, and without the push, after training, they would have moved the other way"
            )
        if isinstance(other, Inoculation) and other.fraction == 1:
            return (
                "with inoculation every task row begins with another system prompt, and the prefix that treft holds is "
                "in none; set inoculation.fraction below 1, or leave one of the two out"
            )
        return None

    def preflight(self, context: RunContext) -> None:
        if self.weight == 0:
            return
        from holdtrue.data import ChatEncoder
        from holdtrue.models import load_tokenizer

        tokenizer = load_tokenizer(context.model)
        prefix = ChatEncoder(tokenizer).prefix_ids()
        if not prefix:
            raise NeedError(
                f"treft: the chat template of {context.model.name} puts no token before the user's words, so there is "
                "no prefix to hold; use another model, or leave the defense out"
            )
        context.notes.update(prefix=str(tokenizer.decode(prefix)), prefix_tokens=len(prefix))

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        own = 0
        for row in rows:
            own += row.messages[0].role == "system"
            yield row
        context.notes["rows_with_their_own_system_prompt"] = own

    def feature_term(self, features: Features) -> Tensor:
        assert features.reference is not None
        drifts = [drift(output, features.reference[place]) for place, output in features.policy.items()]
        layers = {str(place).partition(".")[0] for place in features.policy}
        return (sum(drifts[1:], drifts[0]) / len(layers) - self._free).clamp_min(0)

    @property
    def _free(self) -> float:
        """Delta in units of R, since the trainer multiplies by the weight."""
        return self.delta / self.weight if self.weight else 0.0


def drift(states: Tensor, frozen: Tensor) -> Tensor:
    """Return the mean over positions of ‖x − x0‖²/‖x0‖², (batch,). Both: (batch, length, width)."""
    states, frozen = (x if x.itemsize == 8 else x.float() for x in (states, frozen))
    return ((states - frozen).square().sum(-1) / frozen.square().sum(-1).clamp_min(1e-24)).mean(-1)
