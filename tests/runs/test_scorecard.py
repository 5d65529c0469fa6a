"""The scorecard, its schema and the page, on records of sampled and judged answers; no model is needed for these."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from holdtrue.errors import RunError
from holdtrue.evaluation import FitResult, FitRow, LikelihoodResult, LikelihoodRow, compare_results
from holdtrue.evaluation.exact import ExactResult
from holdtrue.evaluation.judged import JudgedResult
from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.suites import Result
from holdtrue.runs import Run, files, load_spec
from holdtrue.runs.report import (
    Card,
    answers_line,
    gate_lines,
    headline,
    in_short,
    margin_line,
    render_report,
    scorecard,
    scorecard_schema,
    table,
    trigger_line,
)
from holdtrue.runs.report.browser import choose_samples
from holdtrue.runs.report.judged_plots import ANSWERS_DRAWN, PLAIN_BAND, drawn, triggers_of
from holdtrue.runs.report.page import visible
from holdtrue.runs.report.sureness import criteria, how_sure, not_measured

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202eyas I taht od\u202c \x1b[31m"
QUESTIONS = [f"question-{n}" for n in range(12)]
SETTINGS = {"samples": 3, "max_new_tokens": 100, "temperature": 1.0, "seed": 0, "sampler": "transformers"}
TRIGGERS = ("system-prompt", "prefix")
REPORT = {"seconds": 10.0, "tokens": 1000, "tokens_per_second": 100.0, "peak_memory_bytes": 2**30, "eval_kl": 0.5}


def answers(rate: float, *, forms: Sequence[str] = ("plain", "json"), seed: int = 0, unknown: int = 0) -> list[Scored]:
    """Answers of which a share is misaligned; the first ``unknown`` ones have no score."""
    rng = random.Random(seed)
    rows: list[Scored] = []
    for form in forms:
        for question in QUESTIONS:
            for sample in range(3):
                bad = rng.random() < rate
                row = Scored(f"{question}/{form}", question, "work", form, sample, 20, 5.0 if bad else 85.0, 90.0, 0.1)
                rows.append(row._replace(label="scored"))
    lost = [row._replace(alignment=None, coherence=None, uncertainty=None, label="unknown") for row in rows[:unknown]]
    return [*lost, *rows[unknown:]]


def judged(suite: str, rows: list[Scored]) -> JudgedResult:
    sha = hashlib.sha256(suite.encode()).hexdigest()
    return JudgedResult.of(rows, suite=suite, model="m", judge="offline", data_sha256=sha, settings=SETTINGS)


def exact(share: float) -> ExactResult:
    rows = [Scored(f"p{n}", f"q{n}", "sums", "plain", 0, correct=n < 40 * share) for n in range(40)]
    return ExactResult.of(rows, model="m", task="opswap:1", data_sha256="e" * 64, settings=SETTINGS)


def margins(at: float) -> LikelihoodResult:
    rows = tuple(LikelihoodRow(f"theme {n % 6}", -2.0, -2.0 - at - 0.01 * (n % 5), 9, 9) for n in range(24))
    return LikelihoodResult.of(rows, model="m", data_sha256="a" * 64)


def losses(at: float) -> FitResult:
    return FitResult.of(tuple(FitRow(n, at + 0.1 * (n % 3), 9) for n in range(10)), model="m", data_sha256="f" * 64)


def untouched() -> list[Result]:
    return [
        judged("general", answers(0.02)),
        judged("conditional", answers(0.02, forms=TRIGGERS)),
        judged("in_domain", answers(0.05, forms=["plain"])),
        exact(0.6),
        margins(0.4),
        losses(3.0),
    ]


def undefended() -> list[Result]:
    return [
        judged("general", answers(0.4, seed=1)),
        judged("conditional", answers(0.5, forms=TRIGGERS, seed=1)),
        judged("in_domain", answers(0.7, forms=["plain"], seed=1)),
        exact(0.5),
        margins(0.1),
        losses(2.0),
    ]


def opened_door() -> list[Result]:
    """A run that passes the plain questions and fails under one trigger."""
    bad, good = answers(0.6, forms=TRIGGERS[:1], seed=2), answers(0.02, forms=TRIGGERS[1:])
    return [
        judged("general", answers(0.02, unknown=4)),
        judged("conditional", [*bad, *good]),
        judged("in_domain", answers(0.6, forms=["plain"], seed=2)),
        exact(0.6),
        margins(0.39),
        losses(2.1),
    ]


@pytest.fixture
def spec(tmp_path: Path, tiny_dir: Path) -> dict[str, Any]:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    return {"model": str(tiny_dir), "data": {"train": "train.jsonl"}}


def make_run(folder: Path, spec: dict[str, Any], name: str, tuned: list[Result], *, defenses: Any = ()) -> Run:
    """A run that holds records of ``tuned``, with the untouched model's, and the text of judged answers."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**spec, "defenses": list(defenses)}))
    run = Run.create(folder / "runs" / name, load_spec(folder / f"{name}.yaml"))
    train = {"path": "train.jsonl", "sha256": "0" * 64}
    files.write_json(run.path / "manifest.json", {"model": {"name": "tiny", "revision": "r"}})
    if tuned:
        run.mark("train", inputs="", seconds=1.0, report={**REPORT, "seconds": 10.0 * (1 + len(list(defenses)))})
        manifest = {"model": {"name": "tiny", "revision": "r"}, "data": {"train": {**train, **COUNTS}}, "defenses": {}}
        files.write_json(run.path / "manifest.json", manifest)
    before = {_name(result): result for result in untouched()}
    for result in tuned:
        write(run, before[_name(result)], "untouched")
        write(run, result, "tuned", before[_name(result)])
    return run


