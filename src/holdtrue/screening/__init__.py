"""Screening: before training, what three indicators say of a data set, and the risk where they are calibrated.

Names that need torch are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdtrue.late import late_names
from holdtrue.screening.spec import INDICATORS, ScreenSpec

if TYPE_CHECKING:
    from holdtrue.screening.calibration import Calibration, Risk, calibration_for, read_calibration
    from holdtrue.screening.result import Indicator, Screening, Suggestion
    from holdtrue.screening.screener import Screener, screen_data

_LATE = {
    "Calibration": "calibration",
    "Risk": "calibration",
    "calibration_for": "calibration",
    "read_calibration": "calibration",
    "Indicator": "result",
    "Screening": "result",
    "Suggestion": "result",
    "Screener": "screener",
    "screen_data": "screener",
}

__all__ = [
    "INDICATORS",
    "Calibration",
    "Indicator",
    "Risk",
    "ScreenSpec",
    "Screener",
    "Screening",
    "Suggestion",
    "calibration_for",
    "read_calibration",
    "screen_data",
]


__getattr__ = late_names(__name__, _LATE)
