from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.data import Message
from holdtrue.errors import BudgetError, RunError
from holdtrue.evaluation.judges.port import Exchange, Verdict
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampled import (
    ExactMatch,
    SamplingSpec,
    all_samples,
    answer_seed,
    collect,
    identity,
    missing,
    rows_of,
    unjudged,
)
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.store import SampleStore

LABELS = {"suite": "general", "model": "m"}
KEY = "length-1"
SPEC = SamplingSpec(samples=3, max_new_tokens=8)


def prompt(name: str, text: str = "", expected: str | None = None) -> Prompt:
    asked = text or f"what of {name}?"
    return Prompt(name, name.split("/")[0], "theme", "plain", (Message("user", asked),), asked, expected)


class Parrot:
    """Answers with the seed and the last turn: a sampler whose every answer can be foretold."""

    name = "parrot"

    def __init__(self, batch: int = 2, fail_after: int | None = None) -> None:
        self.batch, self.fail_after, self.asked = batch, fail_after, 0

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Answer]]:
        for start in range(0, len(requests), self.batch):
            if self.fail_after is not None and self.asked >= self.fail_after:
                raise RunError("the machine went away")
            part = requests[start : start + self.batch]
            self.asked += len(part)
            yield [
                Answer(start + i, f"{request.seed}: {request.messages[-1].content}", 5, "stop")
                for i, request in enumerate(part)
            ]


class Length:
    """Judges by length, and may run out of its budget."""

    name, key = "length", "length-1"

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.judged = budget, 0

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        for index, exchange in enumerate(exchanges):
            if self.budget is not None and self.judged >= self.budget:
                raise BudgetError("the budget is spent")
            self.judged += 1
            yield [(index, Verdict(len(exchange.answer) % 100, 90.0, 0.1, "scored"))]


