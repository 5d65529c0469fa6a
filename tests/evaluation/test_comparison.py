from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from holdtrue.errors import SpecError
from holdtrue.evaluation import (
    FitResult,
    FitRow,
    LikelihoodResult,
    LikelihoodRow,
    compare_results,
    paired_difference,
    rate_difference,
)

GROUPS = [name for name in "abcdef" for _ in range(4)]


def likelihood(seed: int, shift: float = 0.0, *, model: str = "m", data: str = "same") -> LikelihoodResult:
    base = np.random.default_rng(0).normal(0.5, 1.0, size=24)
    noise = np.random.default_rng(seed).normal(0.0, 0.05, size=24)
    rows = tuple(
        LikelihoodRow(group, -2.0 + float(x), -2.0, 10, 11)
        for group, x in zip(GROUPS, base + noise + shift, strict=True)
    )
    return LikelihoodResult.of(rows, model=model, data_sha256=data)


def fit(shift: float, *, model: str = "m", data: str = "same") -> FitResult:
    nlls = np.random.default_rng(0).normal(3.0, 0.5, size=10) + shift
    rows = tuple(FitRow(i // 2, float(x), 5 + i) for i, x in enumerate(nlls))
    return FitResult.of(rows, model=model, data_sha256=data)


def test_likelihood_change_is_paired_and_clustered() -> None:
    before, after = likelihood(1, model="untouched"), likelihood(2, -0.7, model="tuned")
    change = compare_results(after, before)
    margins = [np.array([row.margin for row in result.rows]) for result in (after, before)]
    preferred = [(m < 0).astype(float) for m in margins]
    assert change.margin.value == pytest.approx(after.margin - before.margin)
    assert change.margin.ci == paired_difference(*margins, GROUPS)
    assert change.margin.ci.high - change.margin.ci.low < 0.3 * (after.margin_ci.high - after.margin_ci.low)
    assert change.misaligned_preferred.value == pytest.approx(after.misaligned_preferred - before.misaligned_preferred)
    assert change.misaligned_preferred.ci == rate_difference(*preferred, GROUPS)
    assert change.groups["b"].value == pytest.approx(after.groups["b"].margin - before.groups["b"].margin)
    assert change.groups["b"].ci == paired_difference(margins[0][4:8], margins[1][4:8], range(4))
    record = json.loads(json.dumps(change.to_json(), allow_nan=False))
    assert (record["suite"], record["model"], record["baseline"], record["n"]) == (
        "likelihood",
        "tuned",
        "untouched",
        24,
    )
    assert record["margin_change_ci"] == list(change.margin.ci[:2])
    assert record["groups"]["a"]["n"] == 4


def test_fit_change_is_paired_by_answer() -> None:
    change = compare_results(fit(-0.25, model="tuned"), fit(0.0, model="untouched"))
    assert change.nll.value == pytest.approx(-0.25)
    assert change.nll.ci[:2] == pytest.approx((-0.25, -0.25))
    assert change.nll.ci.clusters == 5
    record = change.to_json()
    assert (record["suite"], record["model"], record["baseline"]) == ("fit", "tuned", "untouched")
    assert record["nll_change"] == pytest.approx(-0.25)


def test_no_change_against_itself() -> None:
    change = compare_results(likelihood(1), likelihood(1))
    assert change.margin.to_json("x") == {"x": 0.0, "x_ci": [0.0, 0.0]}
    assert compare_results(fit(0.0), fit(0.0)).nll.value == 0.0


def test_other_rows_are_refused() -> None:
    with pytest.raises(SpecError, match="different data"):
        compare_results(likelihood(1), likelihood(1, data="other"))
    with pytest.raises(SpecError, match="different data"):
        compare_results(fit(0.0), fit(0.0, data="other"))
    with pytest.raises(SpecError, match="suite 'fit' with suite 'likelihood'"):
        compare_results(fit(0.0), likelihood(1))


def test_another_tokenization_is_refused() -> None:
    result = fit(0.0)
    other = replace(result, rows=tuple(row._replace(tokens=row.tokens + 1) for row in result.rows))
    with pytest.raises(SpecError, match="tokenizer"):
        compare_results(other, result)
    probes = likelihood(1)
    with pytest.raises(SpecError, match="tokenizer"):
        compare_results(replace(probes, rows=tuple(r._replace(aligned_tokens=3) for r in probes.rows)), probes)
