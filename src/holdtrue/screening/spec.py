"""What is screened, how much of it, and which results stop a run; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from holdtrue.errors import SpecError

IndicatorName = Literal["projection", "gap", "drift"]
INDICATORS: tuple[IndicatorName, ...] = ("projection", "gap", "drift")
TRIAL_BATCH = 4
"""Rows in a step of the trial."""


class ScreenSpec(BaseModel):
    """How a data set is screened.

    Attributes:
        rows: how many rows are drawn of the file; all where it has fewer.
        seed: of the rows drawn, of the model's own answers and of the trial.
        indicators: which are measured, in any order.
        tokens: how many tokens of each answer are read, from its beginning.
        steps: optimizer steps of the trial, of ``TRIAL_BATCH`` rows each.
        vector: a file of persona vectors (``holdtrue persona extract``); by default one made of shipped pairs.
        layer: the block of the vector, from 0; by default 20/28 of the number of blocks.
        scorers: folders of misaligned adapters (``holdtrue scorers build``), held against the model itself; by default
            two adapters tuned on shipped twins are held against each other.
        max_risk: a risk above it stops the run.
        max_projection, max_gap, max_drift: an indicator above it stops the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(default=64, ge=2)
    seed: NonNegativeInt = 0
    indicators: tuple[IndicatorName, ...] = INDICATORS
    tokens: PositiveInt = 48
    steps: PositiveInt = 8
    vector: str | None = Field(default=None, min_length=1)
    layer: NonNegativeInt | None = None
    scorers: tuple[str, ...] = ()
    max_risk: float | None = Field(default=None, ge=0, le=1)
    max_projection: float | None = None
    max_gap: float | None = None
    max_drift: float | None = None

    @property
    def trial_rows(self) -> int:
        """How many rows the trial takes; with fewer it is shorter, and drifts less than the calibration's."""
        return self.steps * TRIAL_BATCH

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.indicators or len(set(self.indicators)) < len(self.indicators):
            raise ValueError(f"indicators: name at least one of {', '.join(INDICATORS)}, and each once")
        for name in self.limits():
            if name != "risk" and name not in self.indicators:
                raise ValueError(f"max_{name}: the indicator {name!r} is not measured; add it to indicators")
        if self.max_risk is not None and set(self.indicators) != set(INDICATORS):
            raise ValueError("max_risk: the risk takes all indicators; leave indicators out, or limit one of them")
        for name, value in (("vector", self.vector), ("layer", self.layer)):
            if value is not None and "projection" not in self.indicators:
                raise ValueError(f"{name} is for the indicator 'projection', which is not measured")
        if self.scorers and "gap" not in self.indicators:
            raise ValueError("scorers are for the indicator 'gap', which is not measured")
        if not all(scorer.strip() for scorer in self.scorers):
            raise ValueError("scorers holds an empty entry")
        return self

    def limits(self) -> dict[str, float]:
        """Return what is limited (an indicator's name, or ``risk``) with its limit."""
        named = {name: getattr(self, f"max_{name}") for name in ("risk", *INDICATORS)}
        return {name: limit for name, limit in named.items() if limit is not None}

    def placed(self, folder: Path) -> Self:
        """Return the spec with its paths made whole, from ``folder`` on."""
        vector = None if self.vector is None else str(folder / Path(self.vector).expanduser())
        return self.model_copy(
            update={"vector": vector, "scorers": tuple(str(folder / Path(s).expanduser()) for s in self.scorers)}
        )

    @classmethod
    def of(cls, **values: object) -> Self:
        """Return a spec from values as a caller has them; ``SpecError`` names every fault."""
        from pydantic import ValidationError

        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, fault['loc'])) or 'screen'}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors()
            ]
            raise SpecError("screening: " + "; ".join(lines)) from None
