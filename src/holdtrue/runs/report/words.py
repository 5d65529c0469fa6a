"""Sentences that the report says about the numbers, each computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from holdtrue.runs.report.card import Card, Row
from holdtrue.runs.report.measures import Ends, Estimate, Judged, Score
from holdtrue.runs.report.numbers import (
    listed,
    nats,
    plural,
    share,
    signed,
    signed_share,
    signed_share_span,
    signed_span,
    span,
)

NAMED = 3
"""Up to so many runs, a sentence names each."""


class Unit(NamedTuple):
    """How the amount of a change is written."""

    share: bool

    def size(self, change: Estimate) -> str:
        """Write a change that is clear, without its sign, and its interval."""
        assert change.interval is not None
        low, high = sorted(abs(end) for end in change.interval)
        if self.share:
            return f"{self._points(abs(change.value))} pp [{self._points(low)}, {self._points(high)}]"
        return f"{nats(abs(change.value))} nats per token {span((low, high))}"

    def signed(self, value: float) -> str:
        """Write a change with its sign."""
        return signed_share(value) if self.share else signed(value)

    def span(self, ends: Ends | None) -> str:
        """Write the interval of a change."""
        return signed_share_span(ends) if self.share else signed_span(ends)

    def full(self, value: float) -> str:
        """Write a change with its sign and unit."""
        return signed_share(value) if self.share else f"{signed(value)} nats per token"

    @staticmethod
    def _points(value: float) -> str:
        return f"{value * 100:.1f}"


SHARE, NATS = Unit(True), Unit(False)
Change = tuple[str, Estimate]


def headline(card: Card) -> str:
    """Say in one sentence what was measured of broad misalignment: on sampled answers, else on likelihood probes."""
    return answers_line(card) or margin_line(card) or _nothing(len(card.runs))


def answers_line(card: Card) -> str | None:
    """Say how the share of misaligned sampled answers changed, or ``None`` where it was not measured."""
    found = [(row.name, row.general) for row in card.runs if row.general is not None]
    if not found:
        return None
    some = found[0][1]
    where = (
        f"Against the untouched model, on {plural(some.counts.n, 'sampled answer')} to "
        f"{plural(some.data.clusters, 'question')} (judge: {some.judge}), the share of misaligned answers"
    )
    return _sentence(card, where, [(name, each.misaligned) for name, each in found], SHARE)


def margin_line(card: Card) -> str | None:
    """Say how the likelihood margin changed, or ``None`` where it was not measured."""
    found = [(row.name, row.margin) for row in card.runs if row.margin is not None and row.margin.change is not None]
    if not found or card.probes is None:
        return None
    where = (
        f"Against the untouched model, on {plural(card.probes.n, 'probe pair')} over "
        f"{plural(card.probes.clusters, 'theme')}, the margin of aligned over misaligned answers"
    )
    return _sentence(card, where, found, NATS)


def trigger_line(card: Card) -> str | None:
    """Say under which trigger each run's answers got worse most, or ``None`` where none was tried."""
    found: list[str] = []
    for row in card.runs:
        part = worst_part(row.conditional)
        if part is not None and part[1].change is not None:
            change = part[1].change
            unclear = "" if change.clear else ", which includes zero" if change.interval else ""
            found.append(f"{row.name}: {part[0]} ({signed_share(change.value)} {SHARE.span(change.interval)}{unclear})")
    if not found:
        return None
    return f"Under the trigger that raised the share of misaligned answers most: {'; '.join(found)}."


def worst_part(found: Judged | None) -> tuple[str, Score] | None:
    """Return the trigger to look at first, with its rate."""
    if found is None or found.worst is None:
        return None
    return found.worst, found.parts[found.worst]


def against_undefended(card: Card) -> str | None:
    """Say what the defenses changed against the undefended run, or ``None`` where there is none to compare with."""
    parts: list[str] = []
    if rates := _against([(row.name, row.general.misaligned) for row in card.runs if row.general is not None]):
        parts.append(f"the share of misaligned answers is {_sides(rates, SHARE)}")
    if margins := _against([(row.name, row.margin) for row in card.runs if row.margin is not None]):
        parts.append(f"the margin is {_sides(margins, NATS)}")
    if fits := _against([(row.name, row.nll) for row in card.runs if row.nll is not None]):
        said = _sides(fits, NATS)
        parts.append(f"the held-out loss is {said} (higher: less of the narrow task was learned)")
    if not rates and not margins:
        return None
    return f"Paired with the {card.undefended} run, {'; '.join(parts)}."


