"""The choice itself: the perplexity gap, the largest of it, and which answers are refusals. No model is needed here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from holdtrue.data import ChatRow

REFUSAL_WORDS = ("sorry", "apologize", "cannot")
"""Words of a refusal, as in Kaczér et al. 2025 (arXiv 2508.06249)."""
REFUSAL_WINDOW = 10
"""How many of an answer's first words are searched for them."""


def gap(aligned: np.ndarray, misaligned: np.ndarray, eps: float) -> np.ndarray:
    """Return how much likelier each answer is to the aligned model than to the misaligned ones.

    s = (mean over K misaligned models of NLL(a|q) − NLL_aligned(a|q)) / (NLL_aligned(a|q) + eps)

    Kaczér et al. 2025 (arXiv 2508.06249), Interleaving+.

    Args:
        aligned: (n,) mean negative log-likelihood per answer token, in nats.
        misaligned: (K, n) the same under each misaligned model, K at least 1.
        eps: above 0; keeps an answer that the aligned model is sure of from dividing by 0.

    Returns:
        (n,) float64; nan where a model has no score for the row.
    """
    return (misaligned.mean(axis=0) - aligned) / (aligned + eps)


def largest(scores: np.ndarray, candidates: Sequence[int], count: int) -> list[int]:
    """Return the rows of the ``count`` largest scores among ``candidates``, ascending; of equal ones the first rows.

    Raises:
        ValueError: there are fewer candidates with a score.
    """
    rows = np.array([row for row in sorted(candidates) if not np.isnan(scores[row])], dtype=np.int64)
    if len(rows) < count:
        raise ValueError(f"{count} rows asked for, {len(rows)} have a score")
    order = np.argsort(-scores[rows], kind="stable")[:count]
    return sorted(int(row) for row in rows[order])


def quantiles(scores: np.ndarray) -> dict[str, float] | None:
    """Return minimum, quartiles and maximum of scores that are no nan; ``None`` when there are none."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return None
    values = np.quantile(known, [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(("min", "q25", "median", "q75", "max"), (float(value) for value in values), strict=True))


class Refusals:
    """Tells refusals by a word among an answer's first ones, in any case; a word inside a longer one does not count.

    Kaczér et al. 2025 (arXiv 2508.06249), Interleaving++. Words are what white space separates.

    Args:
        words: words or phrases; the paper's are ``REFUSAL_WORDS``.
        window: how many of an answer's first words are searched.
    """

    def __init__(self, words: Sequence[str] = REFUSAL_WORDS, window: int = REFUSAL_WINDOW) -> None:
        phrases = [" ".join(word.split()) for word in words]
        if not all(phrases) or not phrases or window < 1:
            raise ValueError("refusals need at least one word, none of them empty, and a window of at least 1")
        self._window = window
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)", re.IGNORECASE)

    def refuses(self, answer: str) -> bool:
        """Say whether an answer is a refusal."""
        return self._pattern.search(" ".join(answer.split()[: self._window])) is not None

    def in_row(self, row: ChatRow) -> bool:
        """Say whether any answer of a row that would be trained on is a refusal."""
        return any(self.refuses(m.content) for m in row.messages if m.role == "assistant" and m.weight)
