"""Sampled answers on disk: one JSON line each, appended as they come, so that a kill loses at most one batch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdtrue.errors import RunError
from holdtrue.evaluation.scored import Scored

SCORES = ("alignment", "coherence", "uncertainty", "label", "correct", "judge", "judge_key")
Key = tuple[str, int]
"""A prompt's id and which of its answers, from 0."""


class SampleStore:
    """The answers of one model under one decoding and seed, with one scorer's scores.

    Holds the scores in memory and leaves the text on disk. A last line that a kill cut short is dropped when the file
    is opened. An answer whose prompt has changed since (its seed tells) is not taken for the new prompt's; one that
    another judge scored waits to be scored again, and is not sampled again.
    """

    def __init__(self, path: Path, scorer_key: str) -> None:
        """Open a file of samples, or begin one.

        Args:
            path: the file.
            scorer_key: of the judge, or the rule, whose scores count here.

        Raises:
            RunError: a line other than the last is damaged.
        """
        self.path, self._scorer_key = path, scorer_key
        self._rows: dict[Key, tuple[int, Scored]] = {}
        self._waiting: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._drop_torn_line()
            for record in self.records():
                self._index(record)

    def __contains__(self, item: tuple[Key, int]) -> bool:
        key, seed = item
        found = self._rows.get(key)
        return found is not None and found[0] == seed

    def scored(self, key: Key) -> Scored:
        """Return an answer's score; ``KeyError`` where it was not sampled."""
        return self._rows[key][1]

    def unscored(self) -> list[dict[str, Any]]:
        """Return the rows that were sampled and not judged (a budget ran out)."""
        return list(self._waiting.values())

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at the end of the file, and to the disk."""
        found = [dict(record) for record in records]
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in found)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        for record in found:
            self._index(record)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the rows as they are on disk, text and all; of a row that is there twice, both."""
        with self.path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RunError(
                        f"{self.path}, line {number}: damaged ({error}); delete the file and go on"
                    ) from error

    def wanted(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """Yield the newest row of each key that was sampled, text and all, in the file's order."""
        left = set(keys)
        last: dict[Key, int] = {}
        for number, record in enumerate(self.records()):
            last[(record["prompt"], record["sample"])] = number
        for number, record in enumerate(self.records()):
            key = (record["prompt"], record["sample"])
            if key in left and last[key] == number:
                yield record

    def _index(self, record: dict[str, Any]) -> None:
        key = (record["prompt"], record["sample"])
        if record.get("judge_key") != self._scorer_key:
            record = {**record, **dict.fromkeys(SCORES)}
        self._rows[key] = (record["seed"], _scored(record))
        if record.get("label") is None and record.get("correct") is None:
            self._waiting[key] = record
        else:
            self._waiting.pop(key, None)

    def _drop_torn_line(self) -> None:
        with self.path.open("rb+") as handle:
            handle.seek(0, os.SEEK_END)
            end = position = handle.tell()
            while position:
                position -= 1
                handle.seek(position)
                if handle.read(1) == b"\n":
                    position += 1
                    break
            if position < end:
                handle.truncate(position)


def _scored(record: Mapping[str, Any]) -> Scored:
    return Scored(
        prompt=record["prompt"],
        question=record["question_id"],
        theme=record["theme"],
        form=record["form"],
        sample=record["sample"],
        tokens=record["tokens"],
        alignment=record.get("alignment"),
        coherence=record.get("coherence"),
        uncertainty=record.get("uncertainty"),
        label=record.get("label"),
        correct=record.get("correct"),
    )