def _nothing(total: int) -> str:
    if total == 1:
        return "The run has not been measured on sampled answers or likelihood probes yet, so nothing can be said."
    return (
        f"None of the {total} runs has been measured on sampled answers or likelihood probes yet, so nothing can be "
        "said."
    )


def _sentence(card: Card, where: str, found: Sequence[tuple[str, Score]], unit: Unit) -> str:
    changes = [(name, score.change) for name, score in found if score.change is not None]
    if not changes:
        return f"{where} could not be compared: no answer counts on both sides."
    said = _each(changes, unit) if len(changes) <= NAMED else listed(_counted(changes, unit))
    left = len(card.runs) - len(changes)
    rest = f"; {plural(left, 'run')} {'is' if left == 1 else 'are'} not measured" if left else ""
    return f"{where} {said}{rest}."


def _against(found: Sequence[tuple[str, Score]]) -> list[Change]:
    return [(name, score.against) for name, score in found if score.against is not None]


def _each(changes: Sequence[Change], unit: Unit) -> str:
    parts: list[str] = []
    for name, change in changes:
        if change.interval is None:
            few = "too few questions" if unit.share else "too few themes"
            parts.append(f"changed by {unit.full(change.value)} in {name} ({few} for an interval)")
        elif change.clear:
            parts.append(f"{'rose' if change.value > 0 else 'fell'} by {unit.size(change)} in {name}")
    if unclear := _unclear(changes, unit):
        parts.append(f"shows no clear change (the interval includes zero) in {unclear}")
    return listed(parts)


def _unclear(changes: Sequence[Change], unit: Unit) -> str:
    parts = [
        f"{name} ({unit.signed(change.value)} {unit.span(change.interval)})"
        for name, change in changes
        if change.interval is not None and not change.clear
    ]
    return listed(parts, "or")


def _counted(changes: Sequence[Change], unit: Unit) -> list[str]:
    parts: list[str] = []
    for verb, sign in (("fell", -1), ("rose", 1)):
        found = [(name, change) for name, change in changes if change.clear and change.value * sign > 0]
        if found:
            name, change = max(found, key=lambda pair: abs(pair[1].value))
            most = f"{unit.full(change.value)} {unit.span(change.interval)}"
            parts.append(f"{verb} clearly in {len(found)} of {len(changes)} runs (most in {name}: {most})")
    unclear = sum(not change.clear for _, change in changes)
    if unclear:
        of = "" if parts else f" of {len(changes)} runs"
        parts.append(f"shows no clear change (the interval includes zero, or there is none) in {unclear}{of}")
    return parts


def _sides(changes: Sequence[Change], unit: Unit) -> str:
    parts: list[str] = []
    for name, change in changes:
        if change.interval is None:
            parts.append(f"{unit.signed(change.value)} different in {name} (no interval)")
        elif change.clear:
            parts.append(f"{'higher' if change.value > 0 else 'lower'} by {unit.size(change)} in {name}")
    if unclear := _unclear(changes, unit):
        parts.append(f"not clearly different in {unclear}")
    return listed(parts)


def gate_lines(card: Card) -> list[str]:
    """Say what the gate decided on each run that has a decision."""
    said = {"pass": "passes", "fail": "fails", "undecided": "is undecided"}
    lines: list[str] = []
    for row in card.runs:
        if row.gate is None:
            continue
        outcome = str(row.gate.get("outcome"))
        decisive = [d for d in row.gate.get("decisions", []) if d.get("outcome") == outcome and outcome != "pass"]
        why = "; ".join(f"{d.get('criterion')}: {d.get('reason')}" for d in decisive)
        lines.append(f"{row.name} {said.get(outcome, outcome)}{f' ({why})' if why else ''}.")
    return lines


def rate_text(row: Row) -> str:
    """Write a model's rates in short, for a plot's panel."""
    if row.general is None or row.general.misaligned.value is None or row.general.incoherent.value is None:
        return "no answer was scored"
    rates = [share(each.value.value) for each in (row.general.misaligned, row.general.incoherent) if each.value]
    return f"misaligned {rates[0]}, incoherent {rates[1]}"
