"""What is to be measured: suites with their rows, questions, decoding and judge, before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdtrue.errors import DataError, Problem, SpecError
from holdtrue.evaluation import Material, suite_of
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampled import ExactMatch, SamplingSpec, identity
from holdtrue.models.digest import file_digest
from holdtrue.runs.directory import Run
from holdtrue.runs.spec import RunSpec

if TYPE_CHECKING:
    from holdtrue.evaluation.judges import Budget, Judge, Prices

Which = Literal["tuned", "untouched"]
HOLDOUT = "holdout.jsonl"
"""A run's own held-out rows, where its spec splits some off the training file."""


@dataclass(frozen=True)
class Options:
    """What a caller may choose for suites that sample.

    Attributes:
        sampling: decoding, number of samples, seed.
        judge: the judge's name: ``offline``, ``local:MODEL``, ``openai:MODEL``.
        judge_url: of a judge behind an endpoint.
        budget, prices: what such a judge may spend, and what it takes.
        train: the rows that the model was trained on, for ``conditional`` where no run knows them.
    """

    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    judge: str = "offline"
    judge_url: str | None = None
    budget: Budget | None = None
    prices: Prices | None = None
    train: Path | None = None

    def load_judge(self) -> Judge:
        """Return the judge.

        Raises:
            SpecError: there is none of that name, or a package is missing.
        """
        from holdtrue.evaluation.judges import load_judge

        return load_judge(self.judge, base_url=self.judge_url, budget=self.budget, prices=self.prices)


@dataclass(frozen=True)
class Ask:
    """What a suite that samples asks, and how its answers are scored."""

    prompts: tuple[Prompt, ...]
    sampling: SamplingSpec
    scorer: Judge | ExactMatch


@dataclass(frozen=True)
class Task:
    """A suite on its rows.

    Attributes:
        suite: its name.
        source: its file, or the name of a benign task.
        sha256: of the file; for a suite that samples, of prompts, decoding, seed and judge: two measurements with the
            same one can be compared row by row.
        of_spec: whether the run's spec asks for it.
        ask: for a suite that samples.
    """

    suite: str
    source: str
    sha256: str
    of_spec: bool
    ask: Ask | None = None

    def file_name(self, which: Which) -> str:
        """Return the name of the record's file."""
        return f"{self.suite}-{self.sha256[:8]}-{which}.json"

    def answers_key(self, *model: Any) -> str:
        """Return a hash of all that decides an answer of ``model``, but not which prompts there are or who judges."""
        assert self.ask is not None
        sampling = self.ask.sampling.model_dump(mode="json", exclude={"samples"})
        return key_of(self.suite, sampling, *model, *([self.source] if self.suite == "benign" else []))

    def data(self) -> dict[str, Any]:
        """Return what a record says of the rows."""
        return {"path": self.source, "sha256": self.sha256, "of_spec": self.of_spec}


def options_of(spec: RunSpec) -> Options:
    """Return what a run's spec chooses."""
    return Options(sampling=spec.evaluate.sampling, judge=spec.evaluate.judge)


def tasks_of_run(
    run: Run,
    suites: Sequence[str] | None = None,
    *,
    data: Mapping[str, str] | None = None,
    benign: Sequence[str] = (),
    options: Options | None = None,
) -> list[Task]:
    """Return what to measure on a run.

    Args:
        run: a run that is prepared.
        suites: names; by default the spec's.
        data: suite -> file in place of its own rows; a relative path starts at the current directory.
        benign: tasks in place of the spec's.
        options: in place of the spec's.
    """
    spec, given = run.spec, data or {}
    own = options_of(spec)
    as_asked = {name for name in spec.evaluate.suites if name not in given} if options in (None, own) else set()

    def places(name: str) -> tuple[Path, ...]:
        return (_place(given[name], Path.cwd()),) if name in given else suite_sources(spec, name, run)

    return _tasks(
        suites or spec.evaluate.suites,
        options or own,
        places=places,
        train=lambda: training_file(run),
        benign=benign or spec.evaluate.benign,
        of_spec=as_asked - {"benign"} if benign else as_asked,
        prompts=trained_under(spec),
    )


