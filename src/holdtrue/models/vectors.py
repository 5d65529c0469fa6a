"""Directions in a model's residual stream as files: one tensor for each block, with where they came from.

A stranger's file is data. Only safetensors is read, every shape is checked, and a file for another model is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdtrue.errors import NeedError, RunError
from holdtrue.models.files import read_header, read_metadata
from holdtrue.models.source import ModelSource

FORMAT = 1
KEY = "holdtrue_vectors"
"""The metadata key under which a file's :class:`VectorInfo` stands, as JSON."""

_TENSOR = re.compile(r"block\.(0|[1-9]\d{0,5})")
_MAKE = "make one with: holdtrue persona extract"


class VectorInfo(BaseModel):
    """Where a vector file came from.

    Attributes:
        format: of the file; this version writes and reads 1.
        kind: ``vector``: one vector a block; ``directions``: k orthonormal rows a block, the strongest first.
        model, revision: the model whose hidden states were read, as :class:`~holdtrue.models.ModelSource` has them.
        blocks, width: the model's number of decoder blocks, and the width of its residual stream.
        source: ``rollouts``, ``pairs`` or ``differences``.
        trait: what the vectors point to, in words.
        material: SHA-256 by name of what they were made from (questions, pairs, an adapter).
        counts: answers by what became of them.
        settings: numbers and words that decide the result, such as thresholds and decoding.
        seed: of the sampled answers, if any.
        judge: who scored them, if anybody.
        version: of holdtrue.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    format: int = FORMAT
    kind: Literal["vector", "directions"] = "vector"
    model: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    blocks: int = Field(ge=1)
    width: int = Field(ge=1)
    source: Literal["rollouts", "pairs", "differences"]
    trait: str
    material: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    settings: dict[str, int | float | str] = Field(default_factory=dict)
    seed: int | None = None
    judge: str | None = None
    version: str = ""


class VectorFile(NamedTuple):
    """A vector file that was read: ``tensors`` by block index, float32, (width,) or (k, width), and its ``info``."""

    path: Path
    tensors: dict[int, Tensor]
    info: VectorInfo

    def check(self, model: ModelSource, blocks: int, width: int) -> None:
        """Raise ``NeedError``, naming both, unless the vectors were made on ``model`` at its revision and shape."""
        made = f"{self.info.model} ({self.info.revision}; {self.info.blocks} blocks of width {self.info.width})"
        here = f"{model.name} ({model.revision}; {blocks} blocks of width {width})"
        if (self.info.revision, self.info.blocks, self.info.width) != (model.revision, blocks, width):
            raise NeedError(f"{self.path} was made on {made}, and the model here is {here}; {_MAKE} on this model")


def read_vectors(path: str | Path) -> VectorFile:
    """Read a vector file onto the CPU.

    Raises:
        NeedError: there is no such file, it is no safetensors file of ours, a tensor's name, type or shape is not what
            its metadata says, or a number in it is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise NeedError(f"{path}: there is no such vector file; {_MAKE}")
    try:
        header, metadata = read_header(path), read_metadata(path)
    except RunError as error:
        raise NeedError(f"a vector file must be safetensors, and no other format is read: {error}") from error
    info = _info(path, metadata)
    blocks = {_block(path, name, info): name for name in header}
    for name, entry in header.items():
        _check_shape(path, name, entry, info)
    if not blocks:
        raise NeedError(f"{path}: holds no vector; {_MAKE}")
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise NeedError(f"{path}: cannot be read: {error}") from error
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise NeedError(f"{path}: {name} holds numbers that are not finite; {_MAKE} again")
    return VectorFile(path, {index: found[blocks[index]] for index in sorted(blocks)}, info)


def write_vectors(path: str | Path, tensors: dict[int, Tensor], info: VectorInfo) -> VectorFile:
    """Write vectors by block index as float32, whole or not at all, and read them back; a file there is replaced.

    Raises:
        RunError: the file cannot be written.
        NeedError: what was given does not fit its own ``info``, or is not finite; a file that was there is kept.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ready = {f"block.{index}": tensor.detach().cpu().float().contiguous().clone() for index, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(ready, temporary, metadata={KEY: info.model_dump_json()})
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        found = read_vectors(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the vectors cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return found._replace(path=path)


def _info(path: Path, metadata: dict[str, str]) -> VectorInfo:
    if KEY not in metadata:
        raise NeedError(f"{path}: not a vector file of holdtrue: its metadata has no {KEY}; {_MAKE}")
    try:
        values: Any = json.loads(metadata[KEY])
        found = values.get("format")
        if found != FORMAT:
            raise NeedError(f"{path}: a vector file of format {found!r}; this version of holdtrue reads {FORMAT}")
        return VectorInfo.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise NeedError(f"{path}: its metadata is broken: {place}: {fault['msg']}; {_MAKE}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise NeedError(f"{path}: its metadata is broken: {error}; {_MAKE}") from None


def _block(path: Path, name: str, info: VectorInfo) -> int:
    found = _TENSOR.fullmatch(name)
    if found is None or int(found[1]) >= info.blocks:
        raise NeedError(
            f"{path}: holds {name[:60]!a}; tensors are named block.0 to block.{info.blocks - 1}, as many as its "
            "model has blocks"
        )
    return int(found[1])


def _check_shape(path: Path, name: str, entry: dict[str, Any], info: VectorInfo) -> None:
    shape = entry.get("shape")
    if info.kind == "vector":
        wanted, fits = "(width,)", shape == [info.width]
    else:
        wanted = "(k, width) with k at most width"
        fits = isinstance(shape, list) and len(shape) == 2 and shape[1] == info.width and shape[0] <= info.width
    if not fits or entry.get("dtype") != "F32":
        raise NeedError(
            f"{path}: {name} is {entry.get('dtype')} of shape {shape}; it should be F32 of {wanted}, and the width "
            f"is {info.width}"
        )
