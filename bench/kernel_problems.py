"""The problems on rows of C values: the layer, its sum over facts, the node start, the gate.

Everything that does not depend on the leaves is made before, for all contenders alike: sorted
orders, int64 indices, sparse matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import scatter

from bench.kernel_packs import Pack
from bench.kernel_ways import (
    Contender,
    Cost,
    Problem,
    RowSum,
    compiled,
    coo_matrices,
    csr_sum,
    embedding_bag_sum,
    index_add_sum,
    ours,
    pyg_sum,
    random_leaf,
    scattered,
    segment_csr_sum,
)
from bench.pyg_rearev import Layer
from dragkit.retriever.layers import ReasoningLayer, gate_pairs
from dragkit_kernels import (
    message_passing,
    relation_gate,
    relation_gate_ref,
    relation_sum,
    relation_sum_ref,
    resolve_backend,
    row_order,
)
from dragkit_kernels.launch import SUM, force_sum


def message_cost(pack: Pack, width: int, size: int) -> tuple[float, float]:
    """Bytes of `message_passing` as kernels/README.md counts them, in values of `size` bytes."""
    orders = pack.orders
    tables = width * (2 * orders.num_pairs + pack.num_graphs + width)
    states = width * orders.num_nodes
    facts = orders.num_facts
    return size * (2 * states + tables) + 24 * facts, size * (4 * states + 2 * tables) + 40 * facts


def _gate_cost(pack: Pack, width: int, count: int, size: int) -> tuple[float, float]:
    gates = 2 * pack.orders.num_pairs * count * width
    relations, instructions = 2 * pack.num_relations * width, pack.num_graphs * count * width
    return (
        size * (gates + relations + instructions),
        size * (gates + 2 * relations + 2 * instructions),
    )


def _summed(p: Tensor, u: Tensor, gate: Tensor, index: tuple[Tensor, ...], nodes: int) -> Tensor:
    """o_v = sum_{e: target=v} p[source_e] relu(u[relation_e] * gate[graph_e])."""
    source, target, relation, graph = index
    message = p[source].unsqueeze(1) * torch.relu(u[relation] * gate[graph])
    return message.new_zeros(nodes, u.shape[1]).index_add(0, target, message)


def layer(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """One reasoning layer from relation vectors and instructions, as ReaRev publishes it.

    Args:
        width: C; count: K; compile_: whether compiled peers run.
    """
    device, nodes, relations = pack.device, pack.orders.num_nodes, pack.num_relations
    make = {"dtype": dtype, "device": device}
    torch.manual_seed(0)
    mine = ReasoningLayer(width, count, 0.0).to(**make)
    h = random_leaf(nodes, width, **make, seed=1)
    p = torch.rand(nodes, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    x = random_leaf(relations + 1, 2, width, **make, seed=3)
    instruction = random_leaf(pack.num_graphs, count, width, **make, seed=4)
    weights = [mine.relation.weight, mine.relation.bias, mine.update.weight, mine.update.bias]
    pairs = gate_pairs(pack.orders, pack.num_graphs, x[:-1])
    node_graph = pack.node_graph.int()

    def collapsed() -> tuple[Tensor, ...]:
        tables = mine.prepare(x.transpose(0, 1))
        return (mine(h, p, tables, instruction, pack.orders, pairs, node_graph),)

    loops = torch.arange(nodes, device=device)
    edge_index = torch.cat([pack.edge_index, loops.expand(2, -1)], dim=1)
    edge_type = torch.cat([pack.relation, torch.full_like(loops, relations)])
    edge_graph = torch.cat([pack.fact_graph, pack.node_graph])

    def pyg(*, per_fact: bool) -> Callable[[], tuple[Tensor, ...]]:
        theirs = Layer(width, count, per_fact=per_fact)
        theirs.relation, theirs.update = mine.relation, mine.update

        def run() -> tuple[Tensor, ...]:
            parts = list(instruction.unbind(1))
            return (theirs(h, p.to(dtype), x, parts, edge_index, edge_type, edge_graph),)

        return run

    matrices = coo_matrices(edge_index, nodes, dtype)

    def published() -> tuple[Tensor, ...]:
        parts, weight = [h], p.to(dtype).unsqueeze(1)
        for k in range(count):
            gate = instruction[:, k].index_select(0, edge_graph)
            for way, source, target in ((0, 0, 3), (1, 1, 2)):
                fact = torch.relu(mine.relation(x[edge_type, way]) * gate)
                fact = fact * torch.sparse.mm(matrices[source], weight)
                parts.append(torch.sparse.mm(matrices[target], fact))
        return (torch.relu(mine.update(torch.cat(parts, dim=1))),)

    def truth(
        h: Tensor,
        p: Tensor,
        x: Tensor,
        instruction: Tensor,
        map_weight: Tensor,
        map_bias: Tensor,
        update_weight: Tensor,
        update_bias: Tensor,
    ) -> tuple[Tensor, ...]:
        u, parts = F.linear(x, map_weight, map_bias), [h]
        for k in range(count):
            for way in (0, 1):
                index = (edge_index[way], edge_index[1 - way], edge_type, edge_graph)
                arguments = (p, u[:, way], instruction[:, k], index, nodes)
                parts.append(checkpoint(_summed, *arguments, use_reentrant=False))
        return (F.linear(torch.cat(parts, dim=1), update_weight, update_bias),)

    size, rows = dtype.itemsize, 2 * (pack.orders.num_pairs + pack.num_graphs)
    gate, message = _gate_cost(pack, width, count, size), message_cost(pack, width, size)
    flops = 2.0 * width**2 * (nodes + rows * count + 2 * relations)
    return Problem(
        name="layer",
        about=pack.sizes() | {"C": width, "K": count},
        leaves=[h, p, x, instruction, *weights],
        truth=truth,
        contenders=[
            *ours("message_passing", h, collapsed),
            Contender("PyG, relations projected once", pyg(per_fact=False)),
            Contender("PyG, relations projected per fact", pyg(per_fact=True)),
            compiled("PyG, relations projected once", pyg(per_fact=False), compile_),
            Contender("ReaRev as published, COO", published),
        ],
        dtype=dtype,
        cost=Cost((gate[0] + message[0], gate[1] + message[1]), (flops, 2 * flops)),
        kink=True,
        # Three products follow one another, each rounded.
        tolerance=(8e-3, 5e-2) if dtype == torch.bfloat16 else None,
    )


def messages(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """`message_passing` alone: what other libraries make of the same collapsed tables."""
    device, nodes, pairs = pack.device, pack.orders.num_nodes, pack.orders.num_pairs
    make = {"dtype": dtype, "device": device}
    h = random_leaf(nodes, width, **make, seed=1)
    p = torch.rand(nodes, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    forward = random_leaf(pairs, width, **make, seed=3)
    inverse = random_leaf(pairs, width, **make, seed=4)
    own = random_leaf(pack.num_graphs, width, **make, seed=5)
    weight = random_leaf(width, width, **make, seed=6, scale=width**-0.5)
    bias = random_leaf(width, **make, seed=7)
    leaves = [h, p, forward, inverse, own, weight, bias]
    node_graph = pack.node_graph.int()
    where = {"orders": pack.orders, "node_graph": node_graph}
    head, tail = pack.edge_index

    def finish(sums: Tensor) -> tuple[Tensor, ...]:
        kept = p.to(dtype).unsqueeze(1) * own.index_select(0, pack.node_graph)
        return (torch.relu(torch.addmm(bias, h, weight) + kept + sums),)

    def by(total: RowSum) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            sent, returned = p.to(dtype).index_select(0, head), p.to(dtype).index_select(0, tail)
            return finish(total(sent, forward, True) + total(returned, inverse, False))

        return run

    with_pyg = pyg_sum(pack)

    def pyg() -> tuple[Tensor, ...]:
        values = p.to(dtype)
        return finish(with_pyg(values, forward, True) + with_pyg(values, inverse, False))

    def truth(
        h: Tensor,
        p: Tensor,
        forward: Tensor,
        inverse: Tensor,
        own: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, ...]:
        out = h @ weight + bias + p.unsqueeze(1) * own[pack.node_graph]
        out = out.index_add(0, tail, p[head].unsqueeze(1) * forward[pack.pair])
        return (out.index_add(0, head, p[tail].unsqueeze(1) * inverse[pack.pair]),)

    def one_hot() -> tuple[Tensor, ...]:
        with force_sum("one-hot"):
            return (message_passing(*leaves, **where),)

    choice = "" if dtype in SUM else f"tables of {dtype} are summed by slots alone"
    runs = resolve_backend("message_passing", h) == "triton"
    flops = 2.0 * nodes * width**2
    return Problem(
        name="message_passing",
        about=pack.sizes() | {"C": width},
        leaves=leaves,
        truth=truth,
        contenders=[
            *ours("message_passing", h, lambda: (message_passing(*leaves, **where),)),
            Contender(
                "dragkit, Triton, one-hot",
                one_hot,
                peer=False,
                obstacle=choice or ("" if runs else f"no Triton kernel runs on a {device.type}"),
            ),
            Contender("PyG propagate over the tables", pyg),
            compiled("PyG propagate over the tables", pyg, compile_),
            Contender("index_add", by(index_add_sum(pack))),
            compiled("index_add", by(index_add_sum(pack)), compile_),
            Contender("embedding_bag, its own autograd", by(embedding_bag_sum(pack))),
            Contender("torch.sparse.mm, CSR", by(csr_sum(pack))),
            scattered(by(segment_csr_sum(pack))),
        ],
        dtype=dtype,
        cost=Cost(message_cost(pack, width, dtype.itemsize), (flops, 2 * flops)),
        kink=True,
    )


def starts(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """`relation_sum`: a node's first state from its facts' relations."""
    orders = pack.orders
    make = {"dtype": dtype, "device": pack.device}
    table = random_leaf(orders.num_pairs, width, **make, seed=1)
    head, tail = pack.edge_index

    def by(total: RowSum) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (total(None, table, True) + total(None, table, False),)

    def pyg() -> tuple[Tensor, ...]:
        rows = table[pack.pair]
        return (
            scatter(rows, tail, 0, orders.num_nodes) + scatter(rows, head, 0, orders.num_nodes),
        )

    size = width * (orders.num_nodes + orders.num_pairs) * dtype.itemsize + 16 * orders.num_facts
    sums = 2 * width * orders.num_facts
    return Problem(
        name="relation_sum",
        about=pack.sizes() | {"C": width},
        leaves=[table],
        truth=lambda table: (relation_sum_ref(table, orders=orders),),
        contenders=[
            *ours("relation_sum", table, lambda: (relation_sum(table, orders=orders),)),
            Contender("PyG scatter", pyg),
            compiled("PyG scatter", pyg, compile_),
            compiled("index_add", by(index_add_sum(pack)), compile_),
            Contender("embedding_bag, its own autograd", by(embedding_bag_sum(pack))),
            Contender("torch.sparse.mm, CSR", by(csr_sum(pack))),
            scattered(by(segment_csr_sum(pack))),
        ],
        dtype=dtype,
        cost=Cost((size, size), (sums, sums)),
    )


def gates(pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool) -> Problem:
    """`relation_gate` against the three operators that one writes for it."""
    make = {"dtype": dtype, "device": pack.device}
    relation = random_leaf(2, pack.num_relations, width, **make, seed=1)
    instruction = random_leaf(pack.num_graphs, count, width, **make, seed=2)
    where = (pack.orders.pair_relation, pack.orders.pair_graph)
    row, graph = (tensor.long() for tensor in where)
    sorted_pairs = {}
    if resolve_backend("relation_gate", relation) == "triton":  # as the model, whose layers share
        sorted_pairs = {
            "relation_order": row_order(where[0], pack.num_relations),
            "graph_order": row_order(where[1], pack.num_graphs),
        }

    def kernels() -> tuple[Tensor, ...]:
        return (relation_gate(relation, instruction, *where, **sorted_pairs),)

    def plain() -> tuple[Tensor, ...]:
        return (torch.relu(relation[:, row].unsqueeze(2) * instruction[graph]),)

    # Product and ReLU; the backward's mask, and a product and a sum for each of two gradients.
    values = 2 * pack.orders.num_pairs * count * width
    return Problem(
        name="relation_gate",
        about=pack.sizes() | {"C": width, "K": count},
        leaves=[relation, instruction],
        truth=lambda *leaves: (relation_gate_ref(*leaves, *where),),
        contenders=[
            *ours("relation_gate", relation, kernels),
            Contender("indexing, product, ReLU", plain),
            compiled("indexing, product, ReLU", plain, compile_),
        ],
        dtype=dtype,
        cost=Cost(_gate_cost(pack, width, count, dtype.itemsize), (2 * values, 5 * values)),
    )
