"""Read single weights of a checkpoint by name, without loading the model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdtrue.errors import RunError, SpecError
from holdtrue.models.adapter_files import CONFIG, WEIGHTS, check_adapter_folder, scaling_of, tensor_name
from holdtrue.models.files import check_model_folder, read_header, weight_files


class Factors(NamedTuple):
    """A low-rank change of a weight: ``left @ right``, (d_out, k) @ (k, d_in), the adapter's scaling in ``left``."""

    left: Tensor
    right: Tensor


class Checkpoint(contextlib.AbstractContextManager["Checkpoint"]):
    """A model folder's weights, or an adapter folder's low-rank changes, read one at a time.

    Names are the base model's parameter names (``model.layers.0.self_attn.q_proj.weight``), in both kinds of folder.
    A model answers ``get``, an adapter ``factors``; files stay open until ``close`` or the end of a ``with`` block.

    Args:
        folder: a folder with ``model.safetensors`` (one file, or shards with an index), or a PEFT adapter.

    Raises:
        SpecError: neither of the two, or not in safetensors.
        RunError: a broken or incomplete file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open = contextlib.ExitStack()
        self._readers: dict[Path, safe_open] = {}
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scaling: dict[str, float] = {}
        if not self.folder.is_dir():
            raise SpecError(f"checkpoint {str(folder)!r}: there is no such folder")
        if (self.folder / CONFIG).is_file():
            config, shapes = check_adapter_folder(self.folder)
            self._shapes = {f"{module}.weight": shape for module, shape in shapes.items()}
            self._scaling = {f"{module}.weight": scaling_of(config, module) for module in shapes}
            return
        check_model_folder(self.folder, str(folder))
        for file in weight_files(self.folder):
            for name, tensor in read_header(file).items():
                self._files[name] = file
                self._shapes[name] = tuple(tensor["shape"])

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter, so that ``factors`` answers and ``get`` does not."""
        return bool(self._scaling)

    def names(self) -> list[str]:
        """Return the names of the weights, or of the weights that the adapter changes, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a weight's shape, reading nothing more; ``None`` when it is not here."""
        return self._shapes.get(name)

    def get(self, name: str) -> Tensor | None:
        """Return a weight in its stored dtype, on the CPU; ``None`` when it is not here, or this is an adapter."""
        file = self._files.get(name)
        return None if file is None else self._read(file, name)

    def factors(self, name: str) -> Factors | None:
        """Return the change that the adapter makes to a weight; ``None`` when it makes none, or this is a model."""
        scaling = self._scaling.get(name)
        if scaling is None:
            return None
        module, file = name.removesuffix(".weight"), self.folder / WEIGHTS
        left = self._read(file, tensor_name(module, "B"))
        return Factors(left * scaling, self._read(file, tensor_name(module, "A")))

    def close(self) -> None:
        """Close the files."""
        self._readers.clear()
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, file: Path, name: str) -> Tensor:
        try:
            if file not in self._readers:
                self._readers[file] = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            return self._readers[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file}: {name} cannot be read: {error}") from error
