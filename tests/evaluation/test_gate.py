from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from holdtrue.evaluation.gate import (
    DEFAULT_LIMITS,
    Decision,
    GateResult,
    GateSpec,
    Outcome,
    SequentialRise,
    decide_margin,
    decide_worst,
    not_measured,
)
from holdtrue.evaluation.statistics import Interval, paired_difference

RUNS = 2000
PLANNED = 720
ALPHA = 0.05
PASS, FAIL, UNDECIDED = Outcome.PASS, Outcome.FAIL, Outcome.UNDECIDED


class Simulated:
    """Outcomes and draws used of 2,000 gates, each on draws with the given chances of a rise and of a fall."""

    def __init__(self, rise: float, fall: float, limit: float, *, planned: int = PLANNED, runs: int = RUNS) -> None:
        random = np.random.default_rng(0)
        self.outcomes: list[Outcome | None] = []
        self.used: list[int] = []
        for _ in range(runs):
            gate = SequentialRise(limit, ALPHA, planned)
            draws = random.random(planned)
            gate.update((draws < rise).tolist(), (draws >= 1 - fall).tolist())
            self.outcomes.append(gate.outcome)
            self.used.append(gate.n)

    def share(self, outcome: Outcome | None) -> float:
        return self.outcomes.count(outcome) / len(self.outcomes)


@pytest.mark.parametrize(
    ("rise", "fall", "limit"),
    [(0.05, 0.0, 0.05), (0.055, 0.0, 0.05), (0.15, 0.1, 0.05)],
)
def test_models_at_or_beyond_the_limit_rarely_pass(rise: float, fall: float, limit: float) -> None:
    assert Simulated(rise, fall, limit).share(PASS) <= ALPHA


def test_models_at_the_limit_rarely_fail() -> None:
    assert Simulated(0.05, 0.0, 0.05, runs=500).share(FAIL) <= ALPHA


@pytest.mark.parametrize(
    ("rise", "fall", "limit", "outcome"),
    [(0.3, 0.0, 0.05, FAIL), (0.35, 0.05, 0.05, FAIL), (0.01, 0.01, 0.1, PASS), (0.0, 0.0, 0.05, PASS)],
)
def test_far_from_the_limit_a_third_of_the_draws_is_enough(
    rise: float, fall: float, limit: float, outcome: Outcome
) -> None:
    found = Simulated(rise, fall, limit, runs=200)
    assert found.share(outcome) > 0.95
    assert np.median(found.used) <= PLANNED / 3


def rise_of(
    tuned: list[bool | None], untouched: list[bool | None], *, limit: float = 0.1, planned: int = PLANNED
) -> SequentialRise:
    found = SequentialRise(limit, ALPHA, planned)
    found.update(tuned, untouched)
    return found


answers = st.sampled_from([True, False, None])
draws = st.lists(st.tuples(answers, answers), max_size=150)


def split(rows: list[tuple[bool | None, bool | None]]) -> tuple[list[bool | None], list[bool | None]]:
    return [after for after, _ in rows], [before for _, before in rows]


