from __future__ import annotations

import math

import pytest
from benchmarks.profile import group, shares
from benchmarks.ratios import (
    DEFAULT,
    MORE_MEMORY,
    TIME,
    Ratio,
    fit_exponent,
    peaks,
    spread,
    spreads,
    table,
    timed,
    verdict,
    within_pairs,
    without,
)
from hypothesis import given
from hypothesis import strategies as st

seconds = st.floats(0.1, 1000)


def test_spread_of_known_values() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0, "runs": 4}
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_a_ratio_is_taken_within_a_round() -> None:
    # The second round's machine is ten times slower: over medians of columns the ratio would not be 2.
    assert within_pairs([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == [2.0, 2.0, 2.0]
    assert within_pairs([2.0, 20.0], [1.0]) == [2.0]


@given(st.lists(seconds, min_size=1, max_size=5), seconds)
def test_a_ratio_does_not_know_how_fast_the_machine_is(rounds: list[float], speed: float) -> None:
    ratios = {"x": Ratio("a", "b", 1, 1)}
    slow = {"a": [2 * s * speed for s in rounds], "b": [s * speed for s in rounds]}
    assert spreads(ratios, slow)["x"] == {"median": 2.0, "min": 2.0, "max": 2.0, "runs": len(rounds)}


def test_turns_are_compared_where_both_sides_have_the_same_rows_in_them() -> None:
    ratios = {"turns": Ratio("kl", "plain", 1, 1), "rounds": Ratio("plain", "trl", 1, 1)}
    steps = {"kl": [2.0, 3.0, 8.0, 2.0], "plain": [1.0, 3.0, 2.0, 2.0], "trl": [9.0, 7.0, 5.0, 3.0]}
    rounds = {"kl": [5.0, 10.0], "plain": [4.0, 4.0], "trl": [16.0, 8.0]}
    found = timed(ratios, steps, rounds)
    assert found["turns"] == {"median": 1.5, "min": 1.0, "max": 4.0, "runs": 4}
    assert found["rounds"] == {"median": 0.375, "min": 0.25, "max": 0.5, "runs": 2}


def test_what_was_not_measured_has_no_ratio() -> None:
    ratios = {"x": Ratio("a", "b", 1, 1), "y": Ratio("a", "c", 1, 1), "s": Ratio("a", "", 1, 0.3, "s")}
    assert set(spreads(ratios, {"a": [1.0], "b": [2.0], "c": []})) == {"x", "s"}


def test_verdicts_stand_on_the_bars() -> None:
    ratio = Ratio("a", "b", 1.45, 1.35)
    assert [verdict(ratio, m) for m in (1.35, 1.36, 1.45, 1.46)] == ["aim", "bar", "bar", "over"]


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    x = [64.0, 128.0, 256.0, 2048.0]
    line = fit_exponent(x, [3.0 * v**exponent for v in x])
    assert line.exponent == pytest.approx(exponent, abs=1e-9)
    assert line.scale == pytest.approx(3.0)


def test_a_fit_says_how_much_it_explains() -> None:
    # log y = 0, 1, 0 at log x = 0, 1, 2: the best line is flat and explains nothing.
    assert fit_exponent([1, math.e, math.e**2], [1, math.e, 1]).r2 == pytest.approx(0.0)


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([2, 2], [1, 3]), ([1, 2], [0, 1]), ([1, 2], [1])])
def test_a_fit_refuses_what_has_no_exponent(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="exponent"):
        fit_exponent(x, y)


def test_the_table_has_every_key_found_and_missing() -> None:
    found = {key: spread([1.0]) for key in (*DEFAULT, *MORE_MEMORY)}
    del found["steering_over_plain"]
    lines = table(found, {"steering_over_plain": "ImportError: none"}).splitlines()[1:]
    assert {line.split()[0] for line in lines} == {*DEFAULT, *MORE_MEMORY}
    assert lines[-1].endswith("missing: ImportError: none")


def test_a_ratio_is_missing_with_either_of_its_arms() -> None:
    found = without(TIME, {"naive": "no room", "kl_cached": "no cache"})
    assert found == {"kl_over_naive": "no room", "kl_cached_over_plain": "no cache"}
    assert set(without(TIME, {"plain": "?"})) == {key for key, r in TIME.items() if "plain" in (r.over, r.under)}


def test_only_two_models_are_compared_without_their_parameters() -> None:
    raw = {"kl": [(10, 110), (10, 120)], "kl-vocab-doubled": [(30, 130)]}
    assert peaks("memory_vocab_doubled", raw) == {"kl": [100, 110], "kl-vocab-doubled": [100]}
    assert peaks("kl_memory_over_plain", raw) == {"kl": [110, 120], "kl-vocab-doubled": [130]}


def test_operators_are_grouped_and_their_shares_sum_to_one() -> None:
    times = {"aten::mm": 6.0, "aten::addmm": 2.0, "aten::mul": 1.0, "aten::_log_softmax": 0.5, "strange": 0.5}
    found = shares(times)
    assert found == pytest.approx({"matmul": 0.8, "elementwise": 0.1, "softmax": 0.05, "other": 0.05})
    names = ("aten::_scaled_dot_product_flash_attention_for_cpu", "Optimizer.step#AdamW.step", "aten::_foreach_norm")
    assert [group(name) for name in names] == ["attention", "optimizer", "optimizer"]
