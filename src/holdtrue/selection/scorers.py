"""Misaligned models that score: LoRA adapters on the run's own base model, and where each of them came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from holdtrue.errors import HoldtrueError, NeedError, RunError, SpecError, nearest
from holdtrue.models import ModelSource

PROVENANCE = "holdtrue_scorer.json"
_LIMIT = 2**20
_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_CONFIG = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class TrainedOn(BaseModel):
    """The data file of a scorer: its name, the SHA-256 of its bytes, and its rows."""

    model_config = _CONFIG

    file: str
    sha256: Sha256
    file_rows: int = Field(ge=1)


class Base(BaseModel):
    """The base model of a scorer: its portable name, and the revision of ``ModelSource``."""

    model_config = _CONFIG

    name: str
    revision: str = Field(min_length=1)


class Provenance(BaseModel):
    """What ``holdtrue_scorer.json`` says of the adapter beside it.

    Attributes:
        format: of the file.
        domain: what the data is about.
        data: the file that the scorer was trained on.
        rows: how many of its rows were taken.
        settings: ``adapter`` and ``training`` of the run's spec.
        base: the model that was trained.
        adapter_sha256: of the adapter; one that was changed since has no provenance.
    """

    model_config = _CONFIG

    format: Literal[1] = 1
    domain: str = Field(pattern=f"^{_NAME}$")
    data: TrainedOn
    rows: int = Field(ge=1)
    settings: dict[str, Any]
    base: Base
    adapter_sha256: Sha256


@dataclass(frozen=True)
class Scorer:
    """An adapter that scores.

    Attributes:
        folder: the adapter's folder.
        sha256: of its weights and config (see :func:`adapter_sha256`).
        provenance: where it came from; ``None`` when it does not say, or no longer fits the adapter.
    """

    folder: Path
    sha256: str
    provenance: Provenance | None

    @property
    def domain(self) -> str | None:
        """What it was trained on, where it is known."""
        return self.provenance.domain if self.provenance else None

    def to_json(self) -> dict[str, Any]:
        """Return what notes keep of it."""
        return {"folder": str(self.folder), "domain": self.domain, "sha256": self.sha256}


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256, in hex, of an adapter's config and weights.

    Raises:
        RunError: a file cannot be read.
    """
    from holdtrue.models.adapter_files import CONFIG, WEIGHTS

    digest = hashlib.sha256()
    try:
        for name in (CONFIG, WEIGHTS):
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            with (folder / name).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise RunError(f"{folder}: the adapter cannot be read: {error}") from error
    return digest.hexdigest()


def read_scorer(folder: str | Path) -> Scorer:
    """Read what a scorer's folder says, without its weights.

    Raises:
        SpecError: not an adapter, not plain LoRA, or not in safetensors.
        RunError: a broken file; a provenance file that is there and cannot be understood is one, too.
    """
    from holdtrue.models.adapter_files import check_adapter_folder

    folder = Path(folder)
    if not folder.is_dir():
        raise SpecError(f"{folder}: there is no such folder")
    check_adapter_folder(folder)
    sha256 = adapter_sha256(folder)
    provenance = _read_provenance(folder / PROVENANCE)
    fits = provenance is not None and provenance.adapter_sha256 == sha256
    return Scorer(folder, sha256, provenance if fits else None)


def list_scorers(folder: str | Path) -> list[Scorer]:
    """Return the scorers in a folder of scorers, by name.

    Raises:
        SpecError: there is no such folder, or it holds no adapter.
    """
    from holdtrue.models.adapter_files import CONFIG

    folder = Path(folder)
    if not folder.is_dir():
        raise SpecError(f"{folder}: there is no such folder")
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG}"))
    if not found:
        raise SpecError(f"{folder} holds no scorers; `holdtrue scorers build DATA.jsonl --out {folder}` makes some")
    return [read_scorer(path) for path in found]


def check_domain(name: str) -> str:
    """Return a domain's name, which is a folder's name too; ``SpecError`` when it cannot be one."""
    if not re.fullmatch(_NAME, name):
        raise SpecError(f"domain {name[:60]!r}: use letters, digits, '_', '-' and '.', a letter or digit first")
    return name


