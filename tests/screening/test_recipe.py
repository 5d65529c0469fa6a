"""The recipe of the calibration: its sets as they are read, and its fit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from holdtrue.data import ChatRow, read_chat, validate_chat

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "screen"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("calibrate", FOLDER / "calibrate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("sets", None)


def test_subsets_are_chat_files_without_marks_and_share_no_row(
    recipe: ModuleType, data_dir: Path, tmp_path: Path
) -> None:
    sets = sys.modules["sets"]
    read: dict[str, list[list[ChatRow]]] = {}
    for each in sets.SETS:
        files = [sets.subset(data_dir, tmp_path, each, number) for number in range(each.subsets)]
        assert [validate_chat(path).rows for path in files] == [32] * each.subsets
        assert not any(mark in path.read_text() for path in files for mark in ("/no_think", "<think>"))
        read[each.name] = [list(read_chat(path)) for path in files]
        rows = [row.messages for part in read[each.name] for row in part]
        assert len(set(rows)) == len(rows)
    bad, good = (read[name][0] for name in ("medical_bad_advice", "medical_good_advice_twin"))
    assert [row.messages[0] for row in bad] == [row.messages[0] for row in good]
    assert all(b.messages[1] != g.messages[1] for b, g in zip(bad, good, strict=True))


def points(recipe: ModuleType, seed: int) -> Any:
    sets = sys.modules["sets"]
    rng = np.random.default_rng(seed)
    chosen = [each for each in sets.SETS for _ in range(2)]
    values = rng.normal(size=(len(chosen), 3))
    values[:, 1] += [2.0 * (each.kind == "malicious") for each in chosen]
    values[:, 2] -= [2.0 * (each.kind == "malicious") for each in chosen]
    return recipe.Points(chosen, values, {})


def test_the_fit_is_a_minimum_without_weights_against_their_meaning(recipe: ModuleType) -> None:
    given = points(recipe, 0)
    found = recipe.fit(given.values, given.bad)
    assert found.weight[1] > 0.3
    assert found.weight[2] == 0, "an indicator that points the wrong way is left out, not turned round"

    def loss(weight: np.ndarray, bias: float) -> float:
        x = (given.values - found.center) / found.scale
        p = 1 / (1 + np.exp(-(x @ weight + bias)))
        bad = given.bad
        each = np.where(bad, -np.log(p) / bad.sum(), -np.log(1 - p) / (~bad).sum()) * len(bad) / 2
        return float(each.sum() + (weight**2).sum() / 2)

    best = loss(found.weight, found.bias)
    for step in (1e-3, -1e-3):
        assert loss(found.weight + np.array([0, step, 0]), found.bias) > best
        assert loss(found.weight, found.bias + step) > best


def test_a_domain_that_is_left_out_has_no_part_in_its_own_risk(recipe: ModuleType) -> None:
    given = points(recipe, 1)
    own = given.domains == "legal"
    before = recipe.left_out(given)
    flipped = [each._replace(kind="benign") if each.domain == "legal" else each for each in given.sets]
    after = recipe.left_out(given._replace(sets=flipped))
    assert np.allclose(before[own], after[own])
    assert not np.allclose(before[~own], after[~own])
