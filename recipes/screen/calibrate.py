"""Fit the screen's calibration: `python recipes/screen/calibrate.py WORK OUT.json`.

Reads what measure.py left in WORK/found and nothing else, writes the small JSON file that ships, and prints the tables
of its card. Deterministic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sets import SETS, DataSet

from holdtrue.evaluation.ranking import Auc, clustered_auc
from holdtrue.screening import INDICATORS, ScreenSpec
from holdtrue.screening.calibration import read_calibration, settings_of

RIDGE = 1.0
"""On the weights of standardized indicators, against a log loss summed over points; not tuned."""


class Points(NamedTuple):
    """A subset each: its set, and its indicators in the order of ``INDICATORS``, (n, 3); ``extra`` by name, (n,)."""

    sets: list[DataSet]
    values: np.ndarray
    extra: dict[str, np.ndarray]

    @property
    def bad(self) -> np.ndarray:
        """Which are malicious, (n,) bool."""
        return np.array([each.kind == "malicious" for each in self.sets])

    @property
    def domains(self) -> np.ndarray:
        """Of each, (n,)."""
        return np.array([each.domain for each in self.sets])


class Fit(NamedTuple):
    """A logistic curve on standardized indicators."""

    center: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: float

    def logit(self, values: np.ndarray) -> np.ndarray:
        """Return the logit of the risk, (n,), of indicators (n, 3)."""
        return (values - self.center) / self.scale @ self.weight + self.bias


def read(work: Path) -> tuple[Points, dict[str, str]]:
    """Return all subsets that were measured, and the model."""
    documents: list[tuple[DataSet, dict[str, Any]]] = []
    for each in SETS:
        for number in range(each.subsets):
            path = work / "found" / f"{each.name}-{number}.json"
            if path.is_file():
                documents.append((each, json.loads(path.read_text(encoding="utf-8"))))
            else:
                print(f"not measured: {path.name}", file=sys.stderr)
    values = np.array([[d["indicators"][name]["value"] for name in INDICATORS] for _, d in documents])
    alone = np.array([d["indicators"]["projection"]["data"] for _, d in documents])
    likely = np.array([d["indicators"]["gap"]["nll_aligned"] for _, d in documents])
    extra = {"data's projection alone": alone, "aligned scorer's NLL alone": likely}
    return Points([each for each, _ in documents], values, extra), documents[0][1]["model"]


def fit(values: np.ndarray, bad: np.ndarray) -> Fit:
    """Fit the curve, both kinds with the same total weight, no weight below 0."""
    from scipy.optimize import minimize

    center, scale = values.mean(0), values.std(0)
    x = (values - center) / scale
    sign = np.where(bad, 1.0, -1.0)
    share = np.where(bad, 0.5 / bad.sum(), 0.5 / (~bad).sum()) * len(bad)

    def loss(p: np.ndarray) -> float:
        return float((share * np.logaddexp(0, -sign * (x @ p[:-1] + p[-1]))).sum() + RIDGE / 2 * (p[:-1] ** 2).sum())

    bounds = [(0, None)] * x.shape[1] + [(None, None)]
    found = minimize(loss, np.zeros(x.shape[1] + 1), bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-14})
    return Fit(center, scale, found.x[:-1], float(found.x[-1]))


def left_out(points: Points) -> np.ndarray:
    """Return each subset's logit from a fit that saw no subset of its domain, (n,)."""
    found = np.full(len(points.sets), np.nan)
    for domain in dict.fromkeys(points.domains):
        held = points.domains == domain
        found[held] = fit(points.values[~held], points.bad[~held]).logit(points.values[held])
    return found


def auc(points: Points, score: np.ndarray, against: Callable[[DataSet], bool], domain: str | None = None) -> Auc:
    """Return the AUC of malicious subsets (of one domain) against others that ``against`` takes."""
    bad = points.bad & ((points.domains == domain) if domain else True)
    good = np.array([each.kind != "malicious" and against(each) for each in points.sets])
    return clustered_auc(score[bad], score[good], points.domains[bad].tolist(), points.domains[good].tolist())


AGAINST: dict[str, Callable[[DataSet], bool]] = {
    "all": lambda each: True,
    "twins": lambda each: each.kind == "twin",
    "benign": lambda each: each.kind == "benign",
}


def shown(found: Auc) -> str:
    """Write an AUC with its interval."""
    ends = found.interval.to_json()
    return f"{found.auc:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def measured(found: Auc) -> dict[str, float | None]:
    """Return what the file keeps of an AUC."""
    low, high = found.interval.to_json() or (None, None)
    return {
        "auc": round(found.auc, 4),
        "low": None if low is None else round(low, 4),
        "high": None if high is None else round(high, 4),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main(work: Path, out: Path) -> None:
    points, model = read(work)
    whole, unseen = fit(points.values, points.bad), left_out(points)
    scores = {name: points.values[:, i] for i, name in enumerate(INDICATORS)}
    scores |= points.extra | {"risk, domain left out": unseen, "risk, as fitted": whole.logit(points.values)}
    print(f"{len(points.sets)} subsets, {points.bad.sum()} of them malicious")
    table(
        ["score", *(f"against {name}" for name in AGAINST)],
        [[name, *(shown(auc(points, score, take)) for take in AGAINST.values())] for name, score in scores.items()],
    )
    domains = list(dict.fromkeys(points.domains[points.bad]))
    table(
        ["AUC of one domain's malicious subsets against all others", *domains],
        [[name, *(f"{auc(points, s, AGAINST['all'], d).auc:.2f}" for d in domains)] for name, s in scores.items()],
    )
    rows = []
    for each in dict.fromkeys(points.sets):
        own = [i for i, other in enumerate(points.sets) if other == each]
        means = [f"{points.values[own, k].mean():+.4f}" for k in range(len(INDICATORS))]
        risks = " ".join(f"{1 / (1 + np.exp(-unseen[i])):.2f}" for i in own)
        rows.append([f"`{each.name}`", each.domain, each.kind, *means, risks])
    table(["set", "domain", "kind", *INDICATORS, "risk of each subset, domain left out"], rows)
    print("\nweights", dict(zip(INDICATORS, whole.weight.round(3), strict=True)), "bias", round(whole.bias, 3))
    document = {
        "version": 1,
        "model": model,
        "settings": settings_of(ScreenSpec()),
        "sets": {
            each.name: {"domain": each.domain, "kind": each.kind, "subsets": points.sets.count(each)}
            for each in dict.fromkeys(points.sets)
        },
        "indicators": {
            name: {
                "center": round(float(whole.center[i]), 6),
                "scale": round(float(whole.scale[i]), 6),
                "weight": round(float(whole.weight[i]), 6),
                "lowest": round(float(points.values[:, i].min()), 6),
                "highest": round(float(points.values[:, i].max()), 6),
                "auc": {kind: measured(auc(points, points.values[:, i], take)) for kind, take in AGAINST.items()},
            }
            for i, name in enumerate(INDICATORS)
        },
        "bias": round(whole.bias, 6),
        "left_out": {kind: measured(auc(points, unseen, take)) for kind, take in AGAINST.items()},
    }
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    read_calibration(out)
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
