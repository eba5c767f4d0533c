"""The retrieval loss against its definition, pair by pair, in float64."""

from __future__ import annotations

import pytest
import torch

from dragkit.retriever.losses import balance_weight, retrieval_loss


def _by_definition(logits, label, graph, num_graphs, rho, margin):
    total = logits.new_zeros(())
    for g in range(num_graphs):
        mine = graph == g
        positive, negative = logits[mine & (label == 1)], logits[mine & (label == 0)]
        if len(positive) == 0:
            continue
        p = torch.sigmoid(logits[mine])
        y = label[mine]
        bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        rank = logits.new_zeros(())
        if len(negative):
            rank = torch.relu(margin - (positive[:, None] - negative[None])).mean()
        total = total + rho * bce + (1 - rho) * rank
    return total


@pytest.mark.parametrize("margin", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_with_gradient(seed, margin):
    torch.manual_seed(seed)
    sizes = [7, 0, 1, 12, 5, 30]
    graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    logits = (2 * torch.randn(len(graph), dtype=torch.float64)).requires_grad_()
    label = (torch.rand(len(graph)) < 0.3).double()
    label[graph == 4] = 0  # a question without a positive fact
    label[graph == 2] = 1  # and one without a negative
    fact_ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    mine = retrieval_loss(logits, label, fact_ptr, rho=0.7, margin=margin)
    wanted = _by_definition(logits, label, graph, len(sizes), 0.7, margin)
    torch.testing.assert_close(mine, wanted)
    (ours,) = torch.autograd.grad(mine, logits)
    (theirs,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(ours, theirs)


def test_questions_without_gold_and_padding_have_no_part():
    logits, fact_ptr = torch.randn(7, requires_grad=True), torch.tensor([0, 2, 2, 4, 5]).int()
    loss = retrieval_loss(logits, torch.zeros(7), fact_ptr, rho=0.7, margin=1.0)
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, logits)[0].any()
    label = torch.tensor([0.0, 1, 0, 0, 1, 1, 1])
    loss = retrieval_loss(logits, label, fact_ptr, rho=0.7, margin=1.0)
    same = retrieval_loss(logits[:5], label[:5], fact_ptr, rho=0.7, margin=1.0)
    assert torch.equal(loss, same)
    assert not torch.autograd.grad(loss, logits)[0][5:].any()


def test_balance_makes_the_weighted_norm_a_share_of_the_generators():
    generator, retriever = torch.randn(50), 1e3 * torch.randn(50)
    weight = balance_weight(generator, retriever, 0.9)
    torch.testing.assert_close((weight * retriever).norm(), 0.9 * generator.norm())
    assert torch.isfinite(balance_weight(generator, torch.zeros(50), 0.9))
