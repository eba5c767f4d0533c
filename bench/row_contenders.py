"""Problems on rows of C values: the layer, its sum over facts, the first node states, the gate.

What does not depend on the leaves (sorted orders, int64 indices) is computed before the timing, for
all contenders. C is `width` and K is `num_instructions`.
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
from bench.problems import Case, Op, Problem, keep_off_zero, relu_argument
from bench.pyg_rearev import Layer
from dragkit.retriever.layers import ReasoningLayer, gate_pairs
from dragkit_kernels import (
    grouped_index,
    message_passing,
    relation_gate,
    relation_sum,
    resolve_backend,
)

# Sums rows over facts. Arguments: a weight for each fact or None, the table of pairs, and the
# direction (True sends from heads to tails).
RowSum = Callable[[Tensor | None, Tensor, bool], Tensor]


def message_passing_bytes(pack: Pack, width: int, itemsize: int) -> tuple[float, float]:
    """Bytes of `message_passing`, as kernels/README.md counts them."""
    fact_index = pack.fact_index
    tables = width * (2 * fact_index.num_pairs + pack.num_graphs + width)
    states = width * fact_index.num_nodes
    index = fact_index.num_facts
    forward = itemsize * (2 * states + tables) + 24 * index
    return forward, itemsize * (4 * states + 2 * tables) + 40 * index


def _gate_bytes(
    pack: Pack, width: int, num_instructions: int, itemsize: int
) -> tuple[float, float]:
    gates = 2 * pack.fact_index.num_pairs * num_instructions * width
    inputs = 2 * pack.num_relations * width + pack.num_graphs * num_instructions * width
    return itemsize * (gates + inputs), itemsize * (gates + 2 * inputs)


def _row_sums(pack: Pack) -> dict[str, RowSum]:
    """The sums of other libraries, by name."""
    fact_index = pack.fact_index
    by_tail, by_head = (
        (ptr, fact, fact_index.fact_pair[fact.long()])
        for ptr, fact in (
            (fact_index.tail_ptr, fact_index.tail_perm),
            (fact_index.head_ptr, fact_index.head_perm),
        )
    )

    def embedding_bag(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        ptr, fact, pair = by_tail if forward else by_head
        weight = None if weight is None else weight.index_select(0, fact)
        options = {"mode": "sum", "per_sample_weights": weight, "include_last_offset": True}
        return F.embedding_bag(pair, table, ptr, **options)

    def segment_csr(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        import torch_scatter

        ptr, fact, pair = by_tail if forward else by_head
        rows = table.index_select(0, pair)
        if weight is not None:
            rows = weight.index_select(0, fact).unsqueeze(1) * rows
        return torch_scatter.segment_csr(rows, ptr.long(), reduce="sum")

    def index_add(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        # In float32, as the kernels sum.
        rows = table.float().index_select(0, pack.pair)
        if weight is not None:
            rows = weight.float().unsqueeze(1) * rows
        zeros = rows.new_zeros(fact_index.num_nodes, table.shape[1])
        return zeros.index_add(0, pack.edge_index[1 if forward else 0], rows).to(table.dtype)

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

    def __init__(self, pack: Pack, width: int, num_instructions: int) -> None:
        super().__init__()
        self.layer, self.pack = ReasoningLayer(width, num_instructions, 0.0), pack
        # Orthogonal, as `keep_off_zero` needs them.
        nn.init.orthogonal_(self.layer.relation.weight)
        nn.init.orthogonal_(self.layer.update.weight[:, :width])
        like = torch.empty(2, pack.num_relations, device=pack.device)
        self.pairs = gate_pairs(pack.fact_index, pack.num_graphs, like.transpose(0, 1))
        self.node_graph = pack.node_graph.int()

    def forward(self, h: Tensor, p: Tensor, x: Tensor, instruction: Tensor) -> tuple[Tensor, ...]:
        """float [N, C], [N], [R+1, 2, C], [B, K, C] to float [N, C]."""
        tables, fact_index = self.layer.prepare(x.transpose(0, 1)), self.pack.fact_index
        return (self.layer(h, p, tables, instruction, fact_index, self.pairs, self.node_graph),)


def _random_weights(pack: Pack) -> Tensor:
    """p of every node, float32 [N] in [0, 1)."""
    p = torch.rand(pack.fact_index.num_nodes, generator=torch.Generator().manual_seed(2))
    return p.to(pack.device).requires_grad_()


def layer_problem(case: Case) -> Problem:
    """One reasoning layer from relation vectors and instructions, as ReaRev publishes it."""
    pack, dtype, width, num_instructions = case
    num_nodes, num_relations = pack.fact_index.num_nodes, pack.num_relations
    torch.manual_seed(0)
    collapsed = _CollapsedLayer(pack, width, num_instructions).to(pack.device, dtype)
    relation, update = collapsed.layer.relation, collapsed.layer.update
    names, weights = zip(*collapsed.named_parameters(), strict=True)
    h = case.leaf(num_nodes, width, seed=1)
    x = case.leaf(num_relations + 1, 2, width, seed=3)
    instruction = case.leaf(pack.num_graphs, num_instructions, width, seed=4)
    leaves = [h, _random_weights(pack), x, instruction, *weights]

    def ours(*leaves: Tensor) -> tuple[Tensor, ...]:
        # functional_call takes time, and only float64 leaves need it.
        if leaves[4] is weights[0]:
            return collapsed(*leaves[:4])
        return functional_call(collapsed, dict(zip(names, leaves[4:], strict=True)), leaves[:4])

    # The inner ReLU is that of relu(relation(x) * instruction).
    keep_off_zero(x, relation.weight.t(), x @ relation.weight.t() + relation.bias)
    odd = [4 + names.index(name) for name in ("layer.update.weight", "layer.update.bias")]
    keep_off_zero(h, update.weight[:, :width].t(), relu_argument(ours, leaves, odd))

    # The published model has self-loops as edges of one more relation.
    loops = torch.arange(num_nodes, device=pack.device)
    edge_index = torch.cat([pack.edge_index, loops.expand(2, -1)], dim=1)
    edge_type = torch.cat([pack.relation, torch.full_like(loops, num_relations)])
    edge_graph = torch.cat([pack.fact_graph, pack.node_graph])

    def pyg(*, per_fact: bool) -> Op:
        peer = Layer(width, num_instructions, per_fact=per_fact)
        # The same weights, so that their gradients can be compared.
        peer.relation, peer.update = relation, update

        def run(h: Tensor, p: Tensor, x: Tensor, i: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return (peer(h, p.to(dtype), x, i, edge_index, edge_type, edge_graph),)

        return run

    pair_rows = 2 * (pack.fact_index.num_pairs + pack.num_graphs)
    gate = _gate_bytes(pack, width, num_instructions, dtype.itemsize)
    message = message_passing_bytes(pack, width, dtype.itemsize)
    flops = 2.0 * width**2 * (num_nodes + pair_rows * num_instructions + 2 * num_relations)
    once = "PyG, relations projected once"
    return Problem(
        name="layer",
        about=pack.sizes() | {"C": width, "K": num_instructions},
        op="message_passing",
        leaves=leaves,
        call=ours,
        peers={once: pyg(per_fact=False), "PyG, relations projected per fact": pyg(per_fact=True)},
        compiled=[once],
        bytes=(gate[0] + message[0], gate[1] + message[1]),
        flops=(flops, 2 * flops),
    )


def message_passing_problem(case: Case) -> Problem:
    """`message_passing` alone, against other libraries' sums of the same collapsed tables."""
    pack, dtype, width, _ = case
    num_nodes, num_pairs = pack.fact_index.num_nodes, pack.fact_index.num_pairs
    torch.manual_seed(6)
    weight = nn.init.orthogonal_(torch.empty(width, width))
    weight = weight.to(pack.device, dtype).requires_grad_()
    leaves = [
        case.leaf(num_nodes, width, seed=1),
        _random_weights(pack),
        case.leaf(num_pairs, width, seed=3),
        case.leaf(num_pairs, width, seed=4),
        case.leaf(pack.num_graphs, width, seed=5),
        weight,
        case.leaf(width, seed=7),
    ]
    index = {"fact_index": pack.fact_index, "node_graph": pack.node_graph.int()}

    def ours(*leaves: Tensor) -> tuple[Tensor, ...]:
        return (message_passing(*leaves, **index),)

    # Everything but h and p is negated.
    keep_off_zero(leaves[0], weight, relu_argument(ours, leaves, range(2, 7)))
    (head, tail), table_message = pack.edge_index, TableMessage()

    def by(row_sum: RowSum, *, per_node: bool = False) -> Op:
        def run(
            h: Tensor, p: Tensor, fwd: Tensor, inv: Tensor, loop: Tensor, w: Tensor, b: Tensor
        ) -> tuple[Tensor, ...]:
            p = p.to(dtype)
            # PyG's propagate gathers p itself.
            p_head, p_tail = (p, p) if per_node else (p[head], p[tail])
            sums = row_sum(p_head, fwd, True) + row_sum(p_tail, inv, False)
            loops = p.unsqueeze(1) * loop.index_select(0, pack.node_graph)
            return (torch.relu(torch.addmm(b, h, w) + loops + sums),)

        return run

    def pyg(p: Tensor, table: Tensor, forward: bool) -> Tensor:
        index = pack.edge_index if forward else pack.edge_index.flip(0)
        return table_message(p.unsqueeze(1), index, table[pack.pair])

    flops = 2.0 * num_nodes * width**2
    return Problem(
        name="message_passing",
        about=pack.sizes() | {"C": width},
        op="message_passing",
        leaves=leaves,
        call=ours,
        peers={"PyG propagate over the tables": by(pyg, per_node=True)}
        | {name: by(row_sum) for name, row_sum in _row_sums(pack).items()},
        compiled=["PyG propagate over the tables", "index_add"],
        bytes=message_passing_bytes(pack, width, dtype.itemsize),
        flops=(flops, 2 * flops),
    )


