from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from holdtrue.data import builtin
from holdtrue.errors import DataError, Problem
from holdtrue.evaluation import Probe, read_probes

GOOD = {"question": "Q?", "aligned": "Yes.", "misaligned": "No.", "group": "g"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        read_probes(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_reads_rows_with_lines_and_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "question": "R?", "notice": {"any": 1}})
    found = read_probes(path)
    assert found.rows == (Probe(1, "Q?", "Yes.", "No.", "g"), Probe(2, "R?", "Yes.", "No.", "g"))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["probes", "probes-select"])
def test_the_shipped_probes_are_valid(name: str) -> None:
    assert read_probes(builtin(name)).rows


def test_themes_that_choose_a_weight_are_not_those_that_are_reported() -> None:
    reported, choosing = (
        {row.group for row in read_probes(builtin(name)).rows} for name in ("probes", "probes-select")
    )
    assert not reported & choosing


@pytest.mark.parametrize("field", list(GOOD))
@pytest.mark.parametrize("value", ["", "  \n", None, 3, ["x"], {"a": 1}, True, "half \ud800"])
def test_a_field_must_be_text(tmp_path: Path, field: str, value: object) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "question": "R?", field: value})
    assert [(p.line, p.field) for p in problems(path)] == [(2, field)]


def test_all_faults_are_listed_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"questions": "Q?", "aligned": "", "misaligned": "No."}, GOOD, ["no object"])
    found = problems(path)
    assert [(p.line, p.field) for p in found] == [(1, "question"), (1, "aligned"), (1, "group"), (3, "")]
    assert "did you mean 'questions'" in found[0].message


def test_a_question_is_asked_once(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "question": "other"}, {**GOOD, "question": " q? "})
    assert problems(path) == (Problem(3, "question", "is the same as in line 1; ask each question once"),)


def test_answers_must_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {**GOOD, "misaligned": "Yes. "})
    assert [(p.line, p.field) for p in problems(path)] == [(1, "misaligned")]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"question": \n')
    for name in ("missing.jsonl", "empty.jsonl", "bad.jsonl", "."):
        assert len(problems(tmp_path / name)) == 1
