from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.evaluation.ranking import clustered_auc

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


def plain(bad: list[int], good: list[int]) -> float:
    return sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(bad) * len(good))


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_order(bad: list[int], good: list[int]) -> None:
    found = clustered_auc(bad, good, range(len(bad)), range(100, 100 + len(good)))
    assert found.auc == pytest.approx(plain(bad, good))
    low, high = found.interval.low, found.interval.high
    if min(len(bad), len(good)) < 2:
        assert (low, high) == (None, None)
    else:
        assert low is not None
        assert high is not None
        assert 0 <= low <= found.auc <= high <= 1
        assert low < high, "no data shows an area without any doubt"


@given(SCORES, SCORES)
def test_only_the_order_counts_and_both_sides_are_alike(bad: list[int], good: list[int]) -> None:
    a, b = range(len(bad)), range(100, 100 + len(good))
    found = clustered_auc(bad, good, a, b)
    assert clustered_auc([math.exp(x) for x in bad], [math.exp(x) for x in good], a, b) == found
    turned = clustered_auc([-x for x in bad], [-x for x in good], a, b)
    assert turned.auc == pytest.approx(1 - found.auc)
    if found.interval.low is not None and found.interval.high is not None:
        assert turned.interval.low == pytest.approx(1 - found.interval.high)


def test_single_cases_have_delongs_variance() -> None:
    rng = np.random.default_rng(0)
    bad, good = rng.normal(1, 1, 30), rng.normal(0, 1, 40)
    found = clustered_auc(bad, good, range(30), range(100, 140))
    wins = (bad[:, None] > good).astype(float)
    delong = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 40
    assert found.interval.low is not None
    assert found.interval.high is not None
    logit = [math.log(p / (1 - p)) for p in (found.interval.low, found.auc, found.interval.high)]
    half = 2.045230 * math.sqrt(delong) / (found.auc * (1 - found.auc))  # Student, 29 degrees of freedom
    assert logit[2] - logit[1] == pytest.approx(half, rel=1e-5)
    assert logit[1] - logit[0] == pytest.approx(half, rel=1e-5)


def test_cases_written_twice_within_their_cluster_teach_nothing() -> None:
    bad, good, names, others = [3.0, 1.0, 2.0, 5.0], [0.0, 2.5, 1.5], list("abcd"), list("xyz")
    once = clustered_auc(bad, good, names, others)
    twice = clustered_auc(bad * 2, good * 2, names * 2, others * 2)
    assert twice.auc == once.auc
    assert twice.interval.low == pytest.approx(once.interval.low)
    assert twice.interval.high == pytest.approx(once.interval.high)


def test_the_interval_holds_its_level_with_few_clusters_of_both_kinds() -> None:
    rng, covered, runs = np.random.default_rng(1), 0, 400
    # Score: shift of the kind, own shift of the domain (shared by both kinds), noise; across domains the difference of
    # two scores is normal with variance 2 * (0.5 ** 2 + 1).
    true = 0.5 * (1 + math.erf(1.0 / math.sqrt(2 * 1.25) / math.sqrt(2)))
    for _ in range(runs):
        shift = rng.normal(0, 0.5, 14)
        bad = [1.0 + shift[i] + rng.normal() for i in range(7) for _ in range(2)]
        good = [shift[i] + rng.normal() for i in range(7, 14) for _ in range(2)]
        names = [i for i in range(7) for _ in range(2)]
        interval = clustered_auc(bad, good, names, [7 + i for i in names]).interval
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= true <= interval.high
    assert 0.93 <= covered / runs <= 1.0


@pytest.mark.parametrize(("bad", "good", "names"), [([], [1.0], []), ([math.nan], [1.0], ["a"]), ([1.0], [1.0], [])])
def test_what_makes_no_area_is_refused(bad: list[float], good: list[float], names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"both kinds|cluster"):
        clustered_auc(bad, good, names, ["b"])
