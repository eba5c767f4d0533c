"""Triton backward of message_passing_parity: from the gradient of the slots to that of the sums.

A tile of nodes never crosses a graph here, so that its part of the instructions' gradient is a sum
over its rows; the parts are added in the order of the tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from ..noise import dropout_scale, dropout_threshold
from ..segments import segment_ids, segment_ptr
from ..triton_math import kept_bits
from .parity_reduce import launch_instruction, launch_p, launch_relations
from .parity_walk import seed_argument, slots_tile, split, sums_of_rows, widened
from .tiles import COLUMNS, wide_spec


@triton.jit
def _slots_of_direction(
    plus,
    minus,
    offs_n,
    mask_n,
    graph,
    offs_c,
    mask_c,
    num_columns,
    grad_ptr,
    p_ptr,
    own_ptr,
    instruction_ptr,
    seed_ptr,
    ds_ptr,
    part_self_ptr,
    part_instruction_ptr,
    num_instructions,
    threshold,
    scale,
    DIRECTION: tl.constexpr,
):
    """Gradients of S+ and S- of a tile, and its parts of those of the instructions and self-loop.

    The choice between S+ and S- is by the sign of what multiplies them; at zero both get nothing.
    """
    tile = tl.program_id(0).to(tl.int64)
    mask = mask_n[:, None] & mask_c[None, :]
    d_plus = tl.zeros(plus.shape, tl.float32)
    d_minus = tl.zeros(plus.shape, tl.float32)
    for first in range(0, num_instructions, 4):
        keep = tl.full(plus.shape, 15, tl.int32)
        if threshold > 0:
            keep = kept_bits(
                tl.load(seed_ptr), offs_n.to(tl.int32)[:, None], first // 4, offs_c[None, :],
                threshold, DIRECTION,
            )  # fmt: skip
        for k in range(first, tl.minimum(first + 4, num_instructions)):
            row = (offs_n * num_instructions + k) * 2 + DIRECTION
            at = row[:, None] * num_columns + offs_c[None, :]
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
            grad = tl.where(((keep >> (k - first)) & 1) != 0, grad * scale, 0.0)
            at = (graph * num_instructions + k) * num_columns + offs_c
            instruction = tl.load(instruction_ptr + at, mask=mask_c, other=0.0)
            up, down = split(instruction)
            d_plus = tl.fma(grad, up[None, :], d_plus)
            d_minus = tl.fma(grad, down[None, :], d_minus)
            part = tl.sum(grad * tl.where(instruction[None, :] < 0, -minus, plus), 0)
            part = tl.where(instruction == 0, 0.0, part)
            at = ((tile * 2 + DIRECTION) * num_instructions + k) * num_columns + offs_c
            tl.store(part_instruction_ptr + at, part, mask=mask_c)
    at = (offs_n * 4 + 2 * DIRECTION)[:, None] * num_columns + offs_c[None, :]
    tl.store(ds_ptr + at, d_plus, mask=mask)
    tl.store(ds_ptr + num_columns + at, d_minus, mask=mask)
    p = tl.load(p_ptr + offs_n, mask=mask_n, other=0.0)
    own = tl.load(own_ptr + offs_c, mask=mask_c, other=0.0)
    part = tl.sum(p[:, None] * tl.where(own[None, :] < 0, -d_minus, d_plus), 0)
    at = (tile * 2 + DIRECTION) * num_columns + offs_c
    tl.store(part_self_ptr + at, tl.where(own == 0, 0.0, part), mask=mask_c)


@triton.jit(do_not_specialize=["num_graphs", "num_instructions", "threshold"])
def _message_passing_parity_bwd_slots_kernel(
    grad_ptr,
    p_ptr,
    rel_fwd_ptr,
    rel_inv_ptr,
    self_fwd_ptr,
    self_inv_ptr,
    instruction_ptr,
    head_ptr,
    tail_ptr,
    tail_begin_ptr,
    tail_fact_ptr,
    head_begin_ptr,
    head_fact_ptr,
    fact_relation_ptr,
    head_count_ptr,
    tail_count_ptr,
    graph_begin_ptr,
    tile_begin_ptr,
    tile_graph_ptr,
    seed_ptr,
    ds_ptr,
    part_self_ptr,
    part_instruction_ptr,
    num_graphs,
    num_instructions,
    threshold,
    scale,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dS+_d[v] = sum_k g[v, 2k + d] relu(i_k), dS-_d[v] with relu(-i_k), where the forward kept g.

    Parts of a tile: of the instructions i_k > 0: sum_v g S+, i_k < 0: -sum_v g S-; of the
    self-loops u > 0: sum_v p_v dS+, u < 0: -sum_v p_v dS-.
    """
    tile = tl.program_id(0)
    graph = tl.load(tile_graph_ptr + tile)
    # Tiles after the last graph's have no rows; what they add is zero.
    live = graph < num_graphs
    begin = tl.load(graph_begin_ptr + graph, mask=live, other=0).to(tl.int64)
    end = tl.load(graph_begin_ptr + graph + 1, mask=live, other=0)
    begin += (tile - tl.load(tile_begin_ptr + graph, mask=live, other=0)).to(tl.int64) * BLOCK_N
    graph = tl.where(live, graph, 0)
    offs_n = begin + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    plus, minus = sums_of_rows(
        offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, tail_fact_ptr,
        fact_relation_ptr, head_ptr, tail_count_ptr, p_ptr, rel_fwd_ptr, self_fwd_ptr,
        BLOCK_N, BLOCK_C,
    )  # fmt: skip
    _slots_of_direction(
        plus, minus, offs_n, mask_n, graph, offs_c, mask_c, num_columns, grad_ptr, p_ptr,
        self_fwd_ptr, instruction_ptr, seed_ptr, ds_ptr, part_self_ptr, part_instruction_ptr,
        num_instructions, threshold, scale, 0,
    )  # fmt: skip
    plus, minus = sums_of_rows(
        offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, head_fact_ptr,
        fact_relation_ptr, tail_ptr, head_count_ptr, p_ptr, rel_inv_ptr, self_inv_ptr,
        BLOCK_N, BLOCK_C,
    )  # fmt: skip
    _slots_of_direction(
        plus, minus, offs_n, mask_n, graph, offs_c, mask_c, num_columns, grad_ptr, p_ptr,
        self_inv_ptr, instruction_ptr, seed_ptr, ds_ptr, part_self_ptr, part_instruction_ptr,
        num_instructions, threshold, scale, 1,
    )  # fmt: skip


