"""Rows kept aside: the gradient of the policy's divergence from the reference on them, the same rows in each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdtrue.data.batching import ASIDE, Collator, each_of_kind
from holdtrue.defenses import Defense
from holdtrue.errors import NeedError
from holdtrue.models import causal_lm
from holdtrue.scoring import final_hidden
from holdtrue.training.batch import Batch
from holdtrue.training.fast_lora import fast_lora
from holdtrue.training.objective import TokenResult, TokenTerm
from holdtrue.training.processes import over_processes
from holdtrue.training.reference import Reference

if TYPE_CHECKING:
    from accelerate import Accelerator


def rows_aside(defenses: Sequence[Defense], rows: Any) -> list[dict[str, Any]]:
    """Return the rows of kind ``aside`` among ``rows``; none where no defense asks for them.

    Raises:
        NeedError: a defense asks for them, and none has an answer.
    """
    asking = [defense.name for defense in defenses if defense.needs().aside]
    if not asking:
        return []
    found = list(each_of_kind(rows, ASIDE))
    if not any(any(row["trained"][1:]) for row in found):
        raise NeedError(
            f"{asking[0]} needs rows of kind 'aside' with answers among the training rows, and there are none: a "
            "run prepares them; a trainer of your own is given them"
        )
    return found


class Aside:
    """Rows kept aside, dealt to the processes: each reads its share, and all get the gradient over all rows.

    The reference reads them once: what it says is kept in memory, beside the model.

    Args:
        rows: with ``input_ids`` and ``trained``.
        model: the policy.
        reference: its frozen self.
        objective: from final states (batch, length, width) and positions to a loss and sums.
        size: the most rows of a pass.
        accelerator: of the trainer.
        fast: whether LoRA's layers take their fast path.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        model: nn.Module,
        reference: Reference,
        objective: Callable[..., TokenResult],
        *,
        size: int,
        accelerator: Accelerator,
        fast: bool,
    ) -> None:
        self._model, self._reference, self._objective = model, reference, objective
        self._accelerator, self._fast = accelerator, fast
        processes, collate = accelerator.num_processes, Collator(0)
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        size = min(size, -(-len(rows) // processes))
        batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        self._count = sum(float(Batch.of(batch).response.sum()) for batch in batches)
        self._batches = [
            Batch.of({name: column.to(accelerator.device) for name, column in batch.items()})
            for batch in batches[accelerator.process_index :: processes]
        ]
        self._frozen: list[Tensor] | None = None

    def gradient(
        self, parameters: Mapping[str, nn.Parameter], precision: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> dict[str, Tensor]:
        """Return the gradient of the mean KL to the reference over the rows' answers, the same on each process.

        Args:
            parameters: by which it is taken; their own gradients stay as they are.
            precision: opens the trainer's precision for a pass of the policy.
        """
        if self._frozen is None:
            self._frozen = [self._reference.outputs(batch, batch.response).hidden for batch in self._batches]
        total = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for batch, frozen in zip(self._batches, self._frozen, strict=True):
            with precision(), fast_lora(self._model, on=self._fast):
                loss = self._loss(batch, frozen)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for whole, part in zip(total, found, strict=True):
                if part is not None:
                    whole += part
        return dict(zip(parameters, over_processes(self._accelerator, total, "sum"), strict=True))

    def _loss(self, batch: Batch, frozen: Tensor) -> Tensor:
        positions = batch.positions(batch.response)
        term = TokenTerm("kl", positions.response, 1 / self._count, lambda chunk: chunk.divergence, reference=True)
        hidden = final_hidden(causal_lm(self._model), batch.input_ids)
        return self._objective(hidden, positions, ce_coefficient=0.0, terms=[term], reference_hidden=frozen).loss
