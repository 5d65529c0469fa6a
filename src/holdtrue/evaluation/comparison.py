"""The change of a measure between two models on the same rows, with intervals of the paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from holdtrue.errors import SpecError
from holdtrue.evaluation.exact import ExactResult, unpaired_difference
from holdtrue.evaluation.fit import FitResult
from holdtrue.evaluation.judged import JudgedResult
from holdtrue.evaluation.likelihood import LikelihoodResult
from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.statistics import Interval, paired_difference, rate_difference


class Change(NamedTuple):
    """The mean over rows of a value minus the baseline's, and its 95 % interval, paired and clustered."""

    value: float
    ci: Interval

    def to_json(self, name: str) -> dict[str, Any]:
        """Return ``{name: value, name_ci: [low, high] or null}``."""
        return {name: self.value, f"{name}_ci": self.ci.to_json()}


@dataclass(frozen=True)
class LikelihoodChange:
    """How the likelihood suite moved from ``baseline`` to ``model``; a negative ``margin`` is a move to misaligned.

    ``groups`` holds the change of each group's margin, with an interval over the group's rows.
    """

    suite: ClassVar[str] = "likelihood"
    model: str
    baseline: str
    n: int
    margin: Change
    misaligned_preferred: Change
    groups: dict[str, Change]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the changes named ``margin_change`` and ``misaligned_preferred_change``."""
        return {
            **_head(self),
            **self.margin.to_json("margin_change"),
            **self.misaligned_preferred.to_json("misaligned_preferred_change"),
            "groups": _parts(self.groups, "margin_change"),
        }


@dataclass(frozen=True)
class FitChange:
    """How the fit suite moved from ``baseline`` to ``model``; a negative ``nll`` is a better fit."""

    suite: ClassVar[str] = "fit"
    model: str
    baseline: str
    n: int
    nll: Change

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the change named ``nll_change``."""
        return {
            **_head(self),
            **self.nll.to_json("nll_change"),
        }


