from __future__ import annotations

import pytest
import torch

from holdtrue.defenses import Features
from holdtrue.defenses.ldifs import LDIFS


def features(seed: int = 0, same: bool = False) -> Features:
    g = torch.Generator().manual_seed(seed)
    reference = {i: torch.randn(2, 4, 3, generator=g, dtype=torch.float64) for i in (0, 2)}
    policy = {
        i: (h + (0 if same else 0.5) * torch.randn(h.shape, generator=g, dtype=torch.float64)).requires_grad_()
        for i, h in reference.items()
    }
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    return Features(policy, reference, mask, torch.zeros(2, dtype=torch.int64))


def naive(f: Features, normalize: str) -> list[float]:
    assert f.reference is not None
    totals = []
    for b in range(2):
        total = 0.0
        n = int(f.mask[b].sum())
        for i, h in f.policy.items():
            x, y = h[b, :n].detach(), f.reference[i][b, :n]
            if normalize == "example":
                total += float((x / x.norm() - y / y.norm()).square().sum())
            else:
                total += sum(float((x[t] / x[t].norm() - y[t] / y[t].norm()).square().sum()) for t in range(n)) / n
        totals.append(total)
    return totals


@pytest.mark.parametrize("normalize", ["example", "token"])
def test_equals_the_definition(normalize):
    f = features()
    assert LDIFS(normalize=normalize).feature_term(f).tolist() == pytest.approx(naive(f, normalize), abs=1e-12)


@pytest.mark.parametrize("normalize", ["example", "token"])
def test_gradient_equals_a_finite_difference(normalize):
    f, defense = features(), LDIFS(normalize=normalize)

    def value(h0: torch.Tensor, h2: torch.Tensor) -> torch.Tensor:
        return defense.feature_term(Features({0: h0, 2: h2}, f.reference, f.mask, f.kind))

    assert torch.autograd.gradcheck(value, (f.policy[0], f.policy[2]), eps=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(defense.feature_term(f).sum(), list(f.policy.values()))
    assert all(g.norm() > 1e-3 for g in gradients)
    assert not any(g[1, 2:].any() for g in gradients), "padding must not count"


def test_zero_at_the_reference():
    f = features(same=True)
    total = LDIFS().feature_term(f).sum()
    assert float(total) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(total, list(f.policy.values())))


def test_layers_are_evenly_spaced():
    assert list(LDIFS().blocks(28)) == [0, 6, 13, 20, 27]
    assert list(LDIFS().blocks(5)) == [0, 1, 2, 3, 4]
    assert list(LDIFS(layers=1).blocks(9)) == [0]


def test_both_spellings():
    assert LDIFS(normalise="token") == LDIFS(normalize="token")
