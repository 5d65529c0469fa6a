"""The grid's tables as Markdown, LaTeX (booktabs) and CSV: rows are settings, columns the four criteria and cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from holdtrue.bench.ratios import Ratio
from holdtrue.bench.shares import Shares
from holdtrue.bench.summary import Column, Entry, Group, Table
from holdtrue.runs.report import numbers
from holdtrue.runs.report.measures import Estimate

NOTE = (
    "Means over seeds; in brackets 95 % intervals that allow for answers to one question (rows of one theme) being "
    "alike, and for other seeds. Below each, the change against the untouched model. Shares in percent, likelihoods in "
    "nats per token. Time is a multiple of the undefended setting's, on a CPU in seconds of the processor."
)
SHARES = "shares of what the undefended setting did"
SHARE_NOTE = (
    "Shares of what the undefended setting did, paired by row and seed, with 95 % intervals (Fieller's; for rates, "
    "from the two changes' own intervals); a share of a change that is not clear of zero is left out."
)


class Cell(NamedTuple):
    """A number as it is printed: value, interval, change, the change's interval; empty where there is none."""

    value: str
    interval: str = ""
    change: str = ""
    change_interval: str = ""


def headings(table: Table) -> list[str]:
    """Return the columns' titles."""
    return [_title(column, task) for column, task in table.columns()] + ["time"]


def rows(table: Table) -> list[tuple[str, list[Cell]]]:
    """Return each row's name and cells, the untouched model's first."""
    columns = table.columns()
    untouched = {(e.column, e.task): e for e in table.untouched}
    found = [("untouched", [_cell(untouched.get(key), False) for key in columns] + [Cell(numbers.NONE)])]
    for group in table.groups:
        mine = {(e.column, e.task): e for e in group.entries}
        found.append((_name(group), [_cell(mine.get(key), True) for key in columns] + [_cost(group)]))
    return found


def share_headings(each: Shares) -> list[str]:
    """Return the columns' titles of a table of shares."""
    return [share.title for share in each.shares] + [f"{data}: time" for data, _ in each.times]


def share_rows(found: Sequence[Shares]) -> list[tuple[str, list[Cell]]]:
    """Return each setting's name and cells; a share of a change that is not clear of zero is left empty."""
    return [(s.setting, [_share(x.ratio) for x in s.shares] + [_times(t) for _, t in s.times]) for s in found]


Found = Mapping[str, Sequence[Shares]]


def markdown(tables: Sequence[Table], shares: Found | None = None) -> str:
    """Return the tables as GitHub's Markdown."""
    parts = [
        _markdown(f"{table.model}, {table.data} ({table.learns})", headings(table), rows(table)) for table in tables
    ]
    parts.append(NOTE)
    for model, found in (shares or {}).items():
        parts += [_markdown(f"{model}: {SHARES}", share_headings(found[0]), share_rows(found)), SHARE_NOTE]
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], shares: Found | None = None) -> str:
    """Return the tables as LaTeX; they need the packages ``booktabs`` and ``graphicx``."""
    parts = ["% needs \\usepackage{booktabs} and \\usepackage{graphicx}"]
    for table in tables:
        caption = f"{table.model}, {table.data} ({table.learns}). {NOTE}"
        parts.append(_latex(caption, headings(table), rows(table)))
    for model, found in (shares or {}).items():
        parts.append(_latex(f"{model}. {SHARE_NOTE}", share_headings(found[0]), share_rows(found)))
    return "\n\n".join(parts) + "\n"


def _markdown(title: str, columns: Sequence[str], body: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    lines = [f"## {_md(title)}", "", f"| {' | '.join(map(_md, ['setting', *columns]))} |"]
    lines.append(f"|---|{'---:|' * len(columns)}")
    for name, cells in body:
        lines.append(f"| {' | '.join([_md(name), *(_lines(cell, '<br>', _md) for cell in cells)])} |")
    return "\n".join(lines)


def _latex(caption: str, columns: Sequence[str], body: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    lines = ["\\begin{table}", "\\centering", "\\resizebox{\\linewidth}{!}{%"]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(columns)}}}", "\\toprule"]
    lines += [" & ".join(map(_tex, ["setting", *columns])) + " \\\\", "\\midrule"]
    for name, cells in body:
        lines.append(" & ".join([_tex(name), *(_stack(cell) for cell in cells)]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}}", f"\\caption{{{_tex(caption)}}}", "\\end{table}"]
    return "\n".join(lines)


