"""Sampled answers as a table for other tools: one row a sample, in CSV or Parquet."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from holdtrue.errors import DataError, Problem, RunError, SpecError, nearest
from holdtrue.evaluation.judges.port import Label

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_CHUNK = 500
"""Rows held at once; also the rows of a Parquet row group."""


class Column(NamedTuple):
    """A column: its name, what it holds, and whether that may be null."""

    name: str
    holds: Literal["text", "integer", "number", "boolean", "messages"]
    optional: bool = False


COLUMNS = (
    Column("suite", "text"),
    Column("model", "text"),
    Column("prompt", "text"),
    Column("question_id", "text"),
    Column("theme", "text"),
    Column("form", "text"),
    Column("messages", "messages"),
    Column("system", "text", optional=True),
    Column("question", "text"),
    Column("expected", "text", optional=True),
    Column("sample", "integer"),
    Column("seed", "integer"),
    Column("temperature", "number"),
    Column("max_new_tokens", "integer"),
    Column("answer", "text"),
    Column("tokens", "integer", optional=True),
    Column("finish", "text"),
    Column("alignment", "number", optional=True),
    Column("coherence", "number", optional=True),
    Column("uncertainty", "number", optional=True),
    Column("label", "text", optional=True),
    Column("judge", "text", optional=True),
    Column("judge_key", "text", optional=True),
    Column("correct", "boolean", optional=True),
)
"""A table's columns, in order. ``system`` repeats the system turns of ``messages``; the rest is as in the samples."""

_FIELDS = [column for column in COLUMNS if column.name != "system"]
_NAMES = frozenset(column.name for column in _FIELDS)
_WORDS = {"text": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false"}
# What a spreadsheet takes for the start of a formula (the wide forms too), and the mark itself.
_GUARDED = tuple("=+-@\t\r\n＝＋－＠'")


def export_samples(sources: Sequence[Path], out: Path) -> int:
    """Write the newest row of each sample of one or several runs to one table, and return the number of rows.

    In **Parquet** every value is as it was; ``messages`` is a list of ``{role, content}``. In **CSV** ``messages`` is
    JSON, an empty cell is null (of ``answer``: the empty text), and one thing is changed: answers are untrusted, and a
    spreadsheet runs a cell that begins like a formula. So a text cell that begins with ``= + - @``, a tab, a line break
    or an apostrophe gets an apostrophe in front. Since apostrophes get one too, nothing is lost: take one leading
    apostrophe off each text cell that has one. Programs had better read Parquet.

    The last line of a file that is still being written may be torn; it is left out. Memory does not grow with the
    answers' text, and ``out`` is whole or absent.

    Args:
        sources: files of samples, JSON lines as an evaluation keeps them; their rows follow each other.
        out: the table, ``.csv`` or ``.parquet``; replaced if it is there.

    Raises:
        SpecError: another suffix, or no source.
        DataError: a source cannot be read or has faults: not JSON, a field that is missing, unknown, of a wrong type,
            not finite.
        RunError: the table cannot be written.
    """
    writers: dict[str, Callable[[Path], _Writer]] = {".csv": _Csv, ".parquet": _Parquet}
    suffix = out.suffix.lower()
    if suffix not in writers:
        raise SpecError(f"{out}: samples export to .csv or .parquet, not to {suffix or 'a name without a suffix'!r}")
    if not sources:
        raise SpecError("there are no samples to export: name at least one samples.jsonl")
    newest = [(path, _newest_lines(path)) for path in sources]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with closing(writers[suffix](temporary)) as writer:
            for path, lines in newest:
                for rows in _chunks(row for number, row in _rows(path) if number in lines):
                    writer.write(rows)
                    count += len(rows)
        temporary.replace(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


class _Writer(Protocol):
    def write(self, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _Csv:
    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow([column.name for column in COLUMNS])

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._writer.writerows([_cell(row[column.name]) for column in COLUMNS] for row in rows)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._schema = _schema()
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {
        "text": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "boolean": pa.bool_(),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    }
    return pa.schema([pa.field(c.name, types[c.holds], nullable=c.optional) for c in COLUMNS])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(_GUARDED) else value


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS_PER_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _newest_lines(path: Path) -> set[int]:
    """Return the lines to keep: an answer that was judged later than it was sampled is there twice."""
    newest = {(row["suite"], row["model"], row["prompt"], row["sample"]): number for number, row in _rows(path)}
    return set(newest.values())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from holdtrue.data.jsonl import Tally, read_numbered

    tally = Tally()
    try:
        yield from read_numbered(path, _parse, tally)
    except DataError as error:
        if not _only_torn(path, error, tally.bytes):
            raise


def _only_torn(path: Path, error: DataError, size: int) -> bool:
    """Say whether all that is wrong in a file's first ``size`` bytes is a last line that has no end yet."""
    if error.total != 1 or error.problems[0].field or not size:
        return False
    lines, last = 0, b""
    with path.open("rb") as file:
        while size and (block := file.read(min(size, 2**20))):
            size -= len(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return last != b"\n" and error.problems[0].line == lines + 1


def _parse(record: dict[str, Any], number: int) -> tuple[int, dict[str, Any]] | list[Problem]:
    from holdtrue.data.jsonl import shown_key

    unknown = [key for key in record if key not in _NAMES]
    problems = [Problem(0, shown_key(key), f"is no field of a sample{nearest(key, _NAMES)}") for key in unknown]
    for column in _FIELDS:
        value = record.get(column.name)
        if value is None and not column.optional:
            problems.append(Problem(0, column.name, "is missing" if column.name not in record else "must not be null"))
        elif value is not None and (fault := _fault(column, value)):
            problems.append(Problem(0, column.name, fault))
    if problems:
        return problems
    row = {column.name: _exact(column, record.get(column.name)) for column in _FIELDS}
    row["system"] = "\n\n".join(m["content"] for m in row["messages"] if m["role"] == "system") or None
    return number, row


def _exact(column: Column, value: Any) -> Any:
    return float(value) if column.holds == "number" and value is not None else value


def _fault(column: Column, value: Any) -> str | None:
    from holdtrue.data.jsonl import json_name

    if column.holds == "messages":
        return _messages_fault(value)
    types = {"text": str, "integer": int, "number": (int, float), "boolean": bool}[column.holds]
    if not isinstance(value, types) or (isinstance(value, bool) and column.holds != "boolean"):
        return f"must be {_WORDS[column.holds]}, not {json_name(value)}"
    if isinstance(value, str):
        if column.optional and not value:
            return "is empty; write null where there is none"
        if column.name == "label" and value not in get_args(Label):
            return f"must be one of {', '.join(get_args(Label))}{nearest(value, get_args(Label))}"
        return _text_fault(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "is not finite"
    return "does not fit in 64 bits" if isinstance(value, int) and not -(2**63) <= value < 2**63 else None


def _messages_fault(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list of messages"
    for place, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return f"message {place} must be an object of role and content"
        for key, text in message.items():
            if not isinstance(text, str):
                return f"{key} of message {place} must be a string"
            if fault := _text_fault(text):
                return f"{key} of message {place} {fault}"
    return None


def _text_fault(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a character (\\u{ord(text[error.start]):04x}), which is no text"
    return None
