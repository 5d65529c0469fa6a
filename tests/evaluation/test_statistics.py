from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, t, ttest_1samp

from holdtrue.evaluation.statistics import (
    ICC_FLOOR,
    Interval,
    cluster_interval,
    combine_rate_differences,
    combine_rates,
    combine_seeds,
    paired_difference,
    rate_difference,
    rate_interval,
    wilson,
)

DATA_SETS = 1000
GROUPS = 8

finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
groups = st.integers(0, 5)


def several_clusters(rows: Sequence[tuple[object, ...]]) -> bool:
    return len({row[-1] for row in rows}) > 1


tables = st.lists(st.tuples(finite, groups), min_size=2, max_size=30).filter(several_clusters)
flagged = st.lists(st.tuples(st.booleans(), groups), min_size=2, max_size=60).filter(several_clusters)
paired = st.lists(st.tuples(st.booleans(), st.booleans(), groups), min_size=2, max_size=60).filter(several_clusters)


def ends(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


# Means


def by_matrices(values: list[float], clusters: list[int], level: float) -> tuple[float, float]:
    """CR2 and the Bell-McCaffrey degrees of freedom by their definition: a regression on a constant, in matrices."""
    y, n = np.array(values), len(values)
    hat = np.full((n, n), 1 / n)
    residual = np.eye(n) - hat
    columns = []
    meat = 0.0
    for cluster in set(clusters):
        rows = np.array([c == cluster for c in clusters])
        block = np.eye(rows.sum()) - hat[np.ix_(rows, rows)]
        eigenvalues, vectors = np.linalg.eigh(block)
        adjusted = np.ones(rows.sum()) @ (vectors / np.sqrt(eigenvalues)) @ vectors.T / n
        meat += float(adjusted @ (residual @ y)[rows]) ** 2
        columns.append(residual[rows].T @ adjusted)
    moments = np.linalg.eigvalsh(np.array(columns) @ np.array(columns).T)
    half = float(t.ppf((1 + level) / 2, moments.sum() ** 2 / (moments**2).sum())) * math.sqrt(meat)
    return float(y.mean()) - half, float(y.mean()) + half


@settings(max_examples=50, deadline=None)
@given(tables, st.sampled_from([0.5, 0.9, 0.95]))
def test_mean_equals_the_definition_in_matrices(rows: list[tuple[float, int]], level: float) -> None:
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    found = cluster_interval(values, clusters, level=level)
    assert found[:2] == pytest.approx(by_matrices(values, clusters, level), rel=1e-6, abs=1e-6)
    assert (found.n, found.clusters) == (len(rows), len(set(clusters)))


def test_mean_of_single_rows_is_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=9)
    assert cluster_interval(values, range(9))[:2] == pytest.approx(ttest_1samp(values, 0).confidence_interval())


def test_mean_of_equal_clusters_is_the_t_interval_of_their_means() -> None:
    values = np.random.default_rng(0).normal(size=(8, 5))
    found = cluster_interval(values.ravel(), np.repeat(np.arange(8), 5).tolist())
    assert found[:2] == pytest.approx(ttest_1samp(values.mean(1), 0).confidence_interval())


def test_copies_within_a_cluster_add_no_certainty() -> None:
    values = np.random.default_rng(0).normal(size=12)
    once = cluster_interval(values, range(12))
    thrice = cluster_interval(np.repeat(values, 3), np.repeat(np.arange(12), 3).tolist())
    assert thrice[:2] == pytest.approx(once[:2])
    assert ends(cluster_interval(np.repeat(values, 3), range(36)))[1] < ends(once)[1]


@settings(max_examples=50, deadline=None)
@given(tables, st.floats(-100, 100), st.floats(0.01, 100))
def test_mean_follows_a_shift_and_a_scale(rows: list[tuple[float, int]], shift: float, scale: float) -> None:
    values, clusters = np.array([v for v, _ in rows]), [c for _, c in rows]
    low, high = ends(cluster_interval(values, clusters))
    slack = 1e-5 * (1 + scale) * (1 + np.abs(values).max() + abs(shift))
    assert low - slack <= values.mean() <= high + slack
    moved = cluster_interval(scale * values + shift, clusters)
    assert moved[:2] == pytest.approx((scale * low + shift, scale * high + shift), abs=slack)
    assert cluster_interval(-values, clusters)[:2] == pytest.approx((-high, -low), abs=slack)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert cluster_interval([0.25] * 5, range(5))[:2] == (0.25, 0.25)


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    random = np.random.default_rng(3)
    before = random.normal(0, 5, size=30)
    after = before + random.normal(0.5, 0.1, size=30)
    clusters = [i % 10 for i in range(30)]
    found = paired_difference(after, before, clusters)
    assert found == cluster_interval(after - before, clusters)
    low, high = ends(found)
    assert 0.4 < low < high < 0.6
    assert paired_difference(after, after, clusters)[:2] == (0.0, 0.0)
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(after, before[1:], clusters)


