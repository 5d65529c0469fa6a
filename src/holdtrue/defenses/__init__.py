"""Defenses: one file a method. A new file in this folder, or an entry point, is all that a new one takes."""

from holdtrue.defenses.base import (
    Defense,
    Features,
    GradientContext,
    LossDefense,
    Needs,
    PairGradient,
    PairTerm,
    RowsContext,
    RunContext,
    TokenChunk,
)
from holdtrue.defenses.catalog import DefenseInfo, Parameter, available, describe, parse
from holdtrue.defenses.runtime import Runtime, StartContext

__all__ = [
    "Defense",
    "DefenseInfo",
    "Features",
    "GradientContext",
    "LossDefense",
    "Needs",
    "PairGradient",
    "PairTerm",
    "Parameter",
    "RowsContext",
    "RunContext",
    "Runtime",
    "StartContext",
    "TokenChunk",
    "available",
    "describe",
    "parse",
]