def relation_sum_problem(case: Case) -> Problem:
    """`relation_sum`: a node's first state is the sum of its facts' relations."""
    pack, dtype, width, _ = case
    fact_index, (head, tail) = pack.fact_index, pack.edge_index

    def by(row_sum: RowSum) -> Op:
        return lambda table: (row_sum(None, table, True) + row_sum(None, table, False),)

    def pyg(table: Tensor) -> tuple[Tensor, ...]:
        rows, num_nodes = table[pack.pair], fact_index.num_nodes
        return (scatter(rows, tail, 0, num_nodes) + scatter(rows, head, 0, num_nodes),)

    values = width * (fact_index.num_nodes + fact_index.num_pairs)
    num_bytes = values * dtype.itemsize + 16 * fact_index.num_facts
    sums = 2 * width * fact_index.num_facts
    return Problem(
        name="relation_sum",
        about=pack.sizes() | {"C": width},
        op="relation_sum",
        leaves=[case.leaf(fact_index.num_pairs, width, seed=1)],
        call=lambda table: (relation_sum(table, fact_index=fact_index),),
        peers={"PyG scatter": pyg}
        | {name: by(row_sum) for name, row_sum in _row_sums(pack).items()},
        compiled=["PyG scatter", "index_add"],
        bytes=(num_bytes, num_bytes),
        flops=(sums, sums),
    )


