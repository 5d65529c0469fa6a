"""Tables of measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.runs.compare import METRICS, Cell, Comparison, Measure

if TYPE_CHECKING:
    from rich.table import Table

    from holdtrue.runs.seeds import SeedMeasure

LABELS = {
    "margin": "margin aligned − misaligned, nats per token",
    "misaligned_preferred": "misaligned answer preferred",
    "nll": "NLL of held-out rows, nats per token",
    "misaligned": "misaligned answers",
    "incoherent": "incoherent answers",
    "accuracy": "right answers",
}
SHARES = {"misaligned_preferred", "misaligned", "incoherent", "accuracy"}


CAPTION = "in brackets: 95 % intervals that allow for answers to one question (rows of one theme) being alike"


def number(metric: str, value: float | None, signed: bool = False) -> str:
    """Write a value of a metric: shares in percent, nats with three decimals."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return f"{value * 100:{sign}.1f} %" if metric in SHARES else f"{value:{sign}.3f}"


def interval(metric: str, ends: list[float] | None, signed: bool = False) -> str:
    """Write an interval, or nothing."""
    return "" if ends is None else f"[{number(metric, ends[0], signed)}, {number(metric, ends[1], signed)}]"


def comparison_table(comparison: Comparison) -> Table:
    """Return a table: a line for each measure, a column for the untouched model and for each run."""
    from rich.table import Table
    from rich.text import Text

    shared = len({column.revision for column in comparison.runs}) == 1
    table = Table(show_lines=True, caption=CAPTION)
    table.add_column("measure")
    if shared:
        table.add_column("untouched", justify="right")
    for column in comparison.runs:
        defenses = " + ".join(column.defenses) or "no defense"
        table.add_column(Text(f"{column.run}\n{defenses}"), justify="right")
    for measure in comparison.measures:
        cells = [_cell(measure, cell, shared) for cell in measure.cells]
        about = ", ".join(
            filter(None, [Path(measure.data).name, f"n={measure.n}", measure.judge and f"judge {measure.judge}"])
        )
        label = f"{measure.suite}: {LABELS[measure.metric]}{measure.part and f' under {measure.part}'}\n{about}"
        table.add_row(*map(Text, [label, *([_untouched(measure)] if shared else []), *cells]))
    return table


def _untouched(measure: Measure) -> str:
    cell = next((c for c in measure.cells if c is not None and c.untouched is not None), None)
    if cell is None:
        return "–"
    ends = interval(measure.metric, cell.untouched_interval)
    return "\n".join(filter(None, [number(measure.metric, cell.untouched), ends]))


def _cell(measure: Measure, cell: Cell | None, shared: bool) -> str:
    if cell is None:
        return "not measured"
    metric = measure.metric
    before = "" if shared else f"{number(metric, cell.untouched)} → "
    lines = [before + number(metric, cell.value), interval(metric, cell.interval)]
    if cell.change is not None:
        lines.append(f"{number(metric, cell.change, True)} {interval(metric, cell.change_interval, True)}".strip())
    return "\n".join(filter(None, lines))


def seeds_table(seeds: Sequence[SeedMeasure]) -> Table:
    """Return a table of what runs of one spec with several seeds say together."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="means over training seeds; intervals hold for other seeds and other questions")
    for title in ("runs", "measure", "value", "change"):
        table.add_column(title)
    for each in seeds:
        value = f"{number(each.metric, each.value)} {interval(each.metric, each.interval)}"
        change = f"{number(each.metric, each.change, True)} {interval(each.metric, each.change_interval, True)}"
        label = f"{each.suite}: {LABELS[each.metric]}, n={each.n}"
        table.add_row(*map(Text, ["\n".join(each.runs), label, value.strip(), change.strip()]))
    return table


def gate_table(gate: dict[str, Any]) -> Table:
    """Return a table of a release decision: a line for each criterion."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"gate: {gate['outcome']}", caption="a change against the untouched model, and the limit it must keep"
    )
    for title in ("criterion", "outcome", "change", "between", "limit", "why"):
        table.add_column(title)
    for decision in gate["decisions"]:
        metric = "margin" if decision["criterion"] == "margin_fall" else "misaligned"
        ends = None if decision["low"] is None or decision["high"] is None else [decision["low"], decision["high"]]
        table.add_row(
            *map(
                Text,
                [
                    decision["criterion"],
                    decision["outcome"],
                    number(metric, decision["estimate"], True),
                    interval(metric, ends, True),
                    number(metric, decision["limit"]),
                    decision["reason"],
                ],
            )
        )
    return table


def records_table(records: list[dict[str, Any]]) -> Table:
    """Return a table of evaluation records that belong to no run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=CAPTION)
    for title in ("model", "measure", "n", "value"):
        table.add_column(title, justify="right" if title in ("n", "value") else "left")
    for record in records:
        for metric in METRICS[record["suite"]]:
            value = f"{number(metric, record[metric])} {interval(metric, record[f'{metric}_ci'])}"
            label = f"{record['suite']}: {LABELS[metric]} ({Path(record['data']['path']).name})"
            table.add_row(*map(Text, [record["model"], label, str(record["n"]), value.strip()]))
    return table