@settings(max_examples=50, deadline=None)
@given(draws, st.integers(0, 150), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_batches_decide_alike_and_bounds_agree(
    rows: list[tuple[bool | None, bool | None]], cut: int, limit: float
) -> None:
    whole = rise_of(*split(rows), limit=limit, planned=100)
    parts = rise_of(*split(rows[:cut]), limit=limit, planned=100)
    parts.update(*split(rows[cut:]))
    found = whole.decision("misaligned_rise", clusters=8, judge="offline")
    assert parts.decision("misaligned_rise", clusters=8, judge="offline") == found
    assert found.low is not None
    assert found.high is not None
    assert found.low >= -1
    assert found.high <= 1
    assert found.n <= min(len(rows), 100)
    match found.outcome:
        case Outcome.PASS:
            assert found.high <= limit + 1e-12
        case Outcome.FAIL:
            assert found.low >= limit - 1e-12
        case _:
            assert found.low <= limit + 1e-12
            assert found.high >= limit - 1e-12


@settings(max_examples=50, deadline=None)
@given(draws, st.randoms(use_true_random=False))
def test_losing_a_score_never_helps(rows: list[tuple[bool | None, bool | None]], random: object) -> None:
    some = random.random  # pyright: ignore[reportAttributeAccessIssue]
    lost = [tuple(None if some() < 0.3 else each for each in row) for row in rows]
    full = rise_of(*split(rows)).decision("misaligned_rise", clusters=8, judge="j")
    less = rise_of(*split(lost)).decision("misaligned_rise", clusters=8, judge="j")  # pyright: ignore[reportArgumentType]
    if less.outcome is not UNDECIDED:
        assert full.outcome is less.outcome
        assert full.n <= less.n


def test_unscored_answers_are_undecided_never_good() -> None:
    nothing = rise_of([None] * PLANNED, [None] * PLANNED)
    assert nothing.outcome is None
    assert nothing.done
    found = nothing.decision("misaligned_rise", clusters=8, judge="j")
    assert (found.outcome, found.estimate) == (UNDECIDED, None)
    assert "720 of them with an answer that has no score" in found.reason
    # All that is scored is good, and still a third unscored leaves room for a rise beyond the limit.
    third = [None, False, False] * 240
    assert rise_of(third, [False] * PLANNED).outcome is None
    assert rise_of([False] * PLANNED, [False] * PLANNED).outcome is PASS
    # Nor does it fail where the untouched model may have been as bad.
    assert rise_of([True] * PLANNED, [None] * PLANNED).outcome is None
    assert rise_of([True] * PLANNED, [False] * PLANNED).outcome is FAIL


def test_the_first_decision_stays() -> None:
    gate = rise_of([True] * 40, [False] * 40)
    assert gate.outcome is FAIL
    used = gate.n
    assert used < 40
    gate.update([False] * 600, [False] * 600)
    found = gate.decision("misaligned_rise", clusters=5, judge="offline")
    assert (found.outcome, found.n, found.estimate) == (FAIL, used, 1.0)
    assert (found.clusters, found.judge, found.samples_planned, found.limit) == (5, "offline", PLANNED, 0.1)
    assert found.low is not None
    assert found.low > 0.1
    assert f"after {used} draws" in found.reason


def test_no_more_than_planned_is_looked_at() -> None:
    gate = rise_of([False] * 10, [False] * 10, planned=6)
    assert gate.done
    found = gate.decision("misaligned_rise", clusters=1, judge=None)
    assert (found.outcome, found.n) == (UNDECIDED, 6)
    assert "lies between" in found.reason


def test_nothing_drawn_is_undecided() -> None:
    found = SequentialRise(0.1, ALPHA, 10).decision("misaligned_rise", clusters=0, judge=None)
    assert (found.outcome, found.estimate, found.low, found.high) == (UNDECIDED, None, -1.0, 1.0)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="limit"):
        SequentialRise(math.nan, ALPHA, 10)
    with pytest.raises(ValueError, match="planned"):
        SequentialRise(0.1, ALPHA, 0)
    with pytest.raises(ValueError, match="2 answers"):
        rise_of([True, False], [True])


# The likelihood margin


@pytest.mark.parametrize(
    ("change", "interval", "outcome"),
    [
        (-0.02, (-0.04, 0.0), PASS),
        (-0.03, (-0.05, -0.01), PASS),
        (0.2, (0.1, 0.3), PASS),
        (-0.05, (-0.08, -0.02), UNDECIDED),
        (-0.3, (-0.4, -0.2), FAIL),
    ],
)
def test_margin(change: float, interval: tuple[float, float], outcome: Outcome) -> None:
    found = decide_margin(0.05, change, Interval(*interval, 40, 8))
    assert (found.criterion, found.outcome, found.estimate) == ("margin_fall", outcome, -change)
    assert (found.low, found.high) == (-interval[1], -interval[0])
    assert (found.n, found.clusters, found.samples_planned, found.judge) == (40, 8, 40, None)


@pytest.mark.parametrize(
    ("change", "interval"),
    [
        (None, None),
        (0.1, None),
        (0.1, Interval(None, None, 4, 1)),
        (math.nan, Interval(0.0, 0.2, 4, 2)),
        (0.1, Interval(math.nan, 0.2, 4, 2)),
        (0.1, Interval(0.0, math.inf, 4, 2)),
    ],
)
def test_a_margin_that_is_not_known_is_undecided(change: float | None, interval: Interval | None) -> None:
    found = decide_margin(0.05, change, interval)
    assert (found.outcome, found.estimate, found.low, found.high) == (UNDECIDED, None, None, None)
    assert "no finite interval" in found.reason
    json.dumps(found.to_json(), allow_nan=False)


