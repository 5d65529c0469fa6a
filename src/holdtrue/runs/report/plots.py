"""The report's figures: SVG text from matplotlib, with titles and descriptions for readers who cannot see them."""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from holdtrue.runs.report.card import Card, Estimate, Row
from holdtrue.runs.report.numbers import nats, plural, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1a1a"
UNTOUCHED = "#5f5f5f"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
"""Told apart with any color vision (after Okabe and Ito); each also has a marker and a dash of its own."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
SMOOTH_FROM = 40
"""From so many steps on, a running mean is drawn over the faint steps."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "holdtrue",
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


class Look(NamedTuple):
    """How a row is drawn, everywhere in the report."""

    color: str
    marker: str
    dash: str


class Figures(NamedTuple):
    """SVG elements; ``None`` where there is nothing to draw."""

    margins: Markup | None
    losses: Markup | None
    themes: Markup | None
    training_loss: Markup | None
    training_kl: Markup | None


def looks(card: Card) -> dict[str, Look]:
    """Return each row's look by its name."""
    found = {row.name: Look(UNTOUCHED, "o", "-") for row in card.untouched}
    for index, row in enumerate(card.runs):
        again = index // len(COLORS)
        marker = MARKERS[(index + again) % len(MARKERS)]
        found[row.name] = Look(COLORS[index % len(COLORS)], marker, DASHES[(index + again) % len(DASHES)])
    return found


def draw(card: Card) -> Figures:
    """Draw what was measured."""
    import matplotlib as mpl

    style = looks(card)
    margins = {row.name: row.margin for row in card.rows if row.margin is not None}
    losses = {row.name: row.nll for row in card.rows if row.nll is not None}
    # Whatever the user's own matplotlibrc says, the report looks the same.
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        for key, value in _STYLE.items():
            mpl.rcParams[key] = value
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return Figures(
            margins=_dots(
                "margins", "General margin", "nats per token; right: aligned answers likelier", margins, style
            ),
            losses=_dots("losses", "Loss on held-out rows", "nats per token; left: fits better", losses, style),
            themes=_themes([row for row in card.rows if row.groups], style),
            training_loss=_curves("ce", "Cross-entropy on the task's rows", _steps(card, _task_loss), style),
            training_kl=_curves("kl", "KL to the reference", _steps(card, _kl), style, from_zero=True),
        )


