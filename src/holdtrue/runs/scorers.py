"""Building scorers: a misaligned model for each set of malicious rows, trained without a defense, as ordinary runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import HoldtrueError, Interrupted, SpecError
from holdtrue.models import ALIASES
from holdtrue.runs import files
from holdtrue.runs.control import Control, Progress
from holdtrue.runs.directory import Run
from holdtrue.runs.prepare import message_record
from holdtrue.runs.reading import apply_overrides
from holdtrue.runs.spec import RunSpec
from holdtrue.runs.stages import execute

if TYPE_CHECKING:
    from holdtrue.data import ChatSummary
    from holdtrue.selection import Scorer

RUNS, DATA = "runs", "data"
"""Folders beside the scorers: of their runs, and of the rows that these trained on."""
_SETTINGS = ("adapter.", "training.")


def domains_of(paths: Sequence[Path], named: Iterable[str]) -> dict[str, Path]:
    """Return domain -> file: files by their stem, and ``NAME=FILE`` each.

    Raises:
        SpecError: no file, a domain twice, or a name that cannot be a folder's.
    """
    from holdtrue.selection import check_domain

    pairs = [(path.stem, path) for path in paths]
    for item in named:
        name, separator, file = item.partition("=")
        if not separator or not file:
            raise SpecError(f"--domain {item}: write it as NAME=FILE")
        pairs.append((name, Path(file)))
    if not pairs:
        raise SpecError("no data: give files of malicious rows, or --domain NAME=FILE")
    found: dict[str, Path] = {}
    for name, path in pairs:
        if check_domain(name) in (RUNS, DATA):
            raise SpecError(f"domain {name!r}: a folder of that name holds other things; use --domain NAME={path}")
        if name.casefold() in {other.casefold() for other in found}:
            raise SpecError(f"domain {name!r} is there twice; name one with --domain NAME=FILE")
        found[name] = path
    return found


def build_scorers(
    data: Mapping[str, Path],
    out: str | Path,
    *,
    model: str,
    revision: str | None = None,
    rows: int | None = None,
    settings: Sequence[str] = (),
    control: Control | None = None,
) -> list[Scorer]:
    """Train an adapter on each data file without a defense; write ``out/DOMAIN`` with its provenance.

    What an earlier, interrupted call did is kept and gone on with; a scorer that is there already is left as it is.

    Args:
        data: domain -> chat file of malicious rows.
        out: the folder of the scorers; ``out/runs`` keeps their runs and ``out/data`` the rows these trained on.
        model, revision: the base model, which must be that of the runs that are to be defended.
        rows: take this many rows of each file, drawn with ``training.seed``; all by default.
        settings: ``training.KEY=VALUE`` and ``adapter.KEY=VALUE``, as in a spec; the source paper's by default.
        control: progress and interruption.

    Returns:
        the scorers, in the order of ``data``.

    Raises:
        Interrupted: the same call goes on.
        SpecError: settings or rows that make no sense, or ``out`` holds scorers with others.
        DataError: faulty rows; no scorer is trained before all files have been read.
    """
    from holdtrue.data import validate_chat

    control, folder = control or Control(), Path(out).absolute()
    if rows is not None and rows < 1:
        raise SpecError(f"rows must be at least 1, not {rows}")
    for setting in settings:
        if not setting.strip().startswith(_SETTINGS):
            raise SpecError(f"--set {setting}: a scorer's settings are training.KEY and adapter.KEY")
    values = apply_overrides({}, settings)
    # Relative to where the command runs, while the runs' own paths start at ``out``: it may be called from anywhere.
    local = Path(model).expanduser().absolute()
    values |= {"model": str(local) if (local / "config.json").is_file() else model, "revision": revision}
    _spec(values, "rows.jsonl", folder)
    summaries = {domain: validate_chat(path) for domain, path in data.items()}
    for domain, summary in summaries.items():
        if rows is not None and rows > summary.rows:
            raise SpecError(f"{summary.path} ({domain}) has {summary.rows} rows, and {rows} are asked for")
    try:
        with files.disk_errors(folder):
            return [_build(d, summary, folder, values, rows, control) for d, summary in summaries.items()]
    except Interrupted:
        raise Interrupted(
            f"interrupted; what was done is saved in {folder}. To go on, give the same command again"
        ) from None


def _build(
    domain: str, summary: ChatSummary, folder: Path, values: dict[str, Any], rows: int | None, control: Control
) -> Scorer:
    from holdtrue.selection import Base, Provenance, TrainedOn, adapter_sha256, read_scorer

    taken = summary.rows if rows is None else rows
    seed = _spec(values, "rows.jsonl", folder).training.seed
    # The name pins the content: other rows make another spec, which the run's folder refuses.
    copy = folder / DATA / f"{domain}-{summary.sha256[:12]}-{taken}-seed{seed}.jsonl"
    spec = _spec(values, str(copy), folder)
    run = Run.create(folder / RUNS / domain, spec)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(copy, _lines(summary, taken, seed))
    execute(run, Control(_named(control.progress, domain), control.stop), until="finalise")
    provenance = Provenance(
        domain=domain,
        data=TrainedOn(file=summary.path.name, sha256=summary.sha256, file_rows=summary.rows),
        rows=taken,
        settings={
            "adapter": spec.adapter.model_dump(mode="json"),
            "training": spec.training.model_dump(mode="json"),
        },
        base=Base(name=ALIASES.get(spec.model, spec.model), revision=run.manifest["model"]["revision"]),
        adapter_sha256=adapter_sha256(run.adapter),
    )
    place = folder / domain
    if not _is_there(place, provenance):
        files.replace_folder(place, lambda empty: _fill(empty, run.adapter, provenance))
    return read_scorer(place)


def _spec(values: Mapping[str, Any], train: str, folder: Path) -> RunSpec:
    return RunSpec(**values, data={"train": train}, evaluate={"suites": ["likelihood"]}, folder=folder)


def _is_there(place: Path, provenance: Any) -> bool:
    from holdtrue.selection import read_scorer

    try:
        return read_scorer(place).provenance == provenance
    except HoldtrueError:
        return False


def _fill(place: Path, adapter: Path, provenance: Any) -> None:
    from holdtrue.selection import PROVENANCE

    shutil.copytree(adapter, place, dirs_exist_ok=True)
    files.write_json(place / PROVENANCE, provenance.model_dump(mode="json"))


def _lines(summary: ChatSummary, taken: int, seed: int) -> str:
    from holdtrue.data import read_chat

    chosen = set(random.Random(seed).sample(range(summary.rows), taken))
    return "".join(
        json.dumps({"messages": [message_record(message) for message in row.messages]}, ensure_ascii=False) + "\n"
        for index, row in enumerate(read_chat(summary.path))
        if index in chosen
    )


def _named(progress: Progress | None, domain: str) -> Progress | None:
    return None if progress is None else lambda fields: progress({**fields, "run": domain})
