"""SafeLoRA: project the trained adapter onto the directions in which alignment moved the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from holdtrue.defenses.base import Defense, RunContext
from holdtrue.errors import HoldtrueError, NeedError

if TYPE_CHECKING:
    from torch import Tensor

    from holdtrue.models import Checkpoint


class SafeLoRA(Defense):
    """After training, pull the layers that left the safe subspace back onto it.

    For each adapted weight, V = W_aligned − W_unaligned and P = V Vᵀ / ‖V‖_F. Where cos(P B A, B A) ≤ threshold,
    B ← P B, computed as V (Vᵀ B) / ‖V‖_F. Mode ``number`` projects the given number of weights with the smallest
    cosines instead. A weight in which V = 0 is left alone, and so is one whose B A = 0.

    P does not know V's sign: a misaligned tune as the unaligned end would *keep* the misaligned directions. P is not
    idempotent, so it is always applied to the raw trained adapter.

    Hsu et al. 2024 (arXiv 2405.16833), as used by Kaczér et al. 2025 (arXiv 2508.06249, threshold 0.3). Corrected: the
    public code matches weights by their order and holds dense (d_out, d_out) projectors; here weights are matched by
    name, V Vᵀ is never formed, and cosines come from r × r Gram matrices.
    """

    name = "safelora"
    badge = "corrected"
    paper = "arXiv 2405.16833"

    aligned: str | None = Field(
        default=None, description="the aligned end: model, path, adapter folder or run; the run's own model by default"
    )
    unaligned: str | None = Field(
        default=None, description="the unaligned end, likewise; one of the two ends must be given"
    )
    mode: Literal["threshold", "number"] = Field(default="threshold", description="how weights are chosen")
    threshold: float = Field(default=0.3, ge=-1, le=1, description="tau: project where the cosine is at most this")
    number: int = Field(default=10, ge=1, description="how many weights mode `number` projects")

    def preflight(self, context: RunContext) -> None:
        if self.aligned is None and self.unaligned is None:
            raise NeedError(
                "safelora needs two checkpoints and got none: give unaligned (the model before its alignment), "
                "or aligned, or both"
            )
        missing, moved = [], False
        with self._ends(context) as ends:
            for module, shape in context.adapted.items():
                found = ends.shapes(module)
                missing += [f"{module}.weight (adapted {shape}, {end} {s})" for end, s in found.items() if s != shape]
                moved = moved or (not missing and ends.difference(module).norm() > 0)
        if missing:
            raise NeedError(
                f"safelora: {len(missing)} adapted weights are absent from a checkpoint or of another shape there, "
                f"the first: {'; '.join(missing[:3])}"
            )
        if not moved:
            raise NeedError("safelora: the aligned and the unaligned end are the same in every adapted weight")

    def weights(self, adapter: dict[str, Tensor], scaling: dict[str, float], context: RunContext) -> dict[str, Tensor]:
        result, cosines = dict(adapter), {}
        projected: dict[str, Tensor] = {}
        with self._ends(context) as ends:
            for module in scaling:
                name_a, name_b = _find(adapter, module)
                subspace = ends.difference(module)
                a, b = adapter[name_a].double(), adapter[name_b].double()
                norm = subspace.norm()
                if norm == 0 or not a.any() or not b.any():
                    cosines[module] = None
                    continue
                pb = subspace.times_own_transpose(b) / norm
                cosines[module] = cosine(pb, b, a)
                projected[module] = pb
        ranked = sorted(projected, key=lambda m: cosines[m])
        near = [m for m in ranked if cosines[m] <= self.threshold]
        chosen = ranked[: self.number] if self.mode == "number" else near
        for module in chosen:
            name_b = _find(adapter, module)[1]
            result[name_b] = projected[module].to(adapter[name_b].dtype).contiguous()
        context.notes.update(
            mode=self.mode, cosines=cosines, projected=chosen, skipped=[m for m, c in cosines.items() if c is None]
        )
        return result

    def _ends(self, context: RunContext) -> _Ends:
        return _Ends(context, self.aligned, self.unaligned)


def cosine(pb: Tensor, b: Tensor, a: Tensor) -> float:
    """Return cos(pb @ a, b @ a) from Gram matrices. pb, b: (d_out, r); a: (r, d_in)."""
    gram = a @ a.T

    def inner(x: Tensor, y: Tensor) -> float:
        return float(((x.T @ y) * gram).sum())

    scale = (inner(pb, pb) * inner(b, b)) ** 0.5
    return inner(pb, b) / scale if scale > 0 else 0.0


class Difference(NamedTuple):
    """V = left @ right, float64: left (d_out, k), right (k, d_in). A dense V has ``right=None`` and is ``left``."""

    left: Tensor
    right: Tensor | None

    def norm(self) -> float:
        """Return ‖V‖_F."""
        if self.right is None:
            return float(self.left.norm())
        square = ((self.left.T @ self.left) * (self.right @ self.right.T)).sum()
        return float(square.clamp_min(0).sqrt())

    def times_own_transpose(self, b: Tensor) -> Tensor:
        """Return V (Vᵀ b) for b of (d_out, r)."""
        if self.right is None:
            return self.left @ (self.left.T @ b)
        return self.left @ (self.right @ (self.right.T @ (self.left.T @ b)))


class _Ends:
    """Both ends, open for reading weight by weight. An adapter folder stands for its base plus its update."""

    def __init__(self, context: RunContext, aligned: str | None, unaligned: str | None) -> None:
        self._context = context
        self._names = {"aligned": aligned, "unaligned": unaligned}
        self._open: dict[str, Checkpoint] = {}
        self._base: Checkpoint | None = None

    def __enter__(self) -> _Ends:
        from holdtrue.models import Checkpoint

        self._base = Checkpoint(self._context.model.path)
        for end, name in self._names.items():
            self._open[end] = self._base if name is None else Checkpoint(self._locate(end, name))
        return self

    def __exit__(self, *_: object) -> None:
        for checkpoint in {id(c): c for c in (*self._open.values(), self._base) if c is not None}.values():
            checkpoint.close()

    def _locate(self, end: str, name: str) -> Path:
        from holdtrue.models import read_adapter, resolve

        local = (self._context.folder / name).expanduser()
        for folder in (local, local / "adapter"):
            if (folder / "adapter_config.json").is_file():
                model, base = self._context.model, read_adapter(folder).config.get("base_model_name_or_path")
                if base not in (None, "", model.name, model.portable_name, str(model.path)):
                    raise NeedError(
                        f"safelora needs its {end} end over the run's own model {model.name}, "
                        f"and the adapter {folder} is for {base}"
                    )
                return folder
        try:
            return resolve(str(local) if local.is_dir() else name).path
        except HoldtrueError as error:
            raise NeedError(f"safelora needs its {end} end {name!r} and cannot get it: {error}") from error

    def shapes(self, module: str) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of ``module``'s weight at each end, ``None`` where it is absent."""
        weight = f"{module}.weight"
        base = self._base.shape(weight) if self._base is not None else None
        return {end: c.shape(weight) or (base if c.is_adapter else None) for end, c in self._open.items()}

    def difference(self, module: str) -> Difference:
        """Return V = W_aligned − W_unaligned of ``module`` in float64, as factors wherever both share the base."""
        import torch

        lefts, rights, dense = [], [], []
        for end, sign in (("aligned", 1.0), ("unaligned", -1.0)):
            checkpoint = self._open[end]
            if checkpoint.is_adapter:
                factors = checkpoint.factors(f"{module}.weight")
                if factors is not None:
                    lefts.append(sign * factors[0].double())
                    rights.append(factors[1].double())
                dense.append((sign, self._base))
            else:
                dense.append((sign, checkpoint))
        if dense[0][1] is dense[1][1]:
            if not lefts:
                return Difference(torch.zeros(1, 1, dtype=torch.float64), None)
            return Difference(torch.cat(lefts, 1), torch.cat(rights, 0))
        v = sum(sign * c.get(f"{module}.weight").double() for sign, c in dense if c is not None)
        for left, right in zip(lefts, rights, strict=True):
            v = v + left @ right
        assert isinstance(v, torch.Tensor)
        return Difference(v, None)


def _find(adapter: dict[str, Tensor], module: str) -> tuple[str, str]:
    """Return the names of ``module``'s A and B among a PEFT file's."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"
