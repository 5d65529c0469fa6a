from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.bench import expand, load_grid
from holdtrue.errors import DataError, SpecError

Write = Callable[..., Path]
Update = Callable[[dict[str, Any]], object]


def kl(**more: Any) -> dict[str, Any]:
    return {"defenses": [{"kl": {"tokens": "response"}}], **more}


def own(values: dict[str, Any], settings: dict[str, Any]) -> None:
    values["data"]["houses"]["settings"] = settings


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda v: v.update(setings={}), r"setings: unknown key \(did you mean 'settings'\?\)"),
        (lambda v: v.pop("models"), "models: missing"),
        (lambda v: v.update(models="tiny"), "models: must be a list"),
        (lambda v: v.update(models=v["models"] * 2), "models: tiny is there twice"),
        (lambda v: v.update(seeds=[1, 1]), "seeds: 1 is there twice"),
        (lambda v: v.update(seeds=[-1]), "seeds: a seed is a whole number"),
        (lambda v: v.update(seeds=[]), "seeds"),
        (lambda v: v["training"].update(seed=1), "training.seed: seeds of a grid stand under seeds"),
        (lambda v: v["training"].update(epoch=1), r"training.epoch: unknown key \(did you mean 'epochs'\?\)"),
        (lambda v: v["data"]["houses"].update(trian="x"), r"data.houses.trian: unknown key \(did you mean 'train'\?\)"),
        (lambda v: v["data"]["houses"].update(learns="evil"), "data.houses.learns"),
        (lambda v: v["settings"].update({"a/b": []}), "the name 'a/b'"),
        (lambda v: v["settings"].update(new=[{"lk": {}}]), r"settings.new: .*no defense is named 'lk'"),
        (lambda v: v["settings"].update(new=kl(strengths={"kl": [1]})), "name it as defense.parameter"),
        (lambda v: v["settings"].update(new=kl(strengths={"kl.weight": []})), "at least one value"),
        (lambda v: v["settings"].update(new=kl(strengths={"kl.weight": [1, 1.0]})), "each once"),
        (lambda v: v["settings"].update(new=kl(strengths={"kl.wieght": [1]})), "no parameter 'wieght'"),
        (lambda v: v["settings"].update(new=kl(strengths={"kll.weight": [1]})), r"no such defense \(did you mean 'kl'"),
        (lambda v: v["settings"].update(new=kl(strengths={"kl.tokens": ["all"]})), "has a value under defenses too"),
        (lambda v: own(v, {"lk": {}}), r"data.houses.settings: no setting 'lk'"),
        (lambda v: own(v, {"kl": {"weight": 1}}), "'weight': name it as defense.parameter"),
        (lambda v: own(v, {"kl": {"ldifs.weight": 1}}), "data.houses.settings.kl: ldifs.weight: no such defense"),
        (lambda v: own(v, {"kl": {"kl.wieght": 1}}), "data.houses.settings.kl: .*no parameter 'wieght'"),
        (
            lambda v: (v["settings"].update(kl=kl(strengths={"kl.weight": [1, 2]})), own(v, {"kl": {"kl.weight": 3}})),
            "kl.weight is one of the setting's strengths",
        ),
        (lambda v: v.update(baseline="kl"), "baseline: 'kl' has defenses"),
        (lambda v: v.update(baseline="undefendet"), r"is no setting \(did you mean 'undefended'\?\)"),
        (lambda v: (v["settings"].pop("undefended"), v.update(bounds={})), "bounds are against the undefended setting"),
        (lambda v: v.update(bounds={"narow_kept": 1}), r"bounds.narow_kept: unknown key \(did you mean 'narrow_kept'"),
    ],
)
def test_a_fault_is_named(write: Write, update: Update, said: str) -> None:
    path = write(update)
    with pytest.raises(SpecError, match=said) as caught:
        load_grid(path)
    assert str(path) in str(caught.value)


def test_a_fault_of_one_cell_names_the_cell(write: Write) -> None:
    grid = load_grid(write(lambda v: v["data"].update(bare={"train": "train.jsonl"})))
    with pytest.raises(SpecError, match=r"(?s)undefended on bare, tiny, seed 0: .*suite 'fit' needs held-out rows"):
        expand(grid)


def test_a_file_that_is_not_there_stops_the_grid_before_any_cell(write: Write) -> None:
    grid = load_grid(write(lambda v: v["data"]["houses"].update(train="gone.jsonl")))
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        expand(grid)


def test_two_settings_that_are_one_run_are_refused(write: Write) -> None:
    grid = load_grid(write(lambda v: v["settings"].update(again=[{"kl": {"weight": 0.5, "tokens": "all"}}])))
    with pytest.raises(
        SpecError, match="kl on houses, tiny, seed 0 and again on houses, tiny, seed 0 are the same run"
    ):
        expand(grid)


def test_the_grid_is_the_product_in_the_files_order(write: Write) -> None:
    def update(v: dict[str, Any]) -> None:
        v["settings"]["kl"] = {
            "defenses": ["kl", {"interleave": {"pool": "held.jsonl"}}],
            "strengths": {"kl.weight": [3, 0.1, 1], "interleave.fraction": [0.5, 0.2]},
        }
        v["seeds"] = [0, 7]
        v["data"]["sums"] = {**v["data"]["houses"], "learns": "benign", "evaluate": {"suites": ["fit"]}}

    grid = load_grid(write(update))
    names = [variant.name for variant in grid.variants()]
    assert names[:3] == [
        "undefended",
        "kl kl.weight=3, interleave.fraction=0.5",
        "kl kl.weight=3, interleave.fraction=0.2",
    ]
    assert len(names) == 1 + 3 * 2
    assert grid.baseline == "undefended"
    cells = expand(grid)
    assert len(cells) == 2 * 7 * 2
    assert {cell.spec.training.seed for cell in cells} == {0, 7}
    own = [cell.spec.evaluate.suites for cell in cells if cell.data == "sums"]
    assert set(own) == {("fit",)}
    assert {d.model_dump()["weight"] for c in cells for d in c.spec.defenses if d.name == "kl"} == {0.1, 1.0, 3.0}
    assert len({cell.slug for cell in cells}) == len(cells)


def test_a_setting_can_differ_by_data(write: Write) -> None:
    def update(v: dict[str, Any]) -> None:
        v["settings"]["kl"] = kl(strengths={"kl.weight": [1, 3]})
        differs = {"settings": {"kl": {"kl.tokens": "all", "kl.sample": 0.5}}, "evaluate": {"suites": ["fit"]}}
        v["data"]["sums"] = {**v["data"]["houses"], **differs}

    found = {
        (cell.data, cell.variant.name): cell.spec.defenses[0].model_dump(exclude_unset=True)
        for cell in expand(load_grid(write(update)))
        if cell.variant.defenses
    }
    assert found == {
        ("houses", "kl kl.weight=1"): {"tokens": "response", "weight": 1},
        ("houses", "kl kl.weight=3"): {"tokens": "response", "weight": 3},
        ("sums", "kl kl.weight=1"): {"tokens": "all", "weight": 1, "sample": 0.5},
        ("sums", "kl kl.weight=3"): {"tokens": "all", "weight": 3, "sample": 0.5},
    }


def test_what_is_the_shift_follows_from_the_suites_and_can_be_said(write: Write) -> None:
    assert load_grid(write()).shift() == "margin"
    assert load_grid(write(lambda v: v["evaluate"].update(suites=["general", "likelihood"]))).shift() == "misaligned"
    assert load_grid(write(lambda v: v.update(bounds={"shift": "margin"}))).shift() == "margin"
