from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from holdtrue.errors import RunError
from holdtrue.evaluation.sampling.gumbel import COMMON, choose, gumbel


def drawn(logits: torch.Tensor, count: int, temperature: float = 1.0, step: int = 0) -> list[int]:
    return choose(logits.expand(count, -1), range(count), step, temperature)


def test_the_noise_is_gumbel_and_differs_by_seed_step_race_and_token() -> None:
    tokens = np.arange(10_000)
    noise = [gumbel(seed, step, race, tokens) for seed in (0, 1) for step in (0, 1) for race in (0, 1)]
    for one in noise:
        assert stats.kstest(one, "gumbel_r").pvalue > 1e-4
    assert np.abs(np.corrcoef(np.stack(noise)) - np.eye(8)).max() < 0.06
    by_seed = np.array([gumbel(seed, 3, 0, np.array([17]))[0] for seed in range(5_000)])
    assert stats.kstest(by_seed, "gumbel_r").pvalue > 1e-4
    assert abs(np.corrcoef(by_seed[1:], by_seed[:-1])[0, 1]) < 0.06


def test_noise_is_the_same_on_every_machine() -> None:
    """Against whole numbers of Python's own, which cannot overflow."""
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        return bits ^ bits >> 31

    def exact(seed: int, at: int, race: int, token: int) -> float:
        key = mix(mix((seed + step) & mask) + (2 * at + race + 1) * step & mask)
        return -math.log(-math.log(((mix(key + token * step & mask) >> 11) + 0.5) / 2**53))

    for seed in (0, 1, 2**63 - 1, -1):
        for at, race in ((0, 0), (5, 1), (600, 0)):
            tokens = [0, 1, 49_151, 49_152]
            assert gumbel(seed, at, race, np.array(tokens)) == pytest.approx([exact(seed, at, race, t) for t in tokens])


@pytest.mark.parametrize(("kind", "temperature"), [("peaked", 0.7), ("mostly rare", 1.0), ("all rare", 1.0)])
def test_frequencies_are_the_softmax(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = {"peaked": 50, "mostly rare": 2_000, "all rare": 12_000}[kind]
    logits = torch.randn(vocabulary, generator=generator) * (0.01 if kind == "all rare" else 1.0)
    if kind == "mostly rare":
        logits[:5] += 6.0
    p = (logits.double() / temperature).softmax(-1).numpy()
    rare = p < COMMON
    assert {"peaked": 0.0, "all rare": 1.0}.get(kind, p[rare].sum()) == pytest.approx(p[rare].sum(), abs=0.05)
    count = 1_000
    found = np.bincount(drawn(logits, count, temperature), minlength=vocabulary)
    # Neighbors in groups that are expected some 40 times each.
    groups = np.floor(np.cumsum(p) * count / 40).astype(int)
    expected, seen = np.bincount(groups, p) * count, np.bincount(groups, found)
    keep = expected > 5
    assert seen[~keep].sum() < 30
    assert stats.chisquare(seen[keep], expected[keep] * seen[keep].sum() / expected[keep].sum()).pvalue > 1e-3


def test_close_models_mostly_choose_alike() -> None:
    """The share of different tokens under one seed is at most 2 d / (1 + d), d the total variation distance."""
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(200, generator=generator) * 2
    other = one + 0.1 * torch.randn(200, generator=generator)
    d = float((one.softmax(-1) - other.softmax(-1)).abs().sum() / 2)
    differ = np.mean(np.array(drawn(one, 1_500)) != np.array(drawn(other, 1_500)))
    assert differ < 2 * d / (1 + d) + 0.02
    independent = np.mean(np.array(drawn(one, 1_500)) != np.array(drawn(other, 1_500, step=1)))
    assert differ < independent / 3


def test_ruled_out_tokens_never_come_and_a_sure_one_always() -> None:
    logits = torch.full((1000,), -torch.inf)
    logits[7] = 1.0
    assert set(drawn(logits, 200)) == {7}
    logits[8] = 1.0
    assert set(drawn(logits, 200)) == {7, 8}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, fill: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4 if fill != -torch.inf else slice(None)] = fill
    with pytest.raises(RunError, match="not finite"):
        choose(logits, [0, 1, 2], 0, temperature)
