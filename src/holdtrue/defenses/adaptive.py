"""Hold the drift of a probe at a set bound, by the weights of the run's other defenses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from holdtrue.data import resolve_data
from holdtrue.defenses.base import Defense, Needs, RunContext, Work, WorkContext
from holdtrue.defenses.dual_ascent import Dual, DualAscent
from holdtrue.defenses.runtime import Runtime, StartContext
from holdtrue.errors import NeedError, OutcomeError
from holdtrue.models.digest import file_digest


class Adaptive(Defense):
    """Say how much drift is allowed, not how strong a defense is: the weights are found while training.

    minimize CE   subject to   drift = margin(reference) − margin(policy) <= max_drift

    Every ``every`` steps the margin is measured on probe pairs: mean log-likelihood per token of aligned answers minus
    that of misaligned ones. The run's loss defenses stand for the constraint in the loss, with weight * m; m follows

    log m <- clip(log m + gain * (e + lead * max(0, e − e_before))),   e = drift / ((1 − headroom) * max_drift) − 1

    A variant of ours: dual ascent on the measured constraint while the primal descends on a differentiable stand-in
    (proxy Lagrangian, Cotter et al. 2018, arXiv 1804.06500), with a look ahead on a rising drift as PID-Lagrangian
    methods have (Stooke et al. 2020, arXiv 2007.03964), in logarithms. ``dual_ascent.py`` has the rule.
    """

    name = "adaptive"
    badge = "variant"
    paper = "after arXiv 2007.03964, arXiv 1804.06500"
    files = ("probe",)

    max_drift: float = Field(default=0.05, gt=0, description="how far the probe's margin may fall, in ``unit``")
    unit: Literal["nats", "share"] = Field(
        default="nats", description="max_drift is in nats per token, or a share of the untouched model's margin"
    )
    probe: str = Field(
        default="builtin:probes-select", description="a probe file, or builtin:NAME; not what the run is evaluated on"
    )
    every: int = Field(default=10, ge=1, description="optimizer steps between measurements; the last step is measured")
    lowest: float = Field(default=0.01, ge=0, description="the least factor on the defenses' weights")
    highest: float = Field(default=100.0, ge=0, description="the largest; 0 for both holds all terms at zero")
    headroom: float = Field(default=0.1, ge=0, lt=1, description="the share of max_drift that is aimed below it")
    gain: float = Field(default=1.0, gt=0, description="step size of the logarithm of the factor")
    lead: float = Field(default=1.0, ge=0, description="measurements to look ahead while the drift rises")
    on_violation: Literal["warn", "stop"] = Field(
        default="warn", description="where the last drift is above max_drift: note it, or keep no adapter"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.lowest > self.highest:
            raise ValueError(f"lowest {self.lowest} is above highest {self.highest}")
        if self.lowest == 0 < self.highest:
            raise ValueError("lowest must be above 0 unless highest is 0: a factor that has come to 0 never leaves it")
        return self

    def needs(self) -> Needs:
        return Needs(probe=self.probe)

    def work(self, context: WorkContext) -> Work:
        pairs = context.pairs(self.probe)
        # Before the first step, then each so many, and after the last.
        times = 2 + max(0, context.steps - 1) // self.every
        return Work(read=times * pairs.rows * pairs.tokens)

    def placed(self, folder: Path) -> Self:
        if self.probe.startswith("builtin:"):
            return self
        return self.model_copy(update={"probe": str(resolve_data(self.probe, folder))})

    def preflight(self, context: RunContext) -> None:
        if context.losses is not None:
            _check_losses(context.losses)
        context.notes["probe_sha256"] = self._digest(context.folder)

    def still_met(self, notes: Mapping[str, Any]) -> None:
        if (now := self._digest(Path())) != (was := notes.get("probe_sha256")):
            raise NeedError(
                f"adaptive's probe {self.probe} has changed since this run was prepared with it (sha256 {was}, now "
                f"{now}): put the file back, or begin another run"
            )

    def start(self, context: StartContext) -> Runtime:
        _check_losses(context.losses)
        assert context.margin is not None
        return _Holder(self, context.margin)

    def _digest(self, folder: Path) -> str:
        path = resolve_data(self.probe, folder)
        try:
            return file_digest(path)
        except OSError as error:
            raise NeedError(f"adaptive needs the probe file {path}: {error.strerror}") from error


class _Holder(Runtime):
    """Measures the drift and moves the multiplier."""

    def __init__(self, defense: Adaptive, margin: Callable[[bool], float]) -> None:
        self._defense, self._measure = defense, margin
        self._rule = DualAscent(defense.gain, defense.lead, defense.lowest, defense.highest)
        self._dual = self._rule.start()
        self._untouched: float | None = None
        self._margin, self._measured_at = 0.0, 0

    def begin(self) -> None:
        if self._untouched is None:
            self._untouched = self._margin = self._finite(reference=True, step=0)
        if self._defense.unit == "share" and self._untouched <= 0:
            raise NeedError(
                f"adaptive: the untouched model's margin on {self._defense.probe} is {self._untouched:.4f} nats per "
                "token, so that no share of it can be held: give max_drift with unit: nats, or another probe"
            )

    def strength(self, name: str) -> float:
        return self._dual.multiplier

    def on_step(self, step: int, *, last: bool) -> Mapping[str, float]:
        used = {"adaptive_multiplier": self._dual.multiplier}
        if step % self._defense.every and not last:
            return used
        started = time.perf_counter()
        self._margin, self._measured_at = self._finite(reference=False, step=step), step
        target = (1.0 - self._defense.headroom) * self._bound
        self._dual = self._rule.step(self._dual, self._drift / target)
        seconds = time.perf_counter() - started
        return used | {
            "adaptive_margin": self._margin,
            "adaptive_drift": self._drift,
            "adaptive_max_drift": self._bound,
            "adaptive_seconds": seconds,
        }

    def finish(self, step: int) -> dict[str, Any]:
        if self._measured_at != step:  # a loop that ended before its last step
            self._margin, self._measured_at = self._finite(reference=False, step=step), step
        held = self._drift <= self._bound
        notes: dict[str, Any] = {
            "held": held,
            "final_drift": self._drift,
            "max_drift": self._bound,
            "untouched_margin": self._untouched,
            "final_margin": self._margin,
            "multiplier": self._dual.multiplier,
        }
        if held:
            return notes
        at_highest = ", where the multiplier was as high as it may be" * (self._dual.multiplier >= self._rule.highest)
        text = (
            f"adaptive: bound not held: the margin on the probe fell by {self._drift:.4f} nats per token to step {step}"
            f"{at_highest}, and max_drift allows {self._bound:.4f}. Begin with larger weights, raise highest, measure "
            "more often (every), add a defense, or train less"
        )
        if self._defense.on_violation == "stop":
            raise OutcomeError(text)
        return notes | {"warning": text}

    def state_dict(self) -> dict[str, Any]:
        return {
            "untouched": self._untouched,
            "margin": self._margin,
            "measured_at": self._measured_at,
            "dual": list(self._dual),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._untouched, self._margin = state["untouched"], state["margin"]
        self._measured_at, self._dual = state["measured_at"], Dual(*state["dual"])

    @property
    def _drift(self) -> float:
        assert self._untouched is not None
        return self._untouched - self._margin

    @property
    def _bound(self) -> float:
        assert self._untouched is not None
        return self._defense.max_drift * (self._untouched if self._defense.unit == "share" else 1.0)

    def _finite(self, *, reference: bool, step: int) -> float:
        margin = self._measure(reference)
        if not math.isfinite(margin):
            raise OutcomeError(
                f"adaptive: the margin on {self._defense.probe} is {margin} at step {step}, so that the drift is not "
                "known: lower the learning rate, or look at the probe's rows"
            )
        return margin


def _check_losses(losses: object) -> None:
    if not losses:
        raise NeedError(
            "adaptive moves the weights of a run's loss defenses, and this run has none above 0: add one, such as "
            "kl: {tokens: response}"
        )
