"""Choosing a token for each row of a batch, each row by its own settings and its own numbers.

The numbers are a function of the row's seed, its step and the token (see :mod:`holdtrue.evaluation.sampling.gumbel`),
so that an answer depends on nothing that shares its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from holdtrue.evaluation.sampling.gumbel import choose, gumbel

if TYPE_CHECKING:
    from torch import Tensor

_RACE = 0
"""One race for each step: the nucleus has noise for all of its tokens."""


class Draw(NamedTuple):
    """How a row's next token is drawn: its seed, how many tokens it has, and the request's settings."""

    seed: int
    step: int
    temperature: float
    top_p: float


def seed_of(seed: int, choice: int) -> int:
    """Return the seed of one of a request's answers: the request's own for the first."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big")


def draw_all(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return a token for each row of ``logits`` (rows, vocabulary).

    Raises:
        RunError: a row's logits are not numbers.
    """
    found = choose(logits, [0] * len(draws), 0, 0.0)  # the likeliest; refuses what is no number
    for row, draw in enumerate(draws):
        if draw.temperature == 0 or draw.top_p == 0:
            continue
        if draw.top_p < 1:
            found[row] = _nucleus(logits[row], draw)
        else:
            found[row] = choose(logits[row : row + 1], [draw.seed], draw.step, draw.temperature)[0]
    return found


def _nucleus(logits: Tensor, draw: Draw) -> int:
    """Draw from the likeliest tokens that have ``top_p`` together (Holtzman et al., arXiv 1904.09751)."""
    logp = (logits.float() / draw.temperature).log_softmax(-1)
    values, tokens = logp.sort(descending=True, stable=True)
    values, tokens = values.double().cpu().numpy(), tokens.cpu().numpy()
    mass = np.cumsum(np.exp(values))
    kept = int(np.searchsorted(mass, draw.top_p)) + 1  # up to and with the token that reaches top_p
    noise = gumbel(draw.seed, draw.step, _RACE, tokens[:kept])
    return int(tokens[int(np.argmax(values[:kept] + noise))])
