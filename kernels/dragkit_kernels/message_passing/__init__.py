"""Message passing over the facts of a pack: one ReaRev layer, collapsed over instructions.

A message depends on its sender only through the scalar p. So the products of relations and
instructions are formed once per (graph, relation) pair, before the facts are visited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from ..orders import FactIndex, check_fact_index
from . import op as _op  # noqa: F401  (registers the ops)
from .per_instruction import message_passing_per_instruction
from .reference import message_passing_ref

__all__ = ["message_passing", "message_passing_per_instruction", "message_passing_ref"]


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

    with n = `tail_count` and m = `head_count` of the index. Sums run in float32 (float64 if an
    argument is float64) and in a fixed order. Only gradients that autograd needs are computed. Node
    rows in `fact_index` are not checked against N.

    Args:
        h: float [N, C] node states.
        p: float [N] node distribution, the weight of each sender.
        table_fwd, table_inv: float [P, C] rows of the (graph, relation) pairs, for messages from
            head to tail and from tail to head.
        self_table: float [B, C] rows of the self-loops.
        weight: float [C, C], applied as h @ weight, with any strides.
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
    num_nodes, width = h.shape
    check_shape(op, "p", p, (num_nodes,))
    check_shape(op, "table_fwd", table_fwd, (fact_index.num_pairs, width))
    check_shape(op, "table_inv", table_inv, (fact_index.num_pairs, width))
    check_shape(op, "self_table", self_table, (None, width))
    check_shape(op, "weight", weight, (width, width))
    check_shape(op, "bias", bias, (width,))
    check_shape(op, "node_graph", node_graph, (num_nodes,))
    check_float(op, h=h, p=p, table_fwd=table_fwd, table_inv=table_inv)
    check_float(op, self_table=self_table, weight=weight, bias=bias)
    check_index(op, node_graph=node_graph)
    check_fact_index(op, fact_index)
    inputs = (h, p, table_fwd, table_inv, self_table, weight, bias)
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.message_passing_fwd(*inputs, list(fact_index), node_graph, triton)