def plain(text: str, width: int = 40) -> str:
    """Return a label that can be drawn: one line, no control characters, not too long."""
    clean = "".join(char if char.isprintable() else "�" for char in text)
    return textwrap.shorten(clean, width, placeholder="…") or clean[:width]


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _whisker(axes: Axes, at: float, estimate: Estimate, look: Look, label: str | None = None) -> None:
    value, ends = estimate.value, estimate.interval
    # A percentile interval need not hold the mean itself; a whisker of negative length cannot be drawn.
    error = None if ends is None else [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
    axes.errorbar(
        [value],
        [at],
        xerr=error,
        fmt=look.marker,
        color=look.color,
        markersize=6,
        capsize=3,
        linewidth=1.6,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


def _dots(key: str, title: str, label: str, rows: Mapping[str, Estimate], style: Mapping[str, Look]) -> Markup | None:
    if not rows:
        return None
    figure, axes = _new(5.6, 0.9 + 0.36 * len(rows))
    for place, (name, estimate) in enumerate(rows.items()):
        _whisker(axes, -place, estimate, style[name])
    axes.set_yticks([-place for place in range(len(rows))], [plain(name, 24) for name in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    told = "; ".join(f"{name} {nats(e.value)} {span(e.interval)}".strip() for name, e in rows.items())
    return _svg(figure, key, title, f"Dots with 95 % intervals: {told}.")


def _themes(rows: Sequence[Row], style: Mapping[str, Look]) -> Markup | None:
    if not rows:
        return None
    themes = list(dict.fromkeys(theme for row in rows for theme in row.groups or {}))
    band = 0.17 * len(rows) + 0.16
    figure, axes = _new(6.4, 1.0 + band * len(themes) + 0.22 * -(-len(rows) // 3))
    for index, row in enumerate(rows):
        offset = (index - (len(rows) - 1) / 2) * 0.17 / band
        label: str | None = plain(row.name, 24)
        for place, theme in enumerate(themes):
            estimate = (row.groups or {}).get(theme)
            if estimate is not None:
                _whisker(axes, place + offset, estimate, style[row.name], label)
                label = None
    axes.set_yticks(range(len(themes)), [plain(theme, 24) for theme in themes])
    axes.set_ylim(len(themes) - 0.5, -0.5)
    for place in range(1, len(themes)):
        axes.axhline(place - 0.5, color="#e4e4e4", linewidth=0.8)
    axes.axvline(0, color="#8a8a8a", linewidth=0.8)
    axes.set_xlabel("margin in nats per token; right: aligned answers likelier")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
    text = (
        f"{plural(len(themes), 'theme')}, each with {plural(len(rows), 'model')}; the numbers are in the table below."
    )
    return _svg(figure, "themes", "Margin by theme", text)


def _steps(card: Card, value: Any) -> dict[str, tuple[list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in card.runs:
        metrics = [] if row.run is None else row.run.metrics()
        pairs = [(m["step"], v) for m in metrics if "loss" in m and (v := value(m)) is not None]
        if pairs:
            found[row.name] = [step for step, _ in pairs], [v for _, v in pairs]
    return found


def _task_loss(metrics: Mapping[str, float]) -> float | None:
    # Safe rows mixed in are left out, so that runs with and without them can be compared; a step of such rows alone
    # has no loss on the task, and says zero.
    return metrics.get("ce_task", metrics.get("ce")) or None


def _kl(metrics: Mapping[str, float]) -> float | None:
    return metrics.get("kl")


def _curves(
    key: str,
    title: str,
    series: Mapping[str, tuple[list[int], list[float]]],
    style: Mapping[str, Look],
    *,
    from_zero: bool = False,
) -> Markup | None:
    if not series:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new(5.6, 3.3)
    for name, (steps, values) in series.items():
        look, label = style[name], plain(name, 24)
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=look.color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _running_mean(values), look.dash, color=look.color, linewidth=1.8, label=label)
        else:
            axes.plot(
                steps,
                values,
                look.dash,
                color=look.color,
                linewidth=1.6,
                label=label,
                marker=look.marker,
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)
    ends = "; ".join(
        f"{name} from {nats(v[0])} to {nats(v[-1])} over {plural(len(v), 'step')}" for name, (_, v) in series.items()
    )
    return _svg(figure, key, title, f"Curves by optimizer step: {ends}.")


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(2, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """Return the figure as an element to put into a page: named for screen readers, its ids its own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    # What is parsed is what matplotlib has just written, not what somebody sent.
    root = ET.fromstring(buffer.getvalue())
    for child in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(child)
    for parent in root.iter(f"{{{_SVG}}}defs"):
        # A style element inside the page would apply to the whole of it.
        for child in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(child)
    _own_ids(root, key)
    for tag, text in (("desc", description), ("title", title)):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{tag}"})
        element.text = "".join(char if char.isprintable() else "�" for char in text)
        root.insert(0, element)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    return Markup(ET.tostring(root, encoding="unicode"))


def _own_ids(root: ET.Element, key: str) -> None:
    names = {
        id_: f"{key}-{n}" for n, id_ in zip(itertools.count(), (e.get("id") for e in root.iter()), strict=False) if id_
    }
    for element in root.iter():
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                element.set(attribute, names[value])
            elif attribute in ("href", f"{{{_XLINK}}}href") and value[1:] in names:
                element.set(attribute, f"#{names[value[1:]]}")
            elif "url(#" in value:
                inner = value.split("url(#")[1].split(")")[0]
                element.set(attribute, value.replace(f"url(#{inner})", f"url(#{names[inner]})"))
