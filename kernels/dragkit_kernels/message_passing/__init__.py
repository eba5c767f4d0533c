"""Message passing over the facts of a pack: the collapsed layer, its parity form, the node start.

The message of a fact depends on the sender only through its scalar p, so all products of relations
with instructions are made once per (graph, relation) pair before the facts are visited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactOrders
from . import op as _op  # noqa: F401  (registers the ops)
from . import parity_op as _parity_op  # noqa: F401
from .reference import message_passing_parity_ref, message_passing_ref, relation_sum_ref

__all__ = [
    "message_passing",
    "message_passing_parity",
    "message_passing_parity_ref",
    "message_passing_ref",
    "relation_sum",
    "relation_sum_ref",
]


def _check_orders(op: str, orders: FactOrders) -> None:
    facts, nodes, pairs = orders.num_facts, orders.num_nodes, orders.num_pairs
    for name, size in (
        ("tail", facts),
        ("tail_fact", facts),
        ("head_ptr", nodes + 1),
        ("head_fact", facts),
        ("pair_ptr", pairs + 1),
        ("pair_fact", facts),
        ("fact_pair", facts),
        ("head_count", facts),
        ("tail_count", facts),
    ):
        check_shape(op, f"orders.{name}", getattr(orders, name), (size,))
    for name, tensor in zip(orders._fields, orders, strict=True):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: orders.{name} must be int32, got {tensor.dtype}")


def message_passing(
    h: Tensor,
    p: Tensor,
    table_fwd: Tensor,
    table_inv: Tensor,
    self_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    orders: FactOrders,
    node_graph: Tensor,
    score_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One ReaRev layer, collapsed over instructions and directions (Mavromatis & Karypis 2022).

    h'_v = relu(h_v W + b + sum_{e: tail=v} n_e p[head_e] Y^F[pair_e]
    + sum_{e: head=v} m_e p[tail_e] Y^I[pair_e] + p_v Y^self[graph_v])

    with n the orders' tail counts and m their head counts.

    Sums run in float32 (float64 if an argument is) and in a fixed order; a gradient that nobody
    asks for is not computed. Node rows in `orders` are trusted, not checked.

    Args:
        h: float [N, C] node states.
        p: float [N] weight of each sender, the node distribution.
        table_fwd, table_inv: float [P, C] rows of the (graph, relation) pairs, head-to-tail and
            tail-to-head.
        self_table: float [B, C] rows of the self-loops.
        weight: float [C, C], applied as h @ weight, any strides.
        bias: float [C].
        orders: the facts.
        node_graph: int32 [N], ascending.
        score_weight: float [S, C] linear scores to take of the new states along with them, S at
            least 1. Not for states that meet a dropout before their score.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, C] with the dtype of `h`; with score weights also h' score_weight^T [N, S], made of the
        stored (rounded) states in float32 (float64 if either is).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "message_passing"
    check_shape(op, "h", h, (orders.num_nodes, None))
    nodes, width = h.shape
    check_shape(op, "p", p, (nodes,))
    check_shape(op, "table_fwd", table_fwd, (orders.num_pairs, width))
    check_shape(op, "table_inv", table_inv, (orders.num_pairs, width))
    check_shape(op, "self_table", self_table, (None, width))
    check_shape(op, "weight", weight, (width, width))
    check_shape(op, "bias", bias, (width,))
    check_shape(op, "node_graph", node_graph, (nodes,))
    check_float(op, h=h, p=p, table_fwd=table_fwd, table_inv=table_inv)
    check_float(op, self_table=self_table, weight=weight, bias=bias)
    check_index(op, node_graph=node_graph)
    _check_orders(op, orders)
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    if score_weight is not None:
        check_shape(op, "score_weight", score_weight, (None, width))
        check_float(op, score_weight=score_weight)
        if score_weight.shape[0] == 0:
            raise ValueError(f"{op}: score_weight must have rows, got [0, {width}]")
        triton = resolve_backend(op, widest(*inputs, score_weight), backend) == "triton"
        return torch.ops.dragkit.message_passing_scored_fwd(
            score_weight, *inputs, *_walks(orders), node_graph, triton
        )
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.message_passing_fwd(*inputs, *_walks(orders), node_graph, triton)


def relation_sum(table: Tensor, *, orders: FactOrders, backend: str = "auto") -> Tensor:
    """Start of the node states: every node sums the rows of its incident facts, both directions.

    out_v = sum_{e: tail=v} n_e table[pair_e] + sum_{e: head=v} m_e table[pair_e]

    with n the orders' tail counts and m their head counts.

    Args:
        table: float [P, C], one row per (graph, relation) pair.
        orders: the facts.
        backend: "auto", "triton" or "torch".

    Returns:
        [N, C] with the dtype of `table`; a node without facts gets zeros.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    check_shape("relation_sum", "table", table, (orders.num_pairs, None))
    check_float("relation_sum", table=table)
    _check_orders("relation_sum", orders)
    triton = resolve_backend("relation_sum", table, backend) == "triton"
    return torch.ops.dragkit.relation_sum_fwd(table, *_walks(orders), triton)


