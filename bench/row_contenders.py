"""Problems on rows of C values: the layer, its sum over facts, the first node states, the gate.

What does not depend on the leaves (sorted orders, int64 indices) is computed before, for all
contenders. Every problem takes the pack, the dtype, C as `width` and K as `count`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from bench.packs import Pack
from bench.problems import Op, Problem, random_leaf
from bench.pyg_rearev import Layer
from dragkit.retriever.layers import ReasoningLayer, gate_pairs
from dragkit_kernels import (
    grouped_index,
    message_passing,
    relation_gate,
    relation_sum,
    resolve_backend,
)

# How a library sums rows over facts. Arguments: a weight for each fact or None, the table of pairs,
# and the direction (True: from heads to tails).
RowSum = Callable[[Tensor | None, Tensor, bool], Tensor]


def message_bytes(pack: Pack, width: int, size: int) -> tuple[float, float]:
    """Bytes of `message_passing` as kernels/README.md counts them, in values of `size` bytes."""
    fact_index = pack.fact_index
    tables = width * (2 * fact_index.num_pairs + pack.num_graphs + width)
    states = width * fact_index.num_nodes
    facts = fact_index.num_facts
    return size * (2 * states + tables) + 24 * facts, size * (4 * states + 2 * tables) + 40 * facts


def _gate_bytes(pack: Pack, width: int, count: int, size: int) -> tuple[float, float]:
    gates = 2 * pack.fact_index.num_pairs * count * width
    inputs = 2 * pack.num_relations * width + pack.num_graphs * count * width
    return size * (gates + inputs), size * (gates + 2 * inputs)


def _row_sums(pack: Pack) -> dict[str, RowSum]:
    """The ways of other libraries; torch_scatter's may be missing."""
    fact_index = pack.fact_index
    sent = {}
    for forward in (True, False):
        ends = (
            (fact_index.tail_ptr, fact_index.tail_perm)
            if forward
            else (fact_index.head_ptr, fact_index.head_perm)
        )
        sent[forward] = *ends, fact_index.fact_pair[ends[1].long()]

    def embedding_bag(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        ptr, fact, pair = sent[forward]
        weight = None if weight is None else weight.index_select(0, fact)
        options = {"mode": "sum", "per_sample_weights": weight, "include_last_offset": True}
        return F.embedding_bag(pair, table, ptr, **options)

    def segment_csr(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        import torch_scatter

        ptr, fact, pair = sent[forward]
        rows = table.index_select(0, pair)
        if weight is not None:
            rows = weight.index_select(0, fact).unsqueeze(1) * rows
        return torch_scatter.segment_csr(rows, ptr.long(), reduce="sum")

    def index_add(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        # Sums in float32 like the kernels'.
        rows = table.float().index_select(0, pack.pair)
        if weight is not None:
            rows = weight.float().unsqueeze(1) * rows
        zeros = rows.new_zeros(fact_index.num_nodes, table.shape[1])
        summed = zeros.index_add(0, pack.edge_index[1 if forward else 0], rows)
        return summed.to(table.dtype)

    return {
        "index_add": index_add,
        "embedding_bag, its own autograd": embedding_bag,
        "torch_scatter": segment_csr,
    }


class TableMessage(MessagePassing):
    """o_v = sum_{e: target=v} p[source_e] table[pair_e] with PyG."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)

    def forward(self, p: Tensor, edge_index: Tensor, rows: Tensor) -> Tensor:
        """float [N, 1], int64 [2, E], float [E, C] to float [N, C]."""
        return self.propagate(edge_index, p=p, rows=rows, size=(p.shape[0], p.shape[0]))

    def message(self, p_j: Tensor, rows: Tensor) -> Tensor:
        """float [E, C]."""
        return p_j * rows


class _CollapsedLayer(nn.Module):
    """Our layer on one pack, from relation vectors."""

    def __init__(self, pack: Pack, width: int, count: int) -> None:
        super().__init__()
        self.layer, self.pack = ReasoningLayer(width, count, 0.0), pack
        like = torch.empty(2, pack.num_relations, device=pack.device)
        self.pairs = gate_pairs(pack.fact_index, pack.num_graphs, like.transpose(0, 1))
        self.node_graph = pack.node_graph.int()

    def forward(self, h: Tensor, p: Tensor, x: Tensor, instruction: Tensor) -> tuple[Tensor, ...]:
        """float [N, C], [N], [R+1, 2, C], [B, K, C] to float [N, C]."""
        tables, fact_index = self.layer.prepare(x.transpose(0, 1)), self.pack.fact_index
        return (self.layer(h, p, tables, instruction, fact_index, self.pairs, self.node_graph),)


def layer(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """One reasoning layer from relation vectors and instructions, as ReaRev publishes it."""
    device, nodes, relations = pack.device, pack.fact_index.num_nodes, pack.num_relations
    make = {"dtype": dtype, "device": device}
    torch.manual_seed(0)
    mine = _CollapsedLayer(pack, width, count).to(**make)
    names, weights = zip(*mine.named_parameters(), strict=True)
    leaves = [
        random_leaf(nodes, width, **make, seed=1),
        torch.rand(nodes, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_(),
        random_leaf(relations + 1, 2, width, **make, seed=3),
        random_leaf(pack.num_graphs, count, width, **make, seed=4),
    ]

    def collapsed(*leaves: Tensor) -> tuple[Tensor, ...]:
        if leaves[4] is weights[0]:
            return mine(*leaves[:4])
        return functional_call(mine, dict(zip(names, leaves[4:], strict=True)), leaves[:4])

    loops = torch.arange(nodes, device=device)
    edge_index = torch.cat([pack.edge_index, loops.expand(2, -1)], dim=1)
    edge_type = torch.cat([pack.relation, torch.full_like(loops, relations)])
    edge_graph = torch.cat([pack.fact_graph, pack.node_graph])

    def pyg(*, per_fact: bool) -> Op:
        theirs = Layer(width, count, per_fact=per_fact)
        theirs.relation, theirs.update = mine.layer.relation, mine.layer.update

        def run(h: Tensor, p: Tensor, x: Tensor, i: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return (theirs(h, p.to(dtype), x, i, edge_index, edge_type, edge_graph),)

        return run

    rows = 2 * (pack.fact_index.num_pairs + pack.num_graphs)
    gate = _gate_bytes(pack, width, count, dtype.itemsize)
    message = message_bytes(pack, width, dtype.itemsize)
    flops = 2.0 * width**2 * (nodes + rows * count + 2 * relations)
    once = "PyG, relations projected once"
    return Problem(
        name="layer",
        about=pack.sizes() | {"C": width, "K": count},
        op="message_passing",
        leaves=[*leaves, *weights],
        call=collapsed,
        peers={once: pyg(per_fact=False), "PyG, relations projected per fact": pyg(per_fact=True)},
        compiled=[once],
        bytes=(gate[0] + message[0], gate[1] + message[1]),
        flops=(flops, 2 * flops),
        relu=True,
    )


def messages(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`message_passing` alone, against other libraries' sums of the same collapsed tables."""
    nodes, pairs = pack.fact_index.num_nodes, pack.fact_index.num_pairs
    make = {"dtype": dtype, "device": pack.device}
    p = torch.rand(nodes, generator=torch.Generator().manual_seed(2)).to(pack.device)
    leaves = [
        random_leaf(nodes, width, **make, seed=1),
        p.requires_grad_(),
        random_leaf(pairs, width, **make, seed=3),
        random_leaf(pairs, width, **make, seed=4),
        random_leaf(pack.num_graphs, width, **make, seed=5),
        random_leaf(width, width, **make, seed=6, scale=width**-0.5),
        random_leaf(width, **make, seed=7),
    ]
    where = {"fact_index": pack.fact_index, "node_graph": pack.node_graph.int()}
    (head, tail), table_message = pack.edge_index, TableMessage()

    def by(total: RowSum, *, nodewise: bool = False) -> Op:
        def run(
            h: Tensor, p: Tensor, fwd: Tensor, inv: Tensor, loop: Tensor, w: Tensor, b: Tensor
        ) -> tuple[Tensor, ...]:
            p = p.to(dtype)
            sent, returned = (p, p) if nodewise else (p[head], p[tail])
            sums = total(sent, fwd, True) + total(returned, inv, False)
            kept = p.unsqueeze(1) * loop.index_select(0, pack.node_graph)
            return (torch.relu(torch.addmm(b, h, w) + kept + sums),)

        return run

    def pyg(p: Tensor, table: Tensor, forward: bool) -> Tensor:
        index = pack.edge_index if forward else pack.edge_index.flip(0)
        return table_message(p.unsqueeze(1), index, table[pack.pair])

    flops = 2.0 * nodes * width**2
    return Problem(
        name="message_passing",
        about=pack.sizes() | {"C": width},
        op="message_passing",
        leaves=leaves,
        call=lambda *leaves: (message_passing(*leaves, **where),),
        peers={"PyG propagate over the tables": by(pyg, nodewise=True)}
        | {name: by(total) for name, total in _row_sums(pack).items()},
        compiled=["PyG propagate over the tables", "index_add"],
        bytes=message_bytes(pack, width, dtype.itemsize),
        flops=(flops, 2 * flops),
        relu=True,
    )


def starts(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`relation_sum`: a node's first state from its facts' relations."""
    fact_index = pack.fact_index
    head, tail = pack.edge_index

    def by(total: RowSum) -> Op:
        return lambda table: (total(None, table, True) + total(None, table, False),)

    def pyg(table: Tensor) -> tuple[Tensor, ...]:
        rows, nodes = table[pack.pair], fact_index.num_nodes
        return (scatter(rows, tail, 0, nodes) + scatter(rows, head, 0, nodes),)

    size = (
        width * (fact_index.num_nodes + fact_index.num_pairs) * dtype.itemsize
        + 16 * fact_index.num_facts
    )
    sums = 2 * width * fact_index.num_facts
    return Problem(
        name="relation_sum",
        about=pack.sizes() | {"C": width},
        op="relation_sum",
        leaves=[random_leaf(fact_index.num_pairs, width, dtype=dtype, device=pack.device, seed=1)],
        call=lambda table: (relation_sum(table, fact_index=fact_index),),
        peers={"PyG scatter": pyg} | {name: by(total) for name, total in _row_sums(pack).items()},
        compiled=["PyG scatter", "index_add"],
        bytes=(size, size),
        flops=(sums, sums),
    )


def gates(pack: Pack, dtype: torch.dtype, width: int, count: int) -> Problem:
    """`relation_gate` against the three operators that one writes for it."""
    make = {"dtype": dtype, "device": pack.device}
    relation = random_leaf(2, pack.num_relations, width, **make, seed=1)
    where = (pack.fact_index.pair_relation, pack.fact_index.pair_graph)
    row, graph = (tensor.long() for tensor in where)
    grouped = {}
    if resolve_backend("relation_gate", relation) == "triton":
        # The layers of a model share these, so they are not part of the time.
        grouped = {
            "pairs_by_relation": grouped_index(where[0], pack.num_relations),
            "pairs_by_graph": grouped_index(where[1], pack.num_graphs),
        }

    def plain(relation: Tensor, instruction: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(relation[:, row].unsqueeze(2) * instruction[graph]),)

    # Product and ReLU; in the backward the mask, and a product and a sum for each of two gradients.
    values = 2 * pack.fact_index.num_pairs * count * width
    return Problem(
        name="relation_gate",
        about=pack.sizes() | {"C": width, "K": count},
        op="relation_gate",
        leaves=[relation, random_leaf(pack.num_graphs, count, width, **make, seed=2)],
        call=lambda *leaves: (relation_gate(*leaves, *where, **grouped),),
        peers={"indexing, product, ReLU": plain},
        compiled=["indexing, product, ReLU"],
        bytes=_gate_bytes(pack, width, count, dtype.itemsize),
        flops=(2 * values, 5 * values),
    )
