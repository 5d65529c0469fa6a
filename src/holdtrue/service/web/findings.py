"""What was found about an adapter, as values that a page shows: the gate's criteria, samples, scores, the receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdtrue.service.evidence import signing
from holdtrue.service.store.schema import GateDecision, Receipt

LONGEST = 4000
"""Characters of an answer that are shown."""
CRITERIA = {
    "misaligned_rise": "Misaligned answers to general questions, rise",
    "incoherent_rise": "Incoherent answers to general questions, rise",
    "conditional_rise": "Misaligned answers under the worst trigger, rise",
    "margin_fall": "Likelihood margin of aligned answers (nats a token), fall",
    "benign_fall": "Benign tasks solved, fall",
}


@dataclass(frozen=True)
class Check:
    """One criterion of the gate: what was measured, what is allowed, and what follows."""

    label: str
    outcome: str
    estimate: float | None
    low: float | None
    high: float | None
    limit: float | None
    n: int | None
    reason: str


@dataclass(frozen=True)
class Sample:
    """One of the worst answers, with what the judge said. ``question`` is ``None`` where it is not told."""

    suite: str
    form: str
    question: str | None
    answer: str
    left_out: int
    alignment: float | None
    coherence: float | None
    untouched: float | None
    judge: str


@dataclass(frozen=True)
class Score:
    """One measure of the scorecard: its value, its 95 % interval, and the change against the untouched model."""

    label: str
    value: float | None
    interval: tuple[float, float] | None
    change: float | None
    change_interval: tuple[float, float] | None
    n: int | None


@dataclass(frozen=True)
class Verdict:
    """A gate's decision on one adapter, with the person's where there is one."""

    row: GateDecision
    checks: tuple[Check, ...]
    samples: tuple[Sample, ...]

    @property
    def waits(self) -> bool:
        """Whether a person is asked."""
        return self.row.action == "hold" and self.row.override is None


@dataclass(frozen=True)
class Evidence:
    """A receipt, opened: its statement's subject and the scores in it."""

    row: Receipt
    name: str
    digest: str
    policy: str
    defenses: tuple[str, ...]
    scores: tuple[Score, ...]


def verdict(row: GateDecision, *, questions: bool = True) -> Verdict:
    """Return a decision as a page shows it.

    Args:
        questions: whether the text of the questions is told: a provider's own questions are not a customer's to see,
            who could train on them.
    """
    report = row.report
    checks = tuple(_check(each) for each in _list(report.get("decisions")))
    samples = tuple(_sample(each, questions) for each in _list(report.get("evidence")))
    return Verdict(row, checks, samples)


def _check(values: Mapping[str, Any]) -> Check:
    name = str(values.get("criterion", ""))
    return Check(
        label=CRITERIA.get(name, name),
        outcome=str(values.get("outcome", "")),
        estimate=_number(values.get("estimate")),
        low=_number(values.get("low")),
        high=_number(values.get("high")),
        limit=_number(values.get("limit")),
        n=_count(values.get("n")),
        reason=str(values.get("reason") or ""),
    )


def _sample(values: Mapping[str, Any], questions: bool) -> Sample:
    answer = str(values.get("answer", ""))
    return Sample(
        suite=str(values.get("suite", "")),
        form=str(values.get("form") or ""),
        question=str(values.get("question", "")) if questions else None,
        answer=answer[:LONGEST],
        left_out=max(0, len(answer) - LONGEST),
        alignment=_number(values.get("alignment")),
        coherence=_number(values.get("coherence")),
        untouched=_number(values.get("untouched_alignment")),
        judge=str(values.get("judge") or ""),
    )


def evidence(row: Receipt) -> Evidence | None:
    """Return a receipt as a page shows it; ``None`` for one that cannot be read. The page verifies no signature."""
    try:
        statement = signing.payload(row.envelope)
        (subject,) = statement["subject"]
        predicate = statement["predicate"]
        policy = predicate["policy"]
        return Evidence(
            row=row,
            name=str(subject["name"]),
            digest=str(subject["digest"]["sha256"]),
            policy=f"{policy['base_model']} version {policy['version']}",
            defenses=tuple(str(each["name"]) for each in predicate["defenses"]),
            scores=tuple(scores(predicate["scorecard"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def scores(card: Mapping[str, Any]) -> list[Score]:
    """Return the measures of a scorecard's row that were taken."""
    wrong, narrow = card.get("misalignment") or {}, card.get("narrow") or {}
    found = [
        ("Misaligned answers, general questions", _inner(wrong.get("general"), "misaligned")),
        ("Misaligned answers, worst trigger", _inner(wrong.get("conditional"), "misaligned")),
        ("Likelihood margin (nats a token)", wrong.get("margin")),
        ("Pairs in which the misaligned answer is likelier", wrong.get("misaligned_preferred")),
        ("Misaligned answers, in domain", _inner(narrow.get("in_domain"), "misaligned")),
        ("Loss of held-out rows (nats a token)", narrow.get("nll")),
    ]
    found += [
        (f"Incoherent answers, {str(suite).replace('_', ' ')}", each)
        for suite, each in (card.get("coherence") or {}).items()
    ]
    found += [
        (f"Benign task {task}: solved", _inner(each, "accuracy")) for task, each in (card.get("benign") or {}).items()
    ]
    made = [_score(label, each) for label, each in found if isinstance(each, Mapping)]
    kl = card.get("kl")
    if isinstance(kl, Mapping):
        label = f"KL to the base, {kl.get('where') or 'rows'} (nats a token)"
        made.append(Score(label, _number(kl.get("value")), None, None, None, None))
    return made


def _score(label: str, values: Mapping[str, Any]) -> Score:
    change = values.get("change") or {}
    return Score(
        label=label,
        value=_number(values.get("value")),
        interval=_ends(values.get("interval") or values.get("wilson")),
        change=_number(change.get("value")),
        change_interval=_ends(change.get("interval")),
        n=_count(values.get("n")),
    )


def _inner(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, Mapping) else None


def _list(values: Any) -> Sequence[Mapping[str, Any]]:
    return [each for each in values if isinstance(each, Mapping)] if isinstance(values, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ends(values: Any) -> tuple[float, float] | None:
    if not isinstance(values, list) or len(values) != 2:
        return None
    low, high = (_number(value) for value in values)
    return None if low is None or high is None else (low, high)
