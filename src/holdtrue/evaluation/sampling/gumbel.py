"""Sampling by Gumbel-max, with noise that depends on a seed, the step and the token alone.

Adding independent Gumbel noise to log-probabilities and taking the largest sum draws from exactly that distribution
(Gumbel 1954; Maddison et al., "A* Sampling", 2014). Because the noise is a function of (seed, step, token), an answer
is the same in any batch, order and resumed run, and on every kind of device. And two models that are asked with one
seed race on the same noise: they write the same answer until their distributions differ where it matters, which makes
paired comparisons of them more precise.

Most of a vocabulary has next to no probability, so noise is not drawn for all of it: the tokens above ``COMMON`` race
with one entry that stands for all others together (the maximum of a group is Gumbel too, at the group's total), and
only if that wins do the others race among themselves, on noise of their own. The result is as exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from holdtrue.errors import OutcomeError

if TYPE_CHECKING:
    from torch import Tensor

COMMON = 1e-4
"""Probability from which on a token has noise of its own in the first race."""

_FIRST, _OTHERS = 0, 1
_STEP = np.uint64(0x9E3779B97F4A7C15)


def choose(logits: Tensor, seeds: Sequence[int], step: int, temperature: float) -> list[int]:
    """Return one token for each row of ``logits`` (rows, vocabulary): step ``step`` of the answers with these seeds.

    Temperature 0 takes the likeliest, and needs no seed.

    Raises:
        OutcomeError: a row's logits are not numbers.
    """
    if temperature == 0:
        best, tokens = logits.max(-1)
        _check(best)
        return tokens.tolist()
    logp = (logits.float() / temperature).log_softmax(-1)
    _check(logp.amax(-1))
    rows, common = (logp > math.log(COMMON)).nonzero(as_tuple=True)
    values = logp[rows, common].double().cpu().numpy()
    tokens = common.cpu().numpy()
    edges = np.searchsorted(rows.cpu().numpy(), np.arange(len(seeds) + 1))
    return [
        _race(logp[row], tokens[a:b], values[a:b], seed, step)
        for row, (a, b, seed) in enumerate(zip(edges[:-1], edges[1:], seeds, strict=True))
    ]


def gumbel(seed: int, step: int, race: int, tokens: np.ndarray) -> np.ndarray:
    """Return standard Gumbel noise for tokens (int64): SplitMix64 (Steele, Lea & Flood 2014), begun at a hashed key."""
    key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
    key = _mix(key + np.array([2 * step + race + 1], dtype=np.uint64) * _STEP)
    bits = _mix(key + tokens.astype(np.uint64) * _STEP)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _race(logp: Tensor, tokens: np.ndarray, values: np.ndarray, seed: int, step: int) -> int:
    vocabulary = logp.shape[0]
    rest = max(1.0 - float(np.exp(values).sum()), 1e-300)
    entries = np.append(tokens, vocabulary)
    winner = int(np.argmax(np.append(values, math.log(rest)) + gumbel(seed, step, _FIRST, entries)))
    if winner < len(tokens):
        return int(tokens[winner])
    others = logp.double().cpu().numpy()
    others[tokens] = -np.inf
    return int(np.argmax(others + gumbel(seed, step, _OTHERS, np.arange(vocabulary))))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _check(best: Tensor) -> None:
    if not bool(best.isfinite().all()):
        raise OutcomeError(
            "the model's logits are not finite, so it has no next token: its weights are broken, or overflow in its "
            "number format (load it in float32 or bfloat16)"
        )
