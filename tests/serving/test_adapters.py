"""Adapters by what is in them: checked before they are put on, apart from each other, and forgotten in time."""

from __future__ import annotations

import gc
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from holdtrue.models import load_adapter, load_model, resolve
from holdtrue.serving import adapters as module
from holdtrue.serving.adapters import Adapters, copy_folder
from holdtrue.serving.port import AdapterRef, ChatError
from serving_support import make_base

IDS = torch.arange(1, 20)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_each_model_is_its_own_and_the_base_stays_the_base(base_dir: Path, adapters: list[AdapterRef]):
    source = resolve(str(base_dir))
    held = Adapters(source)
    models = [held.get(ref) for ref in (None, *adapters)]
    found = [logits(model) for model in models]
    assert torch.equal(found[0], logits(load_model(source, device="cpu")))
    for ref, mine in zip(adapters, found[1:], strict=True):
        assert torch.equal(mine, logits(load_adapter(load_model(source, device="cpu"), ref.location)))
    assert [torch.equal(logits(model), mine) for model, mine in zip(models, found, strict=True)] == [True] * 4
    assert len({id(_lm(model).model.norm) for model in models}) == 4  # modules of their own
    assert len({_lm(model).model.norm.weight.data_ptr() for model in models}) == 1  # on weights that they share


def _lm(model: torch.nn.Module) -> Any:
    from holdtrue.models import causal_lm

    return causal_lm(model)


def test_the_least_used_is_forgotten_and_nothing_stays_on_the_disk(
    base_dir: Path, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(module, "KEPT", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetched: list[str] = []

    def fetch(location: str, folder: Path) -> None:
        fetched.append(location)
        copy_folder(location, folder)

    held = Adapters(resolve(str(base_dir)), fetch)
    one, two, three = adapters
    used = held.get(one)
    before = logits(used)
    gone = weakref.ref(held.get(two))
    for ref in (one, three, one, three, two):
        held.get(ref)
    assert fetched == [ref.location for ref in (one, two, three, two)]
    assert torch.equal(logits(used), before)  # whoever holds a model has it whole
    held.get(one)
    assert fetched[-1] == one.location
    gc.collect()
    assert gone() is None
    assert not list(tmp_path.iterdir())


def test_files_lie_where_they_may_while_they_are_loaded(base_dir: Path, adapters: list[AdapterRef], tmp_path: Path):
    places: list[Path] = []

    def fetch(location: str, folder: Path) -> None:
        places.append(folder)
        copy_folder(location, folder)

    Adapters(resolve(str(base_dir)), fetch, tmp_path).get(adapters[0])
    assert [place.parent.parent for place in places] == [tmp_path]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["a byte", "a file more", "a link", "gone", "no adapter", "another base"])
def test_what_is_not_the_adapter_is_refused(base_dir: Path, adapters: list[AdapterRef], tmp_path: Path, change: str):
    from holdtrue.models.digest import tree_digest

    folder, base = tmp_path / "adapter", base_dir
    shutil.copytree(adapters[0].location, folder)
    digest = adapters[0].digest
    match change:
        case "a byte":
            weights = folder / "adapter_model.safetensors"
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "a file more":
            (folder / "more.txt").write_text("more")
        case "a link":
            (folder / "more.txt").symlink_to("/etc/hostname")
        case "gone":
            shutil.rmtree(folder)
        case "no adapter":
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "a").write_text("a")
            digest = tree_digest(folder)
        case "another base":
            base = make_base(tmp_path / "base", seed=0, width=64)
    with pytest.raises(ChatError) as raised:
        Adapters(resolve(str(base))).get(AdapterRef(digest, str(folder)))
    assert raised.value.fault == "adapter"
