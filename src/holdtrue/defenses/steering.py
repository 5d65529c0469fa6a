"""Steering while training: add a persona vector to the residual stream, or take directions out of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from holdtrue.defenses.base import Defense, RunContext
from holdtrue.errors import NeedError
from holdtrue.models.digest import file_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdtrue.models import VectorFile

Index = Annotated[int, Field(ge=0)]


class Steering(Defense):
    """Shift the residual stream along a persona vector while training, so that training need not.

    mode add:     h_l <- h_l + weight * e_l          preventative steering; nothing is added after training
    mode ablate:  h_l <- h_l − Qᵀ Q h_l              the rows of Q: an orthonormal basis of the file's directions

    h_l is the output of block l at every position, e_l the file's vector for that block, not normalized. Only the
    policy's training passes are changed, forward and backward; neither the reference nor an evaluation sees it.

    Mode add: Chen et al. 2025 (arXiv 2507.21509), as used by Kaczér et al. 2025 (arXiv 2508.06249), faithful. Mode
    ablate: after CAFT, Casademunt et al. 2025 (arXiv 2507.16795), a variant: CAFT looks at directions and chooses;
    here the first ``components`` of the file are taken. ``holdtrue persona`` makes the files.
    """

    name = "steering"
    badge = "faithful"
    paper = "arXiv 2507.21509, arXiv 2507.16795"
    files = ("vector",)

    vector: str | None = Field(default=None, description="a file that holdtrue persona wrote; must be given")
    mode: Literal["add", "ablate"] = Field(default="add", description="add the vector, or project directions away")
    weight: float = Field(
        default=5.0, ge=0, alias="alpha", description="alpha, the factor on the vector; mode ablate knows only zero"
    )
    layer: Index | tuple[Index, ...] | None = Field(
        default=None, description="the block, from 0, or several; by default 20/28 of the number of blocks"
    )
    components: int | None = Field(
        default=None, ge=0, description="how many directions mode ablate takes, the first ones; all by default"
    )

    def layers(self, count: int) -> tuple[int, ...]:
        """Return the blocks' indices for a model of ``count`` blocks; by default 20/28 of it, rounded down."""
        if self.layer is None:
            return (20 * count // 28,)
        return (self.layer,) if isinstance(self.layer, int) else tuple(sorted(set(self.layer)))

    def placed(self, folder: Path) -> Self:
        if self.vector is None:
            return self
        return self.model_copy(update={"vector": str(folder / Path(self.vector).expanduser())})

    def preflight(self, context: RunContext) -> None:
        if not self.acts:
            return
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(context.model.path, trust_remote_code=False).get_text_config(decoder=True)
        file = _read(*self._stamp(context.folder))
        file.check(context.model, context.blocks, config.hidden_size)
        chosen = self.changes(file, context.blocks, config.hidden_size)
        norms = {str(index): round(float(file.tensors[index].norm()), 6) for index in chosen}
        context.notes.update(
            mode=self.mode,
            layers=list(chosen),
            norms=norms,
            sha256=file_digest(file.path),
            vector=file.info.model_dump(mode="json"),
        )

    def still_met(self, notes: Mapping[str, Any]) -> None:
        if not self.acts:
            return
        path = self._stamp(Path())[0]
        was, now = notes.get("sha256"), file_digest(Path(path))
        if was != now:
            raise NeedError(
                f"{path} has changed since this run was prepared with it (sha256 {was}, now {now}): put the file back, "
                "or begin another run"
            )

    @contextlib.contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        if not self.acts:
            yield
            return
        from holdtrue.models import causal_lm, decoder_blocks

        blocks = decoder_blocks(model)
        width = causal_lm(model).config.get_text_config(decoder=True).hidden_size
        # A frozen model can be hashed, which pydantic does not tell type checkers.
        changes = _ready(self, *self._stamp(Path()), len(blocks), width)  # pyright: ignore[reportArgumentType]
        handles = [blocks[index].register_forward_hook(_hook(change)) for index, change in changes.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def acts(self) -> bool:
        """Whether these settings change anything."""
        return self.weight > 0 and not (self.mode == "ablate" and self.components == 0)

    def _stamp(self, folder: Path) -> tuple[str, int, int]:
        if self.vector is None:
            raise NeedError("steering needs a persona vector: give vector, a file from holdtrue persona extract")
        path = folder / Path(self.vector).expanduser()
        try:
            stamp = path.stat()
        except OSError as error:
            raise NeedError(f"steering needs the vector file {path}: {error.strerror}") from error
        return str(path), stamp.st_mtime_ns, stamp.st_size

    def changes(self, file: VectorFile, count: int, width: int) -> dict[int, Callable[[Tensor], Tensor]]:
        """Return the function on the output of each block that is changed, by its index.

        Args:
            file: the vectors.
            count, width: the model's number of blocks and the width of its residual stream.

        Raises:
            NeedError: the file is for a model of another shape, or has nothing for a layer that is asked for.
        """
        if (file.info.blocks, file.info.width) != (count, width):
            raise NeedError(
                f"{file.path} is for {file.info.model} of {file.info.blocks} blocks of width {file.info.width}, and "
                f"this model has {count} blocks of width {width}; make one with: holdtrue persona extract"
            )
        layers = self.layers(count)
        if not layers:
            raise NeedError("steering needs at least one layer; leave layer out for the default")
        for index in layers:
            if index >= count:
                raise NeedError(f"steering.layer is {index}, and the model has {count} blocks: 0 to {count - 1}")
            if index not in file.tensors:
                has = ", ".join(map(str, file.tensors))
                raise NeedError(f"{file.path} has no vector for block {index}; it has {has}")
        make = self._adding if self.mode == "add" else self._ablating
        return {index: make(file, index) for index in layers}

    def _adding(self, file: VectorFile, index: int) -> Callable[[Tensor], Tensor]:
        vector = file.tensors[index]
        if vector.ndim != 1:
            raise NeedError(
                f"{file.path} holds {vector.shape[0]} directions for block {index}, and mode add takes one vector; "
                "use mode: ablate, or a file from holdtrue persona extract"
            )
        if not vector.any():
            raise NeedError(f"{file.path}: the vector for block {index} is zero: steering would do nothing")
        return functools.partial(added, vector=self.weight * vector.double())

    def _ablating(self, file: VectorFile, index: int) -> Callable[[Tensor], Tensor]:
        directions = file.tensors[index].reshape(-1, file.info.width)[: self.components]
        basis = orthonormal(directions)
        if len(directions) and not len(basis):
            raise NeedError(f"{file.path}: the directions for block {index} are zero: steering would do nothing")
        return functools.partial(ablated, basis=basis)


def added(h: Tensor, vector: Tensor) -> Tensor:
    """Return h + vector at every position. h: (batch, length, width); vector: (width,)."""
    return h + vector.to(h.device, h.dtype)


def ablated(h: Tensor, basis: Tensor) -> Tensor:
    """Return h without its part in the span of the basis. h: (batch, length, width); basis: (k, width), orthonormal."""
    if not len(basis):
        return h
    wide = h if h.itemsize > 2 else h.float()
    q = basis.to(wide.device, wide.dtype)
    return (wide - (wide @ q.T) @ q).to(h.dtype)


def orthonormal(directions: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the rows, (rank, width) float64; directions: (k, width)."""
    import torch

    if not len(directions):
        return directions.double()
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[(sizes > 1e-6 * sizes[0]) & (sizes > 0)]


def _hook(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


@functools.lru_cache(maxsize=4)
def _read(path: str, _modified: int, _size: int) -> VectorFile:
    from holdtrue.models import read_vectors

    return read_vectors(path)


@functools.lru_cache(maxsize=4)
def _ready(
    defense: Steering, path: str, modified: int, size: int, count: int, width: int
) -> dict[int, Callable[[Tensor], Tensor]]:
    return defense.changes(_read(path, modified, size), count, width)
