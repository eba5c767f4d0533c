"""Problems with one number for each node or fact: softmax, fact scores, choice of facts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import softmax

from bench.packs import Pack
from bench.problems import Op, Problem, random_leaf
from dragkit_kernels import (
    fact_scores,
    gumbel_topk,
    gumbel_topk_ref,
    logistic_noise,
    segment_softmax,
)

_TEMPERATURE = 0.5
_APART = 1e-5


def node_softmax(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`segment_softmax` over the nodes of every graph."""
    nodes, graphs, ptr = pack.fact_index.num_nodes, pack.num_graphs, pack.node_ptr.long()

    def scatter_softmax(score: Tensor) -> tuple[Tensor, ...]:
        from torch_scatter.composite import scatter_softmax

        return (scatter_softmax(score, pack.node_graph, dim=0, dim_size=graphs),)

    return Problem(
        name="segment_softmax",
        about=pack.sizes(),
        op="segment_softmax",
        leaves=[random_leaf(nodes, dtype=dtype, device=pack.device, seed=1)],
        call=lambda score: (segment_softmax(score, pack.node_ptr),),
        peers={
            "PyG softmax, by index": lambda s: (softmax(s, pack.node_graph, num_nodes=graphs),),
            "PyG softmax, by offsets": lambda score: (softmax(score, ptr=ptr),),
            "torch_scatter": scatter_softmax,
        },
        compiled=["PyG softmax, by index"],
        # Scores in their dtype, shares in float32.
        bytes=(nodes * (dtype.itemsize + 4), nodes * (dtype.itemsize + 8)),
        # Maximum, difference, exponential, sum, quotient; s (g - sum s g).
        flops=(5 * nodes, 4 * nodes),
    )


