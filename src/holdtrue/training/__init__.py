"""Training with defenses. Names that need torch are imported when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdtrue.late import late_names
from holdtrue.training.spec import TrainingSpec

if TYPE_CHECKING:
    from holdtrue.training.fitting import fit
    from holdtrue.training.reference_cache import ReferenceCache
    from holdtrue.training.sft import DefendedSFTTrainer
    from holdtrue.training.trainer import DefendedTrainer

_LATE = {
    "DefendedSFTTrainer": "sft",
    "DefendedTrainer": "trainer",
    "ReferenceCache": "reference_cache",
    "fit": "fitting",
}

__all__ = ["DefendedSFTTrainer", "DefendedTrainer", "ReferenceCache", "TrainingSpec", "fit"]


__getattr__ = late_names(__name__, _LATE)
