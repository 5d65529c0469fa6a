"""The shape of a LoRA adapter, as a value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    field_validator,
    model_serializer,
)


class AdapterSpec(BaseModel):
    """A LoRA adapter on a frozen model; the defaults are the source paper's.

    Attributes:
        r: rank of the update ``B @ A``.
        alpha: the update's factor is ``alpha / sqrt(r)`` with ``rslora``, else ``alpha / r``.
        rslora: rank-stabilised scaling (arXiv 2312.03732).
        dropout: probability of dropping an input of ``A`` in training, 0 to below 1.
        target_modules: ``all-linear`` (every linear layer but the head) or the ends of module names.
        start: folder of an adapter on the same base to go on from, or ``None`` for a fresh one. Its shape counts then,
            not the one here. The reference and what a gate compares with stay the base.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: Annotated[int, Field(ge=1, le=8192, strict=True)] = 32
    alpha: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 64
    rslora: StrictBool = True
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = "all-linear"
    start: Annotated[str, Field(min_length=1)] | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A run that starts afresh has the hash that it had before there was another way.
        return {key: value for key, value in write(self).items() if (key, value) != ("start", None)}

    @field_validator("target_modules")
    @classmethod
    def _named_once(cls, value: str | list[str]) -> str | list[str]:
        if not isinstance(value, str) and (not value or len(set(value)) < len(value)):
            raise ValueError("name at least one module, and each only once; or say 'all-linear'")
        return value