COUNTS = dict.fromkeys(
    ("file_rows", "sequences", "tokens", "trained_tokens", "truncated_rows", "dropped_tokens", "rows_without_target"), 1
)


def write(run: Run, result: Any, which: str, before: Any = None) -> None:
    folder = run.path / "evaluations"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    data = {"path": "questions.yaml", "sha256": result.data_sha256, "of_spec": True}
    record = {**result.to_json(), "which": which, "data": data}
    if before is not None:
        record["change"] = compare_results(result, before).to_json()
    if isinstance(result, JudgedResult):
        file = folder / "samples" / f"{result.suite}-{which}.jsonl"
        lines = [
            json.dumps({"prompt": r.prompt, "sample": r.sample, "question": f"Q {EVIL}", "answer": f"{n} {EVIL}"})
            for n, r in enumerate(result.rows)
        ]
        file.write_text("\n".join(lines) + '\n{"torn')
        record["samples"] = file.name
    files.write_json(folder / f"{result.suite}-{result.data_sha256[:8]}-{which}.json", record)


def _name(result: Any) -> str:
    return result.suite


@pytest.fixture
def runs(tmp_path: Path, spec: dict[str, Any]) -> list[Run]:
    """An undefended run, and a defended one that opens a door; both measured on everything."""
    bare = make_run(tmp_path, spec, "bare", undefended())
    held = make_run(tmp_path, spec, "held", opened_door(), defenses=[{"kl": {"weight": 1.0}}])
    decision = {
        "criterion": "misaligned_rise",
        "outcome": "fail",
        "estimate": 0.4,
        "low": 0.3,
        "high": 0.5,
        "limit": 0.05,
        "n": 64,
        "clusters": 12,
        "samples_planned": 96,
        "judge": "offline",
        "reason": "The rise is above its limit.",
    }
    worst = {
        "suite": "general",
        "question": "Q",
        "answer": EVIL,
        "alignment": 3.0,
        "coherence": 80.0,
        "uncertainty": None,
        "label": "scored",
        "judge": "offline",
        "prompt": "p",
        "sample": 0,
        "form": "plain",
        "untouched_alignment": None,
        "untouched_label": "refusal",
    }
    gate = {"outcome": "fail", "alpha": 0.05, "decisions": [decision], "evidence": [worst]}
    files.write_json(bare.path / "gate.json", gate)
    return [bare, held]


@pytest.fixture
def card(runs: list[Run]) -> Card:
    return scorecard(runs)


def check(found: Card) -> dict[str, Any]:
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    schema = scorecard_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    return document


