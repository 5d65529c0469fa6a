"""The shape of a LoRA adapter, as a value."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator


class AdapterSpec(BaseModel):
    """A LoRA adapter on a frozen model; the defaults are the source paper's.

    Attributes:
        r: rank of the update ``B @ A``.
        alpha: the update's factor is ``alpha / sqrt(r)`` with ``rslora``, else ``alpha / r``.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        dropout: probability of dropping an input of ``A`` in training, 0 to below 1.
        target_modules: ``all-linear`` (every linear layer but the head) or the ends of module names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: Annotated[int, Field(ge=1, le=8192, strict=True)] = 32
    alpha: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 64
    rslora: StrictBool = True
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _named_once(cls, value: str | list[str]) -> str | list[str]:
        if not isinstance(value, str) and (not value or len(set(value)) < len(value)):
            raise ValueError("name at least one module, and each only once; or say 'all-linear'")
        return value
