"""Judging a file of answers: what ``holdtrue judge SAMPLES.jsonl --judge NAME --out SCORED.jsonl`` does."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from holdtrue.data.jsonl import json_name, read_numbered, text_fault
from holdtrue.errors import BudgetError, Problem, RunError, SpecError
from holdtrue.evaluation.judges.budget import Estimate
from holdtrue.evaluation.judges.cache import CachedJudge
from holdtrue.evaluation.judges.port import Exchange, Judge, Verdict
from holdtrue.scoring import Progress

WINDOW = 512
"""Rows that are held in memory and judged together."""
_LINES_SHOWN = 5


class JudgedFile(NamedTuple):
    """What :func:`judge_file` wrote.

    Attributes:
        path: the file.
        rows: rows in it.
        labels: rows by label.
        judge: the judge's name.
    """

    path: Path
    rows: int
    labels: dict[str, int]
    judge: str


class _Row(NamedTuple):
    line: int
    record: dict[str, Any]
    exchange: Exchange


def judge_file(path: Path, judge: Judge, out: Path, progress: Progress | None = None) -> JudgedFile:
    """Judge each row of a file of JSON lines and write it to another, in order, with its other keys as they were.

    A row has ``question`` and ``answer``, and gets ``alignment``, ``coherence``, ``uncertainty`` (numbers or null),
    ``label`` (scored, code, refusal, unknown) and ``judge``. An empty answer is ``unknown``. The whole file is checked
    first; then a window of rows is in memory at a time. ``out`` appears when all is done; after a kill, run the same
    again: with a judge that remembers its verdicts, nothing is judged twice.

    Raises:
        SpecError: ``out`` is the file that is read, or a folder.
        DataError: rows are invalid; nothing was judged.
        BudgetError: the judge's budget ran out. ``out`` is written nevertheless, whole and in order; in the rows that
            were not judged, all five values are null.
        RunError: the judge cannot go on, or ``out`` cannot be written; there is no ``out`` then.
    """
    if out.is_dir():
        raise SpecError(f"{out} is a folder; name the file to write")
    if out.exists() and path.exists() and out.samefile(path):
        raise SpecError(f"{out} is the file that is read; write to another")
    total = sum(1 for _ in _rows(path))
    labels: Counter[str] = Counter()
    done = 0
    missed: list[int] = []
    stopped: BudgetError | None = None
    with _new_file(out) as file:
        rows = _rows(path)
        while window := list(islice(rows, WINDOW)):
            verdicts: dict[int, Verdict] = {}
            try:
                for batch in judge.judge([row.exchange for row in window]):
                    verdicts |= dict(batch)
                    if progress is not None:
                        progress(done + len(verdicts), total)
            except BudgetError as error:
                stopped = stopped or error
            for index, row in enumerate(window):
                verdict = verdicts.get(index)
                if verdict is None:
                    missed.append(row.line)
                else:
                    labels[verdict.label] += 1
                file.write(_line(row.record, verdict, judge.name))
            done += len(verdicts)
    if stopped is not None:
        lines = ", ".join(map(str, missed[:_LINES_SHOWN])) + (", …" if len(missed) > _LINES_SHOWN else "")
        raise BudgetError(
            f"{stopped}. {len(missed)} of {total} rows of {path} were not judged (line {lines}); {out} holds all rows, "
            "with null in place of a label in these"
        ) from stopped
    return JudgedFile(out, total, dict(labels), judge.name)


def estimate_file(path: Path, judge: Judge) -> Estimate | None:
    """Say what judging a file will take, without what is already in the judge's cache; ``None`` if it costs nothing.

    Raises:
        DataError: rows are invalid.
    """
    if not isinstance(judge, CachedJudge):
        return None
    rows = _rows(path)
    parts: list[Estimate] = []
    while window := list(islice(rows, WINDOW)):
        part = judge.estimate([row.exchange for row in window])
        if part is None:
            return None
        parts.append(part)
    costs = [part.cost for part in parts if part.cost is not None]
    return Estimate(sum(p.requests for p in parts), sum(p.tokens for p in parts), sum(costs) if costs else None)


def _rows(path: Path) -> Iterator[_Row]:
    return read_numbered(path, _parsed)


def _parsed(record: dict[str, Any], line: int) -> _Row | list[Problem]:
    problems: list[Problem] = []
    for field in ("question", "answer"):
        if field not in record:
            problems.append(Problem(0, field, "is missing"))
        elif not isinstance(record[field], str):
            problems.append(Problem(0, field, f"must be a string, not {json_name(record[field])}"))
        elif (field == "question" or record[field].strip()) and (fault := text_fault(record[field])):
            problems.append(Problem(0, field, fault))
    if not problems:
        try:
            json.dumps(record, allow_nan=False)
        except ValueError:
            problems.append(Problem(0, "", "holds a number that is too large to be written back"))
    return problems or _Row(line, record, Exchange(record["question"], record["answer"]))


def _line(record: dict[str, Any], verdict: Verdict | None, judge: str) -> str:
    values = verdict._asdict() if verdict else dict.fromkeys(Verdict._fields)
    row = {**record, **values, "judge": judge if verdict else None}
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character in a key that is not ours
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Yield a file that takes the name ``path``, whole and on disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}. Free some space, or name another file") from error
