"""The retrieval loss against its definition over pairs, in float64."""

from __future__ import annotations

import pytest
import torch

from dragkit.retriever.losses import (
    balance_weight,
    leave_one_out_weight,
    posterior_weight,
    retrieval_loss,
)


def _by_definition(logits, label, graph, num_graphs, rho, margin):
    total = logits.new_zeros(())
    for g in range(num_graphs):
        is_member = graph == g
        positive, negative = logits[is_member & (label == 1)], logits[is_member & (label == 0)]
        if len(positive) == 0:
            continue
        p = torch.sigmoid(logits[is_member])
        y = label[is_member]
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
    label[graph == 4] = 0  # no positive fact
    label[graph == 2] = 1  # no negative fact
    fact_ptr = torch.tensor([0, *sizes]).cumsum(0).int()
    loss = retrieval_loss(logits, label, fact_ptr, rho=0.7, margin=margin)
    expected = _by_definition(logits, label, graph, len(sizes), 0.7, margin)
    torch.testing.assert_close(loss, expected)
    grad, expected_grad = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(grad, expected_grad)


def test_questions_without_positive_facts_and_padding_are_left_out():
    logits, fact_ptr = torch.randn(7, requires_grad=True), torch.tensor([0, 2, 2, 4, 5]).int()
    loss = retrieval_loss(logits, torch.zeros(7), fact_ptr, rho=0.7, margin=1.0)
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, logits)[0].any()
    label = torch.tensor([0.0, 1, 0, 0, 1, 1, 1])
    loss = retrieval_loss(logits, label, fact_ptr, rho=0.7, margin=1.0)
    unpadded = retrieval_loss(logits[:5], label[:5], fact_ptr, rho=0.7, margin=1.0)
    assert torch.equal(loss, unpadded)
    assert not torch.autograd.grad(loss, logits)[0][5:].any()


def test_balance_weight_sets_the_ratio_of_the_norms():
    generator, retriever = torch.randn(50), 1e3 * torch.randn(50)
    weight = balance_weight(generator, retriever, 0.9)
    torch.testing.assert_close((weight * retriever).norm(), 0.9 * generator.norm())
    assert torch.isfinite(balance_weight(generator, torch.zeros(50), 0.9))


def test_posterior_weights_are_bounded_and_shift_with_no_constant():
    loss = torch.tensor([[1.0, 500.0], [2.0, 0.0], [4.0, 1e6]], dtype=torch.float64)
    likelihood = torch.exp(-loss[:, 0])
    weight = posterior_weight(loss)
    torch.testing.assert_close(weight[:, 0], 1 / 3 - likelihood / likelihood.sum())
    torch.testing.assert_close(
        weight[:, 1], torch.tensor([1 / 3, -2 / 3, 1 / 3], dtype=torch.float64)
    )
    torch.testing.assert_close(posterior_weight(loss + 700), weight)


def test_both_weights_favour_the_same_draws_where_losses_differ_little():
    """To first order both are the difference to the mean, over M and over M - 1."""
    loss = 20 + 1e-5 * torch.randn(4, 3, dtype=torch.float64)
    expected = leave_one_out_weight(loss) * 3 / 4
    torch.testing.assert_close(posterior_weight(loss), expected, rtol=1e-4, atol=1e-9)