# Shares


@pytest.mark.parametrize("hits", [0, 1, 7, 39, 40])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_share_of_single_rows_is_the_exact_binomial_interval(hits: int, level: float) -> None:
    flags = np.arange(40) < hits
    exact = binomtest(hits, 40).proportion_ci(level, method="exact")
    found = rate_interval(flags, range(40), level=level)
    # Forty rows are worth 39 by the unbiased estimate of their variance, unless all are alike.
    assert found[:2] == pytest.approx((exact.low, exact.high), abs=0.004)
    if hits in (0, 40):
        assert found[:2] == pytest.approx((exact.low, exact.high))


def korn_graubard(counts: list[int], sizes: list[int]) -> tuple[float, float]:
    """The formula of the paper for equal clusters, with the design effect's floor."""
    k, n = np.array(counts, dtype=float), np.array(sizes, dtype=float)
    share, total, g = k.sum() / n.sum(), n.sum(), len(n)
    variance = ((k - n * share) ** 2).sum() / total**2 * g / (g - 1)
    effect = variance / (share * (1 - share) / total) if 0 < share < 1 else 0.0
    effect = max(effect, 1 + (n[0] - 1) * ICC_FLOOR)
    worth = min(total, total / effect * (t.ppf(0.975, total - 1) / t.ppf(0.975, g - 1)) ** 2)
    hits = share * worth
    low = beta.ppf(0.025, hits, worth - hits + 1) if hits else 0.0
    return float(low), float(beta.ppf(0.975, hits + 1, worth - hits)) if hits < worth else 1.0


@pytest.mark.parametrize("counts", [[0] * 8, [1] + [0] * 7, [5] * 8, [0, 0, 0, 0, 0, 10, 20, 50], [50] * 8])
def test_share_equals_the_formula_for_equal_clusters(counts: list[int]) -> None:
    flags = np.concatenate([np.arange(50) < k for k in counts])
    found = rate_interval(flags, np.repeat(np.arange(8), 50).tolist())
    assert found[:2] == pytest.approx(korn_graubard(counts, [50] * 8))


@settings(max_examples=50, deadline=None)
@given(flagged, st.randoms(use_true_random=False))
def test_share_holds_its_estimate_with_some_width(rows: list[tuple[bool, int]], random: object) -> None:
    flags, clusters = [f for f, _ in rows], [c for _, c in rows]
    found = rate_interval(flags, clusters)
    low, high = ends(found)
    assert 0 <= low <= np.mean(flags) <= high <= 1
    assert high - low > 0.01
    shuffled = sorted(rows, key=lambda _: random.random())  # pyright: ignore[reportAttributeAccessIssue]
    again = rate_interval([f for f, _ in shuffled], [f"name {c}" for _, c in shuffled])
    assert again[:2] == pytest.approx(found[:2], abs=1e-9)
    opposite = rate_interval([not f for f in flags], clusters)
    assert opposite[:2] == pytest.approx((1 - high, 1 - low), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(paired)
def test_difference_of_shares_holds_its_estimate_with_some_width(rows: list[tuple[bool, bool, int]]) -> None:
    after, before, clusters = ([row[i] for row in rows] for i in range(3))
    low, high = ends(rate_difference(after, before, clusters))
    assert -1 <= low <= np.mean(after) - np.mean(before) <= high <= 1
    assert high - low > 0.01
    assert rate_difference(before, after, clusters)[:2] == pytest.approx((-high, -low))


def test_no_event_gives_a_bound_that_more_questions_and_answers_tighten() -> None:
    def bound(questions: int, answers: int) -> float:
        none = np.zeros(questions * answers)
        low, high = ends(rate_interval(none, np.repeat(np.arange(questions), answers).tolist()))
        assert low == 0
        return high

    assert bound(8, 100) == pytest.approx(0.0703, abs=5e-4)
    assert bound(24, 100) < bound(8, 100) < bound(8, 25) < bound(4, 25)
    same = np.ones(80)
    unchanged = rate_difference(same, same, np.repeat(np.arange(8), 10).tolist())
    assert ends(unchanged) == pytest.approx((-bound(8, 10), bound(8, 10)))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 1000)])