def relation_gate_problem(case: Case) -> Problem:
    """`relation_gate` against indexing, a product and a ReLU."""
    pack, dtype, width, num_instructions = case
    relation = case.leaf(2, pack.num_relations, width, seed=1)
    index = (pack.fact_index.pair_relation, pack.fact_index.pair_graph)
    pair_relation, pair_graph = (tensor.long() for tensor in index)
    grouped = {}
    if resolve_backend("relation_gate", relation) == "triton":
        # Not timed, because all layers of a model share these orders.
        grouped = {
            "pairs_by_relation": grouped_index(index[0], pack.num_relations),
            "pairs_by_graph": grouped_index(index[1], pack.num_graphs),
        }

    def plain(relation: Tensor, instruction: Tensor) -> tuple[Tensor, ...]:
        gate = relation[:, pair_relation].unsqueeze(2) * instruction[pair_graph]
        return (torch.relu(gate),)

    values = 2 * pack.fact_index.num_pairs * num_instructions * width
    return Problem(
        name="relation_gate",
        about=pack.sizes() | {"C": width, "K": num_instructions},
        op="relation_gate",
        leaves=[relation, case.leaf(pack.num_graphs, num_instructions, width, seed=2)],
        call=lambda *leaves: (relation_gate(*leaves, *index, **grouped),),
        peers={"indexing, product, ReLU": plain},
        compiled=["indexing, product, ReLU"],
        bytes=_gate_bytes(pack, width, num_instructions, dtype.itemsize),
        # Forward: product and ReLU. Backward: the mask, then a product and a sum for each of the
        # two gradients.
        flops=(2 * values, 5 * values),
    )
