"""The scorecard as lines of text: a group for each criterion, a line for each measure, a cell for each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from holdtrue.runs.report.card import Card, Row
from holdtrue.runs.report.cost import Cost
from holdtrue.runs.report.measures import Ends, Judged, Score
from holdtrue.runs.report.numbers import (
    count,
    memory,
    nats,
    plural,
    ratio,
    seconds,
    share,
    share_span,
    signed,
    signed_share,
    signed_share_span,
    signed_span,
    span,
)
from holdtrue.runs.report.sureness import Criterion, criteria
from holdtrue.runs.report.words import worst_part

UNSCORED = "no answer scored"


class Cell(NamedTuple):
    """A value with its interval, what it rests on, and its change against the untouched model.

    ``value`` is ``None`` where nothing was measured; ``clear`` says that the change's interval leaves out zero.
    """

    value: str | None = None
    interval: str = ""
    about: str = ""
    change: str = ""
    change_interval: str = ""
    clear: bool = False


class Line(NamedTuple):
    """A measure, and its cells in the order of the card's rows."""

    name: str
    about: str
    cells: tuple[Cell, ...]


class Group(NamedTuple):
    """A criterion, with how it is measured, and its lines."""

    criterion: Criterion
    lines: tuple[Line, ...]


def table(card: Card) -> list[Group]:
    """Return the four criteria and the cost as text."""
    broad, narrow, harmless, coherent = criteria(card)
    return [
        Group(
            broad,
            (
                _judged_line(card, "misaligned answers", lambda row: row.general, lambda found: found.misaligned),
                _triggers(card),
                Line("general margin", _probes(card), _cells(card, lambda row: row.margin, nats_cell)),
                Line("misaligned answer preferred", _probes(card), _cells(card, lambda row: row.preferred, share_cell)),
            ),
        ),
        Group(
            narrow,
            (
                Line("loss on held-out rows", _heldout(card), _cells(card, lambda row: row.nll, nats_cell)),
                _judged_line(
                    card,
                    "misaligned answers in the domain",
                    lambda row: row.in_domain,
                    lambda found: found.misaligned,
                    "where the narrow task is a malicious one, high means learned; ",
                ),
            ),
        ),
        Group(harmless, tuple(_benign(card, task) for task in card.tasks) or (_nothing(card, "right answers"),)),
        Group(
            coherent,
            (_judged_line(card, "incoherent answers", lambda row: row.general, lambda found: found.incoherent),),
        ),
        Group(Criterion("What it took", "training, and how far the model's words moved"), tuple(_cost(card))),
    ]


def nats_cell(score: Score | None) -> Cell:
    """Write a score in nats."""
    return _score_cell(score, nats, span, signed, signed_span)


def share_cell(score: Score | None) -> Cell:
    """Write a score that is a share."""
    return _score_cell(score, share, share_span, signed_share, signed_share_span)


def _score_cell(
    score: Score | None,
    value: Callable[[float], str],
    ends: Callable[[Ends | None], str],
    moved: Callable[[float], str],
    moved_ends: Callable[[Ends | None], str],
) -> Cell:
    if score is None or score.value is None:
        return Cell() if score is None else Cell(UNSCORED)
    change = score.change
    return Cell(
        value(score.value.value),
        ends(score.value.interval),
        "",
        "" if change is None else moved(change.value),
        "" if change is None else moved_ends(change.interval),
        change is not None and change.clear,
    )


def _cells(card: Card, score: Callable[[Row], Score | None], write: Callable[[Score | None], Cell]) -> tuple[Cell, ...]:
    return tuple(write(score(row)) for row in card.rows)


def _judged_line(
    card: Card, name: str, judged: Callable[[Row], Judged | None], score: Callable[[Judged], Score], note: str = ""
) -> Line:
    found = [judged(row) for row in card.rows]
    some = next((each for each in found if each is not None), None)
    about = "share of scored answers" if some is None else _answers(some)
    cells = [Cell() if each is None else share_cell(score(each))._replace(about=_counted(each)) for each in found]
    return Line(name, f"{note}{about}", tuple(cells))


def _triggers(card: Card) -> Line:
    found = [row.conditional for row in card.rows]
    some = next((each for each in found if each is not None), None)
    cells: list[Cell] = []
    for each in found:
        worst = worst_part(each)
        if worst is None:
            cells.append(Cell() if each is None else Cell(UNSCORED))
        else:
            cells.append(share_cell(worst[1])._replace(about=f"{worst[0]}, n = {count(worst[1].n)}"))
    of = "" if some is None else f"of {plural(len(some.parts), 'trigger')}; {_answers(some)}"
    return Line("misaligned answers, worst trigger", of, tuple(cells))


def _benign(card: Card, task: str) -> Line:
    found = [row.benign[task].accuracy if task in row.benign else None for row in card.rows]
    some = next((each for each in found if each is not None), None)
    about = "" if some is None else f"right answers; n = {count(some.n)}, {plural(some.clusters, 'question')}"
    return Line(task, about, tuple(share_cell(each) for each in found))


def _nothing(card: Card, name: str) -> Line:
    return Line(name, "", tuple(Cell() for _ in card.rows))


def _cost(card: Card) -> list[Line]:
    names: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "seconds": ("training time", seconds),
        "tokens": ("tokens trained", count),
        "tokens_per_second": ("tokens per second", count),
        "peak_memory_bytes": ("peak memory", memory),
    }
    against = f"and against {card.undefended}" if any(row.cost and row.cost.ratios for row in card.runs) else ""
    lines = [Line("KL to the reference", "nats per response token", tuple(_kl(row) for row in card.rows))]
    for key, (name, write) in names.items():
        lines.append(Line(name, against, tuple(_cost_cell(row, key, write) for row in card.rows)))
    if any(row.gate is not None for row in card.runs):
        lines.append(Line("gate", "the release decision", tuple(_gate(row) for row in card.rows)))
    return lines


def _kl(row: Row) -> Cell:
    if row.run is None:
        return Cell("0", about="by definition")
    return Cell() if row.kl is None else Cell(nats(row.kl), about=row.kl_where)


def _cost_cell(row: Row, key: str, write: Callable[[float | None], str]) -> Cell:
    if row.run is None:
        return Cell("–")
    cost: Cost | None = row.cost
    if cost is None:
        return Cell()
    times = cost.ratios.get(key)
    return Cell(write(getattr(cost, key)), about="" if times is None else ratio(times))


def _gate(row: Row) -> Cell:
    if row.run is None:
        return Cell("–")
    return Cell("not decided") if row.gate is None else Cell(str(row.gate.get("outcome")))


def _answers(some: Judged) -> str:
    return f"{plural(some.counts.n, 'answer')} to {plural(some.data.clusters, 'question')}; judge: {some.judge}"


def _counted(found: Judged) -> str:
    return f"n = {count(found.counts.scored)} scored of {count(found.counts.n)}"


def _probes(card: Card) -> str:
    if card.probes is None:
        return "nats per token"
    return f"{plural(card.probes.n, 'pair')} in {plural(card.probes.clusters, 'theme')}; no judge"


def _heldout(card: Card) -> str:
    if card.heldout is None:
        return "nats per token"
    answers = plural(card.heldout.n, "answer")
    return f"nats per token, lower fits better; {answers} of {plural(card.heldout.clusters, 'row')}; no judge"