def test_wilson_is_the_closed_form(k: int, n: int) -> None:
    z, p = 1.959963984540054, k / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(k, n)
    assert found == pytest.approx((max(center - half, 0), min(center + half, 1)), abs=1e-12)
    with pytest.raises(ValueError):
        wilson(1, 0)


# Coverage, on simulated data sets of eight correlated clusters


def drawn_rates(random: np.random.Generator, rate: float, icc: float) -> np.ndarray:
    """(data sets, clusters): the share of each question, with the mean and the correlation asked for."""
    scale = 1 / icc - 1
    return random.beta(rate * scale, (1 - rate) * scale, size=(DATA_SETS, GROUPS))


EQUAL, MANY, UNEQUAL = [25] * 8, [100] * 8, [15, 15, 15, 15, 30, 30, 60, 60]


@pytest.mark.parametrize(
    ("rate", "icc", "sizes"),
    [
        (0.002, 0.05, EQUAL),
        (0.02, 0.05, EQUAL),
        (0.02, 0.3, UNEQUAL),
        (0.05, 0.3, MANY),
        (0.1, 0.05, UNEQUAL),
        (0.1, 0.3, MANY),
        (0.25, 0.3, EQUAL),
        (0.5, 0.3, UNEQUAL),
    ],
)
def test_share_is_covered(rate: float, icc: float, sizes: list[int]) -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(GROUPS), sizes).tolist()
    covered = 0
    for rates in drawn_rates(random, rate, icc):
        low, high = ends(rate_interval(random.random(len(clusters)) < np.repeat(rates, sizes), clusters))
        covered += low <= rate <= high
    assert covered / DATA_SETS >= 0.92


@pytest.mark.parametrize(
    ("before", "after", "sizes"), [(0.02, 0.02, EQUAL), (0.02, 0.1, UNEQUAL), (0.25, 0.5, UNEQUAL)]
)
def test_difference_of_shares_is_covered(before: float, after: float, sizes: list[int]) -> None:
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(GROUPS), sizes).tolist()
    covered = 0
    for old, new in zip(drawn_rates(random, before, 0.2), drawn_rates(random, after, 0.2), strict=True):
        flags, baseline = (random.random(len(clusters)) < np.repeat(rates, sizes) for rates in (new, old))
        low, high = ends(rate_difference(flags, baseline, clusters))
        covered += low <= after - before <= high
    assert covered / DATA_SETS >= 0.92


@pytest.mark.parametrize("heavy", [False, True])
def test_mean_is_covered(heavy: bool) -> None:
    random = np.random.default_rng(2)
    clusters = np.repeat(np.arange(GROUPS), UNEQUAL).tolist()
    covered = 0
    for _ in range(DATA_SETS):
        themes = random.standard_t(3, size=GROUPS) if heavy else random.normal(size=GROUPS)
        low, high = ends(cluster_interval(np.repeat(themes, UNEQUAL) + random.normal(size=len(clusters)), clusters))
        covered += low <= 0 <= high
    assert covered / DATA_SETS >= 0.92


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_mean_over_seeds_is_covered(between: float) -> None:
    random = np.random.default_rng(3)
    clusters = [np.repeat(np.arange(GROUPS), 5).tolist()] * 3
    covered = 0
    for _ in range(DATA_SETS):
        questions, runs = random.normal(size=GROUPS), random.normal(scale=between, size=(3, 1))
        values = np.repeat(questions, 5) + runs + random.normal(size=(3, GROUPS * 5))
        low, high = ends(combine_seeds(list(values), clusters))
        covered += low <= 0 <= high
    assert covered / DATA_SETS >= 0.92


def test_share_over_seeds_is_covered() -> None:
    random = np.random.default_rng(4)
    clusters = np.repeat(np.arange(GROUPS), 20).tolist()
    covered = 0
    for questions in drawn_rates(random, 0.1, 0.1):
        # Each training seed has a rate of its own, half as much again as the average or half of it.
        of_seed = random.choice([0.5, 1.5], size=3)
        flags = [random.random(len(clusters)) < np.repeat(questions * each, 20) for each in of_seed]
        low, high = ends(combine_rates(flags, [clusters] * 3))
        covered += low <= 0.1 <= high
    assert covered / DATA_SETS >= 0.92


