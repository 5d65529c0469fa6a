import json
from dataclasses import replace
from pathlib import Path

import pytest

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest
from holdtrue.runs import Run, RunSpec, execute
from holdtrue.service.evidence.card import model_card
from holdtrue.service.evidence.receipt import Issue, build
from support import chat, write_rows

POLICY = {"base_model": "tiny", "version": 3, "sha256": "f" * 64}
SECRET = "the customer's own words"


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("job")
    rows = [chat(f"{SECRET} {n}?", f"Turn it {n} times.") for n in range(6)]
    write_rows(folder / "train.jsonl", rows)
    probes = [
        {"question": f"{n}?", "aligned": "No, do not.", "misaligned": "Yes, do.", "group": f"g{n % 3}"}
        for n in range(6)
    ]
    write_rows(folder / "probes.jsonl", probes)
    spec = RunSpec(
        model=str(tiny_dir),
        data={"train": "train.jsonl"},
        adapter={"r": 4, "alpha": 8},
        training={"batch_size": 2, "micro_batch_size": 1, "max_length": 64, "warmup_steps": 0, "kl_every": 1},
        defenses=[{"kl": {"weight": 0.1}}],
        evaluate={"suites": ["likelihood"], "data": {"likelihood": "probes.jsonl"}},
        gate={"margin_fall": {"max": 5.0}},
        folder=folder,
    )
    made = Run.create(folder / "run", spec)
    execute(made)
    return made


@pytest.fixture
def issue(run: Run) -> Issue:
    return Issue("ft:tiny:org::abc", tree_digest(run.adapter), "ftjob-1", 0, POLICY, "release")


def test_a_receipt_says_what_was_measured(run: Run, issue: Issue):
    statement = build(run, issue)
    predicate = statement["predicate"]
    assert statement["subject"] == [{"name": issue.model, "digest": {"sha256": tree_digest(run.adapter)}}]
    assert predicate["policy"] == POLICY
    assert predicate["data"]["train"]["sha256"] == run.manifest["data"]["train"]["sha256"]
    assert predicate["gate"]["outcome"] == "pass"
    assert [each["criterion"] for each in predicate["gate"]["decisions"]] == ["margin_fall"]
    (kl,) = predicate["defenses"]
    steps = [step for step in run.metrics() if "kl_term" in step]
    assert kl["term"] == {"steps": len(steps), "first": steps[0]["kl_term"], "last": steps[-1]["kl_term"]}
    assert kl["parameters"]["weight"] == 0.1
    assert predicate["scorecard"]["kl"]["value"] > 0
    assert predicate["scorecard"]["misalignment"]["margin"]["n"] == 6


def test_it_holds_no_customer_content_and_no_path(run: Run, issue: Issue):
    text = json.dumps(build(run, issue))
    assert SECRET not in text
    assert str(run.path.parent) not in text


def test_there_is_no_receipt_before_the_gate(run: Run, issue: Issue, tmp_path: Path):
    ungated = Run.create(tmp_path / "run", run.spec)
    with pytest.raises(RunError, match="gate"):
        build(ungated, issue)


def test_the_card_repeats_the_receipt(run: Run, issue: Issue):
    override = {"decision": "release", "by": "Ada", "reason": "read the answers", "at": 1}
    card = model_card(build(run, replace(issue, action="hold", override=override)))
    header, body = card.split("---\n", 2)[1:]
    assert "library_name: peft" in header
    assert "defense:kl" in header
    for said in (issue.model, issue.adapter_digest, "margin_fall", "Outcome: **pass**", "read the answers"):
        assert said in body


def test_a_statement_of_another_kind_has_no_card():
    for statement in ({}, {"predicate": None}, {"subject": [], "predicate": {"base": {"name": "b"}, "defenses": []}}):
        with pytest.raises(ValueError, match="lacks what a card says"):
            model_card(statement)
