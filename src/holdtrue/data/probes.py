"""Probe files: questions with an aligned and a misaligned answer each, as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.data.jsonl import Tally, read_numbered, text_fault
from holdtrue.errors import Problem, nearest

FIELDS = ("question", "aligned", "misaligned", "group")


class Probe(NamedTuple):
    """One row: its line in the file (from 1), the question, both answers, and the theme it belongs to."""

    line: int
    question: str
    aligned: str
    misaligned: str
    group: str


class Probes(NamedTuple):
    """A probe file's rows, in order, and the SHA-256 of the file."""

    rows: tuple[Probe, ...]
    sha256: str


def read_probes(path: str | Path) -> Probes:
    """Read and check a probe file; keys other than ``FIELDS`` are ignored.

    Raises:
        DataError: listing every fault: a field that is missing, not a string or empty; a question asked twice (rows
            would not be independent); two answers that are the same.
    """
    lines: dict[str, int] = {}

    def parse(record: dict[str, Any], line: int) -> Probe | list[Problem]:
        if problems := _faults(record):
            return problems
        probe = Probe(line, *(record[field] for field in FIELDS))
        first = lines.setdefault(" ".join(probe.question.split()).casefold(), line)
        if first != line:
            return [Problem(0, "question", f"is the same as in line {first}; ask each question once")]
        if probe.aligned.strip() == probe.misaligned.strip():
            return [Problem(0, "misaligned", "is the same answer as 'aligned'")]
        return probe

    tally = Tally()
    rows = tuple(read_numbered(path, parse, tally))
    return Probes(rows, tally.sha256)


def _faults(record: dict[str, Any]) -> list[Problem]:
    others = [key for key in record if key not in FIELDS]
    problems: list[Problem] = []
    for field in FIELDS:
        if field not in record:
            problems.append(Problem(0, field, f"is missing{nearest(field, others)}"))
        elif fault := text_fault(record[field]):
            problems.append(Problem(0, field, fault))
    return problems
