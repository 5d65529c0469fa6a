"""What is compared with what, the bars, and the arithmetic: nothing here measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """``over`` divided by ``under``; at most ``bar``, ``aim`` being what is hoped for. ``unit`` ``s``: no ratio."""

    over: str
    under: str
    bar: float
    aim: float
    unit: str = ""


TIME: dict[str, Ratio] = {
    "plain_over_trl": Ratio("plain", "trl", 0.95, 0.75),
    "kl_over_plain": Ratio("kl", "plain", 1.45, 1.35),
    "kl_over_trl": Ratio("kl", "trl", 1.38, 1.05),
    "kl_sampled_over_plain": Ratio("kl_sampled", "plain", 1.27, 1.20),
    "kl_cached_over_plain": Ratio("kl_cached", "plain", 1.08, 1.04),
    "ldifs_over_plain": Ratio("ldifs", "plain", 1.50, 1.40),
    "ldifs_cached_over_plain": Ratio("ldifs_cached", "plain", 1.15, 1.08),
    "kl_ldifs_over_plain": Ratio("kl_ldifs", "plain", 1.52, 1.42),
    "steering_over_plain": Ratio("steering", "plain", 1.03, 1.01),
    "kl_over_naive": Ratio("kl", "naive", 0.75, 0.55),
}
OWN_ORDER = ("trl", "naive")
"""Arms that take the rows of a round in an order of their own: in a turn theirs are others, in a round the same."""
MEMORY: dict[str, Ratio] = {
    "kl_memory_over_plain": Ratio("kl", "plain", 1.05, 1.02),
    "memory_vocab_doubled": Ratio("kl-vocab-doubled", "kl-vocab", 1.03, 1.00),
}
MORE_MEMORY: dict[str, Ratio] = {
    "kl_all_memory_over_plain": Ratio("kl-all", "plain", 1.05, 1.02),
    "kl_ldifs_memory_over_plain": Ratio("kl-ldifs", "plain", 1.05, 1.02),
    "naive_kl_memory_over_plain": Ratio("naive-kl", "plain", math.inf, math.inf),
}
SWEEP: dict[str, Ratio] = {"sweep_over_naive": Ratio("sweep", "naive sweep", 0.65, 0.50)}
START: dict[str, Ratio] = {
    "help_seconds": Ratio("help", "", 1.0, 0.3, "s"),
    "import_seconds": Ratio("import", "", 1.0, 0.3, "s"),
}
DEFAULT = {**TIME, **MEMORY, **SWEEP, **START}
KNOWN = {**DEFAULT, **MORE_MEMORY}


class Line(NamedTuple):
    """y = ``scale`` * x ** ``exponent``; ``r2`` is the share of the variance of log y that it explains."""

    exponent: float
    scale: float
    r2: float


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the least, the greatest and the number of some values."""
    if not values:
        raise ValueError("a spread needs at least one value")
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 4) for key, value in found.items()} | {"runs": len(values)}


def within_pairs(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide pair by pair, so that what slows the machine for a while cancels; what only one has is left out."""
    return [a / b for a, b in zip(over, under, strict=False)]


def spreads(ratios: Mapping[str, Ratio], raw: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return the spread of each ratio of which both sides were measured at least once."""
    found = {}
    for key, ratio in ratios.items():
        over = raw.get(ratio.over, ())
        values = list(over) if not ratio.under else within_pairs(over, raw.get(ratio.under, ()))
        if values:
            found[key] = spread(values)
    return found


def timed(
    ratios: Mapping[str, Ratio], steps: Mapping[str, Sequence[float]], rounds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Return the spread of each ratio of times: over turns where both sides take the same rows in each, else rounds.

    Turns are more, and nearer in time, so that their median feels what slows the machine for a while less.
    """
    found = {}
    for key, ratio in ratios.items():
        by_round = ratio.over in OWN_ORDER or ratio.under in OWN_ORDER
        found |= spreads({key: ratio}, rounds if by_round else steps)
    return found


def peaks(key: str, raw: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[int]]:
    """Return by way the bytes that a memory ratio compares; ``raw`` has (bytes of parameters, peak bytes).

    Where two models are compared, each one's own parameters are taken from its peak first.
    """
    own = key == "memory_vocab_doubled"
    return {way: [peak - own * parameters for parameters, peak in values] for way, values in raw.items()}


def without(ratios: Mapping[str, Ratio], missing: Mapping[str, str]) -> dict[str, str]:
    """Return why each of the ratios that need a missing arm is missing."""
    return {key: missing[arm] for key, ratio in ratios.items() for arm in (ratio.under, ratio.over) if arm in missing}


def verdict(ratio: Ratio, median: float) -> str:
    """Return ``aim``, ``bar`` or ``over``: the better of the two that the median meets, or neither."""
    if math.isinf(ratio.bar):
        return ""
    return "aim" if median <= ratio.aim else "bar" if median <= ratio.bar else "over"


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line to (log x, log y) by least squares; ``ValueError`` for fewer than two different x, or one below 0."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError("an exponent needs as many y as x, and two different x")
    if min(*x, *y) <= 0:
        raise ValueError("an exponent needs positive values")
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    slope, intercept = statistics.linear_regression(a, b)
    mean = statistics.fmean(b)
    total = sum((v - mean) ** 2 for v in b)
    left = sum((v - intercept - slope * u) ** 2 for u, v in zip(a, b, strict=True))
    return Line(slope, math.exp(intercept), 1 - left / total if total else 1.0)


def table(found: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> str:
    """Return the ratios as lines of text, with bar and aim, and what could not be measured."""
    lines = [f"{'':30} {'median':>8}  {'min':>8} {'max':>8}   {'bar':>5} {'aim':>5}"]
    for key, value in found.items():
        ratio = KNOWN[key]
        bars = "" if math.isinf(ratio.bar) else f"{ratio.bar:5.2f} {ratio.aim:5.2f}  {verdict(ratio, value['median'])}"
        numbers = f"{value['median']:8.3f}  {value['min']:8.3f} {value['max']:8.3f}   {bars}"
        lines.append(f"{key:30} {numbers} {ratio.unit}".rstrip())
    lines += [f"{key:30} missing: {why}" for key, why in missing.items()]
    return "\n".join(lines)