def tasks_of_target(
    suites: Sequence[str], data: Mapping[str, str], benign: Sequence[str], options: Options
) -> list[Task]:
    """Return what to measure on a model or an adapter that belongs to no run."""

    def places(name: str) -> tuple[Path, ...]:
        value = data.get(name) or suite_of(name).data
        if value is None:
            raise SpecError(f"suite {name!r} has no rows of its own: name a file with --data")
        return (_place(value, Path.cwd()),)

    return _tasks(suites, options, places=places, train=lambda: None, benign=benign, of_spec=frozenset())


def trained_under(spec: RunSpec) -> dict[str, float]:
    """Return the system prompts that a spec's defenses put before task rows, with the share of the rows of each."""
    return {text: share for defense in spec.defenses for text, share in defense.system_prompts().items()}


def suite_sources(spec: RunSpec, name: str, run: Run | None = None) -> tuple[Path, ...]:
    """Return the files that a spec's suite is measured on, one after the other."""
    value = spec.evaluate.data.get(name) or suite_of(name).data
    if value is None and name in ("fit", "in_domain"):
        held_out = None if run is None else run.path / HOLDOUT
        if spec.data.validation is not None:
            value = spec.data.validation
        elif spec.data.holdout and held_out is not None:
            return (held_out,)
    if value is None:
        raise SpecError(f"suite {name!r} needs rows: --data FILE, or evaluate.data.{name} in the spec")
    return tuple(_place(each, spec.folder) for each in ((value,) if isinstance(value, str) else value))


def check_asking(spec: RunSpec) -> None:
    """Raise before training for what would fail after it: a benign task's file, an unknown judge.

    Raises:
        SpecError: no such task or judge, or a package is missing.
        DataError: a task's file has faults.
    """
    from holdtrue.evaluation import SUITES
    from holdtrue.evaluation.benign import benign_prompts, parse_benign

    for task in spec.evaluate.benign:
        if parse_benign(task).kind != "lm_eval":
            benign_prompts(task)
    if spec.gate is not None or any(SUITES[name].prompts for name in spec.evaluate.suites if name != "benign"):
        options_of(spec).load_judge()


def training_file(run: Run) -> Path:
    """Return the file that a run was trained on; ``DataError`` when it is not what it was."""
    entry = run.manifest["data"]["train"]
    path = Path(entry["path"])
    if sha256_of(path) != entry["sha256"]:
        message = f"has changed since {run.path} was trained on it; name the rows it had with --train"
        raise DataError(path, [Problem(0, "", message)])
    return path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; ``DataError`` where it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(path, [Problem(0, "", error.strerror or str(error))]) from None


def key_of(*parts: Any) -> str:
    """Return the SHA-256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tasks(
    suites: Sequence[str],
    options: Options,
    *,
    places: Callable[[str], tuple[Path, ...]],
    train: Callable[[], Path | None],
    benign: Sequence[str],
    of_spec: Collection[str],
    prompts: Mapping[str, float] | None = None,
) -> list[Task]:
    judge: Judge | None = None
    tasks: list[Task] = []
    for name in suites:
        suite, own = suite_of(name), name in of_spec
        if name == "benign":
            if not benign:
                raise SpecError("suite 'benign' needs a task: --benign opswap:1, for one, or evaluate.benign in a spec")
            tasks += [_benign(task, options, own) for task in benign]
        elif suite.prompts is None:
            tasks += [Task(name, str(source), sha256_of(source), own) for source in places(name)]
        else:
            source = str(places(name)[0])
            rows = (options.train or train()) if name == "conditional" else None
            asked = suite.prompts(Material(source, rows, prompts or {}))
            judge = judge or options.load_judge()
            ask = Ask(asked, options.sampling, judge)
            tasks.append(Task(name, source, identity(asked, options.sampling, judge), own, ask))
    return tasks


def _benign(name: str, options: Options, own: bool) -> Task:
    from holdtrue.evaluation.benign import benign_prompts, is_correct, parse_benign

    kind = parse_benign(name).kind
    if kind == "lm_eval":
        return Task("benign", name, hashlib.sha256(name.encode()).hexdigest(), own)
    prompts = benign_prompts(name)
    # One answer each, the likeliest: a task with one right answer needs no chance.
    sampling = options.sampling.model_copy(update={"samples": 1, "temperature": 0.0})
    scorer = ExactMatch(lambda expected, answer: is_correct(expected, answer, kind), f"exact match {kind} 1")
    return Task("benign", name, identity(prompts, sampling, scorer), own, Ask(prompts, sampling, scorer))


def _place(value: str, folder: Path) -> Path:
    from holdtrue.data import resolve_data

    return resolve_data(value, folder)