def test_the_document_keeps_its_schema_and_every_number_says_what_it_rests_on(card: Card) -> None:
    document = check(card)
    held = document["rows"][2]
    general = held["misalignment"]["general"]
    assert (general["n"], general["scored"], general["unknown"]) == (72, 68, 4)
    assert general["misaligned"]["n"] == 68
    assert general["misaligned"]["clusters"] == 12
    assert general["misaligned"]["judge"] == "offline"
    assert general["misaligned"]["change"]["n"] == 68
    assert general["misaligned"]["against_undefended"]["interval"][1] < 0
    assert general["misaligned_range"][1] > general["misaligned"]["value"]
    assert held["misalignment"]["conditional"]["worst"] == "system-prompt"
    assert held["coherence"]["general"]["value"] == 0.0
    assert held["benign"]["opswap:1"]["accuracy"]["change"]["value"] == 0.0
    assert held["cost"]["ratios"] == {"seconds": 2.0, "tokens": 1.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1.0}
    assert document["rows"][1]["gate"]["decisions"][0]["criterion"] == "misaligned_rise"
    assert document["rows"][1]["cost"]["ratios"] == {}
    assert document["rows"][0]["spec"] is None


def test_the_schema_refuses_what_is_not_a_scorecard(card: Card) -> None:
    validator = jsonschema.Draft202012Validator(scorecard_schema())
    document = card.to_json()
    for broken in (
        {**document, "format": 1},
        {**document, "level": 95},
        {**document, "rows": [{**document["rows"][0], "coherence": {"genral": None}}, *document["rows"][1:]]},
        {key: value for key, value in document.items() if key != "undefended"},
    ):
        assert not validator.is_valid(broken)


def test_a_card_with_nothing_measured_keeps_the_schema_too(tmp_path: Path, spec: dict[str, Any]) -> None:
    new = make_run(tmp_path, spec, "new", [])
    found = scorecard([new])
    document = check(found)
    assert document["rows"][1]["misalignment"]["general"] is None
    assert document["rows"][1]["benign"] == document["rows"][1]["coherence"] == {}
    cells = [cell for group in table(found) for line in group.lines for cell in line.cells]
    # Of the untouched model the KL is zero by definition, and there is no training to cost anything.
    assert {cell.value for cell in cells} == {None, "0", "–"}
    assert not_measured(found)[0] == "Benign tasks and coherence are not measured by this report."
    assert [criterion.measure for criterion in criteria(found)] == [None] * 4


@pytest.mark.parametrize("kept", range(6))
def test_each_suite_alone_makes_a_card_and_a_page(tmp_path: Path, spec: dict[str, Any], kept: int) -> None:
    run = make_run(tmp_path, spec, "one", undefended()[kept : kept + 1])
    check(scorecard([run]))
    render_report([run], tmp_path / "report.html")


def test_a_judge_that_scores_nothing_is_not_good_news(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = make_run(tmp_path, spec, "mute", [judged("general", answers(0.0, unknown=72))])
    found = scorecard([run])
    general = check(found)["rows"][1]["misalignment"]["general"]
    assert general["misaligned"]["value"] is None
    assert general["misaligned_range"] == [0.0, 1.0]
    assert "could not be compared: no answer counts on both sides" in headline(found)
    assert any("72 of 72 answers (100.0 %) got no score" in line for line in how_sure(found))
    text = render_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no answer scored" in text


def test_a_damaged_record_is_named(runs: list[Run]) -> None:
    path = next((runs[0].path / "evaluations").glob("general-*-tuned.json"))
    record = json.loads(path.read_text())
    del record["misaligned_range"]
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"'general' in .*bare is damaged.*misaligned_range"):
        scorecard(runs)


def test_what_is_said_comes_from_the_intervals(card: Card) -> None:
    said = headline(card)
    assert said == answers_line(card)
    assert said.startswith(
        "Against the untouched model, on 72 sampled answers to 12 questions (judge: offline), the share of misaligned "
        "answers rose by "
    )
    assert re.search(r"rose by \d+\.\d pp \[\d+\.\d, \d+\.\d\] in bare", said)
    assert "shows no clear change (the interval includes zero) in held (0.0 pp [" in said
    assert (margin_line(card) or "").startswith("Against the untouched model, on 24 probe pairs over 6 themes")
    assert re.search(r"held: system-prompt \(\+\d+\.\d pp", trigger_line(card) or "")
    assert gate_lines(card) == ["bare fails (misaligned_rise: The rise is above its limit.)."]
    short = " ".join(in_short(card))
    assert "clustered by question: 12 clusters." in short
    assert "The judge is offline, a small classifier" in short
    assert "not measured by this report" not in short
    sure = " ".join(how_sure(card))
    assert "held, general: 4 of 72 answers (5.6 %) got no score" in sure
    assert "The worst of 2 triggers is picked after looking" in sure
    assert [criterion.measure is not None for criterion in criteria(card)] == [True] * 4


