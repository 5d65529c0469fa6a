from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.errors import HoldtrueError, NeedError, RunError, SpecError
from holdtrue.models import ModelSource, read_adapter, write_adapter
from holdtrue.selection import (
    PROVENANCE,
    Base,
    Provenance,
    TrainedOn,
    adapter_sha256,
    admitted,
    check_domain,
    list_scorers,
    read_scorer,
)


def provenance(folder: Path, about: str, model: ModelSource, **changes: Any) -> Path:
    values = Provenance(
        domain=about,
        data=TrainedOn(file="bad.jsonl", sha256="0" * 64, file_rows=9),
        rows=5,
        settings={},
        base=Base(name=model.portable_name, revision=model.revision),
        adapter_sha256=adapter_sha256(folder),
    ).model_dump(mode="json")
    (folder / PROVENANCE).write_text(json.dumps(values | changes))
    return folder


@pytest.fixture
def known(tiny: ModelSource, adapters: list[Path]) -> list[Path]:
    return [provenance(f, d, tiny) for f, d in zip(adapters, ("medical", "legal"), strict=True)]


def test_a_domain_is_left_out_whatever_its_case(tiny, known) -> None:
    kept, out = admitted(known, tiny, ["Medical"])
    assert [s.domain for s in kept] == ["legal"]
    assert [s.domain for s in out] == ["medical"]
    assert [s.domain for s in admitted(known, tiny)[0]] == ["medical", "legal"]
    assert admitted(known, tiny, ["astronomy"])[1] == []


def test_no_scorer_left_is_a_need(tiny, known) -> None:
    with pytest.raises(NeedError, match="leaves none of 2"):
        admitted(known, tiny, ["medical", "legal"])
    with pytest.raises(NeedError, match="holdtrue scorers build"):
        admitted([], tiny)


@pytest.mark.parametrize("name", ["medicl", "medical_bad_advice", "lega"])
def test_an_excluded_name_that_nearly_fits_is_not_passed_over(tiny, known, name: str) -> None:
    with pytest.raises(NeedError, match="did you mean"):
        admitted(known, tiny, [name])


def test_without_provenance_nothing_can_be_excluded(tiny, adapters, known) -> None:
    (known[1] / PROVENANCE).unlink()
    assert len(admitted(known, tiny)[0]) == 2
    with pytest.raises(NeedError, match="does not say what it was trained on"):
        admitted(known, tiny, ["medical"])


def test_the_provenance_of_another_adapter_does_not_count(tiny, known) -> None:
    shutil.copy(known[0] / PROVENANCE, known[1] / PROVENANCE)
    assert read_scorer(known[1]).provenance is None
    with pytest.raises(NeedError, match="does not say"):
        admitted(known, tiny, ["medical"])


def test_a_scorer_of_another_revision_or_name_is_refused(tiny, known) -> None:
    with pytest.raises(NeedError, match="sha256:other"):
        admitted(known, tiny._replace(revision="sha256:other"))
    (known[0] / PROVENANCE).unlink()
    with pytest.raises(NeedError, match="build the scorer on that"):
        admitted(known[:1], tiny._replace(name="/elsewhere", path=Path("/elsewhere")))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    read = read_adapter(folder)
    tensors = dict(read.tensors)
    change(tensors)
    write_adapter(folder, tensors, read.config)
    return folder


def test_weights_of_another_shape_are_refused(tiny, adapters) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = torch.zeros(4, 40)

    with pytest.raises(NeedError, match="another base model"):
        admitted([rewritten(adapters[0], widen)], tiny)


def test_weights_that_the_model_does_not_have_are_refused(tiny, adapters) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".layers.0.", ".layers.7.")] = tensors.pop(name)

    with pytest.raises(NeedError, match="there is no such weight"):
        admitted([rewritten(adapters[0], rename)], tiny)


def test_weights_that_are_no_numbers_are_refused(tiny, adapters) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = math.nan

    with pytest.raises(NeedError, match="no numbers"):
        admitted([rewritten(adapters[0], spoil)], tiny)


def test_one_adapter_twice_is_refused(tiny, adapters, tmp_path) -> None:
    shutil.copytree(adapters[0], tmp_path / "again")
    with pytest.raises(NeedError, match="same adapter"):
        admitted([adapters[0], tmp_path / "again"], tiny)


def test_what_is_no_safe_adapter_is_refused(tiny, adapters, tmp_path) -> None:
    with pytest.raises(NeedError, match="no such folder"):
        admitted([tmp_path / "nowhere"], tiny)
    with pytest.raises(NeedError, match="not an adapter"):
        admitted([tmp_path], tiny)
    (adapters[0] / "adapter_model.safetensors").rename(adapters[0] / "adapter_model.bin")
    with pytest.raises(NeedError, match="only safetensors"):
        admitted([adapters[0]], tiny)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", "\x00", "[" * 100_000, '{"format": 1}', "null", "x" * (2**20 + 1)],
    ids=["empty", "list", "cut", "bare", "zero", "deep", "short", "null", "large"],
)
def test_a_broken_provenance_is_told(adapters, text: str) -> None:
    (adapters[0] / PROVENANCE).write_text(text)
    with pytest.raises(RunError, match=r"holdtrue_scorer\.json"):
        read_scorer(adapters[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"rows": "5"},
        {"rows": 0},
        {"domain": ""},
        {"domain": ["x"]},
        {"domain": "\x1b[2J"},
        {"adapter_sha256": "x"},
    ],
)
def test_a_provenance_with_a_wrong_value_is_told(tiny, adapters, changes) -> None:
    provenance(adapters[0], "medical", tiny, **changes)
    with pytest.raises(RunError, match=f"{next(iter(changes))}.*build the scorer again"):
        read_scorer(adapters[0])


def test_listing(tiny, known, tmp_path) -> None:
    assert [(s.folder.name, s.domain) for s in list_scorers(tmp_path)] == [("scorer1", "medical"), ("scorer2", "legal")]
    for folder in (tmp_path / "nowhere", tmp_path / "scorer1"):
        with pytest.raises(SpecError):
            list_scorers(folder)


@given(st.text(max_size=12))
def test_a_domain_is_one_visible_folder_or_refused(name: str) -> None:
    try:
        check_domain(name)
    except HoldtrueError:
        return
    assert Path(name).name == name
    assert not name.startswith(".")
    assert name.isascii()
