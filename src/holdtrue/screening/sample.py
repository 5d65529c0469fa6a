"""Which rows of a file are read, and how much of each: drawn by a seed, one answer a row, its first tokens."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from holdtrue.data import ChatEncoder, ChatRow, Encoded, read_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdtrue.data import ChatSummary

MAX_PROMPT = 2048
"""Tokens of a conversation, whatever the model holds; what is beyond is cut, and an answer there is not read."""


def drawn(rows: int, wanted: int, seed: int) -> list[int]:
    """Return which of ``rows`` rows are taken, from 0, in the order of the draw: its start is a sample as well."""
    return random.Random(seed).sample(range(rows), min(rows, wanted))


def sampled_rows(summary: ChatSummary, chosen: Collection[int]) -> Iterator[ChatRow]:
    """Yield the chosen rows in the file's order, each with one answer, in constant memory."""
    wanted, left = frozenset(chosen), len(chosen)
    for index, row in enumerate(read_chat(summary.path)):
        if index in wanted:
            yield one_answer(row)
            left -= 1
            if not left:
                return


def one_answer(row: ChatRow) -> ChatRow:
    """Return the row up to its last trained answer, with the earlier ones as context; unchanged where none is."""
    last = max((i for i, m in enumerate(row.messages) if m.role == "assistant" and m.weight), default=None)
    if last is None:
        return row
    before = tuple(replace(m, weight=0) if m.role == "assistant" else m for m in row.messages[:last])
    return replace(row, messages=(*before, row.messages[last]))


class WindowEncoder(ChatEncoder):
    """Encodes rows with the first ``tokens`` tokens of their answer; what follows is cut and counted as dropped.

    Raises:
        SpecError: as for :class:`~holdtrue.data.ChatEncoder`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int, limit: int | None = None) -> None:
        super().__init__(tokenizer, max_length=MAX_PROMPT if limit is None else min(limit, MAX_PROMPT))
        self._tokens = tokens

    def encode(self, row: ChatRow) -> list[Encoded]:
        """See :meth:`~holdtrue.data.ChatEncoder.encode`; ``tokens`` counts from the first that is trained."""
        return [self._window(sequence) for sequence in super().encode(row)]

    def _window(self, sequence: Encoded) -> Encoded:
        ids, trained, dropped = sequence
        if not any(trained):
            return sequence
        end = min(len(ids), trained.index(True) + self._tokens)
        return Encoded(ids[:end], trained[:end], dropped + len(ids) - end)
