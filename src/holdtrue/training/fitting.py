"""The train stage's work: from a model, rows and a spec to a trained adapter, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments

from holdtrue.defenses import Defense
from holdtrue.errors import SpecError
from holdtrue.models import causal_lm
from holdtrue.training.runtimes import Probe
from holdtrue.training.spec import TrainingSpec
from holdtrue.training.trainer import PARTIAL, DefendedTrainer, checkpoints, verify

if TYPE_CHECKING:
    from peft import PeftModel

    from holdtrue.training.reference_cache import ReferenceCache

Progress = Callable[[dict[str, Any]], None]


def fit(
    *,
    model: PeftModel,
    tokenizer: Any,
    rows: Any,
    validation: Any | None,
    spec: TrainingSpec,
    defenses: Sequence[Defense],
    folder: Path,
    progress: Progress | None = None,
    resume: bool = True,
    stop: Event | None = None,
    reference_cache: ReferenceCache | None = None,
    probe: Probe | None = None,
    fast: bool = True,
) -> dict[str, Any]:
    """Train ``model``'s adapter in place and return a summary.

    Args:
        model: a base model with a new LoRA adapter.
        tokenizer: the model's.
        rows: prepared rows (``holdtrue.data.load_prepared``).
        validation: prepared held-out rows, or ``None``.
        spec: the settings.
        defenses: the run's defenses.
        folder: gets ``checkpoints/`` and ``metrics.jsonl``.
        progress: called after each optimizer step with its metrics, ``step``, ``steps`` and ``seconds_left``, and with
            those of the validation rows (``eval_loss``, no ``loss``) after they were measured.
        resume: go on from the last whole checkpoint where there is one.
        stop: once set, the run saves a checkpoint after the step in hand and returns.
        reference_cache: where the reference's states are kept and looked up.
        probe: measures the policy for defenses that ask for it.
        fast: ``False`` turns off what makes a step faster and changes its results by rounding alone.

    Raises:
        NeedError: a need of a defense is not met by the model.
        RunError: training diverged, a checkpoint is corrupt, or a defense does not let the run pass.
        SpecError: the batch size cannot be split over the processes.
    """
    device = next(model.parameters()).device
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.batch_size % (spec.micro_batch_size * world):
        raise SpecError(
            f"training.batch_size {spec.batch_size} is not a multiple of micro_batch_size {spec.micro_batch_size} "
            f"x {world} processes"
        )
    saved = checkpoints(folder / "checkpoints") if resume else []
    if not resume:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "checkpoints" / PARTIAL, ignore_errors=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch",
        per_device_train_batch_size=spec.micro_batch_size,
        per_device_eval_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.batch_size // (spec.micro_batch_size * world),
        save_strategy="steps",
        save_steps=spec.save_every,
        save_total_limit=2,
        eval_strategy="steps" if spec.eval_every and validation is not None else "no",
        eval_steps=spec.eval_every or None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(spec.report_to) or "none",
        seed=spec.seed,
        bf16=causal_lm(model).dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    if saved:
        verify(saved[-1])
    start_step = int(saved[-1].name.rsplit("-", 1)[1]) if saved else 0
    main = int(os.environ.get("RANK", "0")) == 0
    recorder = _Recorder(
        folder / "metrics.jsonl" if main else None,
        start_step,
        progress,
        stop,
        device.type == "cpu",
        spec.save_epochs,
        validation is not None,
    )
    trainer = DefendedTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        defenses=defenses,
        kl_every=spec.kl_every,
        reference_cache=reference_cache,
        probe=probe,
        fast=fast,
        callbacks=[recorder],
    )
    trainer.remove_callback(_printer())
    if spec.gradient_checkpointing:
        causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    done = trainer.state.global_step >= trainer.state.max_steps
    notes = trainer.runtime_notes() if done else {}
    final = trainer.evaluate() if validation is not None and done else {}
    return (
        recorder.summary()
        | final
        | {
            "steps": trainer.state.global_step,
            "max_steps": trainer.state.max_steps,
            "resumed_from": start_step,
            "train_seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(device),
            "interrupted": not done,
        }
        | ({"runtimes": notes} if notes else {})
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, resident of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # What getrusage tells starts from the peak of the process that started this one.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback


@dataclass
class _Totals:
    """Sums over a run's steps, from which its summary follows.

    Attributes:
        slots: places of the batches, padding among them.
        cpu_seconds: ``None`` where a step has none.
    """

    tokens: float = 0.0
    target_tokens: float = 0.0
    seconds: float = 0.0
    slots: float = 0.0
    cpu_seconds: float | None = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Take in a line of ``metrics.jsonl``; one that is no step's is left out."""
        if "loss" not in record:
            return
        self.tokens += record["tokens"]
        self.target_tokens += record["target_tokens"]
        self.seconds += record["seconds"]
        self.slots += record["tokens"] / (1 - record["padding"])
        here = record.get("cpu_seconds")
        self.cpu_seconds = None if self.cpu_seconds is None or here is None else self.cpu_seconds + here

    def summary(self) -> dict[str, Any]:
        """Return what a run says of its training."""
        return {
            "tokens": int(self.tokens),
            "target_tokens": int(self.target_tokens),
            "seconds": self.seconds,
            **({} if self.cpu_seconds is None else {"cpu_seconds": self.cpu_seconds}),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "padding": 1 - self.tokens / self.slots if self.slots else 0.0,
        }


