"""Relation vectors gated by instructions: the rows that message passing starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape
from ..orders import GroupedIndex, check_grouped_index
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import relation_gate_ref

__all__ = ["relation_gate", "relation_gate_ref"]


def relation_gate(
    relation: Tensor,
    instruction: Tensor,
    pair_relation: Tensor,
    pair_graph: Tensor,
    *,
    pairs_by_relation: GroupedIndex | None = None,
    pairs_by_graph: GroupedIndex | None = None,
    backend: str = "auto",
) -> Tensor:
    """c[d, r, k] = relu(u[d, relation_r] * i[graph_r, k]) for both directions d (ReaRev).

    Backward, with delta the gradient where c is positive and zero elsewhere:

        du[d, q] = sum over the pairs r of relation q and over k of delta[d, r, k] i[graph_r, k]
        di[g, k] = sum over the pairs r of graph g and over d of delta[d, r, k] u[d, relation_r]

    Args:
        relation: float [2, R, C] projected relation vectors u, forward and inverse.
        instruction: float [B, I, C], I at least 1, with the dtype of `relation`.
        pair_relation, pair_graph: int32 [P] relation and graph of every pair, in any sequence.
        pairs_by_relation, pairs_by_graph: `grouped_index(pair_relation, R)` and
            `grouped_index(pair_graph, B)`, for callers with several gates over the same pairs. Give
            both or neither. Only the kernels' backward reads them, and sorts the pairs if None.
        backend: "auto", "triton" or "torch".

    Returns:
        [2, P, I, C] with the dtype of `relation`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "relation_gate"
    check_shape(op, "instruction", instruction, (None, None, None))
    check_shape(op, "relation", relation, (2, None, instruction.shape[2]))
    check_shape(op, "pair_relation", pair_relation, (None,))
    check_shape(op, "pair_graph", pair_graph, tuple(pair_relation.shape))
    check_float(op, relation=relation, instruction=instruction)
    check_index(op, pair_relation=pair_relation, pair_graph=pair_graph)
    if instruction.shape[1] == 0 or instruction.dtype != relation.dtype:
        raise ValueError(
            f"{op}: instruction must hold at least one instruction per graph, with the dtype of "
            f"relation ({relation.dtype}), got {instruction.shape[1]} of {instruction.dtype}"
        )
    grouped: list[Tensor] = []
    if pairs_by_relation is not None and pairs_by_graph is not None:
        num_pairs = pair_relation.shape[0]
        check_grouped_index(
            op, "pairs_by_relation", pairs_by_relation, num_pairs, relation.shape[1]
        )
        check_grouped_index(op, "pairs_by_graph", pairs_by_graph, num_pairs, instruction.shape[0])
        grouped = [*pairs_by_relation, *pairs_by_graph]
    elif pairs_by_relation is not None or pairs_by_graph is not None:
        raise ValueError(f"{op}: give both pairs_by_relation and pairs_by_graph, or neither")
    triton = resolve_backend(op, relation, backend) == "triton"
    return torch.ops.dragkit.relation_gate_fwd(
        relation, instruction, pair_relation, pair_graph, grouped, triton
    )
