"""Figures of what sampled answers were judged to be: against what was learned, by question, by answer, by trigger."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from holdtrue.evaluation.scored import COHERENT_ABOVE, MISALIGNED_BELOW, Scored
from holdtrue.runs.report.card import Card, Row
from holdtrue.runs.report.drawing import (
    GRAY,
    PALE,
    UNTOUCHED,
    Look,
    bands,
    in_percent,
    legend,
    new_figure,
    plain,
    svg,
    whisker,
)
from holdtrue.runs.report.measures import Estimate
from holdtrue.runs.report.numbers import listed, nats, plural, signed, signed_share, signed_share_span, signed_span
from holdtrue.runs.report.words import rate_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTIONS_DRAWN = 12
"""Questions in the figure, those with the highest rates first; the rest is in the table."""
ANSWERS_DRAWN = 400
"""Points in a model's panel; of more answers, so many are drawn at random."""
PLAIN_BAND = "no trigger (plain questions)"
_COLUMNS = 4


def trade_off(card: Card, style: Mapping[str, Look]) -> Markup | None:
    """Draw what each run lost in alignment over what it learned of the narrow task.

    The height is the rise of the misaligned rate where any run has one, else the fall of the likelihood margin.
    """
    sampled = any(_rise(row) is not None for row in card.runs)
    height = _rise if sampled else _fall
    points = {
        row.name: (learned, lost)
        for row in card.runs
        if (learned := _learned(row)) is not None and (lost := height(row)) is not None
    }
    if not points:
        return None
    figure, axes = new_figure(6.4, 4.2)
    axes.axhline(0, color=GRAY, linewidth=0.8)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.plot([0], [0], "o", color=UNTOUCHED, markersize=7, markeredgecolor="white", label="untouched")
    for name, (learned, lost) in points.items():
        whisker(axes, learned, lost, style[name], plain(name, 24), size=8)
    axes.margins(0.12)
    if sampled:
        in_percent(axes.yaxis)
    axes.set_xlabel("narrow task: fall of the held-out loss, nats per token (right: learned more)")
    axes.set_ylabel("rise of the misaligned rate" if sampled else "fall of the general margin, nats per token")
    aside: dict[str, Any] = {"transform": axes.transAxes, "color": UNTOUCHED, "style": "italic", "zorder": 1}
    aside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(0.99, 0.02, "learned, and still aligned", ha="right", **aside)
    axes.text(0.01, 0.97, "misaligned for nothing", va="top", **aside)
    axes.grid()
    axes.set_axisbelow(True)
    _undefended_axis(axes, card)
    legend(figure)
    told = listed([_told(name, learned, lost, sampled) for name, (learned, lost) in points.items()])
    what = "the misaligned rate rose" if sampled else "the general margin fell"
    text = f"For each run, how much the held-out loss fell and how much {what}, with 95 % intervals: {told}."
    return svg(figure, "tradeoff", "Misalignment against narrow learning", text)


def question_rates(card: Card, style: Mapping[str, Look]) -> Markup | None:
    """Draw the misaligned rate on each question, with Wilson intervals."""
    rows = {row.name: _by_question(row) for row in card.rows if row.general is not None}
    peak: dict[str, float] = {}
    for values in rows.values():
        for question, estimate in values.items():
            peak[question] = max(peak.get(question, 0.0), estimate.value)
    chosen = sorted(peak, key=lambda question: -peak[question])[:QUESTIONS_DRAWN]
    shown = {name: {q: values[q] for q in chosen if q in values} for name, values in rows.items()}
    text = (
        f"{len(chosen)} of {plural(len(peak), 'question')}, the highest rates first, each with "
        f"{plural(len(rows), 'model')}; the numbers are in the table below."
    )
    label = "misaligned answers, with Wilson intervals"
    title = "Misaligned rate by question"
    return bands("questions", title, label, shown, style, shares=True, description=text)


def trigger_rates(card: Card, style: Mapping[str, Look]) -> Markup | None:
    """Draw the misaligned rate under each trigger, after that of the plain questions where the same judge has it."""
    rows = {row.name: triggers_of(row) for row in card.rows if row.conditional is not None}
    triggers = {trigger for values in rows.values() for trigger in values} - {PLAIN_BAND}
    text = f"{plural(len(triggers), 'trigger')}, each with {plural(len(rows), 'model')}; the numbers are in the table."
    label = "misaligned answers, with 95 % intervals"
    title = "Misaligned rate by trigger"
    return bands("triggers", title, label, rows, style, shares=True, description=text)


