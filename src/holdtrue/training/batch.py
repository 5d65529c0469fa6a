"""What a micro-batch holds beside its tokens, and which positions a term covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdtrue.data.batching import IGNORED
from holdtrue.defenses.base import Coverage
from holdtrue.training.objective import Positions

COUNTS = ("tokens", "trained", "trained_task", "response", "examples", "slots")


@dataclass(frozen=True)
class Batch:
    """A right-padded micro-batch.

    Attributes:
        input_ids: (batch, length) int64.
        mask: (batch, length) bool, False at padding.
        response: (batch, length) bool, at t: the token at t + 1 is a response token.
        trained: the same, where cross-entropy covers it.
        kind: (batch,) int64.
    """

    input_ids: Tensor
    mask: Tensor
    response: Tensor
    trained: Tensor
    kind: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Batch:
        """Read a collated batch: ``input_ids``, ``attention_mask``, ``labels``, and where given ``kind`` and ``ce``.

        Raises:
            ValueError: the batch is packed or padded on the left, which the objective does not handle.
        """
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
        if "position_ids" in inputs:
            raise ValueError("packed (padding-free) batches are not supported: turn packing and padding_free off")
        if mask.shape[1] > 1 and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("batches must be padded on the right: set the tokenizer's padding_side to 'right'")
        response = torch.zeros_like(mask)
        response[:, :-1] = (labels[:, 1:] != IGNORED) & mask[:, 1:]
        kind = inputs.get("kind")
        kind = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device) if kind is None else kind
        ce = inputs.get("ce")
        trained = response if ce is None else response & ce.bool().unsqueeze(1)
        return cls(ids, mask, response, trained, kind)

    def counts(self) -> Tensor:
        """Return the counts named by ``COUNTS``, (6,) float64. A row whose mask is empty is no example."""
        task = self.trained & (self.kind == 0).unsqueeze(1)
        examples = self.mask.any(1)
        numbers = (self.mask, self.trained, task, self.response, examples)
        return torch.stack([x.sum() for x in numbers] + [torch.tensor(self.mask.numel(), device=self.mask.device)]).to(
            torch.float64
        )

    def positions(self, coverage: Coverage) -> Positions:
        """Return the positions that ``coverage`` names, in reading order."""
        chosen = self.mask if coverage == "all" else self.response
        flat = chosen.flatten().nonzero().squeeze(-1)
        length = self.input_ids.shape[1]
        following = torch.full_like(self.input_ids, -1)
        following[:, :-1] = torch.where(self.mask[:, 1:], self.input_ids[:, 1:], -1)
        return Positions(
            flat=flat,
            targets=following.flatten()[flat],
            trained=self.trained.flatten()[flat],
            response=self.response.flatten()[flat],
            place=_place(self.response).flatten()[flat],
            kind=self.kind[flat // length],
        )


def _place(response: Tensor) -> Tensor:
    """Count from 0 inside each run of True of (batch, length); -1 elsewhere."""
    count = response.cumsum(1)
    before = torch.where(response, 0, count).cummax(1).values
    return torch.where(response, count - before - 1, -1)
