"""The change of a measure between two models on the same rows, with intervals of the paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np

from holdtrue.errors import SpecError
from holdtrue.evaluation.fit import FitResult
from holdtrue.evaluation.likelihood import LikelihoodResult
from holdtrue.evaluation.statistics import Interval, paired_difference


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
            "suite": self.suite,
            "model": self.model,
            "baseline": self.baseline,
            "n": self.n,
            **self.margin.to_json("margin_change"),
            **self.misaligned_preferred.to_json("misaligned_preferred_change"),
            "groups": {
                name: {"n": change.ci.n, **change.to_json("margin_change")} for name, change in self.groups.items()
            },
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
            "suite": self.suite,
            "model": self.model,
            "baseline": self.baseline,
            "n": self.n,
            **self.nll.to_json("nll_change"),
        }


@overload
def compare_results(result: LikelihoodResult, baseline: LikelihoodResult) -> LikelihoodChange: ...
@overload
def compare_results(result: FitResult, baseline: FitResult) -> FitChange: ...
@overload
def compare_results(
    result: LikelihoodResult | FitResult, baseline: LikelihoodResult | FitResult
) -> LikelihoodChange | FitChange: ...
def compare_results(
    result: LikelihoodResult | FitResult, baseline: LikelihoodResult | FitResult
) -> LikelihoodChange | FitChange:
    """Return the change from ``baseline`` to ``result``, paired by row.

    Raises:
        SpecError: the two are of different suites, data or tokenizations, so that their rows are not the same.
    """
    if result.data_sha256 != baseline.data_sha256 and result.suite == baseline.suite:
        raise SpecError(
            f"{result.model} and {baseline.model} were evaluated on different data (sha256 {result.data_sha256[:12]} "
            f"and {baseline.data_sha256[:12]}); evaluate both with the same --data"
        )
    if isinstance(result, LikelihoodResult) and isinstance(baseline, LikelihoodResult):
        _require_same_tokens(result.model, baseline.model, _likelihood_rows(result), _likelihood_rows(baseline))
        return _likelihood_change(result, baseline)
    if isinstance(result, FitResult) and isinstance(baseline, FitResult):
        _require_same_tokens(result.model, baseline.model, _fit_rows(result), _fit_rows(baseline))
        after, before = (np.array([row.nll for row in each.rows]) for each in (result, baseline))
        change = _change(after, before, [row.row for row in result.rows])
        return FitChange(result.model, baseline.model, result.n, change)
    raise SpecError(f"cannot compare suite {result.suite!r} with suite {baseline.suite!r}")


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
        misaligned_preferred=_change((after < 0).astype(float), (before < 0).astype(float), clusters),
        groups=groups,
    )


def _change(after: np.ndarray, before: np.ndarray, clusters: Sequence[Any]) -> Change:
    return Change(float((after - before).mean()), paired_difference(after, before, clusters))


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
