"""Micro-batches of rows of like length, the same rows in each optimizer step however they are split.

The order is drawn in three moves. Rows are shuffled, with the rows of other kinds spread evenly among the task rows.
The order is cut into windows of some tens of rows, and only inside a window rows are sorted by length and cut into
optimizer batches, which are shuffled. Last, a batch is cut into micro-batches and dealt to the ranks. So what an
optimizer step sees depends on the seed, the epoch and the batch size alone. Rows that only a defense reads (kind
``pool``) ride along: a batch holds ``batch_size`` of the others, and its share of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from holdtrue.data.chat import KINDS

IGNORED = -100
RIDING = KINDS["pool"]
"""The kind ``pool`` of ``holdtrue.data.KINDS``: rows that a step reads beside its batch."""
ASIDE = KINDS["aside"]
"""The kind ``aside``: rows that no step reads."""
PAIR = KINDS["pair"]
"""The kind ``pair``: rows that no step reads, two and two."""
NEVER_IN_A_STEP = (ASIDE, PAIR)
"""Kinds of rows that the sampler leaves out."""
GHOST = -1
"""The index of an empty row, dealt to a rank that would otherwise have no micro-batch in a step."""


def each_of_kind(rows: Any, kind: int) -> Iterator[dict[str, Any]]:
    """Yield the rows that are of a kind, in their order; a row without ``kind`` is a task's, kind 0.

    Args:
        rows: a data set, whose column is looked through first, or anything indexable.
        kind: a number of ``KINDS``.
    """
    names = getattr(rows, "column_names", None)
    if names is None:
        return (row for row in map(rows.__getitem__, range(len(rows))) if row.get("kind", 0) == kind)
    kinds = rows["kind"] if "kind" in names else np.zeros(len(rows))
    return (rows[i] for i in np.flatnonzero(np.asarray(kinds) == kind).tolist())


def spread_evenly(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Merge two orders so that the second's items lie at equal distances among the first's."""
    places = np.concatenate([(np.arange(len(items)) + 0.5) / max(1, len(items)) for items in (first, second)])
    which = np.repeat((0, 1), (len(first), len(second)))
    return np.concatenate([first, second])[np.lexsort((which, places))]


class WindowSampler(Sampler[list[int]]):
    """Yields one rank's micro-batches of an epoch as lists of row indices.

    Args:
        lengths: tokens of each row.
        kinds: the kind of each row; rows of kind 0 are task rows, those of kind ``RIDING`` ride along,
            those of kinds ``ASIDE`` and ``PAIR`` are left out.
        batch_size: rows of an optimizer step over all ranks; a multiple of ``micro_batch_size * ranks``.
        micro_batch_size: rows of a micro-batch, those that ride along not counted.
        seed: of the order, together with the epoch.
        rank, ranks: this process and how many there are.
        window: rows that are sorted together; rounded up to whole batches.
        shuffle: False keeps the rows' order but for the sorting (for evaluation).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        kinds: Sequence[int] | None = None,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        window: int = 64,
        shuffle: bool = True,
    ) -> None:
        if batch_size % (micro_batch_size * ranks):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {ranks} processes"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.kinds = np.zeros_like(self.lengths) if kinds is None else np.asarray(kinds, dtype=np.int64)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.ranks, self.seed, self.shuffle = rank, ranks, seed, shuffle
        self.window = -(-max(window, batch_size) // batch_size) * batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order ``iter`` yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        rows = int((self.kinds < RIDING).sum())
        whole, rest = divmod(rows, self.batch_size)
        per_batch = self.batch_size // (self.micro_batch_size * self.ranks)
        return whole * per_batch + -(-rest // (self.micro_batch_size * self.ranks))

    def batches(self) -> Iterator[list[int]]:
        """Yield the rows of each optimizer step, over all ranks, without those that ride along."""
        random = np.random.default_rng((self.seed, self.epoch))
        order = self._order(random)
        for start in range(0, len(order), self.window):
            rows = order[start : start + self.window]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            groups = [rows[i : i + self.batch_size].tolist() for i in range(0, len(rows), self.batch_size)]
            # A short batch stays last, since the trainer takes only the epoch's last window to be short.
            full = [g for g in groups if len(g) == self.batch_size]
            if self.shuffle:
                full = [full[i] for i in random.permutation(len(full))]
            yield from full
            yield from groups[len(full) :]

    def __iter__(self) -> Iterator[list[int]]:
        riders = self._riders()
        for rows in self.batches():
            count = -(-len(rows) // (self.micro_batch_size * self.ranks)) * self.ranks
            if riding := next(riders):
                rows = sorted([*rows, *riding], key=lambda row: self.lengths[row])
            pieces = [part.tolist() for part in np.array_split(np.asarray(rows), count)]
            for piece in pieces[self.rank :: self.ranks]:
                yield piece or [GHOST]

    def _riders(self) -> Iterator[list[int]]:
        """Yield the rows that ride along with each optimizer step of the epoch."""
        riding = np.flatnonzero(self.kinds == RIDING)
        steps = -(-int((self.kinds < RIDING).sum()) // self.batch_size)
        random = np.random.default_rng((self.seed, self.epoch, RIDING))
        yield from (part.tolist() for part in np.array_split(random.permutation(riding), max(1, steps)))

    def _order(self, random: np.random.Generator) -> np.ndarray:
        everything = np.flatnonzero(self.kinds < RIDING)
        if not self.shuffle:
            return everything
        task, other = everything[self.kinds[everything] == 0], everything[self.kinds[everything] != 0]
        return spread_evenly(random.permutation(task), random.permutation(other))


class WithGhost:
    """A dataset that answers the index ``GHOST`` with a row of one token that no term covers."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [0], "ghost": True} if index == GHOST else self.rows[index]


class Collator:
    """Turns rows into a right-padded batch of tensors.

    A row has ``input_ids`` and either ``trained`` (bool per token: a target of cross-entropy) or ``labels`` (-100
    where not trained), and may have ``kind`` (see ``KINDS``) and ``ce`` (False: its tokens count for no
    cross-entropy). The batch has ``input_ids``, ``labels`` (batch, length) int64, ``attention_mask`` (batch, length)
    int64, ``kind`` (batch,) int64 and ``ce`` (batch,) bool.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        length = max(len(row["input_ids"]) for row in rows)
        ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, row in enumerate(rows):
            if row.get("ghost"):
                continue
            tokens = np.asarray(row["input_ids"], dtype=np.int64)
            n = len(tokens)
            ids[i, :n], mask[i, :n] = tokens, 1
            labels[i, :n] = np.where(np.asarray(row["trained"]), tokens, IGNORED) if "trained" in row else row["labels"]
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
            "kind": torch.tensor([int(row.get("kind", 0)) for row in rows]),
            "ce": torch.tensor([bool(row.get("ce", True)) for row in rows]),
        }
