"""What a model folder must hold, read without torch: safetensors headers, refusals, a cheap identity."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from holdtrue.errors import RunError, SpecError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the format's own limit
_SAMPLES, _BLOCK = 64, 1 << 16


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ``RunError`` names the file when it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: should be a JSON object, is a {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return a safetensors file's header: tensor name -> dtype, shape, data_offsets.

    Raises:
        RunError: the file is not safetensors, or is cut short.
    """
    return _header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free text by key that a safetensors file's header holds beside its tensors; empty where there is none.

    Raises:
        RunError: the file is not safetensors, or is cut short.
    """
    return _header(path)[1]


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start) if len(start) == 8 else (_HEADER_LIMIT + 1,)
            if length > min(_HEADER_LIMIT, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata holds something else than text")
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"{size} bytes where the header says {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: not a whole safetensors file ({error}). Fetch or write it again.") from error
    return header, metadata


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights, sorted by name; empty when there are none.

    Raises:
        RunError: the index names a file that is missing, or one outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise RunError(f"{index}: has no weight_map from tensor names to file names")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise RunError(f"{index}: names {name!r}; only safetensors files beside the index are read")
        if not (folder / name).is_file():
            raise RunError(f"{index}: names {name}, which is missing. Fetch the model again.")
    return [folder / name for name in names]


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder that is not a causal language model in safetensors needing no code of its own.

    Raises:
        SpecError: no config, an adapter, weights only as pickle or GGUF, or code in the repository.
        RunError: a file that should be there is missing or broken.
    """
    if (folder / "adapter_config.json").is_file():
        raise SpecError(f"{name}: an adapter, not a base model. Name the model that it was trained on.")
    if not (folder / "config.json").is_file():
        raise SpecError(f"{name}: no config.json in {folder}. A model folder is what save_pretrained writes.")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file() and read_json(folder / file).get("auto_map"):
            raise SpecError(
                f"{name}: {file} has auto_map: this model runs Python code from its own repository, and holdtrue never "
                "does (trust_remote_code is off). Use a model that transformers supports by itself."
            )
    files = weight_files(folder)
    for file in files:
        read_header(file)
    if files:
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.gguf"))
    if pickles:
        raise SpecError(
            f"{name}: only safetensors are read, and its weights are {pickles[0]}: loading a pickle can run any code. "
            "Convert it on a machine that you can lose, with save_pretrained, which writes safetensors."
        )
    hint = f" {others[0]} is GGUF: convert it to safetensors first." if others else ""
    raise SpecError(f"{name}: no model.safetensors or {INDEX} in {folder}.{hint}")


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder would pass ``check_model_folder`` and holds a tokenizer."""
    try:
        check_model_folder(folder, folder.name)
    except (SpecError, RunError):
        return False
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def identity(folder: Path) -> str:
    """Return ``sha256:<hex>`` over what decides a model's outputs, quickly enough to take at each start.

    It covers config, tokenizer and chat template whole, and of each weight file its name, size, header and 64 evenly
    spread blocks of 64 KiB (a smaller file whole). It tells trained models apart; it is no proof against somebody who
    edits weights between the blocks.
    """
    digest = hashlib.sha256()
    weights = weight_files(folder)
    small = [*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.txt"), *folder.glob("*.model")]
    for file in sorted([*small, *weights]):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if file not in weights or size <= _SAMPLES * _BLOCK:
                digest.update(stream.read())
                continue
            (length,) = struct.unpack("<Q", stream.read(8))
            digest.update(stream.read(length))
            for sample in range(_SAMPLES):
                stream.seek((size - _BLOCK) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_BLOCK))
    return f"sha256:{digest.hexdigest()}"
