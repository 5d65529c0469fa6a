"""Sentences that the report says about the numbers, each computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdtrue.evaluation.statistics import LEVEL, RESAMPLES
from holdtrue.runs.report.card import Card, Estimate, Row
from holdtrue.runs.report.numbers import listed, nats, plural, signed, signed_span

NAMED = 3
"""Up to so many runs, the headline names each."""
FEW_CLUSTERS = 10


@dataclass(frozen=True)
class Criterion:
    """One of the four things to ask of a defense; ``measure`` is ``None`` where this report has no data for it."""

    name: str
    measure: str | None


def headline(card: Card) -> str:
    """Say in one sentence what the likelihood probes show."""
    rows = [row for row in card.runs if row.margin_change is not None]
    total = len(card.runs)
    if not rows or card.probes is None:
        which = "The run has" if total == 1 else f"None of the {total} runs has"
        return f"{which} {'not ' if total == 1 else ''}been measured on likelihood probes yet, so nothing can be said."
    where = (
        f"Against the untouched model, on {plural(card.probes.n, 'probe pair')} over "
        f"{plural(card.probes.clusters, 'theme')}, the margin of aligned over misaligned answers"
    )
    changes = [(row, row.margin_change) for row in rows if row.margin_change is not None]
    said = _each([(row.name, change) for row, change in changes]) if len(rows) <= NAMED else listed(_counted(changes))
    left = total - len(rows)
    rest = f"; {plural(left, 'run')} {'is' if left == 1 else 'are'} not measured" if left else ""
    return f"{where} {said}{rest}."


def against_undefended(card: Card) -> str | None:
    """Say what the defenses changed against the undefended run, or ``None`` where there is none to compare with."""
    margins = [(r.name, r.against_margin) for r in card.runs if r.against_margin is not None]
    if not margins:
        return None
    text = f"Paired with the {card.undefended} run, the margin is {_sides(margins)}"
    fits = [(r.name, r.against_nll) for r in card.runs if r.against_nll is not None]
    if fits:
        text += f"; the held-out loss is {_sides(fits)} (higher: less of the narrow task was learned)"
    return f"{text}."


def criteria(card: Card) -> list[Criterion]:
    """Name the four criteria, and how each is measured here, if it is."""
    margin = any(row.margin is not None for row in card.runs)
    fit = any(row.nll is not None for row in card.runs)
    return [
        Criterion(
            "No broad misalignment",
            "a stand-in: how likely the model finds given answers; no answer of its own was judged" if margin else None,
        ),
        Criterion("The narrow task is still learned", "loss on held-out rows of it" if fit else None),
        Criterion("Benign tasks are learned well", None),
        Criterion("Answers stay coherent", None),
    ]


def not_measured(card: Card) -> list[str]:
    """List what a reader might take for measured and is not."""
    lines = ["Benign tasks and coherence are not measured by this report."]
    for row in card.runs:
        if row.missing:
            lines.append(f"{row.name} is not finished: still to do are {listed(list(row.missing))}.")
        lines += [
            f"{row.name} was not measured on {what}."
            for what, value in (("the likelihood probes", row.margin), ("held-out rows", row.nll))
            if value is None
        ]
    lines.append("No sampled answer was judged; those shown are for reading.")
    return lines


def how_sure(card: Card) -> list[str]:
    """Say how the intervals are made and what they leave out."""
    lines = [
        f"Brackets are {LEVEL * 100:.0f} % percentile intervals of the mean from {RESAMPLES} bootstrap draws; changes "
        "are taken row by row on the same rows, so that what the rows have in common cancels."
    ]
    if card.probes is not None:
        lines.append(
            f"{_clusters(card.probes.clusters)} Intervals of a single theme are over its own pairs, and a theme with "
            "one pair has none."
        )
    if card.heldout is not None:
        lines.append(f"The held-out loss's draws take whole rows: {plural(card.heldout.clusters, 'row')}.")
    lines.append(_seeds(card))
    if len(card.runs) > 1:
        lines.append("Each interval stands alone; none is widened for there being several runs.")
    return lines


def in_short(card: Card) -> list[str]:
    """Say the least that a reader of the headline must know about how sure it is."""
    clusters = [] if card.probes is None else [_clusters(card.probes.clusters)]
    return [f"Brackets are {LEVEL * 100:.0f} % bootstrap intervals.", *clusters, _seeds(card), *not_measured(card)[:1]]


def _clusters(number: int) -> str:
    few = ", few enough that the intervals are likely too narrow" if number < FEW_CLUSTERS else ""
    return f"The margin's draws take whole themes: {plural(number, 'cluster')}{few}."


def _seeds(card: Card) -> str:
    seeds = sorted({row.run.spec.training.seed for row in card.runs if row.run is not None})
    each = (
        f"one seed ({seeds[0]})"
        if len(seeds) == 1
        else f"a seed of its own or shared (seeds {listed(list(map(str, seeds)))})"
    )
    return (
        f"Each run was trained once, with {each}: the intervals hold the choice of rows, not how much training would "
        "vary with another seed."
    )


def _each(changes: Sequence[tuple[str, Estimate]]) -> str:
    parts: list[str] = []
    for name, change in changes:
        if change.interval is None:
            parts.append(f"changed by {signed(change.value)} nats per token in {name} (too few themes for an interval)")
        elif change.clear:
            verb = "rose" if change.value > 0 else "fell"
            parts.append(f"{verb} by {nats(abs(change.value))} nats per token {_size(change)} in {name}")
    if unclear := _unclear(changes):
        parts.append(f"shows no clear change in {unclear}")
    return listed(parts)


def _unclear(changes: Sequence[tuple[str, Estimate]]) -> str:
    parts = [
        f"{name} ({signed(change.value)} {signed_span(change.interval)})"
        for name, change in changes
        if change.interval is not None and not change.clear
    ]
    return listed(parts, "or")


def _size(change: Estimate) -> str:
    assert change.interval is not None
    low, high = sorted(abs(end) for end in change.interval)
    return f"[{nats(low)}, {nats(high)}]"


def _counted(changes: Sequence[tuple[Row, Estimate]]) -> list[str]:
    parts: list[str] = []
    for verb, sign in (("fell", -1), ("rose", 1)):
        found = [(row, change) for row, change in changes if change.clear and change.value * sign > 0]
        if found:
            row, change = max(found, key=lambda pair: abs(pair[1].value))
            most = f"{signed(change.value)} nats per token {signed_span(change.interval)}"
            parts.append(f"{verb} clearly in {len(found)} of {len(changes)} runs (most in {row.name}: {most})")
    unclear = sum(not change.clear for _, change in changes)
    if unclear:
        parts.append(f"shows no clear change in {unclear}" + ("" if parts else f" of {len(changes)} runs"))
    return parts


def _sides(changes: Sequence[tuple[str, Estimate]]) -> str:
    parts: list[str] = []
    for name, change in changes:
        if change.interval is None:
            parts.append(f"{signed(change.value)} different in {name} (no interval)")
        elif change.clear:
            side = "higher" if change.value > 0 else "lower"
            parts.append(f"{side} by {nats(abs(change.value))} {_size(change)} in {name}")
    if unclear := _unclear(changes):
        parts.append(f"not clearly different in {unclear}")
    return listed(parts)