class _Recorder(TrainerCallback):
    """Appends each step's metrics to a file, tells the progress, and stops the loop when asked to.

    What it holds in memory does not grow with the steps.
    """

    def __init__(
        self,
        path: Path | None,
        start_step: int,
        progress: Progress | None,
        stop: Event | None,
        on_cpu: bool,
        epochs: bool,
        validates: bool,
    ) -> None:
        self._epochs, self._validates = epochs, validates
        self._path, self._progress, self._stop, self._on_cpu = path, progress, stop, on_cpu
        self._cpu = self._to_begin = 0.0
        self._started, self._first = time.perf_counter(), start_step
        self._totals = _Totals()
        self._keep_until(start_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._cpu = time.process_time()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._first:  # what lives across steps has begun since, as part of the first one
            self._to_begin = time.process_time() - self._cpu

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._cpu = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        # The file has them all; each checkpoint would write them again.
        del state.log_history[:-1]
        if not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        record = {"step": state.global_step, **logs}
        if self._on_cpu and "loss" in logs:
            # What the step itself took, however much of the processor others had meanwhile.
            record["cpu_seconds"] = time.process_time() - self._cpu + self._to_begin
            self._to_begin = 0.0
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._totals.add(record)
        if self._progress is not None:
            done = state.global_step - self._first
            each = (time.perf_counter() - self._started) / max(1, done)
            left = (state.max_steps - state.global_step) * each
            self._progress({**record, "steps": state.max_steps, "seconds_left": left})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._stop is not None and self._stop.is_set() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        ended = abs(state.epoch - round(state.epoch)) < 1e-9
        if self._epochs and ended and state.global_step < state.max_steps:
            # In one go: the Trainer measures first, so that who goes on from the checkpoint has the figures.
            control.should_evaluate = control.should_evaluate or self._validates
            control.should_save = True
        return control

    def summary(self) -> dict[str, Any]:
        """Return totals over the whole run, earlier sittings included."""
        return self._totals.summary()

    def _keep_until(self, step: int) -> None:
        """Drop what was logged after the checkpoint, and a line that a kill cut short; take in the rest."""
        if self._path is None or not self._path.exists():
            return
        partial = self._path.with_suffix(".tmp")
        with self._path.open(encoding="utf-8") as file, partial.open("w", encoding="utf-8") as kept:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if record["step"] <= step:
                    kept.write(json.dumps(record) + "\n")
                    self._totals.add(record)
        partial.replace(self._path)