def scores(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`fact_scores`: three numbers for each fact, from tables that are given in float32."""
    fact_index = pack.fact_index
    make = {"dtype": dtype, "device": pack.device}
    source, target = pack.edge_index

    def plain(head: Tensor, pair: Tensor, tail: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (head[source] + pair[pack.pair] + tail[target] + bias,)

    size = 16 * fact_index.num_facts + 8 * fact_index.num_nodes + 4 * fact_index.num_pairs
    return Problem(
        name="fact_scores",
        about=pack.sizes(),
        op="fact_scores",
        leaves=[
            random_leaf(fact_index.num_nodes, **make, seed=1),
            random_leaf(fact_index.num_pairs, **make, seed=2),
            random_leaf(fact_index.num_nodes, **make, seed=3),
            random_leaf(**make, seed=4),
        ],
        call=lambda *leaves: (fact_scores(*leaves, fact_index=fact_index),),
        peers={"indexing and sums": plain},
        compiled=["indexing and sums"],
        bytes=(size, size),
        flops=(3 * fact_index.num_facts, 4 * fact_index.num_facts),
    )


def fact_head(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """Fact scores from the states: a linear map of [h_s ; x_r ; h_t], which others concatenate."""
    fact_index = pack.fact_index
    make = {"dtype": dtype, "device": pack.device}
    source, target = pack.edge_index

    def kernels(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        blocks = weight.view(3, -1)
        head, tail = (h @ blocks[::2].t()).to(_accumulator(h)).unbind(1)
        middle, bias = (x @ blocks[1]).to(head.dtype), bias.to(head.dtype)[0]
        return (fact_scores(head, middle, tail, bias, fact_index=fact_index),)

    def joined(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat([h[source], x[pack.pair], h[target]], dim=1)
        return (F.linear(rows, weight, bias).squeeze(1),)

    size = 16 * fact_index.num_facts + 8 * fact_index.num_nodes + 4 * fact_index.num_pairs
    states = (fact_index.num_nodes + fact_index.num_pairs) * width * dtype.itemsize
    flops = 2.0 * width * (2 * fact_index.num_nodes + fact_index.num_pairs)
    return Problem(
        name="fact_scores from states",
        about=pack.sizes() | {"C": width},
        op="fact_scores",
        leaves=[
            random_leaf(fact_index.num_nodes, width, **make, seed=1),
            random_leaf(fact_index.num_pairs, width, **make, seed=2),
            random_leaf(1, 3 * width, **make, seed=3, scale=width**-0.5),
            random_leaf(1, **make, seed=4),
        ],
        call=kernels,
        peers={"PyG: concatenation and Linear": joined},
        compiled=["PyG: concatenation and Linear"],
        bytes=(size + states, size + 2 * states),
        flops=(flops, 2 * flops),
    )


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _distinct_keys(logits: Tensor, noise: Tensor, graph: Tensor) -> Tensor:
    """Logits such that no two keys of a graph, and no key and zero, are next to each other.

    Libraries break ties as they like, and two ways to draw the same noise differ in last digits.
    """
    for seed in range(100):
        key, order = (logits + noise).sort(stable=True)
        owner, by_graph = graph[order].sort(stable=True)
        key, order = key[by_graph], order[by_graph]
        near = key.abs() < _APART
        near[1:] |= (key.diff() < _APART) & (owner.diff() == 0)
        moved = order[near]
        if not len(moved):
            return logits
        generator = torch.Generator().manual_seed(seed)
        logits[moved] += 0.01 * torch.randn(len(moved), generator=generator).to(logits)
    raise ValueError("random keys meet again and again")


def _topk_over_padding(pack: Pack, noise: Tensor, k: int) -> Op:
    """`torch.topk` over one padded row for each graph."""
    facts, most = pack.fact_index.num_facts, pack.max_facts
    column = pack.fact_ptr[:-1, None].long() + torch.arange(most, device=pack.device)
    # The element after the last fact is the padding.
    rows = torch.where(column < pack.fact_ptr[1:, None], column, facts)
    slots = min(k, most)

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        key = F.pad(logits + noise, (0, 1), value=float("-inf"))
        soft = torch.sigmoid(key / _TEMPERATURE)
        best, place = key[rows].topk(slots, dim=-1)
        kept = (best > 0) | (torch.arange(slots, device=key.device) == 0)
        fact = torch.where(kept, rows.gather(-1, place), -1)
        picked = soft[fact]
        gate, short = kept + picked - picked.detach(), (0, k - slots)
        return F.pad(gate, short), F.pad(fact, short, value=-1).int()

    return run


def choice(pack: Pack, dtype: torch.dtype, mode: str) -> Problem:
    """`gumbel_topk` in one mode: 100 facts of each graph, 20 of small ones."""
    facts, graphs, ptr = pack.fact_index.num_facts, pack.num_graphs, pack.fact_ptr
    k = 100 if pack.max_facts >= 200 else 20
    seed = torch.tensor(7, device=pack.device)
    question = torch.arange(graphs, device=pack.device)
    noise = logistic_noise(seed, question, ptr, num_facts=facts)
    drawn = random_leaf(facts, dtype=dtype, device=pack.device, seed=1).detach()
    # About k facts of a graph are drawn. With more, some keys' relaxed choice would be one to the
    # last digit, and its slope s (1 - s) would be rounding.
    drawn += math.log(k / max(facts / graphs - k, 1))
    options = {"max_facts": pack.max_facts, "temperature": _TEMPERATURE, "mode": mode}

    def given(logits: Tensor) -> tuple[Tensor, ...]:
        found = gumbel_topk(logits, ptr, k, noise=noise.to(logits.dtype), **options)
        return found.gate, found.index

    def inside(logits: Tensor) -> tuple[Tensor, ...]:
        found = gumbel_topk(logits, ptr, k, seed=seed, question_key=question, **options)
        return found.gate, found.index

    def reference(logits: Tensor) -> tuple[Tensor, ...]:
        found = gumbel_topk_ref(logits, ptr, k, noise=noise, estimator="binary_concrete", **options)
        return found.gate, found.index

    padded = {"torch.topk over padded rows": _topk_over_padding(pack, noise, k)}
    written = 8 * graphs * k
    return Problem(
        name=f"gumbel_topk, {mode}",
        about=pack.sizes() | {"k": k},
        op="gumbel_topk",
        leaves=[_distinct_keys(drawn, noise, pack.fact_graph).requires_grad_()],
        call=given,
        variants={", noise drawn inside": inside},
        peers=padded if mode == "bernoulli" else {"our reference, autograd": reference},
        compiled=list(padded) if mode == "bernoulli" else [],
        bytes=(8 * facts + written, 8 * facts + written / 2),
        # Key and sigmoid of each fact, its slope at the chosen ones. Choosing counts nothing.
        flops=(6 * facts, 4 * graphs * k),
    )


def bernoulli(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`gumbel_topk` of independent draws."""
    return choice(pack, dtype, "bernoulli")


def exact_k(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`gumbel_topk` of exactly k facts."""
    return choice(pack, dtype, "exact_k")
