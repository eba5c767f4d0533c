"""Message passing over the facts of a pack: the collapsed layer, its parity form, the node start.

The message of a fact depends on the sender only through its scalar p, so all products of relations
with instructions are made once per (graph, relation) pair before the facts are visited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactIndex, check_fact_index
from . import op as _op  # noqa: F401  (registers the ops)
from .parity import message_passing_per_instruction
from .reference import message_passing_ref, relation_sum_ref

__all__ = [
    "message_passing",
    "message_passing_per_instruction",
    "message_passing_ref",
    "relation_sum",
    "relation_sum_ref",
]


def message_passing(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    fact_index: FactIndex,
    node_graph: Tensor,
    backend: str = "auto",
) -> Tensor:
    """One ReaRev layer, collapsed over instructions and directions (Mavromatis & Karypis 2022).

    h'_v = relu(h_v W + b + sum_{e: tail=v} n_e p[head_e] Y^F[pair_e]
    + sum_{e: head=v} m_e p[tail_e] Y^I[pair_e] + p_v Y^self[graph_v])

    with n the orders' tail counts and m their head counts.

    Sums run in float32 (float64 if an argument is) and in a fixed order; a gradient that nobody
    asks for is not computed. Node rows in `fact_index` are trusted, not checked.

    Args:
        h: float [N, C] node states.
        p: float [N] weight of each sender, the node distribution.
        table_fwd, table_inv: float [P, C] rows of the (graph, relation) pairs, head-to-tail and
            tail-to-head.
        self_table: float [B, C] rows of the self-loops.
        weight: float [C, C], applied as h @ weight, any strides.
        bias: float [C].
        fact_index: the facts.
        node_graph: int32 [N], ascending.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, C] with the dtype of `h`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "message_passing"
    check_shape(op, "h", h, (fact_index.num_nodes, None))
    nodes, width = h.shape
    check_shape(op, "p", p, (nodes,))
    check_shape(op, "table_fwd", table_fwd, (fact_index.num_pairs, width))
    check_shape(op, "table_inv", table_inv, (fact_index.num_pairs, width))
    check_shape(op, "self_table", self_table, (None, width))
    check_shape(op, "weight", weight, (width, width))
    check_shape(op, "bias", bias, (width,))
    check_shape(op, "node_graph", node_graph, (nodes,))
    check_float(op, h=h, p=p, table_fwd=table_fwd, table_inv=table_inv)
    check_float(op, self_table=self_table, weight=weight, bias=bias)
    check_index(op, node_graph=node_graph)
    check_fact_index(op, fact_index)
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.message_passing_fwd(*inputs, list(fact_index), node_graph, triton)


def relation_sum(table: Tensor, *, fact_index: FactIndex, backend: str = "auto") -> Tensor:
    """Start of the node states: every node sums the rows of its incident facts, both directions.

    out_v = sum_{e: tail=v} n_e table[pair_e] + sum_{e: head=v} m_e table[pair_e]

    with n the orders' tail counts and m their head counts.

    Args:
        table: float [P, C], one row per (graph, relation) pair.
        fact_index: the facts.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, C] with the dtype of `table`; a node without facts gets zeros.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    check_shape("relation_sum", "table", table, (fact_index.num_pairs, None))
    check_float("relation_sum", table=table)
    check_fact_index("relation_sum", fact_index)
    triton = resolve_backend("relation_sum", table, backend) == "triton"
    return torch.ops.dragkit.relation_sum_fwd(table, list(fact_index), triton)
