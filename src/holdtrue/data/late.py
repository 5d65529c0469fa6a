"""Rows of a large file kept as text and encoded when a step reads them, so that training need not wait for them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import from_json, to_json

from holdtrue.data.chat import KIND_NAMES, ChatRow, Message

if TYPE_CHECKING:
    from datasets import Dataset

    from holdtrue.data.encode import ChatEncoder

TEXT = "text"
"""The column of rows that wait to be encoded; null where a row is encoded already."""


def to_text(row: ChatRow) -> bytes:
    """Return what :class:`LateRows` makes the row from again, but for its kind and ``ce``."""
    return to_json([row.source, row.line, [[turn.role, turn.content, turn.weight] for turn in row.messages]])


def from_text(text: str, kind: int, ce: bool) -> ChatRow:
    """Return the row of which :func:`to_text` gave ``text``; ``kind`` is a value of ``KINDS``."""
    source, line, turns = from_json(text)
    return ChatRow(tuple([Message(*turn) for turn in turns]), KIND_NAMES[kind], ce, source, line)


class LateRows:
    """Prepared rows, some of them text that is encoded whenever it is read.

    As a data set: ``rows[i]`` has ``input_ids``, ``trained``, ``kind``, ``length`` and ``ce``; ``rows["kind"]``,
    ``rows["length"]`` and ``rows["ce"]`` are arrays. The length of a row that waits is an estimate in the column and
    exact in the row.

    Args:
        table: the columns on disk.
        encoder: of the same tokenizer and ``max_length`` as the rows were prepared with.
    """

    column_names = ("input_ids", "trained", "kind", "length", "ce")

    def __init__(self, table: Dataset, encoder: ChatEncoder) -> None:
        self._table = table
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return np.asarray(self._table.data.column(key))
        row = self._table[int(key)]
        text = row.pop(TEXT)
        if text is not None:
            (sequence,) = self._encoder.encode(from_text(text, row["kind"], row["ce"]))
            row |= {
                "input_ids": sequence.input_ids,
                "trained": sequence.trained,
                "length": len(sequence.input_ids),
            }
        return row
