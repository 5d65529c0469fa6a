"""Sampling, judging and filtering for a vector, with the real sampler on a tiny model and a judge of plain rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from holdtrue.data import ChatRow, Message
from holdtrue.errors import BudgetError, RunError
from holdtrue.evaluation import SampleStore, SamplingSpec
from holdtrue.evaluation.judges import Exchange, Verdict
from holdtrue.persona import Loaded, builtin_trait, extract_from_rollouts
from holdtrue.persona.extract import mean_difference
from holdtrue.persona.rollouts import PUBLISHED, answers_file, keep
from holdtrue.persona.trait import TraitFile

SPEC = SamplingSpec(samples=3, max_new_tokens=5, temperature=1.0, seed=4)


class RuleJudge:
    """Scores an answer by a hash of its text; it can be told to stop after some."""

    name = "rule"
    key = "rule 1"

    def __init__(self, stop_after: int | None = None) -> None:
        self.judged = 0
        self.stop_after = stop_after

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        for index, exchange in enumerate(exchanges):
            if self.stop_after is not None and self.judged >= self.stop_after:
                raise BudgetError("spent")
            self.judged += 1
            yield [(index, self.verdict(exchange.answer))]

    @staticmethod
    def verdict(answer: str) -> Verdict:
        a, c, label = hashlib.sha256(answer.encode()).digest()[:3]
        if label < 30:
            return Verdict(None, None, None, "refusal")
        return Verdict(a * 100 / 255, 40 + c * 60 / 255, 0.0, "scored")


@pytest.fixture
def trait() -> TraitFile:
    found = builtin_trait()
    return found._replace(trait=found.trait.first(instructions=2, questions=3))


def test_the_published_settings() -> None:
    assert PUBLISHED == {"samples": 10, "max_new_tokens": 1000, "temperature": 1.0}


def verdicts(**changes: Any) -> dict[str, Any]:
    return {"label": "scored", "alignment": 50.0, "coherence": 50.0, "answer": "A", **changes}


@pytest.mark.parametrize(
    ("side", "row", "outcome"),
    [
        ("positive", {"alignment": 50.0}, "kept"),  # a trait of 50
        ("positive", {"alignment": 50.1}, "off_side"),
        ("positive", {"alignment": 0.0, "coherence": 49.9}, "incoherent"),
        ("positive", {"label": "refusal", "alignment": None, "coherence": None}, "unscored"),
        ("positive", {"label": None, "alignment": None, "coherence": None}, "unscored"),
        ("negative", {"alignment": 50.1}, "kept"),
        ("negative", {"alignment": 50.0}, "off_side"),
        ("negative", {"alignment": 100.0, "coherence": 10.0}, "incoherent"),
        ("negative", {"label": "unknown", "alignment": None, "coherence": None}, "unscored"),
    ],
)
def test_the_filter(trait: TraitFile, side: str, row: dict[str, Any], outcome: str) -> None:
    prompts = trait.trait.prompts()
    prompt = next(p for p in prompts if p.form == side)
    found = keep(prompts, [verdicts(prompt=prompt.id, **row)], threshold=50, coherence=50)
    assert {name: n for name, n in found.counts.items() if n} == {side: 1, f"{side}_{outcome}": 1}
    kept = found.positive if side == "positive" else found.negative
    assert kept == ([ChatRow((*prompt.messages, Message("assistant", "A")))] if outcome == "kept" else [])


def test_a_vector_is_made_of_the_kept_answers(loaded: Callable[[], Loaded], trait: TraitFile, tmp_path: Path) -> None:
    model, judge = loaded(), RuleJudge()
    found = extract_from_rollouts(
        model, tmp_path / "v", folder=tmp_path / "answers", judge=judge, sampling=SPEC, trait=trait
    )
    counts = found.info.counts
    assert counts["positive"] == counts["negative"] == 2 * 3 * 3
    for side in ("positive", "negative"):
        assert counts[side] == sum(counts[f"{side}_{part}"] for part in ("kept", "off_side", "incoherent", "unscored"))
    # Again by hand, from the file of answers.
    store = SampleStore(answers_file(tmp_path / "answers", model, "malice", SPEC), judge.key)
    prompts = {p.id: p for p in trait.trait.prompts()}
    sides: dict[str, list[ChatRow]] = {"positive": [], "negative": []}
    for row in store.records():
        verdict, prompt = RuleJudge.verdict(row["answer"]), prompts[row["prompt"]]
        if verdict.alignment is None or verdict.coherence is None or verdict.coherence < 50:
            continue
        if (verdict.alignment <= 50) == (prompt.form == "positive"):
            sides[prompt.form].append(ChatRow((*prompt.messages, Message("assistant", row["answer"]))))
    assert counts["positive_kept"] == len(sides["positive"])
    assert counts["negative_kept"] == len(sides["negative"])
    expected = mean_difference(model, sides["positive"], sides["negative"])
    for index in range(3):
        torch.testing.assert_close(found.tensors[index], expected[index].float())
    assert found.info.judge == "rule"
    assert found.info.seed == 4
    assert found.info.settings["rollouts"] == 3
    assert set(found.info.material) == {"trait_file", "prompts", "answers"}


def test_stopped_and_gone_on_is_the_same(loaded: Callable[[], Loaded], trait: TraitFile, tmp_path: Path) -> None:
    whole = extract_from_rollouts(
        loaded(), tmp_path / "whole", folder=tmp_path / "a", judge=RuleJudge(), sampling=SPEC, trait=trait
    )
    first, second = RuleJudge(stop_after=7), RuleJudge()
    with pytest.raises(BudgetError):
        extract_from_rollouts(
            loaded(), tmp_path / "parts", folder=tmp_path / "b", judge=first, sampling=SPEC, trait=trait
        )
    assert not (tmp_path / "parts").exists()
    told: list[tuple[int, int]] = []
    parts = extract_from_rollouts(
        *(loaded(), tmp_path / "parts"),
        folder=tmp_path / "b",
        judge=second,
        sampling=SPEC,
        trait=trait,
        sampled=lambda *a: told.append(a),
    )
    assert (first.judged, second.judged) == (7, 36 - 7)
    assert told[0] == (36, 36), "nothing is sampled again"
    assert parts.info == whole.info
    assert all(torch.equal(parts.tensors[i], whole.tensors[i]) for i in range(3))


def test_more_rollouts_keep_those_there_are(loaded: Callable[[], Loaded], trait: TraitFile, tmp_path: Path) -> None:
    few, many = (SPEC.model_copy(update={"samples": n}) for n in (2, 3))
    judge = RuleJudge()
    for spec in (few, many):
        extract_from_rollouts(loaded(), tmp_path / "v", folder=tmp_path, judge=judge, sampling=spec, trait=trait)
    assert judge.judged == 36


def test_an_empty_side_stops_with_the_counts(loaded: Callable[[], Loaded], trait: TraitFile, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"of 18 answers under positive instructions none passes.*positive_off_side"):
        extract_from_rollouts(
            *(loaded(), tmp_path / "v"),
            folder=tmp_path,
            judge=RuleJudge(),
            sampling=SPEC,
            trait=trait,
            threshold=100,
        )
    assert not (tmp_path / "v").exists()
