"""The chunked objective against the naive one: full logits of all positions, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdtrue.defenses import parse
from holdtrue.training.objective import Positions, TokenTerm, chunk_size, token_objective


def make(n: int, vocabulary: int, width: int, seed: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64)
    reference = hidden + 0.3 * torch.randn(n, width, generator=g, dtype=torch.float64)
    head = nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
    head.weight.data = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    head.requires_grad_(False)
    response = torch.rand(n, generator=g) < 0.5
    positions = Positions(
        flat=torch.arange(n),
        targets=torch.randint(0, vocabulary, (n,), generator=g),
        trained=response & (torch.rand(n, generator=g) < 0.8),
        response=response,
        place=torch.arange(n),
        kind=torch.randint(0, 2, (n,), generator=g),
    )
    return hidden.to(dtype).requires_grad_(), reference.to(dtype), head.to(dtype), positions


def naive(hidden, reference, head, positions, ce_coefficient, weight, direction, tokens):
    h = hidden.detach().double().requires_grad_()
    w = head.weight.double()
    p = torch.log_softmax(h @ w.T, -1)
    q = torch.log_softmax(reference.double() @ w.T, -1)
    ce = -(p[torch.arange(len(p)), positions.targets] * positions.trained).sum()
    if direction == "reference||policy":
        p, q = q, p
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    covered = torch.ones_like(positions.response) if tokens == "all" else positions.response
    kl = (kl * covered).sum()
    loss = ce_coefficient * ce + weight * kl
    (gradient,) = torch.autograd.grad(loss, h)
    return loss.detach(), gradient, ce.detach(), kl.detach()


def chunked(hidden, reference, head, positions, ce_coefficient, weight, direction, tokens, chunk):
    (defense,) = parse([{"kl": {"direction": direction, "tokens": tokens}}])
    term = TokenTerm("kl", tokens, weight, defense.token_term)
    loss, sums = token_objective(
        hidden,
        head,
        positions,
        ce_coefficient=ce_coefficient,
        terms=[term],
        reference_hidden=reference,
        chunk=chunk,
        vocabulary=head.out_features,
    )
    gradient = torch.autograd.grad(loss, hidden)[0]
    return loss.detach(), gradient, sums["ce"], sums["defense/kl"]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 23),
    vocabulary=st.integers(2, 300),
    chunk=st.integers(1, 24),
    seed=st.integers(0, 2**20),
    direction=st.sampled_from(["policy||reference", "reference||policy"]),
    tokens=st.sampled_from(["all", "response"]),
)
def test_equals_the_naive_objective_in_float64(n, vocabulary, chunk, seed, direction, tokens):
    case = (*make(n, vocabulary, 7, seed, torch.float64), 1 / 3, 0.7, direction, tokens)
    for ours, theirs in zip(chunked(*case, chunk), naive(*case), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_float32_at_the_real_vocabulary(direction):
    n = 97
    case = (*make(n, 49152, 32, 1, torch.float32), 1 / n, 1 / n, direction, "all")
    ours, theirs = chunked(*case, None), naive(*case)
    assert abs(float(ours[0]) - float(theirs[0])) < 1e-5
    assert float((ours[1].double() - theirs[1]).norm() / theirs[1].norm()) < 1e-4


def test_direction_is_told_apart_by_closed_form():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.8, 0.1, 0.1])
    forward = 0.5 * torch.log(torch.tensor(0.5 / 0.8)) + 0.5 * torch.log(torch.tensor(0.25 / 0.1))
    backward = 0.8 * torch.log(torch.tensor(0.8 / 0.5)) + 0.2 * torch.log(torch.tensor(0.1 / 0.25))
    head = nn.Linear(3, 3, bias=False).requires_grad_(False)
    head.weight.data = torch.eye(3)
    one = Positions(
        flat=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        trained=torch.zeros(1, dtype=torch.bool),
        response=torch.ones(1, dtype=torch.bool),
        place=torch.zeros(1, dtype=torch.int64),
        kind=torch.zeros(1, dtype=torch.int64),
    )
    for direction, value in (("policy||reference", forward), ("reference||policy", backward)):
        hidden = p.log().unsqueeze(0).requires_grad_()
        got = chunked(hidden, q.log().unsqueeze(0), head, one, 0.0, 1.0, direction, "response", 1)
        assert float(got[0]) == pytest.approx(float(value), abs=1e-6)
    assert abs(float(forward - backward)) > 0.02


def test_no_position_gives_zero_and_a_zero_gradient():
    hidden, reference, head, positions = make(1, 5, 4, 0, torch.float32)
    none = Positions(*(getattr(positions, f)[:0] for f in positions.__dataclass_fields__))
    loss, _ = token_objective(hidden[:0], head, none, ce_coefficient=0.0, reference_hidden=reference[:0], vocabulary=5)
    assert float(loss) == 0.0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_chunks_shrink_as_the_vocabulary_grows():
    assert chunk_size(49_152) * 49_152 <= 2**21
    assert chunk_size(2 * 49_152) == chunk_size(49_152) // 2
    assert chunk_size(10**9) == 1
