"""The problems with one number for each node or fact: softmax, fact scores, choice of facts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import softmax

from bench.kernel_packs import Pack
from bench.kernel_ways import Contender, Cost, Problem, compiled, ours, random_leaf, scattered
from dragkit_kernels import (
    fact_scores,
    fact_scores_ref,
    gumbel_topk,
    gumbel_topk_ref,
    logistic_noise,
    segment_softmax,
    segment_softmax_ref,
)
from dragkit_kernels.segments import padded_rows

_TEMPERATURE = 0.5
_APART = 1e-5


def node_softmax(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """`segment_softmax` over the nodes of every graph."""
    nodes, graphs = pack.orders.num_nodes, pack.num_graphs
    score = random_leaf(nodes, dtype=dtype, device=pack.device, seed=1)
    ptr = pack.node_ptr.long()

    def pyg() -> tuple[Tensor, ...]:
        return (softmax(score, pack.node_graph, num_nodes=graphs),)

    def scatter_softmax() -> tuple[Tensor, ...]:
        from torch_scatter.composite import scatter_softmax

        return (scatter_softmax(score, pack.node_graph, dim=0, dim_size=graphs),)

    size = dtype.itemsize
    return Problem(
        name="segment_softmax",
        about=pack.sizes(),
        leaves=[score],
        truth=lambda score: (segment_softmax_ref(score, pack.node_ptr),),
        contenders=[
            *ours("segment_softmax", score, lambda: (segment_softmax(score, pack.node_ptr),)),
            Contender("PyG softmax, by index", pyg),
            Contender("PyG softmax, by offsets", lambda: (softmax(score, ptr=ptr),)),
            compiled("PyG softmax, by index", pyg, compile_),
            scattered(scatter_softmax),
        ],
        dtype=dtype,
        # Scores in their dtype, shares in float32.
        # Maximum, difference, exponential, sum, quotient; s (g - sum s g).
        cost=Cost((nodes * (size + 4), nodes * (size + 8)), (5 * nodes, 4 * nodes)),
    )


def scores(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """`fact_scores`, three numbers for each fact: the tables are given, in float32 as always."""
    orders = pack.orders
    make = {"dtype": dtype, "device": pack.device}
    head, pair, tail, bias = leaves = [
        random_leaf(orders.num_nodes, **make, seed=1),
        random_leaf(orders.num_pairs, **make, seed=2),
        random_leaf(orders.num_nodes, **make, seed=3),
        random_leaf(**make, seed=4),
    ]
    source, target = pack.edge_index

    def plain() -> tuple[Tensor, ...]:
        return (head[source] + pair[pack.pair] + tail[target] + bias,)

    size = 16 * orders.num_facts + 8 * orders.num_nodes + 4 * orders.num_pairs
    return Problem(
        name="fact_scores",
        about=pack.sizes(),
        leaves=leaves,
        truth=lambda *leaves: (fact_scores_ref(*leaves, orders=orders),),
        contenders=[
            *ours("fact_scores", head, lambda: (fact_scores(*leaves, orders=orders),)),
            Contender("indexing and sums", plain),
            compiled("indexing and sums", plain, compile_),
        ],
        dtype=dtype,
        cost=Cost((size, size), (3 * orders.num_facts, 4 * orders.num_facts)),
    )


def fact_head(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """The same from the states: a linear map of [h_s ; x_r ; h_t], which others concatenate."""
    orders = pack.orders
    make = {"dtype": dtype, "device": pack.device}
    h = random_leaf(orders.num_nodes, width, **make, seed=1)
    x = random_leaf(orders.num_pairs, width, **make, seed=2)
    weight = random_leaf(1, 3 * width, **make, seed=3, scale=width**-0.5)
    bias = random_leaf(1, **make, seed=4)
    source, target = pack.edge_index

    def kernels() -> tuple[Tensor, ...]:
        blocks = weight.view(3, -1)
        ends = (h @ blocks[::2].t()).float()
        middle = (x @ blocks[1]).float()
        return (fact_scores(ends[:, 0], middle, ends[:, 1], bias.float()[0], orders=orders),)

    def joined(
        h: Tensor = h, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias
    ) -> tuple[Tensor, ...]:
        rows = torch.cat([h[source], x[pack.pair], h[target]], dim=1)
        return (F.linear(rows, weight, bias).squeeze(1),)

    rows = orders.num_nodes + orders.num_pairs
    size = 16 * orders.num_facts + 8 * orders.num_nodes + 4 * orders.num_pairs
    states = rows * width * dtype.itemsize
    flops = 2.0 * width * (2 * orders.num_nodes + orders.num_pairs)
    return Problem(
        name="fact_scores from states",
        about=pack.sizes() | {"C": width},
        leaves=[h, x, weight, bias],
        truth=joined,
        contenders=[
            *ours("fact_scores", h.float(), kernels),
            Contender("PyG: concatenation and Linear", joined),
            compiled("PyG: concatenation and Linear", joined, compile_),
        ],
        dtype=dtype,
        cost=Cost((size + states, size + 2 * states), (flops, 2 * flops)),
    )


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


def choice(mode: str) -> Callable[..., Problem]:
    """The problem of `gumbel_topk` in one mode: 100 facts of each graph, 20 of small ones."""

    def problem(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
        return _choice(pack, dtype, mode, compile_)

    return problem


def _choice(pack: Pack, dtype: torch.dtype, mode: str, compile_: bool) -> Problem:
    facts, graphs, most = pack.orders.num_facts, pack.num_graphs, pack.max_facts
    device, ptr = pack.device, pack.fact_ptr
    k = 100 if most >= 200 else 20
    seed = torch.tensor(7, device=device)
    question = torch.arange(graphs, device=device)
    noise = logistic_noise(seed, question, ptr, num_facts=facts)
    drawn = random_leaf(facts, dtype=dtype, device=device, seed=1).detach()
    # About k facts of a graph fire. More would leave keys whose relaxed choice is one to the last
    # digit, and then its slope s (1 - s) is rounding.
    drawn += math.log(k / max(facts / graphs - k, 1))
    logits = _distinct_keys(drawn, noise, pack.fact_graph).requires_grad_()
    options = {"temperature": _TEMPERATURE, "mode": mode}
    given = {"noise": noise, "max_facts": most} | options
    inside = {"seed": seed, "question_key": question, "max_facts": most} | options
    place = torch.arange(k, device=device)

    def reference(logits: Tensor) -> tuple[Tensor, ...]:
        given = {"noise": noise.to(logits.dtype), "max_facts": most, "estimator": "concrete"}
        found = gumbel_topk_ref(logits, ptr, k, **given, **options)
        return found.gate, found.index

    def with_noise(options: dict[str, object]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            found = gumbel_topk(logits, ptr, k, **options)
            return found.gate, found.index

        return call

    def topk_rows(key: Tensor, soft: Tensor, rows: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Gates and facts of padded rows; the last row of `key` and `soft` is padding."""
        best, column = key[rows].topk(slots, dim=-1)
        kept = (best > 0) | (place[:slots] == 0)
        fact = torch.where(kept, rows.gather(-1, column), -1)
        picked = soft[fact]  # -1 is the padding
        return kept + picked - picked.detach(), fact

    def padded() -> tuple[Tensor, ...]:
        key = F.pad(logits + noise, (0, 1), value=float("-inf"))
        rows = padded_rows(ptr, facts, most)
        soft = torch.sigmoid(key / _TEMPERATURE)
        slots = min(k, most)
        gate, fact = topk_rows(key, soft, rows, slots)
        short = (0, k - slots)
        return F.pad(gate, short), F.pad(fact, short, value=-1).int()

    bounds = ptr.tolist()

    def loop() -> tuple[Tensor, ...]:
        gates, found = [], []
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            key = F.pad(logits[a:b] + noise[a:b], (0, 1), value=float("-inf"))
            soft = torch.sigmoid(key / _TEMPERATURE)
            slots = min(k, b - a)
            gate, fact = topk_rows(key, soft, torch.arange(b - a, device=device), slots)
            short = (0, k - slots)
            gates.append(F.pad(gate, short))
            found.append(F.pad(torch.where(fact < 0, fact, fact + a), short, value=-1))
        return torch.stack(gates), torch.stack(found).int()

    contenders = [
        *ours("gumbel_topk", logits, with_noise(given)),
        *(
            Contender(f"{c.name}, noise drawn inside", c.run, False, c.replay, c.obstacle)
            for c in ours("gumbel_topk", logits, with_noise(inside))
        ),
    ]
    if mode == "bernoulli":
        contenders += [
            Contender("torch.topk over padded rows", padded),
            compiled("torch.topk over padded rows", padded, compile_),
            Contender("torch.topk, a loop over questions", loop),
        ]
    else:
        contenders.append(Contender("our reference, autograd", lambda: reference(logits)))
    chosen = 8 * graphs * k
    return Problem(
        name=f"gumbel_topk, {mode}",
        about=pack.sizes() | {"k": k},
        leaves=[logits],
        truth=reference,
        contenders=contenders,
        dtype=dtype,
        # Key and sigmoid of each fact, its slope at the chosen ones; choosing counts nothing.
        cost=Cost((8 * facts + chosen, 8 * facts + chosen / 2), (6 * facts, 4 * graphs * k)),
    )
