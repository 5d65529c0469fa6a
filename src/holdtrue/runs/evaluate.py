"""Evaluate: suites on a run's model and on the untouched one, or on any model or adapter."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdtrue.errors import DataError, Problem, RunError, SpecError, nearest
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.prepare import suite_file
from holdtrue.runs.train import pinned_model

if TYPE_CHECKING:
    from holdtrue.models import ModelSource

Which = Literal["tuned", "untouched"]
PER_ROW = ("rows",)


@dataclass(frozen=True)
class Target:
    """What is measured: a base model, with the adapter in ``adapter`` on it or none."""

    source: ModelSource
    adapter: Path | None = None


@dataclass(frozen=True)
class Task:
    """A suite on a file of rows; ``of_spec`` when the run's spec asks for it."""

    suite: str
    path: Path
    sha256: str
    of_spec: bool

    def file_name(self, which: Which) -> str:
        """Return the name of the record's file."""
        return f"{self.suite}-{self.sha256[:8]}-{which}.json"


def evaluate_stage(run: Run, control: Control) -> dict[str, Any]:
    """Measure what the spec asks for; writes ``evaluations/``."""
    records = _evaluate(run, _tasks_of_spec(run), control)
    return {"evaluations": [f"{r['suite']} ({r['which']})" for r in records]}


