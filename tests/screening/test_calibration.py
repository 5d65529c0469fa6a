from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import holdtrue.screening.calibration as module
from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.statistics import Interval
from holdtrue.models import ModelSource
from holdtrue.screening import INDICATORS, Calibration, Indicator, ScreenSpec, calibration_for, read_calibration
from holdtrue.screening.advice import LEVELS, advise
from holdtrue.screening.calibration import settings_of
from holdtrue.screening.result import exceeded

KINDS = ("all", "twins", "benign")
SHIPPED = sorted(Path(module.__file__).parent.glob("calibration-*.json"))


def calibration(**weights: float) -> Calibration:
    parts = {
        name: {
            "center": 1.0,
            "scale": 2.0,
            "weight": weights.get(name, 0.0),
            "lowest": -5.0,
            "highest": 5.0,
            "auc": {kind: {"auc": 0.8} for kind in KINDS},
        }
        for name in INDICATORS
    }
    values: dict[str, Any] = {
        "model": {"name": "m", "revision": "r"},
        "settings": {"tokens": 48},
        "sets": {},
        "indicators": parts,
        "bias": 0.25,
        "left_out": {kind: {"auc": 0.7, "low": 0.4, "high": 0.9} for kind in KINDS},
    }
    return Calibration.model_validate(values)


def test_the_risk_is_the_formula() -> None:
    found = calibration(gap=2.0, drift=1.0)
    values = {"projection": 9.0, "gap": 0.5, "drift": 3.0}
    ends = {"gap": Interval(0.0, 1.0, 9, 9), "drift": Interval(2.5, 3.5, 9, 9)}
    risk = found.risk(values, ends)
    z = 0.25 + 2.0 * (0.5 - 1) / 2 + 1.0 * (3.0 - 1) / 2
    half = math.hypot(2.0 / 2 * 0.5, 1.0 / 2 * 0.5)
    assert risk.value == pytest.approx(1 / (1 + math.exp(-z)))
    assert risk.low == pytest.approx(1 / (1 + math.exp(-(z - half))))
    assert risk.high == pytest.approx(1 / (1 + math.exp(-(z + half))))
    assert risk.far == ("projection",)


def test_an_interval_that_is_missing_where_it_counts_leaves_the_risk_without_one() -> None:
    values = dict.fromkeys(INDICATORS, 1.0)
    ends = {"gap": Interval(0.0, 2.0, 9, 9)}
    assert calibration(gap=1.0).risk(values, ends).low is not None
    assert calibration(gap=1.0, drift=1.0).risk(values, ends).low is None
    assert calibration(gap=1.0).risk(values).low is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), st.sampled_from(INDICATORS), st.floats(0, 100))
def test_a_larger_indicator_never_lowers_the_risk(values: list[float], name: str, more: float) -> None:
    found, before = calibration(projection=0.5, gap=1.0, drift=0.0), dict(zip(INDICATORS, values, strict=True))
    low, high = found.risk(before), found.risk({**before, name: before[name] + more})
    assert 0 <= low.value <= high.value <= 1
    assert advise(low).level in {level.name for level in LEVELS}


def test_the_advice_says_how_sure_it_is() -> None:
    values = dict.fromkeys(INDICATORS, 1.0)
    found = advise(calibration(gap=1.0).risk(values, {"gap": Interval(-4.0, 6.0, 9, 9)}))
    assert found.level == "unclear"
    for text in ("AUC 0.70 [0.40, 0.90]", "not clear of chance", "also another level", "one seed"):
        assert text in found.sure
    low = calibration(gap=1.0).risk({**values, "gap": -9.0})
    assert advise(low).level == "low"
    assert "gap: beyond all data sets" in advise(low).sure
    assert advise(calibration(gap=1.0).risk({**values, "gap": 9.0})).level == "high"


def test_each_level_suggests_defenses_that_there_are() -> None:
    from holdtrue.defenses import parse

    for level in LEVELS:
        assert parse(level.defenses)
    assert LEVELS[-1].top == 1.0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_gap": 0.1, "indicators": ["drift"]}, "max_gap"),
        ({"max_risk": 0.5, "indicators": ["drift"]}, "max_risk"),
        ({"vector": "v", "indicators": ["gap"]}, "vector"),
        ({"scorers": ["s"], "indicators": ["drift"]}, "scorers"),
        ({"scorers": [" "]}, "scorers"),
        ({"indicators": []}, "indicators"),
        ({"indicators": ["gap", "gap"]}, "indicators"),
        ({"indicators": ["gaps"]}, "indicators"),
        ({"rows": 1}, "rows"),
        ({"max_risk": 1.5}, "max_risk"),
        ({"max_gap": math.nan}, "max_gap"),
        ({"row": 3}, "row"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ScreenSpec.of(**values)


def test_what_has_no_value_is_beyond_its_limit() -> None:
    spec = ScreenSpec(max_risk=0.5, max_gap=0.1)
    gap = Indicator("gap", 0.1, Interval(None, None, 3, 3), 3, "variant")
    assert exceeded(spec, {"gap": gap}, None) == ("risk is not known",)
    risk = calibration(gap=1.0).risk(dict.fromkeys(INDICATORS, 5.0))
    worse = Indicator("gap", 0.11, gap.interval, 3, "variant")
    assert [line.split()[0] for line in exceeded(spec, {"gap": worse}, risk)] == ["risk", "gap"]
    assert exceeded(ScreenSpec(), {"gap": worse}, risk) == ()


def test_own_vectors_scorers_or_settings_have_no_calibration() -> None:
    source = ModelSource("m", Path(), read_calibration(SHIPPED[0]).model["revision"], "bundled")
    assert calibration_for(source, ScreenSpec()) is not None
    assert calibration_for(source, ScreenSpec(rows=200, seed=4)) is not None, "how many rows are read is free"
    assert calibration_for(source, ScreenSpec(rows=32)) is not None
    assert calibration_for(source, ScreenSpec(rows=31)) is None, "and a trial of fewer steps drifts less"
    for spec in (ScreenSpec(tokens=49), ScreenSpec(steps=9), ScreenSpec(vector="v"), ScreenSpec(scorers=("s",))):
        assert calibration_for(source, spec) is None
    assert calibration_for(source._replace(revision="other"), ScreenSpec()) is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_the_shipped_file_is_what_its_card_says(path: Path) -> None:
    found = read_calibration(path)
    assert found.settings == settings_of(ScreenSpec()), "the shipped rows or the default settings have changed"
    assert set(found.indicators) == set(INDICATORS)
    assert path.stat().st_size < 10_000
    card = (path.parent / found.card).read_text(encoding="utf-8")
    for measured in [*(part.auc for part in found.indicators.values()), found.left_out]:
        assert f"| {measured.all.text()} | {measured.twins.text()} | {measured.benign.text()} |" in card
    for name, each in found.sets.items():
        assert f"`{name}`" in card
        assert each["kind"] in ("malicious", "twin", "benign")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration-x.json"
    for text in ("", "[]", json.dumps({"version": 2})):
        path.write_text(text)
        with pytest.raises(RunError, match=r"calibration-x\.json"):
            read_calibration(path)