FIELDS: tuple[str, ...] = (
    *("model", "data", "learns", "setting", "family", "criterion", "suite", "metric", "task"),
    *("n", "seeds", "planned_seeds", "value", "low", "high", "change", "change_low", "change_high"),
)


def as_csv(tables: Sequence[Table], shares: Found | None = None) -> str:
    """Return one line for each number, unrounded; shares from 0 to 1.

    A share of what the undefended setting did has its measure's name with ``_undone`` or ``_kept`` behind it.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        place = {"model": table.model, "data": table.data, "learns": table.learns}
        for entry in table.untouched:
            writer.writerow({**place, "setting": "untouched", **_numbers(entry, False)})
        for group in table.groups:
            about = {**place, "setting": group.variant.name, "family": group.variant.family}
            about["planned_seeds"] = str(group.planned)
            for entry in group.entries:
                writer.writerow({**about, **_numbers(entry, True)})
            for metric, value in (("seconds", group.seconds), ("time_ratio", group.cost)):
                if value is not None:
                    known = value if isinstance(value, Estimate) else Estimate(value)
                    line = {"criterion": "cost", "suite": "train", "metric": metric, "seeds": len(group.runs)}
                    writer.writerow({**about, **line, **_ends("", known)})
    for model, found in (shares or {}).items():
        for each in found:
            for share in (s for s in each.shares if s.ratio.value is not None and s.ratio.usable):
                assert share.ratio.value is not None
                metric = f"{share.column.metric}_{'undone' if share.undone else 'kept'}"
                about = {"model": model, "data": share.data, "setting": each.setting, "task": share.task}
                about |= {"criterion": share.column.criterion, "suite": share.column.suite, "metric": metric}
                writer.writerow({**about, **_ends("", share.ratio.value)})
    return stream.getvalue()


def as_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return the same numbers as JSON values."""
    return [dict(row) for row in csv.DictReader(io.StringIO(as_csv(tables)))]


def _numbers(entry: Entry, changed: bool) -> dict[str, Any]:
    column = entry.column
    about = {"criterion": column.criterion, "suite": column.suite, "metric": column.metric, "task": entry.task}
    change = _ends("change_", entry.change) if changed else {}
    return {**about, "n": entry.n, "seeds": entry.seeds, **_ends("", entry.value), **change}


def _ends(prefix: str, estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval or ("", "")
    return {prefix.rstrip("_") or "value": estimate.value, f"{prefix}low": low, f"{prefix}high": high}


def _title(column: Column, task: str) -> str:
    return f"{column.title}, {task}" if task else column.title


def _name(group: Group) -> str:
    missing = "" if len(group.runs) == group.planned else f" ({len(group.runs)} of {group.planned} seeds)"
    return f"{group.variant.name}{missing}"


def _cell(entry: Entry | None, changed: bool) -> Cell:
    if entry is None:
        return Cell(numbers.NONE)
    share = entry.column.share
    value = (numbers.share if share else numbers.nats)(entry.value.value)
    interval = (numbers.share_span if share else numbers.span)(entry.value.interval)
    if not changed:
        return Cell(value, interval)
    change = (numbers.signed_share if share else numbers.signed)(entry.change.value)
    return Cell(
        value, interval, change, (numbers.signed_share_span if share else numbers.signed_span)(entry.change.interval)
    )


def _cost(group: Group) -> Cell:
    if group.cost is not None:
        ends = group.cost.interval
        span = "" if ends is None else f"[{numbers.ratio(ends[0])}, {numbers.ratio(ends[1])}]"
        return Cell(numbers.ratio(group.cost.value), span)
    return Cell(numbers.NONE if group.seconds is None else f"{group.seconds:.0f} s")


def _share(ratio: Ratio) -> Cell:
    if ratio.value is None or not ratio.usable:
        return Cell(numbers.NONE)
    return Cell(numbers.share(ratio.value.value), numbers.share_span(ratio.value.interval))


def _times(estimate: Estimate | None) -> Cell:
    return Cell(numbers.NONE) if estimate is None else Cell(numbers.ratio(estimate.value))


def _lines(cell: Cell, between: str, escape: Callable[[str], str]) -> str:
    whole = [f"{cell.value} {cell.interval}".strip(), f"{cell.change} {cell.change_interval}".strip()]
    return between.join(escape(line) for line in whole if line)


def _stack(cell: Cell) -> str:
    lines = _lines(cell, "\n", _tex).split("\n")
    if len(lines) == 1:
        return lines[0]
    return "\\begin{tabular}[t]{@{}r@{}}" + " \\\\ ".join(lines) + "\\end{tabular}"


def _md(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "×": r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)
