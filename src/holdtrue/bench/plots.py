"""The grid's figures as SVG: misalignment against what was learned, and what a strength does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from holdtrue.bench.pick import SHIFT, kept, shift_undone
from holdtrue.bench.spec import GridSpec
from holdtrue.bench.summary import Group, Table
from holdtrue.runs.report.drawing import (
    COLORS,
    DASHES,
    GRAY,
    MARKERS,
    Look,
    in_percent,
    legend,
    new_figure,
    own_style,
    plain,
    svg,
    whisker,
)
from holdtrue.runs.report.measures import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[Estimate, Estimate]]
LEGEND_ROW = 0.26
"""Inches that a line of a legend takes; names of settings stand two in a line."""
MOST = 2.0
"""How far the axis of shares reaches: the interval of a share of little is wide, and would hide all others."""


def draw(grid: GridSpec, tables: Sequence[Table]) -> dict[str, Markup]:
    """Return the figures by the names of their files, without the ending; those without a point are left out."""
    looks = _looks(grid)
    found: dict[str, Markup | None] = {}
    with own_style():
        for index, model in enumerate(grid.models):
            mine = [table for table in tables if table.model == model.name]
            for narrow in (table for table in mine if table.learns == "narrow"):
                for other in mine:
                    if other is narrow or other.learns == "benign":
                        key = f"pareto-{index}-{_slug(narrow.data)}-{_slug(other.data)}"
                        found[key] = _pareto(key, grid, narrow, other, looks)
                for family, setting in grid.settings.items():
                    if len(setting.strengths) == 1:
                        key = f"strength-{index}-{_slug(narrow.data)}-{_slug(family)}"
                        found[key] = _dose(key, grid, mine, narrow, family)
    return {key: figure for key, figure in found.items() if figure is not None}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points that none beats: none has learned as much with as small a shift, or better.

    Args:
        points: name -> (learned, shift to misalignment).
    """
    best = [
        name
        for name, (x, y) in points.items()
        if not any((a >= x and b <= y) and (a > x or b < y) for a, b in points.values())
    ]
    return sorted(best, key=lambda name: points[name])


def _pareto(key: str, grid: GridSpec, narrow: Table, other: Table, looks: Mapping[str, Look]) -> Markup | None:
    shares = any(c.suite == "benign" for c, _ in other.columns()) and other.learns == "benign"
    points: Points = {}
    for group, beside in zip(narrow.groups, other.groups, strict=True):
        shift, learned = _shift(group, grid.shift()), _learned(beside, shares)
        if shift is not None and learned is not None:
            points[group.variant.name] = (learned, shift)
    if not points:
        return None
    figure, axes = new_figure(6.4, 3.6 + LEGEND_ROW * len(points) / 2)
    axes.axhline(0, color=GRAY, linewidth=0.8)
    for name, (learned, shift) in points.items():
        whisker(axes, learned, shift, looks[name], plain(name, 30), size=8)
    best = front({name: (x.value, y.value) for name, (x, y) in points.items()})
    axes.plot([points[n][0].value for n in best], [points[n][1].value for n in best], color=GRAY, zorder=0, linewidth=1)
    axes.margins(0.12)
    if grid.shift() == "misaligned":
        in_percent(axes.yaxis)
    if shares:
        in_percent(axes.xaxis)
    what = "rise of right answers" if shares else "fall of the held-out NLL, nats per token"
    axes.set_xlabel(f"{plain(other.data)}: {what} (right: learned more)")
    rises = "rise of the misaligned rate" if grid.shift() == "misaligned" else "fall of the margin, nats per token"
    axes.set_ylabel(f"{plain(narrow.data)}: {rises}")
    axes.grid()
    axes.set_axisbelow(True)
    legend(figure)
    title = f"{narrow.model}: misalignment by {narrow.data} against what is learned of {other.data}"
    told = "; ".join(f"{name}: {x.value:.3g}, {y.value:.3g}" for name, (x, y) in points.items())
    return svg(figure, key, title, f"Right and low is best; the line joins the settings that none beats. {told}.")


def _dose(key: str, grid: GridSpec, tables: Sequence[Table], narrow: Table, family: str) -> Markup | None:
    (path,) = grid.settings[family].strengths
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for table in tables:
        if table is not narrow and table.learns != "benign":
            continue
        base = next((group for group in table.groups if group.variant.name == grid.baseline), None)
        for group in (g for g in table.groups if g.variant.family == family and base is not None):
            assert base is not None
            strength = group.variant.strengths[path]
            if not isinstance(strength, int | float) or isinstance(strength, bool):
                return None
            ratios = {f"{table.data} {task}".strip() + " kept": r for task, r in kept(table, group, base).items()}
            if table is narrow:
                ratios["shift undone"] = shift_undone(group, base, grid.shift())
            for name, ratio in ratios.items():
                if ratio.value is not None and ratio.usable:
                    lines.setdefault(name, []).append((strength, ratio.value))
    if not lines:
        return None
    figure, axes = new_figure(6.4, 4.0)
    for index, (name, points) in enumerate(lines.items()):
        look = _look(index)
        axes.plot([x for x, _ in points], [y.value for _, y in points], look.dash, color=look.color, linewidth=1.2)
        for place, (x, y) in enumerate(points):
            whisker(axes, x, y, look, plain(name, 30) if place == 0 else None)
    _dose_axes(axes, grid, [x for points in lines.values() for x, _ in points])
    axes.set_xlabel(plain(path))
    axes.set_ylabel("share of the undefended model's")
    legend(figure)
    told = "; ".join(f"{n}: " + ", ".join(f"{x:g} {y.value:.2f}" for x, y in p) for n, p in lines.items())
    return svg(figure, key, f"{narrow.model}, {narrow.data}: what {path} does", f"By strength, {told}.")


def _dose_axes(axes: Axes, grid: GridSpec, strengths: Sequence[float]) -> None:
    if min(strengths) > 0 and max(strengths) / min(strengths) >= 10:
        axes.set_xscale("log")
        places = sorted(set(strengths))
        axes.set_xticks(places, [f"{place:g}" for place in places])  # the scale's own labels are formulas
        axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -MOST), min(high, MOST))
    in_percent(axes.yaxis)
    limits: Any = {} if grid.bounds is None else {grid.bounds.shift_undone, grid.bounds.narrow_kept}
    for limit in limits:
        if limit is not None:
            axes.axhline(limit, color=GRAY, linewidth=0.8, linestyle=":")
    axes.grid()
    axes.set_axisbelow(True)


def _shift(group: Group, shift: str) -> Estimate | None:
    entry = group.entry(*SHIFT[shift])
    if entry is None:
        return None
    return entry.change if shift == "misaligned" else _minus(entry.change)


def _learned(group: Group, shares: bool) -> Estimate | None:
    if shares:
        return next((entry.change for entry in group.entries if entry.column.suite == "benign"), None)
    entry = group.entry("fit", "nll")
    return None if entry is None else _minus(entry.change)


def _minus(estimate: Estimate) -> Estimate:
    ends = estimate.interval
    return Estimate(-estimate.value, None if ends is None else (-ends[1], -ends[0]))


def _looks(grid: GridSpec) -> dict[str, Look]:
    return {variant.name: _look(index) for index, variant in enumerate(grid.variants())}


def _look(index: int) -> Look:
    again = index // len(COLORS)
    marker = MARKERS[(index + again) % len(MARKERS)]
    return Look(COLORS[index % len(COLORS)], marker, DASHES[(index + again) % len(DASHES)])


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text)
