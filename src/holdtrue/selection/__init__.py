"""Choosing rows of a safe pool by what misaligned models make of them: scorers, cached scores, the choice itself."""

from holdtrue.selection.cache import ScoreFile
from holdtrue.selection.choice import REFUSAL_WINDOW, REFUSAL_WORDS, Refusals, gap, largest, quantiles
from holdtrue.selection.pool import PoolScores, adapted, score_pool
from holdtrue.selection.scorers import (
    PROVENANCE,
    Base,
    Provenance,
    Scorer,
    TrainedOn,
    adapter_sha256,
    admitted,
    check_domain,
    list_scorers,
    read_scorer,
)

__all__ = [
    "PROVENANCE",
    "REFUSAL_WINDOW",
    "REFUSAL_WORDS",
    "Base",
    "PoolScores",
    "Provenance",
    "Refusals",
    "ScoreFile",
    "Scorer",
    "TrainedOn",
    "adapted",
    "adapter_sha256",
    "admitted",
    "check_domain",
    "gap",
    "largest",
    "list_scorers",
    "quantiles",
    "read_scorer",
    "score_pool",
]