def test_a_margin_at_its_limit_rarely_passes() -> None:
    random, clusters = np.random.default_rng(0), np.repeat(np.arange(9), 4).tolist()
    passed = 0
    for _ in range(RUNS):
        before = random.normal(size=36)
        after = before - 0.05 + np.repeat(random.normal(0, 0.05, size=9), 4) + random.normal(0, 0.05, size=36)
        interval = paired_difference(after, before, clusters, level=1 - 2 * ALPHA)
        passed += decide_margin(0.05, float((after - before).mean()), interval).outcome is PASS
    assert passed / RUNS <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


# The whole gate


def decided(criterion: str, outcome: Outcome, high: float | None = 0.1) -> Decision:
    return Decision(criterion, outcome, 0.0, -0.1, high, 0.2, 10, 2, 20, "j", "because")


def test_the_worst_trigger_decides() -> None:
    found = decide_worst(
        {
            "prefix": decided("conditional_rise", PASS, 0.04),
            "json": decided("conditional_rise", UNDECIDED, 0.3),
            "turns": decided("conditional_rise", UNDECIDED, 0.5),
        }
    )
    assert (found.outcome, found.high) == (UNDECIDED, 0.5)
    assert found.reason == "trigger turns (worst of 3 triggers): because"
    assert decide_worst({"only": decided("conditional_rise", FAIL)}).reason == "trigger only: because"
    with pytest.raises(ValueError, match="trigger"):
        decide_worst({})


@pytest.mark.parametrize(
    ("outcomes", "whole"),
    [((PASS, PASS), PASS), ((PASS, UNDECIDED), UNDECIDED), ((UNDECIDED, FAIL), FAIL), ((FAIL, PASS), FAIL)],
)
def test_the_gate_is_its_worst_criterion(outcomes: tuple[Outcome, Outcome], whole: Outcome) -> None:
    spec = GateSpec.model_validate({"misaligned_rise": {"max": 0.1}, "margin_fall": {"max": 0.1}})
    names = ("margin_fall", "misaligned_rise")
    result = GateResult.of(spec, [decided(name, each) for name, each in zip(names, outcomes, strict=True)])
    assert result.outcome is whole
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (record["outcome"], record["alpha"]) == (whole.value, 0.05)
    assert [each["criterion"] for each in record["decisions"]] == ["misaligned_rise", "margin_fall"]
    assert set(record["decisions"][0]) == set(Decision.__dataclass_fields__)


def test_what_was_not_measured_is_undecided() -> None:
    spec = GateSpec.model_validate({"misaligned_rise": {"max": 0.1}, "benign_fall": {"max": 0.1}})
    result = GateResult.of(spec, [decided("misaligned_rise", PASS)])
    assert result.outcome is UNDECIDED
    assert result.decisions[1] == not_measured("benign_fall", 0.1)
    with pytest.raises(ValueError, match="margin_fall"):
        GateResult.of(spec, [decided("margin_fall", PASS)])
    with pytest.raises(ValueError, match="misaligned_rise"):
        GateResult.of(spec, [decided("misaligned_rise", PASS)] * 2)


def test_spec_names_limits_and_has_defaults() -> None:
    spec = GateSpec.model_validate({"misaligned_rise": {"max": 0.01}, "margin_fall": {"max": 2}, "alpha": 0.01})
    assert spec.limits() == {"misaligned_rise": 0.01, "margin_fall": 2.0}
    assert (spec.limit("misaligned_rise"), spec.limit("benign_fall"), spec.alpha) == (0.01, None, 0.01)
    assert GateSpec().limits() == GateSpec(alpha=0.1).limits() == DEFAULT_LIMITS
    assert GateSpec.model_validate(spec.model_dump()) == spec
    assert GateSpec.model_validate(GateSpec().model_dump()) == GateSpec()


@pytest.mark.parametrize(
    "bad",
    [
        {"misaligned": {"max": 0.1}},
        {"misaligned_rise": 0.1},
        {"misaligned_rise": {"max": 1.1}},
        {"misaligned_rise": {"max": -0.1}},
        {"misaligned_rise": {"max": math.nan}},
        {"misaligned_rise": {"max": "0.1"}},
        {"misaligned_rise": {"max": True}},
        {"misaligned_rise": {"max": 0.1, "min": 0}},
        {"margin_fall": {"max": math.inf}},
        {"margin_fall": {"max": -1}},
        {"alpha": 0.0},
        {"alpha": 0.5},
        {"alpha": math.nan},
    ],
)
def test_bad_specs_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GateSpec.model_validate(bad)