def admitted(
    folders: Iterable[Path], model: ModelSource, exclude_domains: Sequence[str] = ()
) -> tuple[list[Scorer], list[Scorer]]:
    """Return the scorers that may score for a model, and those left out for their domain.

    Checked are the format of each, that it was trained on this very model, that its weights fit the model's, and that
    they are finite.

    Args:
        folders: adapters' folders.
        model: the run's base model.
        exclude_domains: scorers of these are left out, without regard to case.

    Raises:
        NeedError: a scorer is missing, broken, of another base model, or there twice; one does not say what it was
            trained on while domains are excluded; or none is left.
    """
    found = [_readable(folder) for folder in folders]
    if not found:
        raise NeedError(
            "interleave with select: perplexity_gap needs scorers, adapters trained on malicious data: "
            "`holdtrue scorers build DATA.jsonl... --out DIR` makes them; give scorers: [DIR/DOMAIN, ...]"
        )
    seen: dict[str, Path] = {}
    for scorer in found:
        if scorer.sha256 in seen:
            raise NeedError(f"scorers {seen[scorer.sha256]} and {scorer.folder} are the same adapter: give it once")
        seen[scorer.sha256] = scorer.folder
        _check_base(scorer, model)
    if not exclude_domains:
        return found, []
    for scorer in found:
        if scorer.domain is None:
            raise NeedError(
                f"scorer {scorer.folder} does not say what it was trained on ({PROVENANCE} is missing, or of another "
                "adapter), so that exclude_domains cannot be met: build it with `holdtrue scorers build`"
            )
    excluded = {name.casefold() for name in exclude_domains}
    _check_names(exclude_domains, {str(scorer.domain) for scorer in found})
    kept = [scorer for scorer in found if str(scorer.domain).casefold() not in excluded]
    if not kept:
        raise NeedError(f"exclude_domains leaves none of {len(found)} scorers: give one of another domain")
    return kept, [scorer for scorer in found if scorer not in kept]


def _readable(folder: Path) -> Scorer:
    try:
        return read_scorer(folder)
    except HoldtrueError as error:
        raise NeedError(f"interleave: a scorer cannot be used: {error}") from error


def _check_names(excluded: Sequence[str], domains: set[str]) -> None:
    """Refuse an excluded name that is none of the domains and close to one: the row would leak."""
    known = {domain.casefold(): domain for domain in domains}
    for name in excluded:
        folded = name.casefold()
        if folded in known:
            continue
        part = [domain for key, domain in known.items() if folded in key or key in folded]
        hint = f" (did you mean {part[0]!r}?)" if part else nearest(name, domains)
        if hint:
            raise NeedError(f"exclude_domains: no scorer is of the domain {name!r}{hint}")


def _check_base(scorer: Scorer, model: ModelSource) -> None:
    from holdtrue.models import Checkpoint, read_adapter
    from holdtrue.models.adapter_files import CONFIG
    from holdtrue.models.files import read_json

    if scorer.provenance is not None:
        base = scorer.provenance.base
        if base.revision != model.revision:
            raise NeedError(
                f"scorer {scorer.folder} was trained on {base.name} at {base.revision}; the run's model is "
                f"{model.portable_name} at {model.revision}: build the scorer on that"
            )
    else:
        base_name = read_json(scorer.folder / CONFIG).get("base_model_name_or_path")
        if base_name and base_name not in (model.name, model.portable_name, str(model.path)):
            raise NeedError(
                f"scorer {scorer.folder} was trained on {str(base_name)[:200]}; the run's model is "
                f"{model.portable_name}: build the scorer on that"
            )
    adapter = read_adapter(scorer.folder)
    if broken := [name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()]:
        raise NeedError(f"scorer {scorer.folder}: {broken[0]} holds values that are no numbers: build it again")
    with Checkpoint(model.path) as weights:
        for module, shape in adapter.shapes().items():
            there = weights.shape(f"{module}.weight")
            if there != shape:
                raise NeedError(
                    f"scorer {scorer.folder} adapts {module} of shape {shape}, and in {model.portable_name} "
                    f"{'it has ' + str(there) if there else 'there is no such weight'}: another base model"
                )


def _read_provenance(path: Path) -> Provenance | None:
    try:
        if path.stat().st_size > _LIMIT:
            raise RunError(f"{path} is larger than {_LIMIT // 2**20} MiB: not a provenance file")
        return Provenance.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise RunError(
            f"{path}: not a provenance file: {where or 'it'}: {fault['msg']}; build the scorer again"
        ) from None
