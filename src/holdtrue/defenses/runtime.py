"""What a defense with a life of its own across steps gives the trainer, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StartContext:
    """Given to ``start``, when the trainer is made.

    Attributes:
        losses: the run's loss defenses whose weight is above 0, with that weight.
        margin: ``margin(reference)`` measures, on the probe that ``needs`` named, how much likelier the policy (or the
            reference) finds aligned answers than misaligned ones: mean log-likelihood, nats per token. In evaluation
            mode, without gradient; it draws no random number, and every process gets the same value. ``None`` unless
            ``needs`` named a probe.
    """

    losses: Mapping[str, float]
    margin: Callable[[bool], float] | None = None


class Runtime:
    """The part of a defense that changes while the run goes on. Every method does nothing by default.

    All processes call the same methods with the same values, and must come to the same state.
    """

    def begin(self) -> None:
        """Begin, or go on: called before the first step of a sitting, after ``load_state_dict`` where it is resumed."""

    def strength(self, name: str) -> float:
        """Return the factor on the weight of the loss defense ``name`` in the optimizer step to come."""
        return 1.0

    def on_step(self, step: int, *, last: bool) -> Mapping[str, float]:
        """Look at the policy after optimizer step ``step``, counted from 1; return figures to log with that step.

        Figures that tell a time have ``seconds`` in their names: a resumed run differs in these alone.
        """
        return {}

    def finish(self, step: int) -> dict[str, Any]:
        """Return notes about the whole run, after its last step; what is under ``warning`` is shown as one.

        What it raises stops the run before its adapter is kept.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; finite numbers come back bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that ``state_dict`` returned."""