PROMPTS = [prompt("a"), prompt("b"), prompt("c")]
WANTED = all_samples(PROMPTS, SPEC.samples)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_wanted_is_sampled_and_judged_once(tmp_path: Path) -> None:
    store, sampler, judge = SampleStore(tmp_path / "s.jsonl", KEY), Parrot(), Length()
    collect(WANTED, store=store, sampler=sampler, scorer=judge, spec=SPEC, labels=LABELS)
    assert sampler.asked == judge.judged == len(WANTED) == 9
    rows = rows_of(store, WANTED)
    assert [(row.prompt, row.sample) for row in rows] == [(p.id, n) for p, n in WANTED]
    assert all(row.label == "scored" and row.tokens == 5 for row in rows)
    stored = lines(tmp_path / "s.jsonl")
    assert {row["judge"] for row in stored} == {"length"}
    assert all(str(row["answer"]).startswith(str(row["seed"])) for row in stored)


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    collect(WANTED, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    before = path.read_bytes()
    sampler, judge = Parrot(), Length()
    collect(WANTED, store=SampleStore(path, KEY), sampler=sampler, scorer=judge, spec=SPEC, labels=LABELS)
    assert (sampler.asked, judge.judged, path.read_bytes()) == (0, 0, before)


def test_a_sampler_that_dies_loses_nothing_it_gave(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(RunError, match="went away"):
        collect(
            WANTED,
            store=SampleStore(path, KEY),
            sampler=Parrot(fail_after=4),
            scorer=Length(),
            spec=SPEC,
            labels=LABELS,
        )
    assert len(lines(path)) == 4
    sampler = Parrot()
    store = SampleStore(path, KEY)
    collect(WANTED, store=store, sampler=sampler, scorer=Length(), spec=SPEC, labels=LABELS)
    assert sampler.asked == 5
    whole = SampleStore(tmp_path / "whole.jsonl", KEY)
    collect(WANTED, store=whole, sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    assert rows_of(store, WANTED) == rows_of(whole, WANTED)


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_dropped_and_sampled_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s.jsonl"
    collect(WANTED, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    sampler = Parrot()
    collect(WANTED, store=SampleStore(path, KEY), sampler=sampler, scorer=Length(), spec=SPEC, labels=LABELS)
    assert sampler.asked == 1
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": \n{}\n')
    with pytest.raises(RunError, match="line 1"):
        SampleStore(path, KEY)


def test_a_budget_keeps_what_was_judged_and_judges_the_rest_later(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    store = SampleStore(path, KEY)
    with pytest.raises(BudgetError):
        collect(WANTED, store=store, sampler=Parrot(), scorer=Length(budget=4), spec=SPEC, labels=LABELS)
    assert len(lines(path)) == 9
    assert len(store.unscored()) == 5
    sampler, judge = Parrot(), Length()
    store = SampleStore(path, KEY)
    collect(WANTED, store=store, sampler=sampler, scorer=judge, spec=SPEC, labels=LABELS)
    assert (sampler.asked, judge.judged) == (0, 5)
    assert not store.unscored()
    assert len(list(store.wanted([(p.id, n) for p, n in WANTED]))) == 9


def test_an_answer_to_a_prompt_that_has_changed_is_sampled_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    collect(WANTED, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    other = all_samples([prompt("a", "something else?"), *PROMPTS[1:]], SPEC.samples)
    sampler = Parrot()
    store = SampleStore(path, KEY)
    collect(other, store=store, sampler=sampler, scorer=Length(), spec=SPEC, labels=LABELS)
    assert sampler.asked == 3
    answers = {r["question"] for r in store.wanted([(p.id, n) for p, n in other]) if r["prompt"] == "a"}
    assert answers == {"something else?"}


def test_exact_match_scores_without_a_judge(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s.jsonl", "ends-with")
    asked = [prompt("a", expected="x"), prompt("b", expected="b?")]
    rule = ExactMatch(lambda expected, answer: answer.endswith(expected), "ends-with")
    spec = SamplingSpec(samples=1)
    collect(all_samples(asked, 1), store=store, sampler=Parrot(), scorer=rule, spec=spec, labels=LABELS)
    assert [row.correct for row in rows_of(store, all_samples(asked, 1))] == [False, True]


def test_another_judge_scores_the_same_answers(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    collect(WANTED, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    other, sampler = Length(), Parrot()
    other.key = "length-2"
    store = SampleStore(path, "length-2")
    assert len(store.unscored()) == 9
    collect(WANTED, store=store, sampler=sampler, scorer=other, spec=SPEC, labels=LABELS)
    assert (sampler.asked, other.judged, store.unscored()) == (0, 9, [])
    assert {row["judge_key"] for row in store.wanted([(p.id, n) for p, n in WANTED])} == {"length-2"}


def test_a_judge_is_asked_for_no_more_than_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    collect(WANTED, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    other = Length()
    other.key = "length-2"
    store = SampleStore(path, "length-2")
    few = [*WANTED[:2], (prompt("c", "changed?"), 0)]
    assert [row["prompt"] for row in unjudged(few, store, SPEC.seed)] == ["a", "b"]
    assert [p.id for p, _ in missing(few, store, SPEC.seed)] == ["c"]
    collect(few, store=store, sampler=Parrot(), scorer=other, spec=SPEC, labels=LABELS)
    assert other.judged == 3


def test_progress_counts_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    few = WANTED[:4]
    collect(few, store=SampleStore(path, KEY), sampler=Parrot(), scorer=Length(), spec=SPEC, labels=LABELS)
    told: list[tuple[int, int]] = []
    collect(
        WANTED,
        store=SampleStore(path, KEY),
        sampler=Parrot(),
        scorer=Length(),
        spec=SPEC,
        labels=LABELS,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[0] == (4, 9)
    assert told[-1] == (9, 9)


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.text())
def test_seeds_depend_on_all_they_should(seed: int, sample: int, text: str) -> None:
    one = prompt("a", text or "x")
    found = answer_seed(seed, one, sample)
    assert 0 <= found < 2**63
    assert found == answer_seed(seed, prompt("a", text or "x"), sample)
    assert found != answer_seed(seed + 1, one, sample)
    assert found != answer_seed(seed, one, sample + 1)
    assert found != answer_seed(seed, prompt("a", f"{text}!"), sample)


def test_identity_changes_with_prompts_decoding_and_judge() -> None:
    base = identity(PROMPTS, SPEC, Length())
    assert base == identity(PROMPTS, SPEC, Length())
    other = Length()
    other.key = "length-2"
    assert (
        len(
            {
                base,
                identity(PROMPTS[:2], SPEC, Length()),
                identity(PROMPTS, SamplingSpec(samples=4, max_new_tokens=8), Length()),
                identity(PROMPTS, SPEC, other),
            }
        )
        == 4
    )
