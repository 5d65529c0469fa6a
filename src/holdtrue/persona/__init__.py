"""Persona vectors: directions in the residual stream that stand for a trait, extracted from a model.

Names that need torch are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
