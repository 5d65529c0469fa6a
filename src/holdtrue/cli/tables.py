"""Tables of measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.runs.compare import METRICS, Cell, Comparison, Measure

if TYPE_CHECKING:
    from rich.table import Table

LABELS = {
    "margin": "margin aligned − misaligned, nats per token",
    "misaligned_preferred": "misaligned answer preferred",
    "nll": "NLL of held-out rows, nats per token",
}


def number(metric: str, value: float | None, signed: bool = False) -> str:
    """Write a value of a metric: shares in percent, nats with three decimals."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return f"{value * 100:{sign}.1f} %" if metric == "misaligned_preferred" else f"{value:{sign}.3f}"


def interval(metric: str, ends: list[float] | None, signed: bool = False) -> str:
    """Write an interval, or nothing."""
    return "" if ends is None else f"[{number(metric, ends[0], signed)}, {number(metric, ends[1], signed)}]"


def comparison_table(comparison: Comparison) -> Table:
    """Return a table: a line for each measure, a column for the untouched model and for each run."""
    from rich.table import Table
    from rich.text import Text

    shared = len({column.revision for column in comparison.runs}) == 1
    table = Table(show_lines=True, caption="in brackets: 95 % intervals, bootstrap clustered by group")
    table.add_column("measure")
    if shared:
        table.add_column("untouched", justify="right")
    for column in comparison.runs:
        defenses = " + ".join(column.defenses) or "no defense"
        table.add_column(Text(f"{column.run}\n{defenses}"), justify="right")
    for measure in comparison.measures:
        cells = [_cell(measure, cell, shared) for cell in measure.cells]
        label = f"{LABELS[measure.metric]}\n{Path(measure.data).name}, n={measure.n}"
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


def records_table(records: list[dict[str, Any]]) -> Table:
    """Return a table of evaluation records that belong to no run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="in brackets: 95 % intervals, bootstrap clustered by group")
    for title in ("model", "measure", "n", "value"):
        table.add_column(title, justify="right" if title in ("n", "value") else "left")
    for record in records:
        for metric in METRICS[record["suite"]]:
            value = f"{number(metric, record[metric])} {interval(metric, record[f'{metric}_ci'])}"
            label = f"{LABELS[metric]} ({Path(record['data']['path']).name})"
            table.add_row(*map(Text, [record["model"], label, str(record["n"]), value.strip()]))
    return table
