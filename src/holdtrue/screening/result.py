"""What a screening found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdtrue.evaluation.statistics import Interval
from holdtrue.screening.calibration import Auc, Risk
from holdtrue.screening.spec import ScreenSpec


@dataclass(frozen=True)
class Indicator:
    """One indicator; the larger, the worse.

    Attributes:
        name: ``projection``, ``gap`` or ``drift``.
        value: see the page on screening for its unit.
        interval: 95 %, over the rows drawn (``projection``, ``gap``) or over the probes' themes (``drift``).
        n: rows (probes) that have a value.
        badge: how near it is to its paper.
        about: what it was measured with.
        auc: how well it told malicious sets from others, where the model and the settings are calibrated.
    """

    name: str
    value: float
    interval: Interval
    n: int
    badge: str
    about: Mapping[str, Any] = field(default_factory=dict)
    auc: Auc | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "value": self.value,
            "interval": self.interval.to_json(),
            "n": self.n,
            "badge": self.badge,
            "auc": None if self.auc is None else self.auc.model_dump(mode="json"),
            **self.about,
        }


@dataclass(frozen=True)
class Suggestion:
    """A defense to begin with, for a spec's ``defenses``, and how sure it is."""

    level: str
    defenses: tuple[Mapping[str, Any], ...]
    why: str
    sure: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "level": self.level,
            "defenses": [dict(each) for each in self.defenses],
            "why": self.why,
            "sure": self.sure,
        }


@dataclass(frozen=True)
class Screening:
    """What was found of a data set.

    Attributes:
        data: ``path``, ``sha256``, ``rows``, and ``sampled``, the rows that were drawn.
        model: ``name`` and ``revision``.
        spec: how it was screened.
        indicators: by name, in the order of ``INDICATORS``.
        risk: where the model and the settings are calibrated, else ``None``, and ``notes`` say why.
        suggestion: where there is a risk.
        exceeded: a line for each limit of the spec that is exceeded.
        notes: what a reader must know.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    spec: ScreenSpec
    indicators: Mapping[str, Indicator]
    risk: Risk | None
    suggestion: Suggestion | None
    exceeded: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def outcome(self) -> str | None:
        """``pass`` or ``stop`` where the spec has a limit, else ``None``."""
        return None if not self.spec.limits() else "stop" if self.exceeded else "pass"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "data": dict(self.data),
            "model": dict(self.model),
            "settings": self.spec.model_dump(mode="json"),
            "indicators": {name: each.to_json() for name, each in self.indicators.items()},
            "risk": None if self.risk is None else self.risk.to_json(),
            "suggestion": None if self.suggestion is None else self.suggestion.to_json(),
            "outcome": self.outcome,
            "exceeded": list(self.exceeded),
            "notes": list(self.notes),
        }


def exceeded(spec: ScreenSpec, indicators: Mapping[str, Indicator], risk: Risk | None) -> tuple[str, ...]:
    """Return a line for each limit that is exceeded."""
    values = {name: each.value for name, each in indicators.items()}
    if risk is not None:
        values["risk"] = risk.value
    # What has no value is beyond its limit: it must not pass for want of a number.
    return tuple(
        f"{name} is {values[name]:.4g}, and max_{name} is {limit:g}" if name in values else f"{name} is not known"
        for name, limit in spec.limits().items()
        if not values.get(name, float("inf")) <= limit
    )
