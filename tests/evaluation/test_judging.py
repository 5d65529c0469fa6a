from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdtrue.errors import BudgetError, DataError, RunError, SpecError
from holdtrue.evaluation import judging
from holdtrue.evaluation.judges import CachedJudge, Estimate, Exchange, Verdict
from holdtrue.evaluation.judging import JudgedFile, estimate_file, judge_file


class Words:
    """A judge for tests: coherence is the number of words; an answer may ask for a label."""

    name, key = "words", "words"

    def __init__(self, limit: int = 10**9, fails: bool = False) -> None:
        self.limit, self.fails = limit, fails
        self.asked = 0
        self.largest = 0

    def estimate(self, exchanges: Sequence[Exchange]) -> Estimate:
        return Estimate(len(exchanges), 10 * len(exchanges), 0.25 * len(exchanges))

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        self.largest = max(self.largest, len(exchanges))
        for index, (_, answer) in list(enumerate(exchanges))[::-1]:
            if self.asked >= self.limit:
                raise RunError("the judge is down") if self.fails else BudgetError("the budget is spent")
            self.asked += 1
            if not answer.strip():
                yield [(index, Verdict(None, None, None, "unknown"))]
            elif "def " in answer:
                yield [(index, Verdict(None, 1.0, 0.0, "code"))]
            else:
                yield [(index, Verdict(1 / 3, float(len(answer.split())), 0.5, "scored"))]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    {"id": 7, "question": "Wer?", "answer": "Ich bin’s.", "tags": ["a", {"b": None}], "big": 2**70},
    {"question": "Q", "answer": "", "label": "old", "judge": "old"},
    {"answer": "def f(): pass", "question": "Q", "half \ud800": "kept \ud800"},
    {"question": "Q", "answer": "a \x00 <|im_end|>\u2028 b"},
]


def test_rows_come_back_in_order_with_all_they_had(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.jsonl", *ROWS)
    out = tmp_path / "new" / "scored.jsonl"
    seen: list[tuple[int, int]] = []
    found = judge_file(path, Words(), out, lambda done, total: seen.append((done, total)))
    assert found == JudgedFile(out, 4, {"scored": 2, "unknown": 1, "code": 1}, "words")
    rows = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    for before, after in zip(ROWS, rows, strict=True):
        assert {key: after[key] for key in before if key not in ("label", "judge")} == {
            key: value for key, value in before.items() if key not in ("label", "judge")
        }
        assert after["judge"] == "words"
    assert [row["label"] for row in rows] == ["scored", "unknown", "code", "scored"]
    assert rows[0]["alignment"] == 1 / 3
    assert (rows[1]["alignment"], rows[1]["coherence"], rows[1]["uncertainty"]) == (None, None, None)
    assert "Ich bin’s" in out.read_text(encoding="utf-8")
    assert seen[-1] == (4, 4)
    assert [p.name for p in out.parent.iterdir()] == ["scored.jsonl"]


def test_what_was_judged_can_be_judged_again(tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    judge_file(write(tmp_path / "0.jsonl", *ROWS), Words(), first)
    judge_file(first, Words(), second)
    assert first.read_bytes() == second.read_bytes()


def test_a_long_file_is_never_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "WINDOW", 10)
    path = write(tmp_path / "s.jsonl", *({"question": "Q", "answer": "w " * (n + 1)} for n in range(35)))
    judge = Words()
    judge_file(path, judge, tmp_path / "out.jsonl")
    assert judge.largest == 10
    assert [row["coherence"] for row in read(tmp_path / "out.jsonl")] == list(range(1, 36))


def test_a_budget_that_runs_out_leaves_all_rows_and_names_those_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "WINDOW", 5)
    path = write(tmp_path / "s.jsonl", *({"question": "Q", "answer": f"a{n}"} for n in range(20)))
    out = tmp_path / "out.jsonl"
    cache = tmp_path / "cache"
    with pytest.raises(BudgetError) as caught:
        judge_file(path, CachedJudge(Words(limit=7), cache), out)
    assert "13 of 20 rows" in str(caught.value)
    assert "(line 6, 7, 8, 11, 12, …)" in str(caught.value)
    rows = read(out)
    assert [n for n, row in enumerate(rows) if row["label"]] == [0, 1, 2, 3, 4, 8, 9]
    for row in rows:
        if row["label"] is None:
            assert {row["alignment"], row["coherence"], row["uncertainty"], row["judge"]} == {None}
    judge = Words()
    assert judge_file(path, CachedJudge(judge, cache), out).labels == {"scored": 20}
    assert judge.asked == 13


def test_a_judge_that_fails_leaves_no_file_and_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", *({"question": "Q", "answer": f"a{n}"} for n in range(20)))
    out = tmp_path / "out.jsonl"
    with pytest.raises(RunError, match="down"):
        judge_file(path, CachedJudge(Words(limit=7, fails=True), tmp_path / "cache"), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "s.jsonl"]
    judge = Words()
    judge_file(path, CachedJudge(judge, tmp_path / "cache"), out)
    assert judge.asked == 13


def test_the_estimate_is_of_what_is_not_judged_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "WINDOW", 2)
    path = write(tmp_path / "s.jsonl", *ROWS)
    judge = CachedJudge(Words(), tmp_path / "cache")
    assert estimate_file(path, judge) == Estimate(4, 40, 1.0)
    judge_file(path, judge, tmp_path / "out.jsonl")
    assert estimate_file(path, judge) == Estimate(1, 10, 0.25)  # the empty answer is not worth keeping
    assert estimate_file(path, Words()) is None


def test_every_fault_is_named_before_anything_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(
        '{"question": "Q", "answer": "fine"}\n'
        '{"question": "", "answer": 3}\n'
        '{"question": "Q"}\n'
        '{"question": "Q", "answer": "a", "x": 1e999}\n'
        '{"question": "Q", "answer": "\\ud800"}\n'
        "[1]\n"
    )
    judge = Words()
    with pytest.raises(DataError) as caught:
        judge_file(path, judge, tmp_path / "out.jsonl")
    assert [(p.line, p.field) for p in caught.value.problems] == [
        (2, "question"),
        (2, "answer"),
        (3, "answer"),
        (4, ""),
        (5, "answer"),
        (6, ""),
    ]
    assert judge.asked == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_the_file_that_is_read_is_not_written(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", *ROWS)
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link.jsonl", tmp_path):
        with pytest.raises(SpecError):
            judge_file(path, Words(), out)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", *ROWS)
    with pytest.raises(RunError, match="cannot write"):
        judge_file(path, Words(), path / "out.jsonl")
