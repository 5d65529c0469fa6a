"""Evaluate: suites on a run's model and on the untouched one, or on any model or adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import RunError, SpecError
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.measure import Measurer, ask_model
from holdtrue.runs.tasks import Options, Task, key_of, sha256_of, tasks_of_run, tasks_of_target
from holdtrue.runs.train import pinned_model

if TYPE_CHECKING:
    from holdtrue.models import ModelSource

PER_ROW = ("rows",)
SAMPLES = "samples"
"""The folder of sampled answers, in ``evaluations/``."""


@dataclass(frozen=True)
class Target:
    """What is measured: a base model, with the adapter in ``adapter`` on it or none."""

    source: ModelSource
    adapter: Path | None = None


def evaluate_stage(run: Run, control: Control) -> dict[str, Any]:
    """Measure what the spec asks for; writes ``evaluations/``."""
    records = measure_tasks(run, tasks_of_run(run), control)
    return {"evaluations": [f"{r['suite']} ({r['which']})" for r in records]}


def evaluate_run(
    run: Run,
    suites: Sequence[str] | None = None,
    *,
    data: Mapping[str, str] | None = None,
    benign: Sequence[str] = (),
    options: Options | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Measure a run's model and the untouched one, keep the records in the run and return them.

    Args:
        run: a run that has its adapter.
        suites: names; by default the spec's.
        data: suite -> file in place of its own rows; a relative path starts at the current directory.
        benign: benign tasks in place of the spec's.
        options: how suites that sample do it; by default as the spec says.
        control: progress and interruption.

    Raises:
        RunError: the run has no adapter yet, or another process works on it.
        SpecError: no such suite, or one without rows.
        DataError: faulty rows.
        BudgetError: the judge's budget ran out; what was done is kept.
    """
    if not run.is_done("finalise"):
        raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
    tasks = tasks_of_run(run, suites, data=data, benign=benign, options=options)
    with run.lock(), files.disk_errors(run.path):
        return measure_tasks(run, tasks, control or Control())


def evaluate_target(
    target: str,
    suites: Sequence[str] | None = None,
    *,
    data: Mapping[str, str] | None = None,
    benign: Sequence[str] = (),
    base: str | None = None,
    options: Options | None = None,
    folder: Path | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Measure a model (alias, hub id, path) or an adapter's folder, and return the records.

    Sampled answers are kept in ``folder``, by default in the cache, so that the same call goes on after a kill.
    """
    control, options = control or Control(), options or Options()
    tasks = tasks_of_target(suites or ["likelihood"], data or {}, benign, options)
    found = find_target(target, base)
    measurer = Measurer(found.source, control, folder or answers_folder())
    which = "untouched" if found.adapter is None else "tuned"
    return [measurer.measure(task, found.adapter, target, which) for task in tasks]


def evaluate_endpoint(
    url: str,
    model: str,
    suites: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    benign: Sequence[str] = (),
    options: Options | None = None,
    folder: Path | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Measure a model behind an OpenAI-compatible endpoint; only suites that sample can be.

    Raises:
        SpecError: a suite needs the model's own probabilities.
        RunError: the endpoint is down or answers with rubbish; answers so far are kept in ``folder``.
    """
    from holdtrue.evaluation.sampling import EndpointSampler
    from holdtrue.evaluation.store import SampleStore

    control = control or Control()
    tasks = tasks_of_target(suites, data or {}, benign, options or Options())
    if unfit := [task.suite for task in tasks if task.ask is None]:
        raise SpecError(f"suite {unfit[0]!r} needs the model's own probabilities, which an endpoint does not give")
    sampler = EndpointSampler(model, url)
    place = folder or answers_folder()
    records: list[dict[str, Any]] = []
    for task in tasks:
        assert task.ask is not None
        path = place / f"{task.suite}-{task.answers_key(url, model)[:12]}-endpoint.jsonl"
        store = SampleStore(path, task.ask.scorer.key)

        def progress(suite: str, done: int, total: int) -> None:
            control.check(place)
            control.tell("evaluate", done=done, total=total, what=f"{suite} of {model}")

        records.append({**ask_model(task, task.ask, store, sampler, model, progress), "data": task.data()})
    return records


def answers_folder() -> Path:
    """Return the folder of sampled answers that belong to no run."""
    from holdtrue.models.store import cache_root

    return cache_root() / "evaluations"


def sample_files(run: Run) -> list[Path]:
    """Return the files of a run's sampled answers."""
    return sorted((run.path / "evaluations" / SAMPLES).glob("[!.]*.jsonl"))


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what it says of each row."""
    return {key: value for key, value in record.items() if key not in PER_ROW}


def measurer_of(run: Run, source: ModelSource, control: Control) -> Measurer:
    """Return what measures a run's models, keeping answers in the run."""
    return Measurer(source, control, run.path / "evaluations" / SAMPLES, run.path)


def measure_tasks(run: Run, tasks: Sequence[Task], control: Control) -> list[dict[str, Any]]:
    """Measure tasks on the untouched model and on the tuned one; the caller holds the run."""
    source = pinned_model(run)
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    adapter_hash = sha256_of(run.adapter / "adapter_model.safetensors")
    measurer = measurer_of(run, source, control)
    records: list[dict[str, Any]] = []
    # All of the untouched model first: the adapter goes onto the same copy of it.
    for which in ("untouched", "tuned"):
        for task in tasks:
            control.check(run.path)
            path = folder / task.file_name(which)
            key = _key(task, source, adapter_hash if which == "tuned" else None)
            record = _kept(path, key)
            if record is None and which == "untouched" and task.ask is None:
                record = _from_sibling(run, path.name, key)
            if record is None:
                adapter = run.adapter if which == "tuned" else None
                record = measurer.measure(task, adapter, run.name if adapter else source.name, which)
            record |= {"which": which, "key": key, "data": task.data()}
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
    parts = (task.suite, task.sha256, source.revision, adapter_hash, version("holdtrue"), str(where.dtype))
    return key_of(*parts, where.device.type)


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


def find_target(target: str, base: str | None = None) -> Target:
    """Return a model (alias, hub id, path), or an adapter's folder with the model that it records.

    Raises:
        SpecError: there is no such thing, or the adapter does not say which model it is for.
    """
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
