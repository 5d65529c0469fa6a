"""The Python face: train, evaluate, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdtrue.runs.compare import Comparison, compare_runs
from holdtrue.runs.control import Control, Progress
from holdtrue.runs.directory import Run
from holdtrue.runs.evaluate import evaluate_run
from holdtrue.runs.spec import RunSpec, load_spec
from holdtrue.runs.stages import execute


def default_out(spec: RunSpec, path: Path | None = None) -> Path:
    """Return ``runs/NAME-HASH`` in the current directory: the spec file's name, 8 hex digits of the spec's hash."""
    return Path("runs") / f"{path.stem if path else 'run'}-{spec.hash()[:8]}"


def train(
    spec: RunSpec | str | Path,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """Tune a model as a spec says and measure it; a run that was interrupted is gone on with.

    Args:
        spec: a ``RunSpec``, or the path of a YAML file.
        out: the run's directory; by default ``runs/NAME-HASH``.
        overrides: ``key.path=value`` each, for a spec that is a file.
        progress: called with a dictionary that has ``stage`` and, in training, ``step``, ``steps``, ``loss``.

    Raises:
        SpecError: the spec is faulty, or ``out`` holds another one.
        NeedError, DataError: before the first step.
        RunError: training failed.
    """
    if isinstance(spec, RunSpec):
        if overrides:
            raise TypeError("overrides are for a spec that is a file; use RunSpec(...) with the values you want")
        loaded, path = spec, None
    else:
        path = Path(spec)
        loaded = load_spec(path, overrides)
    run = Run.create(out or default_out(loaded, path), loaded)
    execute(run, Control(progress=progress))
    return run


def evaluate(
    run: Run | str | Path, suites: Sequence[str] | None = None, *, data: Mapping[str, str | Path] | None = None
) -> list[dict[str, Any]]:
    """Measure a run's model and the untouched one; return the records, which the run keeps.

    Args:
        run: a run that has its adapter.
        suites: names of suites; by default the spec's.
        data: suite -> a file in place of the suite's own rows.
    """
    opened = run if isinstance(run, Run) else Run(run)
    return evaluate_run(opened, suites, data={k: str(v) for k, v in (data or {}).items()})


def compare(runs: Sequence[Run | str | Path]) -> Comparison:
    """Return the measures of several runs side by side, with each one's change against its untouched model."""
    return compare_runs([run if isinstance(run, Run) else Run(run) for run in runs])
