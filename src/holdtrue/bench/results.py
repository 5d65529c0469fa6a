"""Writes what a grid found: tables, figures, the pick, a report for each run and an index page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from holdtrue.bench import tables as printed
from holdtrue.bench.grid import Bench, State
from holdtrue.bench.pick import Pick, pick
from holdtrue.bench.plots import draw
from holdtrue.bench.shares import Shares, shares
from holdtrue.bench.summary import Table, summarize
from holdtrue.runs import Run, files
from holdtrue.runs.report import render_report

TEMPLATE = "index.html.j2"


@dataclass(frozen=True)
class Results:
    """What a grid found, and where the index page is."""

    tables: tuple[Table, ...]
    picks: tuple[Pick, ...]
    page: Path
    shares: dict[str, list[Shares]]


def write_results(bench: Bench, *, reports: bool = True) -> Results:
    """Write ``tables/``, ``index.html`` and, for each finished run, ``reports/``; what is there is written again.

    Args:
        bench: a grid with its cells' states; only finished ones are read.
        reports: whether to write a report for each run, beside the undefended one of its seed.

    Raises:
        RunError: a file of a run is damaged, or the disk is full.
    """
    folder = bench.out / "tables"
    found = tuple(summarize(bench))
    picks = tuple(pick(bench.grid, found))
    figures = draw(bench.grid, found)
    parts = shares(bench.grid, found)
    with files.disk_errors(bench.out):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.svg"):
            stale.unlink()
        files.write_text(folder / "results.md", printed.markdown(found, parts))
        files.write_text(folder / "results.tex", printed.latex(found, parts))
        files.write_text(folder / "results.csv", printed.as_csv(found, parts))
        files.write_json(folder / "pick.json", [each.to_json() for each in picks])
        for name, figure in figures.items():
            files.write_text(folder / f"{name}.svg", str(figure))
        links = _reports(bench) if reports else {}
        page = bench.out / "index.html"
        files.write_text(page, _page(bench, found, picks, figures, links, parts))
    return Results(found, picks, page, parts)


def _reports(bench: Bench) -> dict[str, str]:
    """Write a report for each run that has none yet, and return each cell's link by its key."""
    place = {(s.cell.model, s.cell.data, s.cell.seed): s for s in bench.done() if _is_base(bench, s)}
    links: dict[str, str] = {}
    (bench.out / "reports").mkdir(exist_ok=True)
    for state in bench.done():
        base = place.get((state.cell.model, state.cell.data, state.cell.seed))
        beside = base is not None and base.cell.key != state.cell.key
        against = f"-against-{base.cell.key[:6]}" if base is not None and beside else ""
        path = bench.out / "reports" / f"{state.folder.name}{against}.html"
        if not path.exists() or not state.before:
            runs = [Run(base.folder), Run(state.folder)] if base is not None and beside else [Run(state.folder)]
            render_report(runs, path, title=state.cell.title)
        links[state.cell.key] = f"reports/{path.name}"
    return links


def _is_base(bench: Bench, state: State) -> bool:
    return state.cell.variant.name == bench.grid.baseline


def _page(
    bench: Bench,
    found: Any,
    picks: Any,
    figures: dict[str, Markup],
    links: dict[str, str],
    parts: dict[str, list[Shares]],
) -> str:
    from holdtrue.runs.report.page import templates

    return (
        templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            title=bench.out.name,
            counts=bench.counts,
            cells=len(bench.states),
            tables=[(table, printed.headings(table), printed.rows(table)) for table in found],
            note=printed.NOTE,
            shares=[
                (model, printed.share_headings(each[0]), printed.share_rows(each)) for model, each in parts.items()
            ],
            share_note=printed.SHARE_NOTE,
            picks=[each.text() for each in picks],
            figures=figures,
            states=bench.states,
            links=links,
        )
    )
