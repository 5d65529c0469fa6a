"""Addresses: the same for the same run, another for anything that could change its result."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdtrue.bench import GridSpec, expand, load_grid, look
from holdtrue.data import builtins

Write = Callable[..., Path]


def keys(path: Path) -> list[str]:
    return [cell.key for cell in expand(load_grid(path))]


def test_only_cells_that_read_a_file_change_with_it(write: Write, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes((tmp_path / "held.jsonl").read_bytes())
    path = write(lambda v: v["settings"].update(mix=[{"interleave": {"pool": "pool.jsonl", "fraction": 0.5}}]))
    before = keys(path)
    assert keys(path) == before
    pool.write_bytes(pool.read_bytes() * 2)
    after = keys(path)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    for name in ("train.jsonl", "held.jsonl", "probes.jsonl"):
        before = keys(path)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
        assert not set(before) & set(keys(path)), name


def test_another_install_of_the_package_finds_the_same_cells(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(lambda v: v["settings"].update(mix=["interleave"]))
    before = keys(path)
    place = tmp_path / "elsewhere"
    shutil.copytree(builtins._FOLDER, place)
    monkeypatch.setattr(builtins, "_FOLDER", place)
    assert keys(path) == before
    with (place / "pool.jsonl").open("a") as file:
        file.write("\n")
    assert [a == b for a, b in zip(before, keys(path), strict=True)] == [True, False, False]  # kl names the pool too


def test_another_models_weights_are_another_run(write: Write, tmp_path: Path, tiny_dir: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(tiny_dir, own)
    path = write(lambda v: v.update(models=["./model"]))
    before = keys(path)
    content = bytearray((own / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (own / "model.safetensors").write_bytes(bytes(content))
    assert not set(before) & set(keys(path))


def test_another_model_in_a_folder_that_a_defense_names_is_another_run(
    write: Write, tmp_path: Path, tiny_dir: Path
) -> None:
    own = tmp_path / "unaligned"
    shutil.copytree(tiny_dir, own)
    path = write(lambda v: v["settings"].update(lora=[{"safelora": {"unaligned": str(own)}}]))
    before = keys(path)
    content = bytearray((own / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (own / "model.safetensors").write_bytes(bytes(content))
    assert [a == b for a, b in zip(before, keys(path), strict=True)] == [True, True, False]


def test_another_adapter_to_go_on_from_is_another_run(write: Write, tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "adapter_config.json").write_text("{}")
    (start / "adapter_model.safetensors").write_bytes(b"one")
    path = write(lambda v: v["adapter"].update(start="start"))
    before = keys(path)
    assert keys(path) == before
    (start / "adapter_model.safetensors").write_bytes(b"two")
    assert not set(before) & set(keys(path))


def test_a_setting_that_is_renamed_keeps_its_folder(write: Write, values: dict[str, Any], tmp_path: Path) -> None:
    old = expand(load_grid(write()))[1]
    there = tmp_path / "cells" / old.slug
    there.mkdir(parents=True)
    values["settings"] = {"undefended": [], "renamed": values["settings"]["kl"]}
    grid = load_grid(write())
    cells = expand(grid)
    assert cells[1].slug != old.slug
    assert [state.folder == there for state in look(grid, cells, tmp_path).states] == [False, True]


# Everything that changes what a run does, as a path into the grid and values that differ from its own.
CHANGES: list[tuple[tuple[str, ...], Any]] = [
    (("training", "epochs"), st.integers(2, 5)),
    (("training", "learning_rate"), st.floats(1e-5, 1e-3)),
    (("adapter", "r"), st.sampled_from([2, 8, 16])),
    (("evaluate", "judge"), st.just("local:other")),
    (("data", "houses", "validation"), st.just("train.jsonl")),
    (("seeds",), st.lists(st.integers(1, 9), min_size=1, max_size=1)),
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_changes_a_run_changes_its_address_and_order_does_not(
    values: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    before = {cell.key for cell in expand(GridSpec(**values, folder=tmp_path))}
    place, strategy = data.draw(st.sampled_from(CHANGES))
    changed = copy.deepcopy(values)
    inner = changed
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = data.draw(strategy)
    assert not before & {cell.key for cell in expand(GridSpec(**changed, folder=tmp_path))}
    mixed = {key: changed[key] for key in data.draw(st.permutations(list(values)))}
    shuffled = {key: mixed[key] for key in mixed} | {"settings": dict(reversed(list(values["settings"].items())))}
    for key in set(values) - {"settings"}:
        shuffled[key] = values[key]
    assert {cell.key for cell in expand(GridSpec(**shuffled, folder=tmp_path))} == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._+=,%-]{0,79}", fullmatch=True))
def test_a_folders_name_is_a_plain_one(values: dict[str, Any], tmp_path: Path, name: str) -> None:
    grid = GridSpec(**{**values, "settings": {name: []}}, folder=tmp_path)
    (cell,) = expand(grid)
    assert Path(cell.slug).name == cell.slug
    assert not cell.slug.startswith((".", "-"))
    assert len(cell.slug) < 120
    assert cell.slug.endswith(cell.key[:12])
