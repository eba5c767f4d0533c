"""Triton forward of message_passing_parity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from ..noise import dropout_scale, dropout_threshold
from ..triton_math import kept_bits
from .parity_walk import parity_tile, seed_argument, split, sums_of_rows, widened
from .tiles import COLUMNS, wide_spec
from .walk import block_rows


@triton.jit
def _store_slots(
    plus,
    minus,
    offs_n,
    mask_n,
    graph,
    offs_c,
    mask_c,
    num_columns,
    instruction_ptr,
    seed_ptr,
    out_ptr,
    num_instructions,
    threshold,
    scale,
    DIRECTION: tl.constexpr,
):
    """out[v, 2k + d] = S+ relu(i_k) + S- relu(-i_k) for every instruction k, with dropout."""
    mask = mask_n[:, None] & mask_c[None, :]
    for first in range(0, num_instructions, 4):
        keep = tl.full(plus.shape, 15, tl.int32)
        if threshold > 0:
            # The words of a counter serve four instructions.
            keep = kept_bits(
                tl.load(seed_ptr), offs_n.to(tl.int32)[:, None], first // 4, offs_c[None, :],
                threshold, DIRECTION,
            )  # fmt: skip
        for k in range(first, tl.minimum(first + 4, num_instructions)):
            at = (graph * num_instructions + k)[:, None] * num_columns + offs_c[None, :]
            up, down = split(tl.load(instruction_ptr + at, mask=mask, other=0.0))
            value = tl.fma(minus, down, plus * up)
            value = tl.where(((keep >> (k - first)) & 1) != 0, value * scale, 0.0)
            row = (offs_n * num_instructions + k) * 2 + DIRECTION
            tl.store(out_ptr + row[:, None] * num_columns + offs_c[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_nodes", "num_instructions", "threshold"])
def _message_passing_parity_fwd_kernel(
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
    node_graph_ptr,
    seed_ptr,
    out_ptr,
    num_nodes,
    num_instructions,
    threshold,
    scale,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[v, 2k + d] = S+_d relu(i_k) + S-_d relu(-i_k) for a tile of nodes v and a block of
    columns, with S+-_F = sum_{e: tail=v} n p[head] relu(+-u) + p_v relu(+-u_self), S_I likewise."""
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    graph = tl.load(node_graph_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    plus, minus = sums_of_rows(
        offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr, tail_fact_ptr,
        fact_relation_ptr, head_ptr, tail_count_ptr, p_ptr, rel_fwd_ptr, self_fwd_ptr,
        BLOCK_N, BLOCK_C,
    )  # fmt: skip
    _store_slots(
        plus, minus, offs_n, mask_n, graph, offs_c, mask_c, num_columns, instruction_ptr,
        seed_ptr, out_ptr, num_instructions, threshold, scale, 0,
    )  # fmt: skip
    plus, minus = sums_of_rows(
        offs_n, mask_n, offs_c, mask_c, num_columns, head_begin_ptr, head_fact_ptr,
        fact_relation_ptr, tail_ptr, head_count_ptr, p_ptr, rel_inv_ptr, self_inv_ptr,
        BLOCK_N, BLOCK_C,
    )  # fmt: skip
    _store_slots(
        plus, minus, offs_n, mask_n, graph, offs_c, mask_c, num_columns, instruction_ptr,
        seed_ptr, out_ptr, num_instructions, threshold, scale, 1,
    )  # fmt: skip


def message_passing_parity_fwd(
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    head: Tensor,
    tail: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    pair_relation: Tensor,
    fact_pair: Tensor,
    head_count: Tensor,
    tail_count: Tensor,
    node_graph: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """Launches the kernel; see `dragkit::message_passing_parity_fwd`."""
    num_nodes, (_, num_instructions, num_columns) = p.shape[0], instruction.shape
    out = p.new_empty((num_nodes, 2 * num_instructions, num_columns), dtype=torch.float32)
    if out.numel() == 0:
        return out
    floats = widened(p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    walks = (head, tail, tail_ptr, tail_fact, head_ptr, head_fact)
    fact_relation = pair_relation.index_select(0, fact_pair)
    tile = parity_tile(num_columns)
    _message_passing_parity_fwd_kernel[tile.grid(num_nodes, num_columns)](
        *floats,
        *(x.contiguous() for x in walks),
        fact_relation,
        *(x.contiguous() for x in (head_count, tail_count, node_graph)),
        seed_argument(seed, p),
        out,
        num_nodes,
        num_instructions,
        dropout_threshold(dropout),
        dropout_scale(dropout),
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )
    return out


KERNELS = tuple(
    wide_spec(
        _message_passing_parity_fwd_kernel,
        "*fp32",
        parity_tile(columns),
        "BLOCK_N",
        Budget(registers=128, shared=8192, wide_loads=6),
        {"fact_relation_ptr": "*i32", "scale": "fp32", "seed_ptr": "*i64"},
    )
    for columns in COLUMNS
)
