from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from holdtrue.errors import NeedError
from holdtrue.models import ModelSource, VectorInfo, read_vectors, write_vectors
from holdtrue.models.vectors import KEY

INFO = VectorInfo(model="m", revision="r", blocks=3, width=4, source="pairs", trait="malice", counts={"pairs": 2})


def made(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Write a file by hand, with whatever is wrong in it."""
    info = json.loads(INFO.model_dump_json()) | changes
    save_file({"block.0": torch.ones(4)} if tensors is None else tensors, path, metadata={KEY: json.dumps(info)})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    vectors = {2: torch.randn(4, dtype=torch.float64), 0: torch.randn(4, dtype=torch.float64)}
    written = write_vectors(tmp_path / "new" / "v.safetensors", vectors, INFO)
    found = read_vectors(tmp_path / "new" / "v.safetensors")
    assert found.info == written.info == INFO
    assert list(found.tensors) == [0, 2]
    assert all(torch.equal(found.tensors[i], v.float()) for i, v in vectors.items())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_directions_may_be_none_or_many(tmp_path: Path) -> None:
    info = INFO.model_copy(update={"kind": "directions"})
    found = write_vectors(tmp_path / "v", {0: torch.ones(0, 4), 1: torch.eye(4)[:2]}, info)
    assert [tuple(t.shape) for t in found.tensors.values()] == [(0, 4), (2, 4)]


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        ({"block.0": torch.ones(5)}, {}, r"F32 of shape \[5\].*width is 4"),
        ({"block.0": torch.ones(1, 4)}, {}, r"F32 of shape \[1, 4\]; it should be F32 of \(width,\)"),
        ({"block.0": torch.ones(4)}, {"kind": "directions"}, r"\(k, width\)"),
        ({"block.0": torch.ones(5, 4)}, {"kind": "directions"}, "k at most width"),
        ({"block.0": torch.ones(4, dtype=torch.float16)}, {}, "F16"),
        ({"block.3": torch.ones(4)}, {}, "block.0 to block.2"),
        ({"block.00": torch.ones(4)}, {}, "'block.00'"),
        ({"weight": torch.ones(4)}, {}, "'weight'"),
        ({"block.0": torch.tensor([1, float("nan"), 0, 0])}, {}, "not finite"),
        ({"block.0": torch.tensor([1, float("inf"), 0, 0])}, {}, "not finite"),
        ({}, {}, "holds no vector"),
        (None, {"format": 2}, "format 2; this version of holdtrue reads 1"),
        (None, {"blocks": "3"}, "blocks: Input should be a valid integer"),
        (None, {"code": "x"}, "code: Extra inputs"),
        (None, {"revision": ""}, "revision"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path: Path, tensors: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NeedError, match=words):
        read_vectors(made(tmp_path / "v.safetensors", tensors, **changes))


def test_no_file_no_safetensors_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(NeedError, match="there is no such vector file"):
        read_vectors(tmp_path / "v.safetensors")
    torch.save({"block.0": torch.ones(4)}, tmp_path / "v.pt")
    with pytest.raises(NeedError, match="must be safetensors"):
        read_vectors(tmp_path / "v.pt")
    save_file({"block.0": torch.ones(4)}, tmp_path / "plain.safetensors")
    with pytest.raises(NeedError, match="not a vector file of holdtrue"):
        read_vectors(tmp_path / "plain.safetensors")
    save_file({"block.0": torch.ones(4)}, tmp_path / "list.safetensors", metadata={KEY: "[]"})
    with pytest.raises(NeedError, match="metadata is broken"):
        read_vectors(tmp_path / "list.safetensors")


def test_a_bad_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_vectors(path, {0: torch.ones(4)}, INFO)
    before = path.read_bytes()
    with pytest.raises(NeedError, match="not finite"):
        write_vectors(path, {0: torch.full((4,), float("nan"))}, INFO)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_another_model_is_named(tmp_path: Path) -> None:
    found = read_vectors(made(tmp_path / "v.safetensors"))
    found.check(ModelSource("other name", tmp_path, "r", "path"), 3, 4)
    for source, blocks, width in (
        (ModelSource("n", tmp_path, "r2", "path"), 3, 4),
        (ModelSource("n", tmp_path, "r", "path"), 4, 4),
        (ModelSource("n", tmp_path, "r", "path"), 3, 8),
    ):
        with pytest.raises(NeedError, match=r"made on m \(r; 3 blocks of width 4\).*the model here is n \("):
            found.check(source, blocks, width)


@given(data=st.binary(max_size=200), start=st.booleans())
def test_any_bytes_are_refused_with_words(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "v.safetensors"
    good = made(path).read_bytes() if start else b""
    path.write_bytes(good[: len(good) // 2] + data)
    with pytest.raises(NeedError, match=r"v\.safetensors"):
        read_vectors(path)
