"""How a run trains: the paper's set-up as defaults, without torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from holdtrue.errors import nearest

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class TrainingSpec(BaseModel):
    """Settings of the optimizer and the loop; AdamW, linear decay after a warm-up.

    Attributes:
        epochs: passes over the rows.
        learning_rate: the peak, after warm-up.
        batch_size: rows in one optimizer step, over all processes.
        micro_batch_size: rows in one forward pass of one process; must divide ``batch_size`` evenly.
        max_length: tokens of a row; the rest is cut, counted and reported.
        seed: of the adapter's initial weights, the order of rows and the choices of defenses.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        save_every: optimizer steps between checkpoints.
        save_epochs: whether there is a checkpoint, and the validation loss is measured, at each epoch's end as well.
        eval_every: optimizer steps between measurements of the validation loss, which is measured at the end anyway.
        kl_every: optimizer steps between measurements of the KL to the reference where no defense pays for one;
            0 turns them off.
        reference_cache: GiB on disk for the frozen reference's states, kept for later epochs and for other runs on the
            same rows; 0 keeps nothing.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        report_to: experiment trackers that receive the metrics (``tensorboard``, ``wandb``, ``mlflow``, ``trackio``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-4
    batch_size: PositiveInt = 16
    micro_batch_size: PositiveInt = 4
    max_length: int = Field(default=2048, ge=8)
    seed: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 5
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: NonNegativeFloat = 1.0
    save_every: PositiveInt = 50
    save_epochs: bool = False
    eval_every: NonNegativeInt = 0
    kl_every: NonNegativeInt = 10
    reference_cache: NonNegativeFloat = 0.0
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A run without these checkpoints has the hash that it had before there were any.
        return {key: value for key, value in write(self).items() if (key, value) != ("save_epochs", False)}

    @field_validator("report_to")
    @classmethod
    def _known(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        for name in trackers:
            if name not in TRACKERS:
                raise ValueError(f"no tracker {name!r}{nearest(name, TRACKERS)}; known: {', '.join(TRACKERS)}")
            if find_spec(name) is None:
                raise ValueError(f"{name} is not installed: pip install {name}, or take it out of report_to")
        return trackers

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
