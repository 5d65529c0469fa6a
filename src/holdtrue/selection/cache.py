"""Scores of a pool under one model on disk: a file for each pool and model, appended to in windows of rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock

from holdtrue.errors import RunError
from holdtrue.models.store import cache_root

FORMAT = 1
"""Of the file, and of how rows are encoded and scored: whoever changes either counts it up."""


class Key(Protocol):
    """Names a file of scores: by the pool's hash, and by all that decides them, on one line."""

    @property
    def pool(self) -> str:
        """SHA-256 of the scored rows' file."""
        ...

    def header(self) -> str:
        """Return the first line of the file."""
        ...


class ScoreKey(NamedTuple):
    """All that a pool's scores depend on.

    Attributes:
        pool: SHA-256 of the pool's bytes.
        rows: rows in it.
        model: the base model's revision.
        adapter: SHA-256 of the adapter, or ``none``.
        max_length: tokens after which rows are cut.
        dtype: numbers that the model runs in.
        format: ``FORMAT``.
    """

    pool: str
    rows: int
    model: str
    adapter: str
    max_length: int | None
    dtype: str
    format: int = FORMAT

    def header(self) -> str:
        """Return the first line of the file."""
        return json.dumps(self._asdict(), sort_keys=True)


class ScoreFile:
    """One model's scores of a pool's first rows; use as ``with ScoreFile.open(key) as file``.

    Each line holds a window of rows and a digest of itself. What a kill cut short, or what was damaged, is dropped
    together with all behind it, and counts as not scored yet. No text of the pool is in it.

    Attributes:
        scores: nats per token; nan for a row that cannot be scored.
    """

    def __init__(self, path: Path, header: str) -> None:
        self.path = path
        self.scores: list[float] = []
        self._header = header
        self._read()

    @classmethod
    @contextlib.contextmanager
    def open(cls, key: Key, cache: str | os.PathLike[str] | None = None) -> Iterator[ScoreFile]:
        """Open the file of a key in the cache folder, alone: another process that wants it waits.

        Raises:
            RunError: the folder cannot be written.
        """
        name = hashlib.sha256(key.header().encode()).hexdigest()[:32]
        path = cache_root(cache) / "scores" / key.pool[:16] / f"{name}.jsonl"
        with contextlib.ExitStack() as stack:
            with _disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
                file = cls(path, key.header())
            yield file

    def append(self, scores: Sequence[float]) -> None:
        """Write the scores of the next rows to the disk; one that is not finite counts as none.

        Raises:
            RunError: the file cannot be written.
        """
        start = len(self.scores)
        values = [float(score) if math.isfinite(score) else None for score in scores]
        line = {"start": start, "nll": values, "digest": _digest(start, values)}
        with _disk_errors(self.path), self.path.open("ab") as handle:
            handle.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.scores += [math.nan if value is None else value for value in values]

    def _read(self) -> None:
        with self.path.open("a+b") as handle:
            handle.seek(0)
            whole = 0
            if handle.readline() == f"{self._header}\n".encode():
                whole = handle.tell()
                while (values := _window(handle.readline(), len(self.scores))) is not None:
                    self.scores += values
                    whole = handle.tell()
            handle.truncate(whole)
            if not whole:
                handle.write(f"{self._header}\n".encode())


def _window(line: bytes, start: int) -> list[float] | None:
    try:
        record = json.loads(line)
        values: list[Any] = record["nll"]
        if record["start"] != start or record["digest"] != _digest(start, values):
            return None
        return [math.nan if value is None else float(value) for value in values]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(start: int, values: Sequence[float | None]) -> str:
    return hashlib.sha256(json.dumps([start, values]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot keep scores in {path}: {error}. Free some space there, or set HOLDTRUE_CACHE to another folder."
        ) from error
