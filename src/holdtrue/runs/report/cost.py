"""What training took, and how that compares with the undefended run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from holdtrue.runs.directory import Run


@dataclass(frozen=True)
class Cost:
    """What training took.

    Attributes:
        seconds: of optimizer steps, whatever else the machine was doing.
        tokens: that went through the model, rows that a defense mixed in among them.
        tokens_per_second: of these.
        peak_memory_bytes: on a GPU, allocated; on a CPU, the process's since it started.
        cpu_seconds: of the processor, all threads together, that the same steps took; ``None`` for a run on a GPU.
        ratios: each of these over the undefended run's, where that was trained from the same model on the same
            rows; else empty.
    """

    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    ratios: dict[str, float]
    cpu_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, under the attributes' names."""
        return asdict(self)


NAMES = ("seconds", "tokens", "tokens_per_second", "peak_memory_bytes")


def cost_of(run: Run, undefended: Run | None) -> Cost | None:
    """Return what a run's training took, or ``None`` before it is done."""
    own = _report(run)
    if own is None:
        return None
    base = None if undefended is None or not _same_rows(run, undefended) else _report(undefended)
    ratios = {} if base is None else {name: own[name] / base[name] for name in own if own[name] and base.get(name)}
    return Cost(**own, ratios=ratios)


def _report(run: Run) -> dict[str, Any] | None:
    report: dict[str, Any] = (run.marker("train") or {}).get("report", {})
    if any(report.get(name) is None for name in NAMES):
        return None
    more = {"cpu_seconds": report["cpu_seconds"]} if "cpu_seconds" in report else {}
    return {name: report[name] for name in NAMES} | more


def _same_rows(run: Run, other: Run) -> bool:
    if run.path == other.path:
        return False
    seen = [(r.manifest["model"]["revision"], r.manifest["data"]["train"]["sha256"]) for r in (run, other)]
    return seen[0] == seen[1]
