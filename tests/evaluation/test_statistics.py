from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.evaluation import Interval, cluster_bootstrap, paired_difference

finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
tables = st.lists(st.tuples(finite, st.integers(0, 5)), min_size=2, max_size=30).filter(
    lambda rows: len({group for _, group in rows}) > 1
)


def naive(values: list[float], clusters: list[int], *, resamples: int, seed: int, level: float) -> tuple[float, float]:
    """The definition, one row at a time, with the same draws."""
    names = list(dict.fromkeys(clusters))
    random = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        rows: list[float] = []
        for drawn in random.integers(0, len(names), size=len(names)):
            rows += [v for v, c in zip(values, clusters, strict=True) if c == names[drawn]]
        means.append(sum(rows) / len(rows))
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


@settings(max_examples=25, deadline=None)
@given(tables, st.integers(0, 3), st.sampled_from([0.5, 0.9, 0.95]))
def test_equals_the_naive_loop(rows: list[tuple[float, int]], seed: int, level: float) -> None:
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    found = cluster_bootstrap(values, clusters, resamples=60, seed=seed, level=level)
    low, high = naive(values, clusters, resamples=60, seed=seed, level=level)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9 * (1 + np.abs(values).max()))


def test_batches_of_draws_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from holdtrue.evaluation import statistics

    values = np.random.default_rng(1).normal(size=40)
    whole = cluster_bootstrap(values, range(40))
    monkeypatch.setattr(statistics, "DRAWS_PER_BATCH", 40 * 7)
    assert cluster_bootstrap(values, range(40)) == pytest.approx(whole)


def test_agrees_with_all_draws_of_three_clusters() -> None:
    values, clusters = [0.0, 2.0, 4.0, 10.0], ["a", "a", "b", "c"]
    of = {"a": [0.0, 2.0], "b": [4.0], "c": [10.0]}
    means = [np.mean([v for name in draw for v in of[name]]) for draw in itertools.product("abc", repeat=3)]
    found = cluster_bootstrap(values, clusters, resamples=20_000, level=0.9)
    # The 27 draws are equally likely, so the ends are the means at the 5 % and 95 % points of their distribution.
    assert found[:2] == pytest.approx((np.quantile(means, 0.05), np.quantile(means, 0.95)), abs=1e-9)


def test_agrees_with_the_normal_interval_of_many_clusters() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    found = cluster_bootstrap(values, range(2000))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_agrees_with_the_binomial_interval_of_a_share() -> None:
    values = np.repeat([0.0, 1.0], [600, 200])
    found = cluster_bootstrap(values, range(800))
    half = 1.96 * np.sqrt(0.25 * 0.75 / 800)
    assert found[:2] == pytest.approx((0.25 - half, 0.25 + half), abs=0.003)


def test_copies_within_a_cluster_add_no_certainty() -> None:
    values = np.random.default_rng(0).normal(size=12)
    once = cluster_bootstrap(values, range(12))
    thrice = cluster_bootstrap(np.repeat(values, 3), np.repeat(np.arange(12), 3).tolist())
    assert thrice[:2] == pytest.approx(once[:2])
    assert cluster_bootstrap(np.repeat(values, 3), range(36)).high < once.high


@settings(max_examples=50, deadline=None)
@given(tables)
def test_lies_within_the_cluster_means(rows: list[tuple[float, int]]) -> None:
    values, clusters = np.array([v for v, _ in rows]), np.array([c for _, c in rows])
    means = [values[clusters == c].mean() for c in set(clusters.tolist())]
    found = cluster_bootstrap(values, clusters.tolist(), resamples=100)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert min(means) - slack <= found.low <= found.high <= max(means) + slack
    assert (found.n, found.clusters) == (len(rows), len(means))


@settings(max_examples=50, deadline=None)
@given(tables, st.floats(-100, 100), st.floats(0.01, 100))
def test_follows_a_shift_and_a_scale(rows: list[tuple[float, int]], shift: float, scale: float) -> None:
    values, clusters = np.array([v for v, _ in rows]), [c for _, c in rows]
    plain = cluster_bootstrap(values, clusters, resamples=100)
    moved = cluster_bootstrap(scale * values + shift, clusters, resamples=100)
    mirrored = cluster_bootstrap(-values, clusters, resamples=100)
    assert plain.low is not None
    assert plain.high is not None
    slack = 1e-9 * (1 + scale) * (1 + np.abs(values).max() + abs(shift))
    assert moved[:2] == pytest.approx((scale * plain.low + shift, scale * plain.high + shift), abs=slack)
    assert mirrored[:2] == pytest.approx((-plain.high, -plain.low), abs=slack)


def test_names_and_positions_of_clusters_do_not_matter() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    assert cluster_bootstrap(values, ["x", "y", "x", "z"]) == cluster_bootstrap(values, [7, (1, 2), 7, None])


def test_one_cluster_has_no_interval() -> None:
    assert cluster_bootstrap([1.0, 2.0], ["a", "a"]) == Interval(None, None, 2, 1)
    assert cluster_bootstrap([1.0, 2.0], ["a", "a"]).to_json() is None
    assert cluster_bootstrap([1.0], ["a"]) == Interval(None, None, 1, 1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert cluster_bootstrap([0.25] * 5, range(5))[:2] == (0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [([], []), ([1.0, 2.0], ["a"]), ([1.0, float("nan")], ["a", "b"]), ([1.0, float("inf")], ["a", "b"])],
)
def test_refuses_what_has_no_mean(values: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError):
        cluster_bootstrap(values, clusters)


def test_level_and_resamples_are_checked() -> None:
    with pytest.raises(ValueError):
        cluster_bootstrap([1.0, 2.0], "ab", level=1.0)
    with pytest.raises(ValueError):
        cluster_bootstrap([1.0, 2.0], "ab", resamples=0)


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    random = np.random.default_rng(3)
    before = random.normal(0, 5, size=30)
    after = before + random.normal(0.5, 0.1, size=30)
    clusters = [i % 10 for i in range(30)]
    paired = paired_difference(after, before, clusters)
    assert paired == cluster_bootstrap(after - before, clusters)
    assert 0.4 < paired.low < paired.high < 0.6
    assert paired_difference(after, after, clusters)[:2] == (0.0, 0.0)
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(after, before[1:], clusters)


def test_interval_survives_json() -> None:
    for interval in (Interval(0.1, 0.2, 9, 3), Interval(None, None, 9, 1)):
        assert Interval.from_json(interval.to_json(), n=9, clusters=interval.clusters) == interval
