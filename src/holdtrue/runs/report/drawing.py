"""How the report draws: colors, marks, and SVG text that may stand in a page."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from holdtrue.runs.report.card import Card
from holdtrue.runs.report.measures import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1a1a"
GRAY = "#8a8a8a"
PALE = "#e4e4e4"
UNTOUCHED = "#5f5f5f"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
"""Told apart with any color vision (after Okabe and Ito); each also has a marker and a dash of its own."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")

LEGEND_WIDTH = 66
"""Letters of a legend's line."""
REM_PER_INCH = 6.9
"""How wide an inch of a figure is shown at most."""

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
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "legend.frameon": False,
}


class Look(NamedTuple):
    """How a row is drawn, everywhere in the report."""

    color: str
    marker: str
    dash: str


def looks(card: Card) -> dict[str, Look]:
    """Return each row's look by its name."""
    found = {row.name: Look(UNTOUCHED, "o", "-") for row in card.untouched}
    for index, row in enumerate(card.runs):
        again = index // len(COLORS)
        marker = MARKERS[(index + again) % len(MARKERS)]
        found[row.name] = Look(COLORS[index % len(COLORS)], marker, DASHES[(index + again) % len(DASHES)])
    return found


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Draw in the report's style, whatever the user's own matplotlibrc says."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        for key, value in _STYLE.items():
            mpl.rcParams[key] = value
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def plain(text: str, width: int = 40) -> str:
    """Return a label that can be drawn: one line, no control characters, not too long."""
    clean = " ".join("".join(char if char.isprintable() else "�" for char in text).split())
    return clean if len(clean) <= width else f"{clean[: width - 1]}…"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def whisker(
    axes: Axes, x: Estimate | float, y: Estimate | float, look: Look, label: str | None = None, size: float = 6
) -> None:
    """Draw a mark with an error bar along each coordinate that is an estimate with an interval."""
    axes.errorbar(
        [_value(x)],
        [_value(y)],
        xerr=_error(x),
        yerr=_error(y),
        fmt=look.marker,
        color=look.color,
        markersize=size,
        capsize=3,
        linewidth=1.6,
        label=label,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


def legend(figure: Figure) -> None:
    """Put the legend above the axes."""
    _, labels = figure.axes[0].get_legend_handles_labels()
    columns = next((n for n in (6, 5, 4, 3) if max(map(len, labels)) * n <= LEGEND_WIDTH), 2)
    figure.legend(loc="outside upper left", ncols=min(columns, len(labels)), handletextpad=0.3, columnspacing=1.2)


def dots(
    key: str, title: str, label: str, rows: Mapping[str, Estimate], style: Mapping[str, Look], told: Sequence[str]
) -> Markup | None:
    """Draw one value a model, one below the other; ``told`` says the values to readers who cannot see."""
    if not rows:
        return None
    figure, axes = new_figure(5.6, 0.9 + 0.36 * len(rows))
    for place, (name, estimate) in enumerate(rows.items()):
        whisker(axes, estimate, -place, style[name])
    axes.set_yticks([-place for place in range(len(rows))], [plain(name, 24) for name in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return svg(figure, key, title, f"Dots with 95 % intervals: {'; '.join(told)}.")


def bands(
    key: str,
    title: str,
    label: str,
    rows: Mapping[str, Mapping[str, Estimate]],
    style: Mapping[str, Look],
    *,
    shares: bool = False,
    description: str,
) -> Markup | None:
    """Draw a band for each group (theme, question, trigger) with a value of each model in it.

    Args:
        key, title, description: of the figure.
        label: of the axis.
        rows: model -> group -> value.
        style: by model.
        shares: whether values are shares, to be shown in percent from zero.
    """
    groups = list(dict.fromkeys(group for values in rows.values() for group in values))
    if not groups:
        return None
    band = 0.17 * len(rows) + 0.16
    figure, axes = new_figure(6.4, 1.2 + band * len(groups))
    for index, (name, values) in enumerate(rows.items()):
        offset = (index - (len(rows) - 1) / 2) * 0.17 / band
        told: str | None = plain(name, 24)
        for place, group in enumerate(groups):
            if group in values:
                whisker(axes, values[group], place + offset, style[name], told)
                told = None
    axes.set_yticks(range(len(groups)), [plain(group, 28) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    for place in range(1, len(groups)):
        axes.axhline(place - 0.5, color=PALE, linewidth=0.8)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    if shares:
        in_percent(axes.xaxis)
        axes.set_xlim(left=-0.01 * axes.get_xlim()[1])
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    legend(figure)
    return svg(figure, key, title, description)


def in_percent(axis: Any) -> None:
    """Write an axis's ticks in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %".replace("-", "−")))


def svg(figure: Figure, key: str, title: str, description: str) -> Markup:
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
    root.set("style", f"max-width: {figure.get_figwidth() * REM_PER_INCH:.1f}rem")
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    return Markup(ET.tostring(root, encoding="unicode"))


def _value(at: Estimate | float) -> float:
    return at.value if isinstance(at, Estimate) else at


def _error(at: Estimate | float) -> list[list[float]] | None:
    if not isinstance(at, Estimate) or at.interval is None:
        return None
    # An interval need not hold the mean itself; a whisker of negative length cannot be drawn.
    return [[max(0.0, at.value - at.interval[0])], [max(0.0, at.interval[1] - at.value)]]


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
