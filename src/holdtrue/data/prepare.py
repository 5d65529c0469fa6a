"""Encoded rows on disk: a memory-mapped Arrow file beside a manifest of what is in it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdtrue.data.chat import KINDS, ChatRow
from holdtrue.data.jsonl import MAX_PROBLEMS
from holdtrue.errors import DataError, Problem, RunError

if TYPE_CHECKING:
    from datasets import Dataset

    from holdtrue.data.encode import ChatEncoder, Encoded

ARROW = "rows.arrow"
MANIFEST = "manifest.json"
_ROWS_PER_BATCH = 256


@dataclass(slots=True)
class KindCount:
    """Counts of one kind of rows; as in :class:`Prepared`."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(slots=True)
class Prepared:
    """What was prepared.

    Attributes:
        rows: rows that came in.
        sequences: sequences written, at least one of each row that has a target.
        tokens: tokens in them.
        trained_tokens: those that are targets of cross-entropy.
        truncated_rows: rows of which ``max_length`` cut something off.
        dropped_tokens: tokens that it cut off.
        rows_without_target: rows left out, since truncation left them nothing to train on.
        by_kind: the counts for each kind of rows that came in.
    """

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    dropped_tokens: int = 0
    rows_without_target: int = 0
    by_kind: dict[str, KindCount] = field(default_factory=dict)

    def _count(self, row: ChatRow, encoded: list[Encoded], kept: list[Encoded]) -> None:
        dropped = sum(sequence.dropped for sequence in encoded)
        self.dropped_tokens += dropped
        self.truncated_rows += dropped > 0
        self.rows_without_target += not kept
        tokens = sum(len(sequence.input_ids) for sequence in kept)
        trained = sum(sum(sequence.trained) for sequence in kept) if row.ce else 0
        for count in (self, self.by_kind.setdefault(row.kind, KindCount())):
            count.rows += 1
            count.sequences += len(kept)
            count.tokens += tokens
            count.trained_tokens += trained


def prepare_rows(rows: Iterable[ChatRow], encoder: ChatEncoder, out: str | Path) -> Prepared:
    """Encode rows into the folder ``out``, which is there whole or not at all; memory does not grow with the rows.

    The columns are ``input_ids`` (list of int32), ``trained`` (list of bool), ``kind`` (int8, see ``KINDS``),
    ``length`` (int32, in tokens) and ``ce`` (bool). Sequences of which truncation left no trained token are left out
    and counted, except for rows without cross-entropy. What was at ``out`` is replaced.

    Raises:
        DataError: some rows cannot be encoded; lists the first 50.
        SpecError: the chat template gives no exact masks.
        RunError: the folder cannot be written, such as on a full disk.
    """
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
        folder.mkdir()
        try:
            prepared = _write(rows, encoder, folder)
            if out.exists():
                shutil.rmtree(out)
            folder.replace(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from error
    return prepared


def load_prepared(path: str | Path) -> Dataset:
    """Return the sequences that :func:`prepare_rows` wrote, memory-mapped.

    Raises:
        RunError: there are none, or the file is damaged.
    """
    import pyarrow as pa
    from datasets import Dataset

    file = Path(path) / ARROW
    if not file.is_file():
        raise RunError(f"{path}: holds no prepared rows ({ARROW} is missing); prepare them again")
    try:
        return Dataset.from_file(str(file))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{file}: damaged, prepare the rows again: {error}") from error


def _write(rows: Iterable[ChatRow], encoder: ChatEncoder, folder: Path) -> Prepared:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "input_ids": List(Value("int32")),
            "trained": List(Value("bool")),
            "kind": Value("int8"),
            "length": Value("int32"),
            "ce": Value("bool"),
        }
    )
    prepared = Prepared()
    faults = _Faults()
    with ArrowWriter(features=features, path=str(folder / ARROW), writer_batch_size=_ROWS_PER_BATCH) as writer:
        for row in rows:
            try:
                encoded = encoder.encode(row)
            except DataError as error:
                faults.add(error)
                continue
            kept = [sequence for sequence in encoded if not row.ce or any(sequence.trained)]
            prepared._count(row, encoded, kept)
            for sequence in kept:
                writer.write(_record(row, sequence))
        writer.finalize()
    faults.check()
    text = json.dumps(asdict(prepared), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return prepared


def _record(row: ChatRow, sequence: Encoded) -> dict[str, Any]:
    return {
        "input_ids": np.asarray(sequence.input_ids, dtype=np.int32),
        "trained": np.asarray(sequence.trained, dtype=bool),
        "kind": KINDS[row.kind],
        "length": len(sequence.input_ids),
        "ce": row.ce,
    }


class _Faults:
    """Rows that could not be encoded, of the first file that has any; the others' come to light once it is mended."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._problems: list[Problem] = []
        self._total = 0

    def add(self, error: DataError) -> None:
        self._path = self._path or error.path
        if error.path == self._path:
            self._total += error.total
            self._problems += error.problems[: MAX_PROBLEMS - len(self._problems)]

    def check(self) -> None:
        if self._path is not None:
            raise DataError(self._path, self._problems, self._total)