class GraphTiles(NamedTuple):
    """Tiles of nodes that do not cross a graph.

    Attributes:
        graph_ptr: int32 [B+1] first node of each graph; tile_ptr: int32 [B+1] its first tile.
        graph: int64 [T] graph of each tile, B for those after the last; T needs no look at a size.
    """

    graph_ptr: Tensor
    tile_ptr: Tensor
    graph: Tensor


def graph_tiles(node_graph: Tensor, num_graphs: int, rows: int) -> GraphTiles:
    """The tiles of `rows` nodes of every graph."""
    graph_ptr = segment_ptr(node_graph, num_graphs)
    tiles = (graph_ptr.diff() + (rows - 1)) // rows
    tile_ptr = F.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    graph = segment_ids(tile_ptr, node_graph.shape[0] // rows + num_graphs)
    return GraphTiles(graph_ptr, tile_ptr, graph)


def message_passing_parity_bwd(
    grad: Tensor,
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    *rest: object,
) -> tuple[Tensor, ...]:
    """Launches what output_mask asks for; see `dragkit::message_passing_parity_bwd`."""
    *orders, node_graph, seed, dropout, output_mask = rest
    orders = [x.contiguous() for x in orders]
    *walks, _, _, pair_relation, fact_pair, head_count, tail_count = orders
    inputs = (p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    out = [
        x.new_empty(x.shape if wanted else (0,), dtype=torch.float32)
        for x, wanted in zip(inputs, output_mask, strict=True)
    ]
    if grad.numel() == 0:
        return tuple(g.zero_().to(x.dtype) for g, x in zip(out, inputs, strict=True))
    floats = widened(*inputs)
    num_graphs, num_instructions, num_columns = instruction.shape
    tile = slots_tile(num_columns)
    tiles = graph_tiles(node_graph.contiguous(), num_graphs, tile.rows)
    parts = len(tiles.graph)
    ds = grad.new_empty((p.shape[0], 4, num_columns))
    part_self = grad.new_empty((parts, 2, num_columns))
    part_instruction = grad.new_empty((parts, 2, num_instructions, num_columns))
    walks += [pair_relation.index_select(0, fact_pair), head_count, tail_count]
    _message_passing_parity_bwd_slots_kernel[tile.grid(parts * tile.rows, num_columns)](
        grad.contiguous(),
        *floats,
        *walks,
        *tiles,
        seed_argument(seed, p),
        ds,
        part_self,
        part_instruction,
        num_graphs,
        num_instructions,
        dropout_threshold(dropout),
        dropout_scale(dropout),
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    if output_mask[0]:
        launch_p(out[0], ds, floats[1:5], walks)
    if output_mask[1] or output_mask[2]:
        launch_relations(out[1:3], ds, floats, orders)
    if output_mask[3] or output_mask[4]:
        own = part_self.sum(0)
        for place in (3, 4):
            if output_mask[place]:
                out[place] = own[place - 3]
    if output_mask[5]:
        launch_instruction(out[5], part_instruction, tiles.tile_ptr)
    return tuple(g.to(x.dtype) for g, x in zip(out, inputs, strict=True))


_TYPES = {
    **{"fact_relation_ptr": "*i32", "tile_begin_ptr": "*i32", "tile_graph_ptr": "*i64"},
    **{"scale": "fp32", "seed_ptr": "*i64"},
}
KERNELS = tuple(
    wide_spec(
        _message_passing_parity_bwd_slots_kernel,
        "*fp32",
        slots_tile(columns),
        "BLOCK_N",
        Budget(registers=128, shared=8192, wide_loads=2),
        _TYPES,
    )
    for columns in COLUMNS
)
