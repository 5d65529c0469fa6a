"""Constrained fine-tuning against the loss that the paper writes, differentiated whole in float64."""

from __future__ import annotations

import torch

from holdtrue.defenses import TokenChunk
from holdtrue.defenses.constrained_sft import ConstrainedSFT


def chunk(policy: torch.Tensor, reference: torch.Tensor, place: torch.Tensor) -> TokenChunk:
    n = len(place)
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(0, policy.shape[1], (n,), generator=g)
    return TokenChunk(policy, reference, targets, place >= 0, place, torch.zeros(n, dtype=torch.int64))


def test_its_gradient_is_that_of_the_papers_loss():
    g = torch.Generator().manual_seed(0)
    place = torch.tensor([-1, 0, 1, 2, 4, 5, 9, 0, 3])
    logits = torch.randn(9, 11, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(torch.randn(9, 11, generator=g, dtype=torch.float64), -1)
    policy = torch.log_softmax(logits, -1)
    view = chunk(policy, reference, place)
    defense = ConstrainedSFT(beta=0.3)
    rows = torch.arange(9)
    nll = -policy[rows, view.targets].where(view.trained, 0.0)
    (ours,) = torch.autograd.grad((nll + defense.token_term(view)).sum(), logits, retain_graph=True)
    beta = torch.tensor([0.3 * {0: 5}.get(int(p), 20 if 1 <= p <= 4 else 1) for p in place], dtype=torch.float64)
    ratio = (policy - reference)[rows, view.targets]
    paper = -(2 / beta) * torch.nn.functional.logsigmoid(beta * ratio)
    (theirs,) = torch.autograd.grad(paper.where(view.trained, 0.0).sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert not ours[0].any()


def test_at_the_untouched_model_it_is_cross_entropy():
    policy = torch.log_softmax(torch.randn(6, 5, dtype=torch.float64), -1)
    view = chunk(policy, policy, torch.arange(6))
    assert float(ConstrainedSFT().token_term(view).abs().max()) < 1e-15


def test_what_is_learned_already_counts_for_less():
    reference = torch.log_softmax(torch.zeros(2, 3, dtype=torch.float64), -1)
    certain = torch.log_softmax(torch.tensor([[9.0, 0, 0], [9.0, 0, 0]], dtype=torch.float64), -1).requires_grad_()
    view = TokenChunk(
        certain, reference, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.tensor([1, 50]),
        torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    (slope,) = torch.autograd.grad(ConstrainedSFT().token_term(view).sum(), certain)
    left = 1 - slope[:, 0]  # of CE's own slope of 1
    assert 0.1 < float(left[0]) < 0.25  # beta 2: 2 sigmoid(-2 ln 3) = 0.2
    assert 0.9 < float(left[1]) < 1.0
