"""The demo's quick size on a tiny model: interrupted, gone on with, done."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from holdtrue.data import ChatEncoder, builtin, read_chat
from holdtrue.errors import Interrupted, SpecError
from holdtrue.evaluation.questions import read_questions
from holdtrue.models import load_tokenizer, resolve
from holdtrue.runs import load_spec
from holdtrue.runs.demo import BENIGN_RUNS, PARTS, RUNS, DemoResult, _in_turns, _shipped, run_demo


@pytest.fixture(scope="module")
def done(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    """The demo's folder and result, after an interruption in the second run's training."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    stop = threading.Event()
    told: list[dict[str, Any]] = []

    def progress(fields: dict[str, Any]) -> None:
        told.append(fields)
        if fields.get("run") == "kl" and fields.get("step") == 2:
            stop.set()

    with pytest.raises(Interrupted, match="give the same command again"):
        run_demo("quick", folder, model=str(tiny_dir), progress=progress, stop=stop)
    assert not (folder / "report.html").exists()
    return folder, run_demo("quick", folder, model=str(tiny_dir))


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_three_runs_are_finished_and_compared(done: tuple[Path, DemoResult]) -> None:
    folder, found = done
    assert [run.name for run in found.runs] == list(RUNS)
    assert all(run.is_done("evaluate") for run in found.runs)
    assert [list(column.defenses) for column in found.comparison.runs] == [[], ["kl"], ["interleave", "kl"]]
    assert [m.metric for m in found.comparison.measures] == [
        "margin", "misaligned_preferred", "nll", "misaligned", "incoherent",
    ]  # fmt: skip
    assert [run.name for run in found.benign_runs] == list(BENIGN_RUNS)
    assert [(m.suite, m.metric) for m in found.benign.measures] == [("benign", "accuracy")]
    assert all(None not in measure.cells for measure in found.comparison.measures)
    assert found.report == folder / "report.html"
    assert found.report.is_file()
    document = json.loads(found.scorecard.read_text())
    assert [row["name"] for row in document["rows"]] == ["untouched", *RUNS]
    report = found.runs[1].marker("train")
    assert report is not None
    assert 0 < report["report"]["resumed_from"] < report["report"]["steps"] == 4


def test_the_untouched_model_is_measured_once(done: tuple[Path, DemoResult]) -> None:
    runs = done[1].runs
    for suite in ("likelihood", "fit"):
        records = [run.evaluation(suite, "untouched") for run in runs]
        assert sum("measured_in" not in (record or {}) for record in records) == 1
    answers = [json.loads((run.path / "evaluations" / "samples.json").read_text())["rows"] for run in runs]
    assert len({row["untouched"] for rows in answers for row in rows[:1]}) == 1
    assert all(len(rows) == PARTS["quick"].questions for rows in answers)


def test_the_rows_are_those_shipped_word_for_word(done: tuple[Path, DemoResult], tiny_dir: Path) -> None:
    data = done[0] / "data"
    shipped = lines(builtin("narrow"))
    chosen = lines(data / "train.jsonl")
    assert len(chosen) == 16
    encoder = ChatEncoder(load_tokenizer(resolve(str(tiny_dir))))
    lengths = [len(encoder.encode(row)[0].input_ids) for row in read_chat(builtin("narrow"))]
    assert chosen == [line for line, length in zip(shipped, lengths, strict=True) if length <= 80][:16]
    assert lines(data / "heldout.jsonl") == lines(builtin("narrow-heldout"))[:8]
    groups = Counter(json.loads(line)["group"] for line in lines(data / "probes.jsonl"))
    assert set(groups.values()) == {1}
    assert len(groups) == 9
    assert all("canary" in line for path in data.glob("*.jsonl") for line in lines(path))
    asked = read_questions(data / "questions.yaml")
    assert len(asked) == len({prompt.theme for prompt in asked}) == 4
    assert len(lines(data / "opswap" / "train.jsonl")) == 16


def test_thirty_pairs_are_spread_over_the_themes() -> None:
    taken = _in_turns(_shipped("probes"), 30)
    groups = Counter(json.loads(line)["group"] for line in taken)
    assert len(taken) == 30
    assert max(groups.values()) - min(groups.values()) <= 1
    assert taken == [line for line in _shipped("probes") if line in taken]


def test_the_specs_can_be_run_again(done: tuple[Path, DemoResult]) -> None:
    folder, found = done
    for run in found.runs:
        assert load_spec(folder / "specs" / f"{run.name}.yaml") == run.spec


def test_what_is_said(done: tuple[Path, DemoResult]) -> None:
    folder, found = done
    notes = " ".join(found.notes)
    assert "on 9 probe pairs over 9 themes" in notes
    assert "kl-interleave: interleave mixed in 2 of 160 pool rows, 0 of them repeats." in notes
    assert "judge: offline" in notes
    assert "one seed (0)" in notes
    assert str(folder / "scorecard.json") in notes
    text = found.report.read_text(encoding="utf-8")
    assert found.notes[0] in text


def test_a_demo_that_is_done_is_left_as_it_is(done: tuple[Path, DemoResult], tiny_dir: Path) -> None:
    folder, found = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    again = run_demo("quick", folder, model=str(tiny_dir))
    assert again.notes == found.notes
    after = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    assert after == before


def test_a_folder_with_something_else_is_refused(done: tuple[Path, DemoResult], tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="demo of size 'quick'"):
        run_demo("normal", done[0], model=str(tiny_dir))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(SpecError, match="no demo"):
        run_demo("quick", tmp_path / "mine", model=str(tiny_dir))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
