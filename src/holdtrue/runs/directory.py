"""A run is a directory; this is its map. Nothing here computes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import filelock

from holdtrue.errors import RunError, SpecError, nearest
from holdtrue.models.store import new_folder
from holdtrue.runs import files
from holdtrue.runs.spec import RunSpec, differences

Stage = Literal["screen", "prepare", "train", "finalise", "evaluate", "gate"]
STAGES: tuple[Stage, ...] = ("screen", "prepare", "train", "finalise", "evaluate", "gate")
"""All there are; a run has those of :attr:`Run.stages`."""
MEASURING: dict[Stage, str] = {"evaluate": "evaluate", "gate": "gate"}
"""Stages that look at a finished adapter, each with the section of the spec that is its own."""


class Run:
    """A run's directory.

    ====================  ==========================================================================
    ``spec.json``         the resolved spec, with its hash
    ``screen.json``       what screening found of the training rows, where the spec asks for it
    ``manifest.json``     model and revision, data with hashes and counts, notes of defenses, versions
    ``events.jsonl``      what happened when
    ``metrics.jsonl``     one line for each optimizer step
    ``data/``             the encoded rows
    ``checkpoints/``      to resume training from
    ``adapter_raw/``      the trained adapter; ``adapter/`` the one to use, after the defenses' last hook
    ``finalise.json``     notes of that hook
    ``evaluations/``      one JSON file for each suite, data and model (tuned, untouched); ``samples/`` holds answers
    ``gate.json``         the release decision and its evidence, where the spec has a gate
    ``stages/``           one marker for each finished stage
    ====================  ==========================================================================
    """

    def __init__(self, path: str | Path) -> None:
        """Open a run that exists; ``SpecError`` when the folder is none."""
        self.path = Path(path).absolute()
        try:
            stored = files.read_json(self.path / "spec.json")
            self.spec = RunSpec(**stored["spec"])
            self.name: str = stored.get("name") or self.path.name
            # The hash it was made with: a version that knows more keys reads the same run, and finds its stages done.
            self._hash: str = stored["hash"]
            self._trained_under: str = stored.get("trained_under", self._hash)
        except FileNotFoundError:
            raise SpecError(_not_a_run(Path(path))) from None
        except SpecError as error:
            raise SpecError(f"{self.path / 'spec.json'} does not fit this version of holdtrue: {error}") from None
        except (KeyError, TypeError) as error:
            raise RunError(f"{self.path / 'spec.json'} is damaged: {error!r}") from None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, spec: RunSpec) -> Run:
        """Make the directory for a spec, or open it when it already holds the same one.

        Raises:
            SpecError: the folder holds another spec (the text lists what differs), or files that are no run.
        """
        folder = Path(path).absolute()
        if (folder / "spec.json").exists():
            run = cls(folder)
            if changed := differences(run.spec.canonical(), spec.canonical()):
                raise SpecError(
                    f"{folder} already holds a run of another spec; choose another --out, or delete the folder\n"
                    + "\n".join(f"  {line}" for line in changed)
                )
            return run
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"{folder} is a file; --out names a folder")
        strangers = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if "spec.json" in strangers:
            return cls.create(path, spec)  # another process of this run was faster
        if strangers:
            raise SpecError(f"{folder} is no run and not empty (it holds {strangers[0]!r}); choose another --out")
        with files.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stored = {"format": 1, "name": folder.name, "hash": spec.hash(), "spec": spec.canonical()}
            files.write_json(folder / "spec.json", stored)
        return cls(folder)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of this run, in order: ``screen`` only where the spec asks for it."""
        return STAGES if self.spec.screen is not None else STAGES[1:]

    @property
    def screen(self) -> dict[str, Any] | None:
        """What screening found of the training rows, or ``None`` where it was not asked for or is not done."""
        try:
            return files.read_json(self.path / "screen.json")
        except FileNotFoundError:
            return None

    @property
    def adapter(self) -> Path:
        """The adapter to use, in PEFT format; there once the finalise stage is done."""
        return self.path / "adapter"

    @property
    def adapter_raw(self) -> Path:
        """The adapter as training left it."""
        return self.path / "adapter_raw"

    @property
    def checkpoints(self) -> Path:
        """The folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def manifest(self) -> dict[str, Any]:
        """What went into the run: ``model``, ``data``, ``defenses`` (notes), ``versions``; empty before prepare."""
        try:
            return files.read_json(self.path / "manifest.json")
        except FileNotFoundError:
            return {}

    @property
    def finalise_notes(self) -> dict[str, Any]:
        """What each defense noted when it changed the adapter, by its name."""
        try:
            return files.read_json(self.path / "finalise.json")
        except FileNotFoundError:
            return {}

    @property
    def gate(self) -> dict[str, Any] | None:
        """The release decision (``outcome``, ``decisions``, ``evidence``), or ``None`` where none was taken."""
        try:
            return files.read_json(self.path / "gate.json")
        except FileNotFoundError:
            return None

    def data(self, split: Literal["train", "validation"]) -> Path:
        """Return the folder of a split's encoded rows."""
        return self.path / "data" / split

    def metrics(self) -> list[dict[str, Any]]:
        """Return the per-step metrics so far; a line that is being written is left out."""
        return _read_lines(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Return what happened when, oldest first."""
        return _read_lines(self.path / "events.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """Return all evaluation records: the suite's fields, ``which`` (tuned, untouched) and ``data``."""
        return [files.read_json(path) for path in sorted((self.path / "evaluations").glob("[!.]*.json"))]

    def evaluation(
        self, suite: str, which: Literal["tuned", "untouched"] = "tuned", data_sha256: str | None = None
    ) -> dict[str, Any] | None:
        """Return the record of a suite, of that data or of the spec's own (the first there is), or ``None``."""
        found = [r for r in self.evaluations() if (r["suite"], r["which"]) == (suite, which)]
        if data_sha256 is not None:
            found = [r for r in found if r["data"]["sha256"] == data_sha256]
        found.sort(key=lambda record: not record["data"].get("of_spec", False))
        return found[0] if found else None

    def marker(self, stage: Stage) -> dict[str, Any] | None:
        """Return a finished stage's marker (``inputs``, ``seconds`` and what it reported), or ``None``."""
        try:
            return files.read_json(self.path / "stages" / f"{stage}.json")
        except FileNotFoundError:
            return None

    def mark(self, stage: Stage, *, inputs: str, seconds: float, report: dict[str, Any]) -> None:
        """Write a stage's marker; its output must already be on the disk."""
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        files.write_json(
            folder / f"{stage}.json",
            {"stage": stage, "inputs": inputs, "seconds": round(seconds, 3), "report": report, "at": _now()},
        )

    def inputs(self, stage: Stage) -> str:
        """Return the hash that a stage's marker must carry to count: of the spec, and of the marker before it."""
        index = self.stages.index(stage)
        before = self.path / "stages" / f"{self.stages[index - 1]}.json"
        content = before.read_bytes() if index and before.exists() else b""
        spec = self._hash if stage in MEASURING else self._trained_under
        return hashlib.sha256(f"{stage}:{spec}:".encode() + content).hexdigest()

    def fork(self, path: str | Path, spec: RunSpec) -> Run:
        """Copy this run, once it is trained, into a new folder under a spec that differs in what is measured alone.

        The copy has the adapter and all that was measured so far; ``evaluate`` and ``gate`` are due again, and measure
        what is missing. Checkpoints stay behind.

        Raises:
            SpecError: the specs differ in more than that.
            RunError: the run is not trained yet, or the folder cannot be written.
        """
        if changed := differences(_trained_part(self.spec), _trained_part(spec)):
            raise SpecError(f"{self.path} was trained under another spec: {'; '.join(changed)}")
        if not self.is_done("finalise"):
            raise RunError(f"{self.path} is not trained yet: holdtrue resume {self.path}")
        folder = Path(path).absolute()
        left = shutil.ignore_patterns("checkpoints", ".*", "gate.json", *(f"{stage}.json" for stage in MEASURING))
        with files.disk_errors(folder), new_folder(folder) as copy:
            shutil.copytree(self.path, copy, ignore=left, dirs_exist_ok=True)
            for record in (copy / "evaluations").glob("*.json"):
                told = files.read_json(record)
                told["data"]["of_spec"] = False  # until it is asked for again
                files.write_json(record, told)
            stored = {"format": 1, "name": folder.name, "hash": spec.hash(), "spec": spec.canonical()}
            files.write_json(copy / "spec.json", {**stored, "trained_under": self._trained_under})
        fork = Run(folder)
        fork.record("forked", of=str(self.path))
        return fork

    def is_done(self, stage: Stage) -> bool:
        """Say whether a stage and all before it are finished, for this spec; one that it does not have is."""
        for name in self.stages_until(stage):
            marker = self.marker(name)
            if marker is None or marker["inputs"] != self.inputs(name):
                return False
        return True

    def stages_until(self, stage: Stage) -> tuple[Stage, ...]:
        """Return the run's stages up to and with ``stage``, in order."""
        return tuple(name for name in self.stages if STAGES.index(name) <= STAGES.index(stage))

    def record(self, event: str, **fields: Any) -> None:
        """Append to ``events.jsonl``."""
        path = self.path / "events.jsonl"
        line = json.dumps({"at": _now(), "event": event, **fields}, ensure_ascii=False, default=str) + "\n"
        # A line that a kill cut short is ended first, so that only that line is lost.
        torn = path.exists() and path.stat().st_size > 0 and not _ends_whole(path)
        with path.open("a", encoding="utf-8") as handle:
            handle.write("\n" + line if torn else line)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run; the system lets go when the process dies. ``RunError`` when another process holds it."""
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(f"another process is working on {self.path}; wait for it, or stop it first") from None
        try:
            yield
        finally:
            lock.release()


def _trained_part(spec: RunSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.canonical().items() if key not in MEASURING.values()}


def is_run(path: Path) -> bool:
    """Say whether a folder holds a run."""
    return (path / "spec.json").is_file()


def _not_a_run(path: Path) -> str:
    if not path.exists():
        parent = path.absolute().parent
        beside = [p.name for p in parent.iterdir() if is_run(p)] if parent.is_dir() else []
        return f"{path}: no such run{nearest(path.name, beside)}"
    return f"{path} is not a run: it has no spec.json; `holdtrue train SPEC --out DIR` makes one"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
