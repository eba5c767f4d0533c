"""A million facts at one node, and a draw from a question with a million facts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dragkit_kernels import (
    fact_loss,
    fact_scores,
    gumbel_topk,
    message_passing,
    relation_sum,
    segment_softmax,
    top_facts,
)
from dragkit_kernels.testing import Adjacency, adjacency, assert_close, gradients, leaves

FACTS, WIDTH = 10**6, 2
# Tolerance of a sequential float32 sum of FACTS numbers.
LONG_SUM = 1e-3


@pytest.fixture(scope="module")
def star() -> Adjacency:
    """Node 0 is the tail of every fact. Each fact has a different head."""
    head = torch.arange(1, FACTS + 1)
    return adjacency([(FACTS + 1, FACTS)], head, torch.zeros_like(head), head % 7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_hub_receives_every_message(star: Adjacency) -> None:
    fact_index, nodes = star.fact_index, FACTS + 1
    h, p = random(nodes, WIDTH), random(nodes)
    fwd, inv, self_table = random(7, WIDTH), random(7, WIDTH), random(1, WIDTH)
    inputs = leaves([h, p, fwd, inv, self_table, torch.eye(WIDTH), torch.zeros(WIDTH)])
    out = message_passing(*inputs, fact_index=fact_index, node_graph=star.node_graph)
    pair = fact_index.fact_pair.long()
    messages = (p[1:, None].double() * fwd[pair].double()).sum(0)
    hub = h[0].double() + messages + p[0].double() * self_table[0].double()
    assert_close(out[0], hub.relu(), tolerance=LONG_SUM)
    in_float32 = torch.zeros(1, WIDTH).index_add(0, pair * 0, p[1:, None] * fwd[pair])[0]
    limit = 2 * (in_float32.double() - messages).abs().max() + 1e-6 * messages.abs().max()
    assert (out[0] - hub.relu()).abs().max() <= limit
    others = h[1:].double() + p[0].double() * inv[pair].double()
    assert_close(out[1:], (others + p[1:, None].double() * self_table.double()).relu())
    # dp of a sender is the sum of its table row over the columns where the hub is positive.
    positive = (out[0] > 0).double()
    (dp,) = torch.autograd.grad(out[0].sum(), [inputs[1]])
    assert_close(dp[1:], fwd[pair].double() @ positive)

    sums = relation_sum(fwd, fact_index=fact_index)
    assert_close(sums[0], fwd[pair].double().sum(0), tolerance=LONG_SUM)
    assert torch.equal(sums[1:], fwd[pair])


def test_scores_and_softmax(star: Adjacency) -> None:
    fact_index = star.fact_index
    a, b, c = random(FACTS + 1), random(7), 2 * random(FACTS + 1)
    scores = leaves([a, b, c, torch.zeros(())])
    out = fact_scores(*scores, fact_index=fact_index)
    assert_close(out, a[1:].double() + b[fact_index.fact_pair.long()].double() + c[0].double())
    grad = torch.ones_like(out)
    grads = gradients(out, scores, grad)
    assert grads[2][0] == FACTS and not grads[2][1:].any() and grads[3] == FACTS
    wanted = torch.softmax(a.double(), 0)
    assert_close(segment_softmax(a, star.node_ptr), wanted, tolerance=LONG_SUM)


@pytest.mark.parametrize("k", [0, 100, 3000])
def test_a_draw_from_a_million_facts(k: int) -> None:
    ptr = torch.tensor([0, 0, FACTS], dtype=torch.int32)
    logits, noise = random(FACTS), random(1, FACTS)[0]
    drawn = gumbel_topk(logits, ptr, k, noise=noise, mode="exact_k", max_facts=FACTS)
    best = torch.argsort(logits + noise, descending=True, stable=True)[:k]
    assert drawn.count.tolist() == [0, k]
    assert torch.equal(drawn.index[1].long(), best)
    assert_close(drawn.soft.double().sum(), torch.tensor(float(k)), tolerance=1e-3)
    best = torch.argsort(logits, descending=True, stable=True)[:k]
    assert torch.equal(top_facts(logits, ptr, k, max_facts=FACTS).index[1].long(), best)


def test_the_loss_of_a_million_facts() -> None:
    ptr = torch.tensor([0, FACTS, FACTS], dtype=torch.int32)
    logits = random(FACTS).requires_grad_()
    label = torch.zeros(FACTS)
    label[:: FACTS // 50] = 1.0
    loss = fact_loss(logits, label, ptr, rho=0.5, margin=0.5)
    x = logits.detach().double().requires_grad_()
    bce = F.binary_cross_entropy_with_logits(x, label.double())
    positive, negative = x[label == 1], x[label == 0]
    rank = torch.relu(0.5 - (positive[:, None] - negative)).mean()
    wanted = 0.5 * bce + 0.5 * rank
    assert_close(loss, torch.stack([wanted.detach(), torch.zeros(())]), tolerance=2e-6)
    (want,) = torch.autograd.grad(wanted, x)
    assert_close(gradients(loss, [logits], torch.ones(2))[0], want)
