"""From tokens to text as they come: no half character, no part of a stop text, nothing said twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: the model's.
        stops: texts at which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._prefix, self._read = 0, 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token and return what can be said now."""
        self._ids.append(token)
        return self._say(self._new(last=False), last=False)

    def end(self) -> str:
        """Return what was held back, once no token follows."""
        return "" if self.stopped else self._say(self._new(last=True), last=True)

    def _new(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or (after.endswith(_BROKEN) and not last):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _say(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins, short of the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
