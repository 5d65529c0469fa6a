"""Persona vectors: directions in the residual stream that stand for a trait, extracted from a model.

Names that need torch are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdtrue.late import late_names
from holdtrue.persona.trait import Instructions, Trait, builtin_trait

if TYPE_CHECKING:
    from holdtrue.persona.directions import extract_directions
    from holdtrue.persona.extract import Loaded, extract_from_pairs
    from holdtrue.persona.rollouts import extract_from_rollouts

_LATE = {
    "Loaded": "extract",
    "extract_directions": "directions",
    "extract_from_pairs": "extract",
    "extract_from_rollouts": "rollouts",
}

__all__ = [
    "Instructions",
    "Loaded",
    "Trait",
    "builtin_trait",
    "extract_directions",
    "extract_from_pairs",
    "extract_from_rollouts",
]


__getattr__ = late_names(__name__, _LATE)
