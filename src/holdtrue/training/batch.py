"""What a micro-batch holds beside its tokens, and which positions a term covers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdtrue.data import KINDS
from holdtrue.data.batching import IGNORED
from holdtrue.defenses.base import Needs
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
        lot: (batch,) float64 in [0, 1), the row's place in this window's draw: a sample of share f holds the rows
            below f (see :func:`draw_lots`).
    """

    input_ids: Tensor
    mask: Tensor
    response: Tensor
    trained: Tensor
    kind: Tensor
    lot: Tensor

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
        lot = inputs.get("lot")
        lot = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device) if lot is None else lot
        return cls(ids, mask, response, trained, kind, lot)

    def covered(self, needs: Needs, *, sampled: bool = True) -> Tensor:
        """Return the positions that a defense's token term covers, (batch, length) bool.

        With ``sampled`` false: those that it would cover if it took every row.
        """
        covered = self.mask if needs.tokens == "all" else self.response
        if needs.kinds is not None:
            wanted = torch.tensor([KINDS[kind] for kind in needs.kinds], device=self.kind.device)
            covered = covered & torch.isin(self.kind, wanted).unsqueeze(1)
        if sampled and needs.sample < 1:
            covered = covered & (self.lot < needs.sample).unsqueeze(1)
        return covered

    def begins(self, start: Sequence[int]) -> Tensor:
        """Return which rows begin with the tokens ``start``, (batch,) bool."""
        size = len(start)
        if self.input_ids.shape[1] < size:
            return torch.zeros_like(self.kind, dtype=torch.bool)
        same = self.input_ids[:, :size] == self.input_ids.new_tensor(start)
        return (same & self.mask[:, :size]).all(1)

    def counts(self) -> Tensor:
        """Return the counts named by ``COUNTS``, (6,) float64. A row whose mask is empty is no example."""
        task = self.trained & (self.kind == 0).unsqueeze(1)
        examples = self.mask.any(1)
        numbers = (self.mask, self.trained, task, self.response, examples)
        return torch.stack([x.sum() for x in numbers] + [torch.tensor(self.mask.numel(), device=self.mask.device)]).to(
            torch.float64
        )

    def positions(self, chosen: Tensor) -> Positions:
        """Return what lies at the ``chosen`` positions, (batch, length) bool, in reading order."""
        row, column = chosen.nonzero(as_tuple=True)
        following = torch.full_like(self.input_ids, -1)
        following[:, :-1] = torch.where(self.mask[:, 1:], self.input_ids[:, 1:], -1)
        return Positions(
            row=row,
            column=column,
            targets=following[row, column],
            trained=self.trained[row, column],
            response=self.response[row, column],
            place=_place(self.response)[row, column],
            kind=self.kind[row],
        )


def draw_lots(
    batches: Sequence[dict[str, Any]],
    seed: int,
    step: int,
    *,
    gather: Callable[[list[list[bytes]]], list[list[bytes]]] = list,
    process: int = 0,
) -> None:
    """Give each row of an accumulation window a ``lot``, so that a sample of share f holds f of the rows.

    The rows' order is drawn from their tokens, the seed and the step, so it does not depend on how a window is cut
    into micro-batches and dealt to processes. One offset for all moves the lots: the number of rows below f is f times
    the rows, rounded up or down with the chances that make every row's own chance exactly f.

    Args:
        batches: this process's micro-batches of the window.
        seed, step: of the run.
        gather: from a list of one process's names to that of all processes', in their order.
        process: this one's place among them.
    """
    rows = [
        ids.cpu().numpy()[mask.cpu().numpy().astype(bool)]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    key = f"{seed}/{step}".encode()
    # An empty row, dealt to a process that has no other, takes part in no draw.
    names = [hashlib.blake2b(row.tobytes(), key=key).digest() for row in rows if len(row)]
    parts = gather([names])
    everyone = [name for part in parts for name in part]
    offset = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/offset".encode(), digest_size=8).digest()) / 2**64
    order = sorted(range(len(everyone)), key=everyone.__getitem__)
    lots = torch.empty(len(everyone), dtype=torch.float64)
    lots[order] = (torch.arange(len(everyone), dtype=torch.float64) + offset) / max(1, len(everyone))
    own = iter(lots[sum(map(len, parts[:process])) :].tolist())
    drawn = iter([next(own) if len(row) else 0.0 for row in rows])
    for batch in batches:
        ids = batch["input_ids"]
        batch["lot"] = torch.tensor([next(drawn) for _ in ids], dtype=torch.float64, device=ids.device)


def _place(response: Tensor) -> Tensor:
    """Count from 0 inside each run of True of (batch, length); -1 elsewhere."""
    count = response.cumsum(1)
    before = torch.where(response, 0, count).cummax(1).values
    return torch.where(response, count - before - 1, -1)
