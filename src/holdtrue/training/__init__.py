"""Training with defenses. Names that need torch are imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from holdtrue.training.spec import TrainingSpec

if TYPE_CHECKING:
    from holdtrue.training.fitting import fit
    from holdtrue.training.reference_cache import ReferenceCache
    from holdtrue.training.sft import DefendedSFTTrainer
    from holdtrue.training.trainer import DefendedTrainer

_LATE = {
    "DefendedSFTTrainer": "holdtrue.training.sft",
    "DefendedTrainer": "holdtrue.training.trainer",
    "ReferenceCache": "holdtrue.training.reference_cache",
    "fit": "holdtrue.training.fitting",
}

__all__ = ["DefendedSFTTrainer", "DefendedTrainer", "ReferenceCache", "TrainingSpec", "fit"]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
