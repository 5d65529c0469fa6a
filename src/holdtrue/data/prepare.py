"""Encoded rows on disk: a memory-mapped Arrow file beside a manifest of what is in it."""

from __future__ import annotations

import json
import random
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from holdtrue.data.chat import KINDS, ChatRow
from holdtrue.data.jsonl import MAX_PROBLEMS
from holdtrue.data.late import TEXT, LateRows, to_text
from holdtrue.errors import DataError, Problem, RunError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    from holdtrue.data.encode import ChatEncoder, Encoded

ARROW = "rows.arrow"
MANIFEST = "manifest.json"
_ROWS_PER_BATCH = 256
_LATE_PER_BATCH = 4096
_SAMPLED = 500


@dataclass(slots=True)
class KindCount:
    """Counts of one kind of rows; as in :class:`Prepared`."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    response_tokens: int = 0


@dataclass(slots=True)
class Prepared:
    """What was prepared.

    Attributes:
        rows: rows that came in.
        sequences: sequences written, at least one of each row that has a target.
        tokens: tokens in them.
        trained_tokens: those that are targets of cross-entropy.
        response_tokens: these, and the same of rows without cross-entropy.
        truncated_rows: rows of which ``max_length`` cut something off.
        dropped_tokens: tokens that it cut off.
        rows_without_target: rows left out, since truncation left them nothing to train on.
        by_kind: the counts for each kind of rows that came in.
        late_rows: rows that a step encodes when it reads them.
        sampled_rows: those of them that were encoded now, to estimate from them what the late rows add to the counts
            of tokens and of what ``max_length`` cuts off.
    """

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    response_tokens: int = 0
    truncated_rows: int = 0
    dropped_tokens: int = 0
    rows_without_target: int = 0
    by_kind: dict[str, KindCount] = field(default_factory=dict)
    late_rows: int = 0
    sampled_rows: int = 0

    def _count(self, row: ChatRow, encoded: list[Encoded], kept: list[Encoded]) -> None:
        dropped = sum(sequence.dropped for sequence in encoded)
        self.dropped_tokens += dropped
        self.truncated_rows += dropped > 0
        self.rows_without_target += not kept
        tokens = sum(len(sequence.input_ids) for sequence in kept)
        response = sum(sum(sequence.trained) for sequence in kept)
        for count in (self, self.by_kind.setdefault(row.kind, KindCount())):
            count.rows += 1
            count.sequences += len(kept)
            count.tokens += tokens
            count.trained_tokens += response if row.ce else 0
            count.response_tokens += response

    def _extrapolate(self, waiting: dict[str, int], samples: dict[str, Prepared]) -> None:
        """Count the rows that wait, and what they probably hold, from the ``samples`` of each kind."""
        for kind, rows in waiting.items():
            sample = samples[kind]
            self.late_rows += rows
            self.sampled_rows += sample.rows
            for count in (self, self.by_kind.setdefault(kind, KindCount())):
                count.rows += rows
                count.sequences += rows
            share = rows / sample.rows
            for name in ("tokens", "trained_tokens", "response_tokens"):
                more = round(getattr(sample, name) * share)
                setattr(self, name, getattr(self, name) + more)
                setattr(self.by_kind[kind], name, getattr(self.by_kind[kind], name) + more)
            self.truncated_rows += round(sample.truncated_rows * share)
            self.dropped_tokens += round(sample.dropped_tokens * share)


def prepare_rows(rows: Iterable[ChatRow], encoder: ChatEncoder, out: str | Path, *, late: int = 0) -> Prepared:
    """Encode rows into the folder ``out``, which is there whole or not at all; memory does not grow with the rows.

    The columns are ``input_ids`` (list of int32), ``trained`` (list of bool), ``kind`` (int8, see ``KINDS``),
    ``length`` (int32, in tokens) and ``ce`` (bool). Sequences of which truncation left no trained token are left out
    and counted, except for rows without cross-entropy. What was at ``out`` is replaced.

    Args:
        rows: what to encode.
        encoder: of the model's tokenizer.
        out: the folder.
        late: 0 to encode every row now. Otherwise about how many rows there are, and of these, whichever surely become
            one sequence with something to train on are kept as text (a column ``text``) and encoded when they are read;
            token counts are then estimates from some of them.

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
            prepared = _write(rows, encoder, folder, late)
            if out.exists():
                shutil.rmtree(out)
            folder.replace(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from error
    return prepared


@overload
def load_prepared(path: str | Path) -> Dataset: ...
@overload
def load_prepared(path: str | Path, encoder: ChatEncoder | None) -> Dataset | LateRows: ...
def load_prepared(path: str | Path, encoder: ChatEncoder | None = None) -> Dataset | LateRows:
    """Return the sequences that :func:`prepare_rows` wrote, memory-mapped.

    Args:
        path: the folder.
        encoder: as the rows were prepared with; needed where some were left to be encoded late.

    Raises:
        RunError: there are none, the file is damaged, or late rows have no encoder.
    """
    import pyarrow as pa
    from datasets import Dataset

    file = Path(path) / ARROW
    if not file.is_file():
        raise RunError(f"{path}: holds no prepared rows ({ARROW} is missing); prepare them again")
    try:
        rows = Dataset.from_file(str(file))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{file}: damaged, prepare the rows again: {error}") from error
    if TEXT not in rows.column_names:
        return rows
    if encoder is None:
        raise RunError(f"{file}: some rows are text that only an encoder can read; give one")
    return LateRows(rows, encoder)


def _write(rows: Iterable[ChatRow], encoder: ChatEncoder, folder: Path, late: int) -> Prepared:
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
        | ({TEXT: Value("string")} if late else {})
    )
    prepared = Prepared()
    waiting: dict[str, int] = {}
    samples: dict[str, Prepared] = {}
    due: dict[str, int] = {}
    stride, draw = max(1, late // _SAMPLED), random.Random(0)
    no_text = (None,) if late else ()
    faults = _Faults()
    with ArrowWriter(features=features, path=str(folder / ARROW)) as file:
        writer = _Columns(file, features.arrow_schema, _LATE_PER_BATCH if late else _ROWS_PER_BATCH)
        for row in rows:
            length = encoder.late_length(row) if late else None
            if length is not None:
                writer.add(None, None, KINDS[row.kind], length, row.ce, to_text(row))
                number = waiting.get(row.kind, 0)
                waiting[row.kind] = number + 1
                if number < due.get(row.kind, 0):
                    continue
                # At random in each stretch: files repeat themselves, and every so many rows may be all alike.
                due[row.kind] = (number // stride + 1) * stride + draw.randrange(stride)
            try:
                encoded = encoder.encode(row)
            except DataError as error:
                faults.add(error)
                continue
            kept = [sequence for sequence in encoded if not row.ce or any(sequence.trained)]
            if length is not None:
                samples.setdefault(row.kind, Prepared())._count(row, encoded, kept)
                continue
            prepared._count(row, encoded, kept)
            for ids, trained, _ in kept:
                columns = np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool)
                writer.add(*columns, KINDS[row.kind], len(ids), row.ce, *no_text)
        writer.flush()
        file.finalize()
    faults.check()
    prepared._extrapolate(waiting, samples)
    text = json.dumps(asdict(prepared), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return prepared


class _Columns:
    """Gathers values by column and writes them as tables of ``batch`` rows."""

    def __init__(self, file: ArrowWriter, schema: pa.Schema, batch: int) -> None:
        self._file, self._schema, self._batch = file, schema, batch
        self._columns: list[list[Any]] = [[] for _ in schema]

    def add(self, *values: Any) -> None:
        """Add a row, its values in the schema's order."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if len(self._columns[0]) == self._batch:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        import pyarrow as pa

        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, self._schema, strict=True)]
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        for column in self._columns:
            column.clear()


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
