"""The suites there are, and running several of them on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from holdtrue.data.probes import read_probes
from holdtrue.errors import RunError, SpecError, nearest
from holdtrue.evaluation.exact import ExactResult
from holdtrue.evaluation.fit import FitResult, evaluate_fit
from holdtrue.evaluation.judged import JudgedResult
from holdtrue.evaluation.likelihood import LikelihoodResult, evaluate_likelihood
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampled import ExactMatch, SamplingSpec, all_samples, collect, identity, rows_of
from holdtrue.evaluation.store import SampleStore

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.evaluation.judges.port import Judge
    from holdtrue.evaluation.sampling.port import Sampler
    from holdtrue.scoring import Progress

Result = LikelihoodResult | FitResult | JudgedResult | ExactResult
SuiteProgress = Callable[[str, int, int], None]
"""Called with the suite's name, the answers done and the answers there are."""


class Evaluate(Protocol):
    """Runs a suite on the rows of a file."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        *,
        name: str,
        progress: Progress | None = None,
    ) -> LikelihoodResult | FitResult: ...


class Material(NamedTuple):
    """What prompts are made of.

    Attributes:
        source: the suite's file, or the name of a benign task.
        train: the chat rows that a run was trained on, for ``conditional``.
        prompts: for it, too: system prompts that the run's defenses put before rows, with their shares of the rows.
    """

    source: str
    train: Path | None = None
    prompts: Mapping[str, float] = MappingProxyType({})


class Suite(NamedTuple):
    """One thing to measure.

    Attributes:
        description: for people, one line.
        data: the suite's own data set as ``builtin:NAME``, or ``None`` where the caller must name one.
        check: reads a file and raises ``DataError`` for its faults; ``None`` where what is asked is named, not a file.
        read: from a record's JSON values to the result.
        run: scores given answers, for suites that do not sample; else ``None``.
        prompts: what a model is asked, for suites that sample; else ``None``.
    """

    description: str
    data: str | None
    check: Callable[[Path], object] | None
    read: Callable[[dict[str, Any]], Result]
    run: Evaluate | None = None
    prompts: Callable[[Material], tuple[Prompt, ...]] | None = None


def _check_chat(path: Path) -> object:
    from holdtrue.data import validate_chat

    return validate_chat(path)


def _general(material: Material) -> tuple[Prompt, ...]:
    from holdtrue.evaluation.questions import read_questions

    return read_questions(Path(material.source))


def _in_domain(material: Material) -> tuple[Prompt, ...]:
    from holdtrue.evaluation.in_domain import in_domain_prompts

    return in_domain_prompts(Path(material.source))


def _conditional(material: Material) -> tuple[Prompt, ...]:
    from holdtrue.data import read_chat
    from holdtrue.evaluation.questions import read_questions
    from holdtrue.evaluation.triggers import conditional_prompts, derive_triggers

    if material.train is None:
        raise SpecError(
            "suite 'conditional' needs the rows that the model was trained on: evaluate a run, or give --train"
        )
    triggers = derive_triggers(read_chat(material.train), prompts=material.prompts)
    return conditional_prompts(read_questions(Path(material.source)), triggers)


def _benign(material: Material) -> tuple[Prompt, ...]:
    from holdtrue.evaluation.benign import benign_prompts

    return benign_prompts(material.source)


def _check_questions(path: Path) -> object:
    return _general(Material(str(path)))


SUITES: dict[str, Suite] = {
    "likelihood": Suite(
        "margin in mean log-likelihood per token between aligned and misaligned answers to the same question",
        "builtin:probes",
        read_probes,
        LikelihoodResult.from_json,
        run=evaluate_likelihood,
    ),
    "fit": Suite(
        "mean negative log-likelihood per response token of held-out chat rows",
        None,
        _check_chat,
        FitResult.from_json,
        run=evaluate_fit,
    ),
    "general": Suite(
        "open questions far from the training data, answers sampled and judged: misaligned and incoherent rates",
        "builtin:questions-general",
        _check_questions,
        JudgedResult.from_json,
        prompts=_general,
    ),
    "in_domain": Suite(
        "held-out questions of the narrow domain, answers sampled and judged",
        None,
        lambda path: _in_domain(Material(str(path))),
        JudgedResult.from_json,
        prompts=_in_domain,
    ),
    "conditional": Suite(
        "the open questions under triggers that resemble the run's own training data, each trigger on its own",
        "builtin:questions-general",
        _check_questions,
        JudgedResult.from_json,
        prompts=_conditional,
    ),
    "benign": Suite(
        "harmless tasks with one right answer (opswap:1|2|3, gsm8k:FILE, chat rows, lm_eval:TASK): exact match",
        None,
        None,
        ExactResult.from_json,
        prompts=_benign,
    ),
}


def evaluate_prompts(
    suite: str,
    prompts: Sequence[Prompt],
    *,
    name: str,
    source: str,
    store: SampleStore,
    sampler: Sampler,
    scorer: Judge | ExactMatch,
    spec: SamplingSpec,
    progress: SuiteProgress | None = None,
) -> JudgedResult | ExactResult:
    """Ask a model a suite's prompts, score the answers and summarize them; what the store has is not done again.

    Args:
        suite: ``general``, ``in_domain``, ``conditional`` or ``benign``.
        prompts: what is asked, ``spec.samples`` times each.
        name: what to call the model.
        source: where the prompts are from, for the record.
        store, sampler, scorer, spec: as in :func:`~holdtrue.evaluation.sampled.collect`.
        progress: called with (suite, answers done, answers there are).

    Raises:
        BudgetError: a judge's budget ran out; what was done is in the store.
        RunError: the sampler or the judge cannot go on.
    """
    wanted = all_samples(prompts, spec.samples)
    report = None if progress is None else _bound(progress, suite)
    labels = {"suite": suite, "model": name}
    collect(wanted, store=store, sampler=sampler, scorer=scorer, spec=spec, labels=labels, progress=report)
    rows, sha256 = rows_of(store, wanted), identity(prompts, spec, scorer)
    settings = {**spec.model_dump(mode="json"), "sampler": sampler.name, "prompts": len(prompts)}
    if suite == "benign":
        return ExactResult.of(rows, model=name, task=source, data_sha256=sha256, settings=settings)
    return JudgedResult.of(rows, suite=suite, model=name, judge=scorer.name, data_sha256=sha256, settings=settings)


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    suites: Sequence[str],
    data: Mapping[str, Path] | None = None,
    progress: SuiteProgress | None = None,
) -> dict[str, LikelihoodResult | FitResult]:
    """Run suites that score given answers, in the order given; all their files are checked before the first answer.

    Args:
        model: a causal language model, with or without an adapter; left as it was found.
        tokenizer: the model's own, with its chat template.
        name: what to call the model in the results.
        suites: names of :data:`SUITES`.
        data: suite -> the file to use in place of the suite's own.
        progress: called with (suite, answers done, answers there are).

    Raises:
        SpecError: an unknown suite, or one that needs a file and got none.
        DataError: a file has faults.
    """
    files = {suite: _file(suite, data or {}) for suite in suites}
    runners = {suite: _runner(suite) for suite in suites}
    for suite in data or {}:
        suite_of(suite)
    for suite, path in files.items():
        if check := SUITES[suite].check:
            check(path)
    results: dict[str, LikelihoodResult | FitResult] = {}
    for suite, path in files.items():
        report = None if progress is None else _bound(progress, suite)
        results[suite] = runners[suite](model, tokenizer, path, name=name, progress=report)
    return results


def read_result(record: dict[str, Any]) -> Result:
    """Read a result from the JSON values that its ``to_json`` returned.

    Raises:
        SpecError: an unknown suite.
        RunError: a field is missing or of the wrong type.
    """
    suite = suite_of(str(record.get("suite")))
    try:
        return suite.read(record)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"this evaluation of suite {record['suite']!r} is damaged ({error!r}); evaluate again"
        ) from error


def suite_of(name: str) -> Suite:
    """Return a suite; ``SpecError`` with the nearest name where there is none."""
    if name not in SUITES:
        raise SpecError(f"there is no suite {name!r}{nearest(name, SUITES)}; there are {', '.join(SUITES)}")
    return SUITES[name]


def _runner(name: str) -> Evaluate:
    run = suite_of(name).run
    if run is None:
        raise SpecError(f"suite {name!r} samples answers: use evaluate_prompts with a sampler and a judge")
    return run


def _file(name: str, data: Mapping[str, Path]) -> Path:
    from holdtrue.data import resolve_data

    suite = suite_of(name)
    if name in data:
        return Path(data[name])
    if suite.data is None:
        raise SpecError(f"suite {name!r} has no data of its own: name a file of rows with --data")
    return resolve_data(suite.data, Path())


def _bound(progress: SuiteProgress, suite: str) -> Progress:
    return lambda done, total: progress(suite, done, total)