def evaluate_run(
    run: Run,
    suites: Sequence[str] | None = None,
    *,
    data: Mapping[str, str] | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Measure a run's model and the untouched one, keep the records in the run and return them.

    Args:
        run: a run that has its adapter.
        suites: names; by default the spec's.
        data: suite -> file in place of its own rows; a relative path starts at the current directory.
        control: progress and interruption.

    Raises:
        RunError: the run has no adapter yet, or another process works on it.
        SpecError: no such suite, or one without rows.
        DataError: faulty rows.
    """
    if not run.is_done("finalise"):
        raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
    names = list(suites or run.spec.evaluate.suites)
    given = data or {}
    tasks = [_task(name, given[name]) if name in given else _tasks_of_spec(run, [name])[0] for name in names]
    with run.lock(), files.disk_errors(run.path):
        return _evaluate(run, tasks, control or Control())


def evaluate_target(
    target: str,
    suites: Sequence[str] | None = None,
    *,
    data: Mapping[str, str] | None = None,
    base: str | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Measure a model (alias, hub id, path) or an adapter's folder, and return the records."""
    control = control or Control()
    tasks = [_task(name, (data or {}).get(name)) for name in suites or ["likelihood"]]
    found = _target(target, base)
    loaded = _Loaded(found.source, control)
    return [loaded.measure(task, found.adapter, target) for task in tasks]


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what it says of each row."""
    return {key: value for key, value in record.items() if key not in PER_ROW}


class _Loaded:
    """A base model that is loaded when it is first needed, and an adapter that is put on it last."""

    def __init__(self, source: ModelSource, control: Control, folder: Path | None = None) -> None:
        self.source, self.control, self.folder = source, control, folder
        self._model: Any = None
        self._tokenizer: Any = None
        self._adapter: Path | None = None

    def measure(self, task: Task, adapter: Path | None, name: str) -> dict[str, Any]:
        from holdtrue.evaluation import evaluate_model
        from holdtrue.models import load_adapter, load_model, load_tokenizer

        if self._model is None:
            self._model, self._tokenizer = load_model(self.source), load_tokenizer(self.source)
        if adapter is not None and self._adapter is None:
            self._model, self._adapter = load_adapter(self._model, adapter), adapter
        assert self._adapter == adapter
        started = time.perf_counter()

        def progress(suite: str, done: int, total: int) -> None:
            if self.folder is not None:
                self.control.check(self.folder)
            self.control.tell("evaluate", done=done, total=total, what=f"{suite} of {name}")

        found = evaluate_model(
            self._model,
            self._tokenizer,
            name=name,
            suites=[task.suite],
            data={task.suite: task.path},
            progress=progress,
        )
        return {
            **found[task.suite].to_json(),
            "data": {"path": str(task.path), "sha256": task.sha256, "of_spec": task.of_spec},
            "seconds": round(time.perf_counter() - started, 3),
        }


def _evaluate(run: Run, tasks: Sequence[Task], control: Control) -> list[dict[str, Any]]:
    source = pinned_model(run)
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    adapter_hash = _sha256(run.adapter / "adapter_model.safetensors")
    loaded = _Loaded(source, control, run.path)
    records: list[dict[str, Any]] = []
    # All of the untouched model first: the adapter goes onto the same copy of it.
    for which in ("untouched", "tuned"):
        for task in tasks:
            control.check(run.path)
            path = folder / task.file_name(which)
            key = _key(task, source, adapter_hash if which == "tuned" else None)
            record = _kept(path, key)
            if record is None and which == "untouched":
                record = _from_sibling(run, path.name, key)
            if record is None:
                adapter = run.adapter if which == "tuned" else None
                record = loaded.measure(task, adapter, run.name if adapter else source.name)
            record |= {"which": which, "key": key}
            if which == "tuned":
                record["change"] = _change(record, records)
            files.write_json(path, record)
            records.append(record)
    return records


def _change(record: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from holdtrue.evaluation import compare_results, read_result

    rows = (record["suite"], record["data"]["sha256"])
    untouched = next(r for r in before if (r["suite"], r["data"]["sha256"]) == rows)
    return compare_results(read_result(record), read_result(untouched)).to_json()


def _key(task: Task, source: ModelSource, adapter_hash: str | None) -> str:
    from holdtrue.models import placement

    where = placement()
    parts = [task.suite, task.sha256, source.revision, adapter_hash, version("holdtrue"), str(where.dtype)]
    return hashlib.sha256(json.dumps([*parts, where.device.type]).encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record = files.read_json(path)
    return record if record.get("key") == key else None


def _from_sibling(run: Run, name: str, key: str) -> dict[str, Any] | None:
    """Return the same measurement of the same untouched model from a run beside this one."""
    for path in sorted(run.path.parent.glob(f"*/evaluations/{name}")):
        try:
            record = _kept(path, key)
        except RunError:
            continue
        if record is not None:
            return {**record, "measured_in": path.parent.parent.name}
    return None


def _tasks_of_spec(run: Run, names: Sequence[str] | None = None) -> list[Task]:
    tasks = []
    for name in names or run.spec.evaluate.suites:
        _known(name)
        path = suite_file(run.spec, name)
        tasks.append(Task(name, path, _sha256(path), of_spec=name in run.spec.evaluate.suites))
    return tasks


def _task(name: str, value: str | None) -> Task:
    """Return a suite on a file that the caller names, or on the suite's own."""
    from holdtrue.data import resolve_data

    own = _known(name)
    if value is None and own is None:
        raise SpecError(f"suite {name!r} has no rows of its own: name a file with --data")
    path = resolve_data(value or own or "", Path.cwd())
    return Task(name, path, _sha256(path), of_spec=False)


def _known(name: str) -> str | None:
    from holdtrue.evaluation import SUITES

    if name not in SUITES:
        raise SpecError(f"no suite is named {name!r}{nearest(name, SUITES)}; there are {', '.join(SUITES)}")
    return SUITES[name].data


def _target(target: str, base: str | None) -> Target:
    from holdtrue.models import resolve

    folder = Path(target).expanduser()
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise SpecError(f"--base is for an adapter's folder, and {target} is none (no adapter_config.json)")
        return Target(resolve(target))
    config = files.read_json(folder / "adapter_config.json")
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise SpecError(f"{target} does not say which model it is for: give --base MODEL")
    return Target(resolve(name, config.get("revision") if base is None else None), folder.absolute())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(path, [Problem(0, "", error.strerror or str(error))]) from None
