"""Defenses with a life of their own: started, asked for strengths, told of steps, kept in checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainerCallback

from holdtrue.defenses import Defense, LossDefense, Runtime, StartContext
from holdtrue.errors import NeedError, RunError
from holdtrue.models import without_adapter
from holdtrue.models.layers import peft_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

STATE = "holdtrue_runtimes.json"
"""In a checkpoint: the state of each defense that has one, by its name."""

Probe = Callable[[nn.Module], float]
"""Measures a model: how much likelier it finds aligned answers than misaligned ones, nats per token."""


class RuntimeMixin(_Base):
    """Gives a Trainer the runtimes of its defenses; ``DefenseMixin`` is built on it.

    Attributes:
        step_metrics: of the optimizer step in hand; runtimes add theirs after it.
    """

    step_metrics: dict[str, float]

    @property
    def _policy(self) -> PeftModel:
        policy = peft_model(self.model)  # pyright: ignore[reportArgumentType]
        assert policy is not None
        return policy

    def _start_runtimes(self, defenses: Sequence[Defense], losses: Sequence[LossDefense], probe: Probe | None) -> None:
        self._probe = probe
        self._runtimes: dict[str, Runtime] = {}
        self._largest = {defense.name: defense.largest_weight() for defense in losses}
        given = {defense.name: defense.weight for defense in losses}
        for defense in defenses:
            asked = defense.needs().probe
            if asked is not None and probe is None:
                raise NeedError(
                    f"{defense.name} measures the model on {asked} while it trains: give the trainer "
                    "probe=MarginProbe(FILE, tokenizer), from holdtrue.evaluation"
                )
            margin = None if asked is None else self._margin
            runtime = defense.start(StartContext(given, margin))
            if runtime is not None:
                self._runtimes[defense.name] = runtime
        if self._runtimes:
            self.add_callback(_Steps(self))

    def _weights(self, losses: Sequence[LossDefense]) -> dict[str, float]:
        """Return the weights of loss defenses in the step in hand, by name: no runtime moves one out of its range."""
        found = {defense.name: defense.weight for defense in losses}
        for runtime in self._runtimes.values():
            found = {name: weight * runtime.strength(name) for name, weight in found.items()}
        return {name: min(weight, self._largest[name]) for name, weight in found.items()}

    def runtime_notes(self) -> dict[str, dict[str, Any]]:
        """Return what runtimes say of the whole run once it is trained, by the defense's name; log their warnings."""
        notes = {name: runtime.finish(self.state.global_step) for name, runtime in self._runtimes.items()}
        for note in notes.values():
            if "warning" in note and self.accelerator.is_main_process:
                logger.warning("%s", note["warning"])
        return {name: note for name, note in notes.items() if note}

    def _margin(self, reference: bool) -> float:
        """Measure the probe on the first process, and give its value to all."""
        device = self.args.device
        value = torch.zeros((), dtype=torch.float64, device=device)
        if self.accelerator.is_main_process:
            assert self._probe is not None
            # A probe draws nothing; one that does must not move the dropout of the steps to come.
            drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
            off = without_adapter(self._policy) if reference else _looking(self._policy)
            with drawing, off:
                value.fill_(self._probe(self._policy))
        agreed = broadcast(value)
        assert isinstance(agreed, Tensor)
        return agreed.item()

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._runtimes and self.args.should_save:
            states = {name: runtime.state_dict() for name, runtime in self._runtimes.items()}
            path = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / STATE
            path.write_text(json.dumps(states, allow_nan=False), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._runtimes:
            return
        path = Path(resume_from_checkpoint) / STATE
        try:
            states = json.loads(path.read_text(encoding="utf-8"))
            for name, runtime in self._runtimes.items():
                runtime.load_state_dict(states[name])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path} does not hold the state of {', '.join(self._runtimes)} ({error!r}): train from the start, "
                "in a new folder"
            ) from error


class _Steps(TrainerCallback):
    """Tells a trainer's runtimes of its steps: after the optimizer's, before anything is logged or saved.

    What they take is part of the step's time; what they take to begin, of the first step's.
    """

    def __init__(self, trainer: RuntimeMixin) -> None:
        self._trainer = trainer
        self._spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        started = time.perf_counter()
        for runtime in self._trainer._runtimes.values():
            runtime.begin()
        self._spent = time.perf_counter() - started

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        started = time.perf_counter()
        last, metrics = state.global_step >= state.max_steps, self._trainer.step_metrics
        for runtime in self._trainer._runtimes.values():
            metrics |= runtime.on_step(state.global_step, last=last)
        metrics["seconds"] += self._spent + time.perf_counter() - started
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds"]
        self._spent = 0.0


@contextlib.contextmanager
def _looking(model: nn.Module) -> Any:
    """Put a model into evaluation mode, without gradients; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
