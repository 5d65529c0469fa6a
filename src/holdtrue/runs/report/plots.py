"""The report's figures, from the scorecard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from holdtrue.runs.report.card import Card
from holdtrue.runs.report.drawing import Look, bands, dots, legend, looks, new_figure, own_style, plain, svg
from holdtrue.runs.report.judged_plots import answer_clouds, question_rates, trade_off, trigger_rates
from holdtrue.runs.report.measures import Estimate, Score
from holdtrue.runs.report.numbers import nats, plural, span

SMOOTH_FROM = 40
"""From so many steps on, a running mean is drawn over the faint steps."""


class Figures(NamedTuple):
    """SVG elements; ``None`` where there is nothing to draw."""

    trade_off: Markup | None
    questions: Markup | None
    clouds: Markup | None
    triggers: Markup | None
    margins: Markup | None
    losses: Markup | None
    themes: Markup | None
    training_loss: Markup | None
    training_kl: Markup | None
    drift: Markup | None
    multiplier: Markup | None


def draw(card: Card) -> Figures:
    """Draw what was measured."""
    style = looks(card)
    margins = _values({row.name: row.margin for row in card.rows})
    losses = _values({row.name: row.nll for row in card.rows})
    with own_style():
        return Figures(
            trade_off=trade_off(card, style),
            questions=question_rates(card, style),
            clouds=answer_clouds(card, style),
            triggers=trigger_rates(card, style),
            margins=dots(
                "margins",
                "General margin",
                "nats per token; right: aligned answers likelier",
                margins,
                style,
                _told(margins),
            ),
            losses=dots(
                "losses",
                "Loss on held-out rows",
                "nats per token; left: fits better",
                losses,
                style,
                _told(losses),
            ),
            themes=_themes(card, style),
            training_loss=_curves("ce", "Cross-entropy on the task's rows", _steps(card, _task_loss), style),
            training_kl=_curves("kl", "KL to the reference", _steps(card, _kl), style, from_zero=True),
            drift=_curves(
                "drift",
                "Drift of the probe's margin",
                _steps(card, _named("adaptive_drift")),
                style,
                from_zero=True,
                levels=_steps(card, _named("adaptive_max_drift")),
            ),
            multiplier=_curves(
                "multiplier",
                "Factor on the weights of the loss defenses",
                _steps(card, _named("adaptive_multiplier")),
                style,
                label="factor",
                logarithmic=True,
            ),
        )


def _values(scores: Mapping[str, Score | None]) -> dict[str, Estimate]:
    return {name: score.value for name, score in scores.items() if score is not None and score.value is not None}


def _told(rows: Mapping[str, Estimate]) -> list[str]:
    return [f"{name} {nats(each.value)} {span(each.interval)}".strip() for name, each in rows.items()]


def _themes(card: Card, style: Mapping[str, Look]) -> Markup | None:
    rows = {row.name: row.groups for row in card.rows if row.groups}
    themes = {theme for groups in rows.values() for theme in groups}
    text = (
        f"{plural(len(themes), 'theme')}, each with {plural(len(rows), 'model')}; the numbers are in the table below."
    )
    label = "margin in nats per token; right: aligned answers likelier"
    return bands("themes", "Margin by theme", label, rows, style, description=text)


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


def _named(key: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda metrics: metrics.get(key)


def _curves(
    key: str,
    title: str,
    series: Mapping[str, tuple[list[int], list[float]]],
    style: Mapping[str, Look],
    *,
    from_zero: bool = False,
    label: str = "nats per token",
    logarithmic: bool = False,
    levels: Mapping[str, tuple[list[int], list[float]]] | None = None,
) -> Markup | None:
    """Draw a curve for each model; ``levels`` are what each is held to, thin lines over the whole width."""
    if not series:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(5.6, 3.3)
    for name, (steps, values) in series.items():
        look, told = style[name], plain(name, 24)
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=look.color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _running_mean(values), look.dash, color=look.color, linewidth=1.8, label=told)
        else:
            axes.plot(
                steps,
                values,
                look.dash,
                color=look.color,
                linewidth=1.6,
                label=told,
                marker=look.marker,
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    for name, (_, values) in (levels or {}).items():
        axes.axhline(values[-1], color=style[name].color, linewidth=1, linestyle=(0, (1, 2)))
    if logarithmic and all(value > 0 for _, values in series.values() for value in values):
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(bottom=min(0.0, *(value for _, values in series.values() for value in values)))
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    legend(figure)
    ends = "; ".join(
        f"{name} from {nats(v[0])} to {nats(v[-1])} over {plural(len(v), 'step')}" for name, (_, v) in series.items()
    )
    return svg(figure, key, title, f"Curves by optimizer step: {ends}.")


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(2, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
