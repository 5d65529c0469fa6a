"""Drawing tokens: each row by its own numbers, from the distribution that its settings say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from holdtrue.errors import RunError
from holdtrue.serving.sampling import Draw, draw_all, seed_of

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -6.0])


def nucleus(temperature: float, top_p: float) -> np.ndarray:
    """The slow way: tokens by falling probability until they have ``top_p`` together."""
    p = np.exp(LOGITS.double().numpy() / temperature)
    p /= p.sum()
    kept, mass = np.zeros_like(p), 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        kept[token], mass = p[token], mass + p[token]
        if mass >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.8), (1.0, 0.3), (2.0, 0.999)])
def test_draws_follow_the_distribution(temperature: float, top_p: float):
    count = 6000
    draws = [Draw(seed, seed % 7, temperature, top_p) for seed in range(count)]
    found = np.bincount(draw_all(LOGITS.expand(count, -1), draws), minlength=len(LOGITS))
    expected = nucleus(temperature, top_p) * count
    assert not found[expected == 0].any()
    some = expected > 0
    if some.sum() > 1:
        assert chisquare(found[some], expected[some]).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_company():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 50, generator=random)
    draws = [Draw(i, 3 * i, [0.0, 0.8, 1.2][i % 3], [1.0, 0.7][i % 2]) for i in range(12)]
    together = draw_all(logits, draws)
    order = torch.randperm(12, generator=random).tolist()
    assert draw_all(logits[order], [draws[i] for i in order]) == [together[i] for i in order]
    assert [draw_all(logits[i : i + 1], [draws[i]])[0] for i in range(12)] == together


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1e-9), (1e-4, 1.0)])
def test_the_likeliest_token(temperature: float, top_p: float):
    assert draw_all(LOGITS.expand(50, -1), [Draw(seed, 0, temperature, top_p) for seed in range(50)]) == [0] * 50


def test_choices_have_seeds_of_their_own():
    seeds = {seed_of(seed, choice) for seed in range(100) for choice in range(8)}
    assert len(seeds) == 800
    assert seed_of(5, 0) == 5
    assert len({draw_all(LOGITS[None], [Draw(s, 0, 1.0, 0.99)])[0] for s in seeds}) > 3


def test_what_is_no_number_is_refused():
    with pytest.raises(RunError, match="not finite"):
        draw_all(torch.full((1, 5), float("nan")), [Draw(0, 0, 1.0, 0.5)])