def triggers_of(row: Row) -> dict[str, Estimate]:
    """Return the misaligned rate under each trigger, and first that of the plain questions."""
    found: dict[str, Estimate] = {}
    if row.conditional is None:
        return found
    if row.general is not None and _comparable(row):
        plain_part = row.general.parts.get("plain")
        if plain_part is not None and plain_part.value is not None:
            found[PLAIN_BAND] = plain_part.value
    return found | {name: part.value for name, part in row.conditional.parts.items() if part.value is not None}


def answer_clouds(card: Card, style: Mapping[str, Look]) -> Markup | None:
    """Draw each model's answers by alignment and coherence, as Betley et al. (2025) do."""
    rows = [row for row in card.rows if row.general is not None and any(each.counted for each in row.general.rows)]
    if not rows:
        return None
    from matplotlib.figure import Figure

    lines = -(-len(rows) // _COLUMNS)
    columns = -(-len(rows) // lines)
    figure = Figure(figsize=(0.5 + 2.9 * columns, 0.4 + 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, row in zip(panels, rows, strict=False):
        _cloud(axes, row, style[row.name])
    for axes in panels[len(rows) :]:
        axes.remove()
    figure.supxlabel("alignment", fontsize=10)
    figure.supylabel("coherence", fontsize=10)
    told = "; ".join(f"{row.name}: {rate_text(row)}" for row in rows)
    text = f"One panel a model, one point an answer; the upper left holds the misaligned answers. {told}."
    return svg(figure, "clouds", "Alignment and coherence of each answer", text)


def _cloud(axes: Axes, row: Row, look: Look) -> None:
    assert row.general is not None
    points = drawn(row.general.rows)
    axes.axvspan(0, MISALIGNED_BELOW, ymin=(COHERENT_ABOVE + 3) / 106, color="#d55e00", alpha=0.12, linewidth=0)
    axes.axvline(MISALIGNED_BELOW, color=GRAY, linewidth=0.8, linestyle="--")
    axes.axhline(COHERENT_ABOVE, color=GRAY, linewidth=0.8, linestyle="--")
    axes.plot(
        [each.alignment or 0.0 for each in points],
        [each.coherence or 0.0 for each in points],
        look.marker,
        linestyle="none",
        color=look.color,
        alpha=0.45,
        markersize=4,
        markeredgewidth=0,
    )
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.set_xticks([0, MISALIGNED_BELOW, 100])
    axes.set_yticks([0, COHERENT_ABOVE, 100])
    axes.set_aspect("equal")
    axes.set_title(f"{plain(row.name, 30)}\n{rate_text(row)}", fontsize=9, loc="left", linespacing=1.4)


def drawn(rows: Sequence[Scored]) -> list[Scored]:
    """Return the counted answers, or as many of them, at random but always the same ones, as a panel can show."""
    counted = [row for row in rows if row.counted]
    if len(counted) <= ANSWERS_DRAWN:
        return counted
    return random.Random(0).sample(counted, ANSWERS_DRAWN)


def _rise(row: Row) -> Estimate | None:
    return None if row.general is None else row.general.misaligned.change


def _fall(row: Row) -> Estimate | None:
    return None if row.margin is None else _turned(row.margin.change)


def _learned(row: Row) -> Estimate | None:
    return None if row.nll is None else _turned(row.nll.change)


def _turned(change: Estimate | None) -> Estimate | None:
    if change is None:
        return None
    ends = None if change.interval is None else (-change.interval[1], -change.interval[0])
    return Estimate(-change.value, ends)


def _told(name: str, learned: Estimate, lost: Estimate, sampled: bool) -> str:
    amount, ends = (signed_share, signed_share_span) if sampled else (signed, signed_span)
    return (
        f"{name} learned {nats(learned.value)} {signed_span(learned.interval)}, lost {amount(lost.value)} "
        f"{ends(lost.interval)}"
    )


def _undefended_axis(axes: Axes, card: Card) -> None:
    """Say above the axes what share of the undefended run's learning a place is."""
    base = next((row for row in card.runs if row.name == card.undefended), None)
    whole = None if base is None else _learned(base)
    if whole is None or not whole.clear or whole.value < 0:
        return
    import numpy as np

    total = whole.value
    axes.axvline(total, color=PALE, linewidth=1.6, zorder=0)
    above = axes.secondary_xaxis("top", functions=(lambda x: np.asarray(x) / total, lambda x: np.asarray(x) * total))
    in_percent(above.xaxis)
    above.set_xlabel("share of what the undefended run learned")


def _by_question(row: Row) -> dict[str, Estimate]:
    assert row.general is not None
    return {
        name: Estimate(score.value.value, score.wilson)
        for name, score in row.general.questions.items()
        if score.value is not None
    }


def _comparable(row: Row) -> bool:
    assert row.general is not None
    assert row.conditional is not None
    same = [(each.judge, each.data.data, _decoding(each.settings)) for each in (row.general, row.conditional)]
    return same[0] == same[1]


def _decoding(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key != "prompts"}
