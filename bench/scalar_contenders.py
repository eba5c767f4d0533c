"""Problems with one number for each node or fact: softmax, fact scores, the draw of facts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import softmax

from bench.packs import Pack
from bench.problems import Case, Op, Problem
from dragkit_kernels import (
    fact_scores,
    gumbel_topk,
    gumbel_topk_ref,
    logistic_noise,
    segment_softmax,
)

_TEMPERATURE = 0.5
_MIN_KEY_GAP = 1e-5


def segment_softmax_problem(case: Case) -> Problem:
    """`segment_softmax` over the nodes of every graph."""
    pack, dtype = case.pack, case.dtype
    num_nodes, num_graphs, ptr = pack.fact_index.num_nodes, pack.num_graphs, pack.node_ptr.long()

    def composite(score: Tensor) -> tuple[Tensor, ...]:
        from torch_scatter.composite import scatter_softmax

        return (scatter_softmax(score, pack.node_graph, dim=0, dim_size=num_graphs),)

    return Problem(
        name="segment_softmax",
        about=pack.sizes(),
        op="segment_softmax",
        leaves=[case.leaf(num_nodes, seed=1)],
        call=lambda score: (segment_softmax(score, pack.node_ptr),),
        peers={
            "PyG softmax, by index": lambda score: (
                softmax(score, pack.node_graph, num_nodes=num_graphs),
            ),
            "PyG softmax, by offsets": lambda score: (softmax(score, ptr=ptr),),
            "torch_scatter": composite,
        },
        compiled=["PyG softmax, by index"],
        # Scores are in `dtype`, probabilities in float32.
        bytes=(num_nodes * (dtype.itemsize + 4), num_nodes * (dtype.itemsize + 8)),
        # Forward: maximum, difference, exponential, sum, quotient. Backward: p (g - sum p g).
        flops=(5 * num_nodes, 4 * num_nodes),
    )


def _index_bytes(pack: Pack) -> int:
    """Bytes of three numbers for each fact, from tables of nodes and pairs, in float32."""
    fact_index = pack.fact_index
    return 16 * fact_index.num_facts + 8 * fact_index.num_nodes + 4 * fact_index.num_pairs


def fact_scores_problem(case: Case) -> Problem:
    """`fact_scores`: the sum of three numbers for each fact, from float32 tables."""
    pack = case.pack
    fact_index, (head, tail) = pack.fact_index, pack.edge_index

    def plain(
        head_score: Tensor, pair_score: Tensor, tail_score: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        return (head_score[head] + pair_score[pack.pair] + tail_score[tail] + bias,)

    return Problem(
        name="fact_scores",
        about=pack.sizes(),
        op="fact_scores",
        leaves=[
            case.leaf(fact_index.num_nodes, seed=1),
            case.leaf(fact_index.num_pairs, seed=2),
            case.leaf(fact_index.num_nodes, seed=3),
            case.leaf(seed=4),
        ],
        call=lambda *leaves: (fact_scores(*leaves, fact_index=fact_index),),
        peers={"indexing and sums": plain},
        compiled=["indexing and sums"],
        bytes=(_index_bytes(pack), _index_bytes(pack)),
        flops=(3 * fact_index.num_facts, 4 * fact_index.num_facts),
    )


def fact_head_problem(case: Case) -> Problem:
    """Fact scores from states: a linear map of [h_s ; x_r ; h_t], which the peer concatenates."""
    pack, dtype, width, _ = case
    fact_index, (head, tail) = pack.fact_index, pack.edge_index

    def decomposed(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        # Scores are summed in float32, or in float64 for the expected values.
        accumulator = torch.promote_types(h.dtype, torch.float32)
        blocks = weight.view(3, -1)
        head_score, tail_score = (h @ blocks[::2].t()).to(accumulator).unbind(1)
        pair_score = (x @ blocks[1]).to(accumulator)
        bias = bias.to(accumulator)[0]
        return (fact_scores(head_score, pair_score, tail_score, bias, fact_index=fact_index),)

    def concatenated(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat([h[head], x[pack.pair], h[tail]], dim=1)
        return (F.linear(rows, weight, bias).squeeze(1),)

    states = (fact_index.num_nodes + fact_index.num_pairs) * width * dtype.itemsize
    flops = 2.0 * width * (2 * fact_index.num_nodes + fact_index.num_pairs)
    return Problem(
        name="fact_scores from states",
        about=pack.sizes() | {"C": width},
        op="fact_scores",
        leaves=[
            case.leaf(fact_index.num_nodes, width, seed=1),
            case.leaf(fact_index.num_pairs, width, seed=2),
            case.leaf(1, 3 * width, seed=3, scale=width**-0.5),
            case.leaf(1, seed=4),
        ],
        call=decomposed,
        peers={"PyG: concatenation and Linear": concatenated},
        compiled=["PyG: concatenation and Linear"],
        bytes=(_index_bytes(pack) + states, _index_bytes(pack) + 2 * states),
        flops=(flops, 2 * flops),
    )


def _distinct_keys(logits: Tensor, noise: Tensor, graph: Tensor) -> Tensor:
    """Logits such that keys of a graph differ from one another, and from zero, by `_MIN_KEY_GAP`.

    Libraries break ties differently, and two ways to draw the same noise differ in the last digits.

    Raises:
        ValueError: a hundred redraws of the keys that are too near did not part them.
    """
    for seed in range(100):
        key, order = (logits + noise).sort(stable=True)
        graph_of_key, by_graph = graph[order].sort(stable=True)
        key, order = key[by_graph], order[by_graph]
        near = key.abs() < _MIN_KEY_GAP
        near[1:] |= (key.diff() < _MIN_KEY_GAP) & (graph_of_key.diff() == 0)
        moved = order[near]
        if not len(moved):
            return logits
        generator = torch.Generator().manual_seed(seed)
        logits[moved] += 0.01 * torch.randn(len(moved), generator=generator).to(logits)
    raise ValueError("gumbel_topk: some random keys are still too near after 100 redraws")


def _topk_over_padding(pack: Pack, noise: Tensor, k: int) -> Op:
    """`torch.topk` over one padded row for each graph."""
    num_facts, max_facts = pack.fact_index.num_facts, pack.max_facts
    column = pack.fact_ptr[:-1, None].long() + torch.arange(max_facts, device=pack.device)
    # The element after the last fact is the padding.
    rows = torch.where(column < pack.fact_ptr[1:, None], column, num_facts)
    num_columns = min(k, max_facts)

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        key = F.pad(logits + noise, (0, 1), value=float("-inf"))
        soft = torch.sigmoid(key / _TEMPERATURE)
        best, position = key[rows].topk(num_columns, dim=-1)
        # The best fact is drawn in any case.
        drawn = (best > 0) | (torch.arange(num_columns, device=key.device) == 0)
        fact = torch.where(drawn, rows.gather(-1, position), -1)
        relaxed = soft[fact]
        # Straight-through: the forward is 0 or 1, the gradient that of the relaxed choice.
        gate, padding = drawn + relaxed - relaxed.detach(), (0, k - num_columns)
        return F.pad(gate, padding), F.pad(fact, padding, value=-1).int()

    return run


def gumbel_topk_problem(case: Case, *, mode: str) -> Problem:
    """`gumbel_topk`: 100 facts of each graph, 20 of small graphs.

    Args:
        mode: "bernoulli" for independent draws, "exact_k" for exactly k facts.
    """
    pack = case.pack
    num_facts, num_graphs, ptr = pack.fact_index.num_facts, pack.num_graphs, pack.fact_ptr
    k = 100 if pack.max_facts >= 200 else 20
    seed = torch.tensor(7, device=pack.device)
    question = torch.arange(num_graphs, device=pack.device)
    noise = logistic_noise(seed, question, ptr, num_facts=num_facts)
    logits = case.leaf(num_facts, seed=1).detach()
    # About k facts of a graph are then drawn. With more, the relaxed choice s of some keys would be
    # 1 to the last digit, and its slope s (1 - s) would be rounding alone.
    logits += math.log(k / max(num_facts / num_graphs - k, 1))
    options = {"max_facts": pack.max_facts, "temperature": _TEMPERATURE, "mode": mode}

    def noise_given(logits: Tensor) -> tuple[Tensor, ...]:
        drawn = gumbel_topk(logits, ptr, k, noise=noise.to(logits.dtype), **options)
        return drawn.gate, drawn.index

    def noise_inside(logits: Tensor) -> tuple[Tensor, ...]:
        drawn = gumbel_topk(logits, ptr, k, seed=seed, question_key=question, **options)
        return drawn.gate, drawn.index

    def reference(logits: Tensor) -> tuple[Tensor, ...]:
        drawn = gumbel_topk_ref(logits, ptr, k, noise=noise, estimator="binary_concrete", **options)
        return drawn.gate, drawn.index

    padded = {"torch.topk over padded rows": _topk_over_padding(pack, noise, k)}
    written = 8 * num_graphs * k
    return Problem(
        name=f"gumbel_topk, {mode}",
        about=pack.sizes() | {"k": k},
        op="gumbel_topk",
        leaves=[_distinct_keys(logits, noise, pack.fact_graph).requires_grad_()],
        call=noise_given,
        variants={", noise drawn inside": noise_inside},
        peers=padded if mode == "bernoulli" else {"our reference, autograd": reference},
        compiled=list(padded) if mode == "bernoulli" else [],
        bytes=(8 * num_facts + written, 8 * num_facts + written / 2),
        # Key and sigmoid of each fact, its slope at the chosen ones. The selection is not counted.
        flops=(6 * num_facts, 4 * num_graphs * k),
    )