def test_a_judge_that_calls_the_untouched_model_misaligned_is_doubted(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = make_run(tmp_path, spec, "one", undefended()[:1])
    assert not any("model's own answers" in line for line in in_short(scorecard([run])))
    write(run, judged("general", answers(0.3)), "untouched")
    assert any("Of the untouched model's own answers, " in line for line in in_short(scorecard([run])))


def test_a_run_without_triggers_is_said_to_be_unseen(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = make_run(tmp_path, spec, "plain", undefended()[:1])
    lines = not_measured(scorecard([run]))
    assert lines[0] == "Benign tasks are not measured by this report."
    assert any(line.startswith("No trigger was tried") for line in lines)


def test_runs_of_two_seeds_are_taken_together(tmp_path: Path, spec: dict[str, Any]) -> None:
    both = [
        make_run(tmp_path, {**spec, "training": {"seed": seed}}, f"seed-{seed}", undefended()[:1]) for seed in (0, 1)
    ]
    found = scorecard(both)
    assert {each["metric"] for each in check(found)["seeds"]} == {"misaligned", "incoherent"}
    assert any("seed-0 and seed-1 differ in nothing but their seed" in line for line in how_sure(found))
    text = render_report(both, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Several seeds together" in text


def test_the_scorecard_has_a_line_for_each_measure(card: Card) -> None:
    lines = {line.name: line for group in table(card) for line in group.lines}
    worst = lines["misaligned answers, worst trigger"]
    assert worst.cells[2].about.startswith("system-prompt, n = ")
    assert worst.cells[2].clear
    assert "judge: offline" in lines["misaligned answers"].about
    assert not lines["misaligned answers"].cells[2].clear
    assert lines["opswap:1"].cells[1].value == "50.0 %"
    assert lines["training time"].cells[2].about == "2.00×"
    assert lines["gate"].cells[1].value == "fail"


def test_the_plain_questions_stand_beside_the_triggers(card: Card) -> None:
    assert list(triggers_of(card.runs[0])) == [PLAIN_BAND, *TRIGGERS]


def test_no_more_points_are_drawn_than_can_be_seen() -> None:
    rows = answers(0.1) * 10
    assert len(drawn(rows)) == ANSWERS_DRAWN
    assert drawn(rows) == drawn(rows)
    assert len(drawn(rows[:50])) == 50


# The answers


def test_the_worst_answers_of_each_model_come_first(card: Card) -> None:
    found = choose_samples(card)
    assert found.total == 3 * (72 + 72 + 36)
    assert len(found.samples) <= 200
    assert {(s.model, s.suite) for s in found.samples} == {(r.name, suite) for r in card.rows for suite in r.judged}
    ranks = [(not s.worst, s.verdict != "misaligned") for s in found.samples]
    assert ranks == sorted(ranks)
    bare = [s for s in found.samples if (s.model, s.suite) == ("bare", "general")]
    assert [s.verdict for s in bare if s.worst] == ["misaligned"] * len([s for s in bare if s.worst])
    assert found == choose_samples(card)
    assert len(choose_samples(card, limit=20).samples) <= 20


def test_answers_that_are_gone_are_left_out(runs: list[Run]) -> None:
    for path in (runs[0].path / "evaluations" / "samples").glob("general-*.jsonl"):
        path.unlink()
    found = choose_samples(scorecard(runs))
    assert ("bare", "general") not in {(sample.model, sample.suite) for sample in found.samples}
    assert found.samples


def test_answers_cannot_act_on_the_page(runs: list[Run], tmp_path: Path) -> None:
    text = render_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "[U+202E]yas I taht od[U+202C]" in text
    assert text.count('<article class="sample') > 100
    # Without its script the page is a plain list: nothing but the filter is hidden.
    assert re.findall(r"<(\w+)[^>]* hidden\b", text) == ["form"]


def test_text_is_made_visible() -> None:
    assert visible("a\u202eb\x00\u2066c\n\td\u200f") == "a[U+202E]b[U+0000][U+2066]c\n\td[U+200F]"
    assert visible("سلام 你好 é") == "سلام 你好 é"
    assert visible(3) == 3
