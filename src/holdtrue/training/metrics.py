"""The metrics of an optimizer step, from sums and counts over its window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdtrue.defenses import LossDefense
from holdtrue.defenses.base import Needs


def step_means(
    sums: Mapping[str, float],
    counts: Mapping[str, float],
    losses: Sequence[tuple[LossDefense, Needs]],
    weights: Mapping[str, float],
    seconds: float,
) -> dict[str, float]:
    """Return a step's metrics.

    Args:
        sums: of the whole window over all ranks, by the objective's names.
        counts: what each term covers in it, by the names of ``COUNTS``, ``defense/<name>`` and ``features/<name>``.
        losses: the run's loss defenses, each with its needs.
        weights: their weights in this step, by name.
        seconds: that the window took.
    """
    c = counts
    metrics = {"ce": mean(sums["ce"], c["trained"]), "accuracy": mean(sums["right"], c["trained"])}
    if c["trained"] != c["trained_task"]:
        if c["trained_task"]:
            metrics["ce_task"] = mean(sums["ce_task"], c["trained_task"])
        metrics["ce_safe"] = mean(sums["ce"] - sums["ce_task"], c["trained"] - c["trained_task"])
    if sums.get("kl_count"):
        metrics["kl"] = mean(sums["kl"], sums["kl_count"])
    for defense, needs in losses:
        raw = 0.0
        if needs.tokens is not None:
            raw += mean(sums[f"defense/{defense.name}"], c[f"defense/{defense.name}"] * needs.sample)
        if needs.features:
            raw += mean(sums[f"features/{defense.name}"], c[f"features/{defense.name}"])
        metrics[f"{defense.name}_term"] = raw
        metrics[f"{defense.name}_weighted"] = weights[defense.name] * raw
    return metrics | {
        "tokens": c["tokens"],
        "target_tokens": c["trained"],
        "padding": 1 - c["tokens"] / c["slots"],
        "seconds": seconds,
        "tokens_per_second": c["tokens"] / seconds,
    }


def mean(total: float, count: float) -> float:
    """Return ``total / count``, and 0 where nothing was counted."""
    return total / count if count else 0.0