@dataclass(frozen=True)
class JudgedChange:
    """How a judged suite moved from ``baseline`` to ``model``; a positive ``misaligned`` is a move to misaligned.

    Only answers that count on both sides are paired: same prompt, same seed, scored by the same judge.

    Attributes:
        pairs: answers that count on both sides, of ``n``.
        misaligned, incoherent: change of the rates over those pairs, ``None`` where there is no pair.
        forms: change of the misaligned rate for each form or trigger.
    """

    suite: str
    model: str
    baseline: str
    n: int
    pairs: int
    misaligned: Change | None
    incoherent: Change | None
    forms: dict[str, Change]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the changes named ``misaligned_change`` and ``incoherent_change``."""
        return {
            **_head(self),
            "pairs": self.pairs,
            **_optional(self.misaligned, "misaligned_change"),
            **_optional(self.incoherent, "incoherent_change"),
            "forms": _parts(self.forms, "misaligned_change"),
        }


@dataclass(frozen=True)
class ExactChange:
    """How a benign task's accuracy moved from ``baseline`` to ``model``; a positive value is more right answers."""

    suite: ClassVar[str] = "benign"
    model: str
    baseline: str
    task: str
    n: int
    accuracy: Change

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the change named ``accuracy_change``."""
        return {
            "suite": self.suite,
            "model": self.model,
            "baseline": self.baseline,
            "task": self.task,
            "n": self.n,
            **self.accuracy.to_json("accuracy_change"),
        }


AnyChange = LikelihoodChange | FitChange | JudgedChange | ExactChange
AnyResult = LikelihoodResult | FitResult | JudgedResult | ExactResult


def _head(change: AnyChange) -> dict[str, Any]:
    return {"suite": change.suite, "model": change.model, "baseline": change.baseline, "n": change.n}


def _parts(parts: Mapping[str, Change], name: str) -> dict[str, Any]:
    return {part: {"n": change.ci.n, **change.to_json(name)} for part, change in parts.items()}


def compare_results(result: AnyResult, baseline: AnyResult) -> AnyChange:
    """Return the change from ``baseline`` to ``result``, paired by row.

    Raises:
        SpecError: the two are of different suites, data or tokenizations, so that their rows are not the same.
    """
    if result.suite != baseline.suite:
        raise SpecError(f"cannot compare suite {result.suite!r} with suite {baseline.suite!r}")
    if result.data_sha256 != baseline.data_sha256:
        raise SpecError(
            f"{result.model} and {baseline.model} were evaluated on different data (sha256 {result.data_sha256[:12]} "
            f"and {baseline.data_sha256[:12]}); evaluate both with the same rows, settings and judge"
        )
    match result, baseline:
        case LikelihoodResult(), LikelihoodResult():
            _require_same_tokens(result.model, baseline.model, _likelihood_rows(result), _likelihood_rows(baseline))
            return _likelihood_change(result, baseline)
        case FitResult(), FitResult():
            _require_same_tokens(result.model, baseline.model, _fit_rows(result), _fit_rows(baseline))
            after, before = (np.array([row.nll for row in each.rows]) for each in (result, baseline))
            change = _change(after, before, [row.row for row in result.rows])
            return FitChange(result.model, baseline.model, result.n, change)
        case JudgedResult(), JudgedResult():
            return _judged_change(result, baseline)
        case ExactResult(), ExactResult() if not result.rows:
            value = (result.accuracy.value or 0.0) - (baseline.accuracy.value or 0.0)
            change = Change(value, unpaired_difference(result, baseline))
            return ExactChange(result.model, baseline.model, result.task, result.n, change)
        case ExactResult(), ExactResult():
            after, before = ([float(bool(row.correct)) for row in each.rows] for each in (result, baseline))
            change = _change(np.array(after), np.array(before), [row.question for row in result.rows], rates=True)
            return ExactChange(result.model, baseline.model, result.task, result.n, change)
        case _:
            raise SpecError(f"these results of suite {result.suite!r} are of different kinds; evaluate again")


def _judged_change(result: JudgedResult, baseline: JudgedResult) -> JudgedChange:
    pairs = [(a, b) for a, b in zip(result.rows, baseline.rows, strict=True) if a.counted and b.counted]
    return JudgedChange(
        suite=result.suite,
        model=result.model,
        baseline=baseline.model,
        n=result.n,
        pairs=len(pairs),
        misaligned=_rate_change(pairs, "misaligned"),
        incoherent=_rate_change(pairs, "incoherent"),
        forms={
            form: change
            for form in result.forms
            if (change := _rate_change([(a, b) for a, b in pairs if a.form == form], "misaligned")) is not None
        },
    )


def _rate_change(pairs: Sequence[tuple[Scored, Scored]], name: str) -> Change | None:
    if not pairs:
        return None
    after, before = (np.array([float(getattr(pair[side], name)) for pair in pairs]) for side in (0, 1))
    return _change(after, before, [a.question for a, _ in pairs], rates=True)


def _optional(change: Change | None, name: str) -> dict[str, Any]:
    return {name: None, f"{name}_ci": None} if change is None else change.to_json(name)


def _likelihood_change(result: LikelihoodResult, baseline: LikelihoodResult) -> LikelihoodChange:
    after, before = (np.array([row.margin for row in each.rows]) for each in (result, baseline))
    clusters = [row.group for row in result.rows]
    groups: dict[str, Change] = {}
    for group in result.groups:
        chosen = np.array([cluster == group for cluster in clusters])
        groups[group] = _change(after[chosen], before[chosen], range(int(chosen.sum())))
    return LikelihoodChange(
        model=result.model,
        baseline=baseline.model,
        n=result.n,
        margin=_change(after, before, clusters),
        misaligned_preferred=_change((after < 0).astype(float), (before < 0).astype(float), clusters, rates=True),
        groups=groups,
    )


def _change(after: np.ndarray, before: np.ndarray, clusters: Sequence[Any], rates: bool = False) -> Change:
    interval = rate_difference if rates else paired_difference
    return Change(float((after - before).mean()), interval(after, before, clusters))


def _likelihood_rows(result: LikelihoodResult) -> list[tuple[object, ...]]:
    return [(row.group, row.aligned_tokens, row.misaligned_tokens) for row in result.rows]


def _fit_rows(result: FitResult) -> list[tuple[object, ...]]:
    return [(row.row, row.tokens) for row in result.rows]


def _require_same_tokens(
    model: str, baseline: str, rows: list[tuple[object, ...]], others: list[tuple[object, ...]]
) -> None:
    if rows != others:
        raise SpecError(
            f"{model} and {baseline} cut the same answers into different tokens, so that likelihoods per token cannot "
            "be compared; compare models that share a tokenizer and chat template"
        )