# Training seeds


def test_one_seed_is_the_interval_of_its_rows() -> None:
    random = np.random.default_rng(0)
    values, flags, clusters = random.normal(size=40), random.random(40) < 0.3, [i % 8 for i in range(40)]
    assert combine_seeds([values], [clusters]) == cluster_interval(values, clusters)
    assert combine_rates([flags], [clusters]) == rate_interval(flags, clusters)
    assert combine_rate_differences([flags], [~flags], [clusters]) == rate_difference(flags, ~flags, clusters)


def test_equal_seeds_add_no_certainty_and_different_ones_take_some() -> None:
    values, clusters = np.random.default_rng(0).normal(size=40), [i % 8 for i in range(40)]
    low, high = ends(cluster_interval(values, clusters))
    assert combine_seeds([values] * 3, [clusters] * 3)[:2] == pytest.approx((low, high))
    apart = ends(combine_seeds([values - 1, values, values + 1], [clusters] * 3))
    assert apart[0] < low < high < apart[1]


def test_variances_of_seeds_and_clusters_add_up() -> None:
    values = np.array([[0.0, 2.0, 4.0, 2.0], [1.0, 3.0, 5.0, 3.0]])
    low, high = ends(combine_seeds(list(values), [list("abcd")] * 2))
    by_seed, by_cluster = np.var([2.0, 3.0], ddof=1) / 2, np.var([0.5, 2.5, 4.5, 2.5], ddof=1) / 4
    df = (by_seed + by_cluster) ** 2 / (by_seed**2 / 1 + by_cluster**2 / 3)
    half = t.ppf(0.975, df) * math.sqrt(by_seed + by_cluster)
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


def test_seeds_may_have_answered_other_rows() -> None:
    found = combine_rates([[1, 0, 1], [0, 0, 0, 1]], [["a", "b", "c"], ["a", "a", "b", "d"]])
    low, high = ends(found)
    assert low < (2 / 3 + 1 / 4) / 2 < high
    assert (found.n, found.clusters) == (7, 4)


# Edges


def test_names_and_positions_of_clusters_do_not_matter() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    assert cluster_interval(values, ["x", "y", "x", "z"]) == cluster_interval(values, [7, (1, 2), 7, None])


def test_one_cluster_has_no_interval() -> None:
    none = Interval(None, None, 2, 1)
    assert cluster_interval([1.0, 2.0], ["a", "a"]) == none
    assert rate_interval([True, False], ["a", "a"]) == none
    assert rate_difference([True, False], [True, True], ["a", "a"]) == none
    assert none.to_json() is None
    assert cluster_interval([1.0], ["a"]) == Interval(None, None, 1, 1)


@pytest.mark.parametrize("of", [cluster_interval, rate_interval])
@pytest.mark.parametrize(
    ("values", "clusters"),
    [([], []), ([1.0, 0.0], ["a"]), ([1.0, float("nan")], ["a", "b"]), ([1.0, float("inf")], ["a", "b"])],
)
def test_refuses_what_has_no_mean(of: Callable[..., Interval], values: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError):
        of(values, clusters)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="level"):
        cluster_interval([1.0, 2.0], "ab", level=1.0)
    with pytest.raises(ValueError, match="zeros and ones"):
        rate_interval([0.5, 1.0], "ab")
    with pytest.raises(ValueError, match="same rows"):
        rate_difference([True], [True, False], "a")
    with pytest.raises(ValueError, match="seeds"):
        combine_seeds([], [])


def test_ten_thousand_rows_are_quick() -> None:
    values, clusters = np.random.default_rng(0).normal(size=10_000), list(range(10_000))
    rate_interval(values > 0, clusters)
    start = time.perf_counter()
    cluster_interval(values, clusters)
    rate_interval(values > 0, clusters)
    assert time.perf_counter() - start < 0.1


def test_interval_survives_json() -> None:
    for interval in (Interval(0.1, 0.2, 9, 3), Interval(None, None, 9, 1)):
        assert Interval.from_json(interval.to_json(), n=9, clusters=interval.clusters) == interval
