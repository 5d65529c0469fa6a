"""The chunked objective against the naive one: full logits of all positions, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdtrue.defenses import LossDefense, parse
from holdtrue.training.head import BLOCK, Head, ProcessorHead, head_for
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
        row=torch.zeros(n, dtype=torch.int64),
        column=torch.arange(n),
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


def chunked(hidden, reference, head, positions, ce_coefficient, weight, direction, tokens, chunk, fast=True):
    (defense,) = parse([{"kl": {"direction": direction, "tokens": tokens}}])
    covered = torch.ones_like(positions.response) if tokens == "all" else positions.response
    term = TokenTerm("kl", covered, weight, defense.token_term, reference=True)
    loss, sums = token_objective(
        hidden,
        head,
        positions,
        ce_coefficient=ce_coefficient,
        terms=[term],
        reference_hidden=reference,
        chunk=chunk,
        vocabulary=head.out_features,
        fast=fast,
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
    fast=st.booleans(),
)
def test_equals_the_naive_objective_in_float64(n, vocabulary, chunk, seed, direction, tokens, fast):
    case = (*make(n, vocabulary, 7, seed, torch.float64), 1 / 3, 0.7, direction, tokens)
    for ours, theirs in zip(chunked(*case, chunk, fast), naive(*case), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_float32_at_the_real_vocabulary(direction, fast):
    n = 97
    case = (*make(n, 49152, 32, 1, torch.float32), 1 / n, 1 / n, direction, "all")
    ours, theirs = chunked(*case, None, fast), naive(*case)
    assert abs(float(ours[0]) - float(theirs[0])) < 1e-5
    assert float((ours[1].double() - theirs[1]).norm() / theirs[1].norm()) < 1e-4


def test_direction_is_told_apart_by_closed_form():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.8, 0.1, 0.1])
    forward = 0.5 * torch.log(torch.tensor(0.5 / 0.8)) + 0.5 * torch.log(torch.tensor(0.25 / 0.1))
    backward = 0.8 * torch.log(torch.tensor(0.8 / 0.5)) + 0.2 * torch.log(torch.tensor(0.1 / 0.25))
    head = nn.Linear(3, 3, bias=False).requires_grad_(False)
    head.weight.data = torch.eye(3)
    one = Positions(
        row=torch.zeros(1, dtype=torch.int64),
        column=torch.zeros(1, dtype=torch.int64),
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
    none = positions.take(slice(0, 0))
    loss, _ = token_objective(hidden[:0], head, none, ce_coefficient=0.0, reference_hidden=reference[:0], vocabulary=5)
    assert float(loss) == 0.0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_chunks_shrink_as_the_vocabulary_grows():
    assert chunk_size(49_152) == 128
    assert chunk_size(2 * 49_152) == chunk_size(49_152) // 2
    assert chunk_size(262_144) == 64
    assert chunk_size(10**9) == 1


def test_positions_without_a_reference_get_cross_entropy_alone():
    hidden, reference, head, positions = make(20, 60, 5, 3, torch.float64)
    m = 8
    right = torch.arange(20) % 3 == 0  # which of the targets are the likeliest tokens
    likeliest = head(hidden.detach()).argmax(-1)
    positions = dataclasses.replace(positions, targets=torch.where(right, likeliest, (likeliest + 1) % 60))
    (defense,) = parse([{"kl": {"tokens": "all"}}])
    covered = torch.arange(20) < m
    term = TokenTerm("kl", covered, 0.7, defense.token_term, reference=True)
    given_terms = {"ce_coefficient": 0.3, "terms": [term], "reference_hidden": reference[:m], "vocabulary": 60}
    loss, sums = token_objective(hidden, head, positions, chunk=3, **given_terms)
    (gradient,) = torch.autograd.grad(loss, hidden)
    h = hidden.detach().requires_grad_()
    p, q = torch.log_softmax(head(h), -1), torch.log_softmax(head(reference[:m]), -1)
    ce = -(p[torch.arange(20), positions.targets] * positions.trained).sum()
    kl = (p[:m].exp() * (p[:m] - q)).sum(-1)
    expected = 0.3 * ce + 0.7 * kl.sum()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, h)[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(sums["kl"], (kl * positions.response[:m]).sum().detach(), atol=1e-10, rtol=0)
    assert int(sums["right"]) == int((right & positions.trained).sum()) > 0
    assert int(sums["kl_count"]) == int(positions.response[:m].sum())
    broader = TokenTerm("kl", torch.arange(20) <= m, 0.7, defense.token_term, reference=True)
    with pytest.raises(ValueError, match="kl covers positions that have no reference"):
        token_objective(hidden, head, positions, **given_terms | {"terms": [broader]})


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda head: head, ProcessorHead),
        (lambda head: head.bfloat16(), Head),
        (lambda head: head.requires_grad_(True), Head),
        (lambda head: lambda hidden: 2 * head(hidden), Head),
        (lambda head: head.register_forward_hook(lambda *_: None) and head, Head),
    ],
)
def test_the_products_are_rearranged_only_for_a_frozen_linear_layer_in_the_states_precision(change, form):
    hidden, _, head, _ = make(3, 40, 4, 0, torch.float32)
    assert type(head_for(change(head), hidden, 2)) is form
    assert type(head_for(head, hidden, 2, fast=False)) is Head


def test_blocks_of_the_vocabulary_and_odd_chunks_make_one_product():
    g = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 2 * BLOCK + 5, bias=False, dtype=torch.float64).requires_grad_(False)
    products = head_for(head, torch.zeros(1, 6, dtype=torch.float64), 40)
    for n in (20, 3, 17):
        a, b = torch.randn(2, n, 6, generator=g, dtype=torch.float64)
        policy, reference, room, back = products.chunk(a, b, gradient=True)
        torch.testing.assert_close(policy, head(a).log_softmax(-1), atol=1e-12, rtol=0)
        torch.testing.assert_close(reference, head(b).log_softmax(-1), atol=1e-12, rtol=0)
        assert room.shape == (2, *policy.shape)
        room.fill_(torch.nan)
        torch.testing.assert_close(back(policy), policy @ head.weight, atol=1e-9, rtol=0)


class Spread(LossDefense):
    """Its gradient with respect to the log-probabilities is one number for all, a view without memory of its own."""

    name, badge, paper = "spread", "variant", "none"

    def token_term(self, chunk):
        return chunk.policy.sum(-1)


def test_a_term_may_have_any_gradient():
    hidden, _, head, positions = make(9, 30, 4, 5, torch.float64)
    term = TokenTerm("spread", positions.response, 0.2, Spread().token_term, reference=False)
    loss, _ = token_objective(hidden, head, positions, ce_coefficient=0.5, terms=[term], vocabulary=30, chunk=4)
    h = hidden.detach().requires_grad_()
    p = torch.log_softmax(head(h), -1)
    ce = -(p[torch.arange(9), positions.targets] * positions.trained).sum()
    expected = 0.5 * ce + 0.2 * (p.sum(-1) * positions.response).sum()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    ours, theirs = torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(expected, h)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
