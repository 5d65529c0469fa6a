"""From indicators to a risk, where research data has shown what they mean: one model, one way to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdtrue.errors import RunError
from holdtrue.evaluation.statistics import Interval
from holdtrue.models.digest import file_digest
from holdtrue.screening.spec import INDICATORS, IndicatorName, ScreenSpec

if TYPE_CHECKING:
    from holdtrue.models import ModelSource

_FOLDER = Path(__file__).parent
_CONFIG = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Measured(BaseModel):
    """An area under the ROC curve with its 95 % interval, clustered by domain; ``None`` where there is none."""

    model_config = _CONFIG

    auc: float = Field(ge=0, le=1)
    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        """Return it as people read it, such as ``0.74 [0.26, 0.96]``."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.auc:.2f}{ends}"


class Auc(BaseModel):
    """Of malicious sets against all others, against aligned twins of malicious sets, and against other benign sets."""

    model_config = _CONFIG

    all: Measured
    twins: Measured
    benign: Measured


class Weight(BaseModel):
    """An indicator's part in the risk.

    Attributes:
        center, scale: of the calibration's points; the indicator is taken as (value − center) / scale.
        weight: on that; not negative, since an indicator is never used against its meaning.
        lowest, highest: of the calibration's points.
        auc: how well the indicator alone ranks.
    """

    model_config = _CONFIG

    center: float
    scale: float = Field(gt=0)
    weight: float = Field(ge=0)
    lowest: float
    highest: float
    auc: Auc


class Calibration(BaseModel):
    """What research data showed on one model, measured in one way.

    Attributes:
        version: of the file.
        model: the model's name, and the revision that it was measured on.
        settings: what the indicators must have been measured with; see :func:`settings_of`.
        sets: each data set's domain, its kind (malicious, its aligned twin, other benign) and how many subsets of it.
        indicators: their weights.
        bias: of the logistic curve.
        left_out: the risk's AUC on domains that its weights have not seen.
        card: the file beside it with the whole table.
    """

    model_config = _CONFIG

    version: int = Field(default=1, ge=1, le=1)
    model: Mapping[str, str]
    settings: Mapping[str, int | str]
    sets: Mapping[str, Mapping[str, str | int]]
    indicators: Mapping[IndicatorName, Weight]
    bias: float
    left_out: Auc
    card: str = "CARD.md"

    def risk(self, values: Mapping[str, float], intervals: Mapping[str, Interval] | None = None) -> Risk:
        """Return the risk of a data set.

        risk = σ(bias + Σ weight · (value − center) / scale)

        The ends of its interval add the indicators' half-widths in squares; they say nothing of the calibration's own
        error, which ``left_out`` shows.

        Args:
            values: of every indicator, by name.
            intervals: theirs; without them the risk has none.

        Raises:
            KeyError: an indicator is missing.
        """
        z, squares, known = self.bias, 0.0, True
        for name, part in self.indicators.items():
            slope = part.weight / part.scale
            z += slope * (values[name] - part.center)
            ends = (intervals or {}).get(name)
            if ends is not None and ends.low is not None and ends.high is not None:
                squares += (slope * (ends.high - ends.low) / 2) ** 2
            elif slope > 0:
                known = False
        half = math.sqrt(squares)
        low, high = (_logistic(z - half), _logistic(z + half)) if known else (None, None)
        far = tuple(name for name, part in self.indicators.items() if not part.lowest <= values[name] <= part.highest)
        return Risk(_logistic(z), low, high, self.left_out, far)


class Risk(NamedTuple):
    """The share of malicious sets among sets that look like this one, were half of all sets malicious.

    Attributes:
        value: 0 to 1.
        low, high: 95 %, from the rows drawn and the probes alone; ``None`` where there is no interval.
        left_out: how well such risks ranked data sets of domains that the calibration had not seen.
        far: indicators that lie outside of all that the calibration has seen.
    """

    value: float
    low: float | None
    high: float | None
    left_out: Auc
    far: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "value": self.value,
            "interval": None if self.low is None else [self.low, self.high],
            "auc_of_unseen_domains": self.left_out.model_dump(mode="json"),
            "outside_of_calibration": list(self.far),
        }


def settings_of(spec: ScreenSpec) -> dict[str, int | str] | None:
    """Return what decides an indicator's scale.

    ``None`` where a vector or scorers are the caller's own, or where the rows do not suffice for the trial's steps.
    """
    from holdtrue.data import builtin
    from holdtrue.screening.passes import FORMAT
    from holdtrue.screening.projection import PAIRS
    from holdtrue.screening.trial import pair_folder

    if spec.vector is not None or spec.layer is not None or spec.scorers or set(spec.indicators) != set(INDICATORS):
        return None
    if spec.rows < spec.trial_rows:
        return None
    return {
        "format": FORMAT,
        "tokens": spec.tokens,
        "steps": spec.steps,
        "pairs": file_digest(builtin(PAIRS)),
        "scorers": pair_folder(Path()).sha256,
    }


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration file.

    Raises:
        RunError: it is missing or broken.
    """
    try:
        return Calibration.model_validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{path}: the calibration cannot be read: {str(error).splitlines()[0]}") from error


def calibration_for(source: ModelSource, spec: ScreenSpec) -> Calibration | None:
    """Return the shipped calibration of a model and of these settings, where there is one."""
    settings = settings_of(spec)
    if settings is None:
        return None
    for path in sorted(_FOLDER.glob("calibration-*.json")):
        found = read_calibration(path)
        if found.model["revision"] == source.revision and found.settings == settings:
            return found
    return None


def _logistic(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
