"""dragkit::fact_rows_* and gated_rows_*: the rows of selected facts, and their gates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from .places import places_of

if HAS_TRITON:
    from .backward import fact_rows_bwd, gated_rows_bwd
    from .forward import fact_rows_fwd, gated_rows_fwd
else:
    fact_rows_bwd = fact_rows_fwd = gated_rows_bwd = gated_rows_fwd = None

_FACTS = "Tensor index, Tensor head, Tensor fact_pair, Tensor tail, Tensor? group_row"


def _torch_fact_fwd(
    node: Tensor,
    relation: Tensor,
    index: Tensor,
    head: Tensor,
    fact_pair: Tensor,
    tail: Tensor,
    group_row: Tensor | None,
) -> Tensor:
    """[node[head] ; relation[pair] ; node[tail]] of every place; see fact_rows."""
    width = 2 * node.shape[1] + relation.shape[1]
    if (head if group_row is None else group_row).shape[0] == 0:
        return node.new_zeros(index.shape[0], width)
    # Row 0 stands in at empty places, whose values are cleared afterwards.
    rows = places_of(index, head, fact_pair, tail, group_row, 0, 0)
    parts = (node, rows.head), (relation, rows.pair), (node, rows.tail)
    out = torch.cat([table.index_select(0, row) for table, row in parts], 1)
    return out.masked_fill_((index < 0).unsqueeze(1), 0.0)


def _torch_fact_bwd(
    grad: Tensor,
    index: Tensor,
    head: Tensor,
    fact_pair: Tensor,
    tail: Tensor,
    group_row: Tensor | None,
    num_nodes: int,
    num_pairs: int,
    node_columns: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """dnode_v = sum over the places with head v, and with tail v; drelation_r over those of r."""
    dtype = accumulator_dtype(grad)
    rows = places_of(index, head, fact_pair, tail, group_row, num_nodes, num_pairs)
    widths = [node_columns, grad.shape[1] - 2 * node_columns, node_columns]
    by_head, by_pair, by_tail = grad.to(dtype).split(widths, 1)
    d_node = d_relation = grad.new_empty(0)
    # One more row takes what comes from empty places.
    if output_mask[0]:
        out = by_head.new_zeros(num_nodes + 1, node_columns)
        out.index_add_(0, rows.head.long(), by_head).index_add_(0, rows.tail.long(), by_tail)
        d_node = out[:-1].to(grad.dtype)
    if output_mask[1]:
        out = by_pair.new_zeros(num_pairs + 1, widths[1]).index_add_(0, rows.pair.long(), by_pair)
        d_relation = out[:-1].to(grad.dtype)
    return d_node, d_relation


def _fact_fake(node: Tensor, relation: Tensor, index: Tensor, *rest: object) -> Tensor:
    return node.new_empty(index.shape[0], 2 * node.shape[1] + relation.shape[1])


def _fact_bwd_fake(grad: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    num_nodes, num_pairs, columns, mask, _ = rest[-5:]
    return (
        grad.new_empty(num_nodes, columns) if mask[0] else grad.new_empty(0),
        grad.new_empty(num_pairs, grad.shape[1] - 2 * columns) if mask[1] else grad.new_empty(0),
    )


def _fact_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    node, relation, *facts, ctx.triton = inputs
    ctx.sizes = (*node.shape, relation.shape[0])
    ctx.save_for_backward(*facts)


def _fact_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:2])
    num_nodes, columns, num_pairs = ctx.sizes
    grads = torch.ops.dragkit.fact_rows_bwd(
        grad, *ctx.saved_tensors, num_nodes, num_pairs, columns, mask, ctx.triton
    )
    return (*(g if need else None for g, need in zip(grads, mask, strict=True)), *(None,) * 6)


def _torch_gated_fwd(vectors: Tensor, gate: Tensor) -> Tensor:
    """gate_i vectors_i."""
    return (vectors * gate.unsqueeze(1)).to(vectors.dtype)


def _torch_gated_bwd(
    grad: Tensor, vectors: Tensor, gate: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """dvectors_i = gate_i grad_i, dgate_i = <grad_i, vectors_i>."""
    d_vectors, d_gate = vectors.new_empty(0), gate.new_empty(0)
    if output_mask[0]:
        d_vectors = (grad * gate.unsqueeze(1)).to(vectors.dtype)
    if output_mask[1]:
        dtype = accumulator_dtype(grad, vectors, gate)
        d_gate = (grad.to(dtype) * vectors.to(dtype)).sum(1).to(gate.dtype)
    return d_vectors, d_gate


def _gated_fake(vectors: Tensor, gate: Tensor, triton: bool) -> Tensor:
    return vectors.new_empty(vectors.shape)


def _gated_bwd_fake(
    grad: Tensor, vectors: Tensor, gate: Tensor, output_mask: list[bool], triton: bool
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape if wanted else 0)
        for x, wanted in zip((vectors, gate), output_mask, strict=True)
    )


def _gated_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    vectors, gate, ctx.triton = inputs
    ctx.save_for_backward(vectors, gate)


def _gated_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:2])
    grads = torch.ops.dragkit.gated_rows_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)
    return (*(g if need else None for g, need in zip(grads, mask, strict=True)), None)


register(
    f"fact_rows_fwd(Tensor node, Tensor relation, {_FACTS}, bool triton) -> Tensor",
    _torch_fact_fwd,
    _fact_fake,
    triton=fact_rows_fwd,
)
register(
    f"fact_rows_bwd(Tensor grad, {_FACTS}, SymInt num_nodes, SymInt num_pairs, "
    "SymInt node_columns, bool[] output_mask, bool triton) -> (Tensor, Tensor)",
    _torch_fact_bwd,
    _fact_bwd_fake,
    triton=fact_rows_bwd,
)
register(
    "gated_rows_fwd(Tensor vectors, Tensor gate, bool triton) -> Tensor",
    _torch_gated_fwd,
    _gated_fake,
    triton=gated_rows_fwd,
)
register(
    "gated_rows_bwd(Tensor grad, Tensor vectors, Tensor gate, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor)",
    _torch_gated_bwd,
    _gated_bwd_fake,
    triton=gated_rows_bwd,
)
register_gradient("fact_rows_fwd", _fact_backward, _fact_setup)
register_gradient("gated_rows_fwd", _gated_backward, _gated_setup)
forbid_gradient("fact_rows_bwd")
forbid_gradient("gated_rows_bwd")
