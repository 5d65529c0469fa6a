"""Pairs that defenses train on or have measured while training: kept apart from what a run is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdtrue.data import Probe, read_probes, resolve_data
from holdtrue.errors import NeedError, SpecError
from holdtrue.runs.directory import Run
from holdtrue.runs.spec import RunSpec
from holdtrue.runs.tasks import sha256_of, suite_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdtrue.evaluation import MarginProbe


def check_probes(run: Run) -> None:
    """Check the pairs that a run's defenses read, once the rows that it holds out are split off.

    Raises:
        SpecError: two defenses name different probes; a defense measures drift on questions that another one trains on;
            or the run is evaluated on a file that a defense reads, or on questions of it: a defense holds what it is
            measured on, so that this would say nothing of anything else.
        NeedError: such a file is not there.
        DataError: rows have faults.
    """
    spec = run.spec
    _path(spec)
    for defense in spec.defenses:
        needs = defense.needs()
        for file in (needs.probe, needs.pairs):
            if file is not None:
                _check_apart(run, defense.name, resolve_data(file, spec.folder))
    _check_measured(spec)


def _check_measured(spec: RunSpec) -> None:
    """Refuse a defense that trains on questions on which another one measures drift."""
    measured = _path(spec)
    if measured is None:
        return
    for defense in spec.defenses:
        trained = defense.needs().pairs
        if trained is None:
            continue
        path = resolve_data(trained, spec.folder)
        if shared := _shared(path, measured):
            raise SpecError(
                f"defenses: {len(shared)} of the questions on which drift is measured, {measured} (line "
                f"{shared[0].line}, for one), are among the pairs that {defense.name} trains on, {path}: it would say "
                "nothing of others. Take them out of one of the two"
            )


def _check_apart(run: Run, name: str, path: Path) -> None:
    spec = run.spec
    reason = f"{name} holds the margin on these pairs, so a measurement on the same questions says nothing of others"
    if not path.is_file():
        raise NeedError(f"{name} needs pairs of answers and {path} does not exist: give a probe file, or builtin:NAME")
    probes = read_probes(path)
    for suite in (s for s in spec.evaluate.suites if s != "benign"):
        for source in suite_sources(spec, suite, run):
            if source.is_file() and sha256_of(source) == probes.sha256:
                raise SpecError(
                    f"evaluate: {suite} is measured on the pairs of {name}, {path}. {reason}: name another file"
                )
    if "likelihood" in spec.evaluate.suites or (spec.gate is not None and "margin_fall" in spec.gate.limits()):
        for source in suite_sources(spec, "likelihood", run):
            if shared := _shared(path, source):
                raise SpecError(
                    f"evaluate: {len(shared)} of the questions of {source} (line {shared[0].line}, for one) are among "
                    f"the pairs of {name}, {path}, too. {reason}: take them out of one of the two"
                )


def load_probe(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> MarginProbe | None:
    """Return what measures the margin for the spec's defenses, or ``None`` where none asks."""
    from holdtrue.evaluation import MarginProbe

    path = _path(spec)
    return None if path is None else MarginProbe(path, tokenizer)


def _path(spec: RunSpec) -> Path | None:
    asked = {d.name: probe for d in spec.defenses if (probe := d.needs().probe) is not None}
    if len(set(asked.values())) > 1:
        raise SpecError(f"defenses: {' and '.join(asked)} name different probes; give them the same file")
    return resolve_data(next(iter(asked.values())), spec.folder) if asked else None


def _shared(path: Path, other: Path) -> list[Probe]:
    """Return the rows of ``other`` whose questions are asked in ``path`` too."""
    own = {_folded(probe.question) for probe in read_probes(path).rows}
    return [probe for probe in read_probes(other).rows if _folded(probe.question) in own]


def _folded(question: str) -> str:
    return " ".join(question.split()).casefold()