def message_passing_parity(
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    *,
    orders: FactOrders,
    node_graph: Tensor,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sums of the published layer before its linear map, one per instruction and direction.

    out[v, 2k]   = sum_{e: tail=v} n_e p[head_e] relu(u^F[rel_e] * i_k) + p_v relu(u^F_self * i_k)
    out[v, 2k+1] = sum_{e: head=v} m_e p[tail_e] relu(u^I[rel_e] * i_k) + p_v relu(u^I_self * i_k)

    with n the orders' tail counts and m their head counts. With dropout an element (node, slot,
    column) is zero with that probability and else divided by 1 - dropout; which ones follows from
    the seed and the three numbers alone, and the backward pass draws them again.

    Sums run in a fixed order; a gradient that nobody asks for is not computed. Node rows and
    relation rows in `orders` are trusted, not checked.

    Args:
        p: float [N].
        rel_fwd, rel_inv: float [R, C] projected relation vectors u, forward and inverse.
        self_fwd, self_inv: float [C] those of the self-loop.
        instruction: float [B, I, C].
        orders: the facts; node_graph: int32 [N], ascending.
        dropout: probability of an element to be dropped, 0 or more and below 1.
        seed: int64 [], needed with dropout (a tensor, so that nothing waits for the device).
        backend: "auto", "triton" or "torch".

    Returns:
        [N, 2I, C] in float32 (float64 if an argument is).

    Raises:
        ValueError: shapes or dtypes do not fit, or dropout has no seed.
        RuntimeError: Triton was asked for where it cannot run.

    Source: the sums of ReaRev (Mavromatis & Karypis 2022).
    """
    op = "message_passing_parity"
    check_shape(op, "instruction", instruction, (None, None, None))
    width = instruction.shape[2]
    check_shape(op, "p", p, (orders.num_nodes,))
    check_shape(op, "rel_fwd", rel_fwd, (None, width))
    check_shape(op, "rel_inv", rel_inv, tuple(rel_fwd.shape))
    check_shape(op, "self_fwd", self_fwd, (width,))
    check_shape(op, "self_inv", self_inv, (width,))
    check_shape(op, "node_graph", node_graph, (orders.num_nodes,))
    check_float(op, p=p, rel_fwd=rel_fwd, rel_inv=rel_inv, instruction=instruction)
    check_float(op, self_fwd=self_fwd, self_inv=self_inv)
    check_index(op, node_graph=node_graph)
    _check_orders(op, orders)
    _check_dropout(op, dropout, seed)
    inputs = (p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.message_passing_parity_fwd(
        *inputs, *_parity_walks(orders), node_graph, seed if dropout > 0 else None, dropout, triton
    )


def _check_dropout(op: str, dropout: float, seed: Tensor | None) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")
    if seed is None:
        if dropout > 0:
            raise ValueError(f"{op}: dropout {dropout} needs a seed of shape [], got None")
        return
    check_shape(op, "seed", seed, ())
    if seed.dtype != torch.int64:
        raise ValueError(f"{op}: seed must be int64, got {seed.dtype}")


def _parity_walks(orders: FactOrders) -> tuple[Tensor, ...]:
    """The fields of `_walks`, with the relations of the pairs before the facts' pairs."""
    *walks, fact_pair, head_count, tail_count = _walks(orders)
    return (*walks, orders.pair_relation, fact_pair, head_count, tail_count)


def _walks(orders: FactOrders) -> tuple[Tensor, ...]:
    """The fields an op needs, in the order of its schema."""
    return (
        orders.head,
        orders.tail,
        orders.tail_ptr,
        orders.tail_fact,
        orders.head_ptr,
        orders.head_fact,
        orders.pair_ptr,
        orders.pair_fact,
        orders.fact_pair,
        orders.head_count,
        orders.tail_count,
    )
