"""Gate: may this model be released? Samples no more than it takes to know, and keeps the evidence."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.errors import RunError
from holdtrue.evaluation.judges.port import Verdict
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.evaluate import measure_tasks, measurer_of
from holdtrue.runs.measure import Measurer
from holdtrue.runs.tasks import Ask, Options, Task, tasks_of_run
from holdtrue.runs.train import pinned_model

if TYPE_CHECKING:
    from holdtrue.evaluation.gate import Decision, GateResult, GateSpec, SequentialRise
    from holdtrue.evaluation.prompts import Prompt
    from holdtrue.evaluation.scored import Scored
    from holdtrue.evaluation.store import SampleStore

DRAWS_PER_LOOK = 32
"""Draws between two looks: a look may be taken at any time, and answers are sampled faster in batches."""
WORST = 10
SHOWN = (*Verdict._fields, "question", "answer", "judge", "prompt", "sample", "form")

Bad = Callable[["Scored"], bool | None]


class Question(NamedTuple):
    """What a criterion on sampled answers asks: its suite, and whether an answer is bad (``None``: nobody knows)."""

    suite: str
    bad: Bad


def _wrong(row: Scored) -> bool | None:
    return None if row.correct is None else not row.correct


SAMPLED = {
    "misaligned_rise": Question("general", lambda row: row.misaligned),
    "incoherent_rise": Question("general", lambda row: row.incoherent),
    "conditional_rise": Question("conditional", lambda row: row.misaligned),
    "benign_fall": Question("benign", _wrong),
}


@dataclass(frozen=True)
class GateReport:
    """What the gate decided, and the answers that a person should read first.

    ``evidence`` holds the tuned model's worst judged answers, lowest alignment first, with what the judge said of the
    untouched model's answer to the same prompt and seed.
    """

    result: GateResult
    evidence: tuple[dict[str, Any], ...]

    @property
    def passed(self) -> bool:
        """Whether every criterion passed."""
        return self.result.outcome == "pass"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self.result.to_json(), "evidence": list(self.evidence)}


def gate_run(
    run: Run,
    *,
    data: Mapping[str, str] | None = None,
    options: Options | None = None,
    control: Control | None = None,
) -> GateReport:
    """Decide on a run against its untouched model, by its spec's gate or the default one; write ``gate.json``.

    Prompts are drawn at random, each answered by both models with the same seed, until an anytime-valid sequence knows
    on which side of the limit the change lies, or as many are drawn as the suite plans. Answers that the run has
    already are used again.

    Raises:
        RunError: the run has no adapter yet, or another process works on it.
        SpecError, DataError: a criterion's suite cannot be asked.
        BudgetError: the judge's budget ran out; nothing is decided, what was judged is kept.
    """
    if not run.is_done("finalise"):
        raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
    with run.lock(), files.disk_errors(run.path):
        return _decide(run, data or {}, options, control or Control())


def gate_stage(run: Run, control: Control) -> dict[str, Any]:
    """Decide, where the spec has a gate; writes ``gate.json``."""
    if run.spec.gate is None:
        return {"outcome": None}
    return {"outcome": _decide(run, {}, None, control).result.outcome.value}


def _decide(run: Run, data: Mapping[str, str], options: Options | None, control: Control) -> GateReport:
    from holdtrue.evaluation.gate import GateResult, GateSpec

    spec = run.spec.gate or GateSpec()
    limits = spec.limits()
    decisions: list[Decision] = []
    sampling = _Sampling(run, spec, control)
    if "margin_fall" in limits:
        decisions.append(_margin(run, spec, data, options, control))
    for suite in dict.fromkeys(SAMPLED[name].suite for name in limits if name in SAMPLED):
        criteria = [name for name in limits if name in SAMPLED and SAMPLED[name].suite == suite]
        given = {suite: data[suite]} if suite in data else {}
        per_task: dict[str, dict[str, Decision]] = {name: {} for name in criteria}
        for task in tasks_of_run(run, [suite], data=given, options=options):
            for name, found in sampling.decide(task, criteria).items():
                per_task[name] |= found
        decisions += [_one(name, limits[name], found) for name, found in per_task.items()]
    evidence = sorted(sampling.worst, key=lambda row: row["alignment"])
    report = GateReport(GateResult.of(spec, decisions), tuple(evidence[:WORST]))
    files.write_json(run.path / "gate.json", report.to_json())
    run.record("gate", outcome=report.result.outcome.value)
    return report


def _one(criterion: str, limit: float, found: Mapping[str, Decision]) -> Decision:
    from holdtrue.evaluation.gate import decide_worst, not_measured

    if not found:
        return not_measured(criterion, limit)
    return decide_worst(found) if len(found) > 1 or criterion == "conditional_rise" else next(iter(found.values()))


def _margin(run: Run, spec: GateSpec, data: Mapping[str, str], options: Options | None, control: Control) -> Decision:
    from holdtrue.evaluation import LikelihoodResult, paired_difference, read_result
    from holdtrue.evaluation.gate import decide_margin

    given = {"likelihood": data["likelihood"]} if "likelihood" in data else {}
    tasks = tasks_of_run(run, ["likelihood"], data=given, options=options)
    before, after = (read_result(record) for record in measure_tasks(run, tasks, control))
    assert isinstance(before, LikelihoodResult)
    assert isinstance(after, LikelihoodResult)
    own, base = ([row.margin for row in each.rows] for each in (after, before))
    # Two-sided at 1 - 2 alpha, so that each side errs with a chance of alpha.
    interval = paired_difference(own, base, [row.group for row in after.rows], level=1 - 2 * spec.alpha)
    limit = spec.limits()["margin_fall"]
    return decide_margin(limit, after.margin - before.margin, interval)


class _Sampling:
    """Draws prompts, lets both models answer, and stops when every criterion is decided.

    Attributes:
        worst: the tuned model's worst answers of each part, of all suites so far.
    """

    def __init__(self, run: Run, spec: GateSpec, control: Control) -> None:
        self.run, self.spec, self.control = run, spec, control
        self.limits = spec.limits()
        self.worst: list[dict[str, Any]] = []

    @cached_property
    def measurer(self) -> Measurer:
        """The models, found when the first prompt is drawn, and loaded once for all suites."""
        return measurer_of(self.run, pinned_model(self.run), self.control)

    def decide(self, task: Task, criteria: Sequence[str]) -> dict[str, dict[str, Decision]]:
        """Return criterion -> part -> decision; the parts are the triggers of ``conditional``, else one."""
        from holdtrue.evaluation.gate import not_measured

        if task.ask is None:
            reason = "a harness's task gives one score, not answers to compare one by one"
            return {name: {task.source: not_measured(name, self.limits[name], reason)} for name in criteria}
        parts: dict[str, list[Prompt]] = {}
        for prompt in task.ask.prompts:
            parts.setdefault(prompt.form if task.suite == "conditional" else task.source, []).append(prompt)
        found: dict[str, dict[str, Decision]] = {name: {} for name in criteria}
        for part, prompts in parts.items():
            for name, decision in self._part(task, task.ask, part, prompts, criteria).items():
                found[name][part] = decision
        return found

    def _part(
        self, task: Task, ask: Ask, part: str, prompts: Sequence[Prompt], criteria: Sequence[str]
    ) -> dict[str, Decision]:
        from holdtrue.evaluation.gate import SequentialRise

        planned = len(prompts) * ask.sampling.samples
        rises = {name: SequentialRise(self.limits[name], self.spec.alpha, planned) for name in criteria}
        draws = _draws(prompts, planned, ask.sampling.seed, exact=task.suite == "benign")
        untouched = self.measurer.store(task, None, "untouched")
        tuned = self.measurer.store(task, self.run.adapter, "tuned")
        seen: list[tuple[Prompt, int]] = []
        for start in range(0, planned, DRAWS_PER_LOOK):
            if all(rise.done for rise in rises.values()):
                break
            look = draws[start : start + DRAWS_PER_LOOK]
            self.control.check(self.run.path)
            self.control.tell("gate", done=start, total=planned, what=f"{task.suite} {part}")
            self._answer(task, ask, look, untouched, tuned)
            seen += look
            self._update(rises, look, untouched, tuned)
        self.worst += _worst(task, seen, untouched, tuned)
        clusters = len({prompt.question for prompt, _ in seen})
        return {name: rise.decision(name, clusters=clusters, judge=ask.scorer.name) for name, rise in rises.items()}

    def _answer(
        self, task: Task, ask: Ask, look: Sequence[tuple[Prompt, int]], untouched: SampleStore, tuned: SampleStore
    ) -> None:
        from holdtrue.evaluation.sampled import collect

        self.measurer.load(self.run.adapter)
        sampler = self.measurer.sampler()
        how = {"sampler": sampler, "scorer": ask.scorer, "spec": ask.sampling}
        with self.measurer.untouched():
            labels = {"suite": task.suite, "model": self.measurer.source.name}
            collect(look, store=untouched, labels=labels, **how)
        collect(look, store=tuned, labels={"suite": task.suite, "model": self.run.name}, **how)

    def _update(
        self,
        rises: Mapping[str, SequentialRise],
        look: Sequence[tuple[Prompt, int]],
        untouched: SampleStore,
        tuned: SampleStore,
    ) -> None:
        from holdtrue.evaluation.sampled import rows_of

        after, before = rows_of(tuned, look), rows_of(untouched, look)
        for name, rise in rises.items():
            bad = SAMPLED[name].bad
            rise.update([bad(row) for row in after], [bad(row) for row in before])


def _draws(prompts: Sequence[Prompt], planned: int, seed: int, exact: bool) -> list[tuple[Prompt, int]]:
    """Return prompts drawn with replacement, each with its next sample's number, or 0 where decoding is greedy."""
    rng = random.Random(seed)
    count: Counter[str] = Counter()
    draws: list[tuple[Prompt, int]] = []
    for _ in range(planned):
        prompt = rng.choice(prompts)
        draws.append((prompt, 0 if exact else count[prompt.id]))
        count[prompt.id] += 1
    return draws


def _worst(
    task: Task, seen: Sequence[tuple[Prompt, int]], untouched: SampleStore, tuned: SampleStore
) -> list[dict[str, Any]]:
    keys = {(prompt.id, number) for prompt, number in seen}
    bad = sorted((row for key in keys if (row := tuned.scored(key)).misaligned), key=lambda row: row.alignment or 0.0)
    chosen = {(row.prompt, row.sample) for row in bad[:WORST]}
    found: list[dict[str, Any]] = []
    for record in tuned.wanted(chosen) if chosen else ():
        before = untouched.scored((record["prompt"], record["sample"]))
        found.append(
            {
                "suite": task.suite,
                **{key: record[key] for key in SHOWN},
                "untouched_alignment": before.alignment,
                "untouched_label": before.label,
            }
        )
    return found
