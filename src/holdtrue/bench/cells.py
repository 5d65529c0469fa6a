"""Cells: one ordinary run for each model, data set, setting and seed, addressed by all that decides its result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.bench.spec import GridSpec, Variant
from holdtrue.errors import SpecError
from holdtrue.runs.spec import RunSpec
from holdtrue.runs.tasks import key_of, sha256_of, suite_sources

FOLDERS = ("config.json", "adapter_config.json", "*/adapter_config.json")
"""What a folder holds that a defense may read: a model, an adapter, or several adapters."""
ADDRESS = 12
"""Hex digits of a cell's key that its folder's name ends in."""


class Cell(NamedTuple):
    """One run of the grid.

    Attributes:
        model, data, seed: as the grid names them; ``variant`` is the setting with its strengths.
        spec: the run's.
        key: SHA-256 of the resolved spec and of every file that it reads.
    """

    model: str
    data: str
    variant: Variant
    seed: int
    spec: RunSpec
    key: str

    @property
    def title(self) -> str:
        """Who it is, for people."""
        return f"{self.variant.name} on {self.data}, {self.model}, seed {self.seed}"

    @property
    def slug(self) -> str:
        """The same for a file's name; the key's first digits make it the cell's own."""
        words = (self.variant.name, self.data, self.model, f"s{self.seed}")
        text = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") for word in words)
        return f"{text[:96]}-{self.key[:ADDRESS]}"


def expand(grid: GridSpec) -> list[Cell]:
    """Return the grid's cells: by model, data, setting, seed, in the grid's order.

    Raises:
        SpecError: a combination is no run spec (the text names it), or two settings are one run.
        DataError: a file that a cell reads cannot be read.
    """
    hashes: dict[str, str] = {}
    cells: list[Cell] = []
    seen: dict[str, Cell] = {}
    for model in grid.models:
        for data in grid.data:
            for variant in grid.variants():
                for seed in grid.seeds:
                    where = f"{variant.name} on {data}, {model.name}, seed {seed}"
                    try:
                        spec = _run_spec(grid, model.model, model.revision, data, variant, seed)
                    except SpecError as error:
                        raise SpecError(f"{where}: {error}") from None
                    cell = Cell(model.name, data, variant, seed, spec, address(spec, hashes))
                    if (other := seen.setdefault(cell.key, cell)) is not cell:
                        raise SpecError(f"{other.title} and {cell.title} are the same run; take one out of the grid")
                    cells.append(cell)
    return cells


def address(spec: RunSpec, hashes: dict[str, str] | None = None) -> str:
    """Return the SHA-256 of a run's resolved spec and of the files that it reads.

    Args:
        spec: the run's.
        hashes: path -> SHA-256 of files hashed already; added to.

    Raises:
        DataError: a file that the run must read is not there.
    """
    known = {} if hashes is None else hashes
    files = {_told(path): _hash(path, known) for path in _files(spec)}
    folders = {str(path): _hash_folder(path, known) for path in _folders(spec)}
    return key_of(spec.hash(), sorted({**files, **folders}.items()), _weights(spec.model, known))


def _told(path: Path) -> str:
    """Return what a file is called in an address: of a shipped one not its place, which another install has not."""
    from holdtrue.data import builtin_name

    return builtin_name(path) or str(path)


def _run_spec(grid: GridSpec, model: str, revision: str | None, data: str, variant: Variant, seed: int) -> RunSpec:
    rows = grid.data[data]
    return RunSpec(
        model=model,
        revision=revision,
        data={"train": rows.train, "validation": rows.validation, "holdout": rows.holdout},
        adapter=grid.adapter.model_dump(),
        training={**grid.training.model_dump(exclude_unset=True), "seed": seed},
        defenses=grid.defenses(data, variant),
        evaluate=grid.evaluation(data),
        folder=grid.folder,
    )


def _files(spec: RunSpec) -> set[Path]:
    """Return the files that a run reads; those that its defenses name are found among their parameters."""
    found = {_place(spec.data.train, spec)}
    if spec.data.validation is not None:
        found.add(_place(spec.data.validation, spec))
    for suite in spec.evaluate.suites:
        held_out = suite in ("fit", "in_domain") and suite not in spec.evaluate.data and spec.data.validation is None
        if suite != "benign" and not held_out:
            found.update(suite_sources(spec, suite))
    tasks = [task.partition(":")[2] if task.startswith("gsm8k:") else task for task in spec.evaluate.benign]
    return found | {path for path in _there([*_parameters(spec), *tasks], spec) if path.is_file()}


def _folders(spec: RunSpec) -> set[Path]:
    """Return the folders that a run names beside its model, such as trained adapters."""
    return {path for path in _there(_parameters(spec), spec) if path.is_dir() and any(map(path.glob, FOLDERS))}


def _parameters(spec: RunSpec) -> list[str]:
    start = [] if spec.adapter.start is None else [spec.adapter.start]
    return [*start, *_strings([defense.model_dump(mode="json") for defense in spec.defenses])]


def _there(texts: list[str], spec: RunSpec) -> Iterator[Path]:
    """Yield what is there of the files and folders that texts may name."""
    for text in texts:
        if text.strip() and "\0" not in text and len(text) < 4096:
            try:
                path = _place(text, spec)
                if path.exists():
                    yield path
            except (SpecError, OSError):
                continue  # no file's name


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _place(text: str, spec: RunSpec) -> Path:
    from holdtrue.data import resolve_data

    return resolve_data(text, spec.folder)


def _hash(path: Path, known: dict[str, str]) -> str:
    if str(path) not in known:
        known[str(path)] = sha256_of(path)
    return known[str(path)]


def _weights(model: str, known: dict[str, str]) -> str | None:
    """Return what identifies a local model's weights; a hub id's are pinned by the run itself."""
    folder = Path(model).expanduser()
    return _hash_folder(folder, known) if (folder / "config.json").is_file() else None


def _hash_folder(folder: Path, known: dict[str, str]) -> str:
    from holdtrue.models.files import identity

    if str(folder) not in known:
        if (folder / "config.json").is_file():
            known[str(folder)] = identity(folder)
        else:
            parts = [path for pattern in FOLDERS for path in folder.glob(pattern)]
            inside = sorted({file for part in parts for file in part.parent.iterdir() if file.is_file()})
            known[str(folder)] = key_of([(str(file.relative_to(folder)), sha256_of(file)) for file in inside])
    return known[str(folder)]
