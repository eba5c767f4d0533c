"""Triton backward of message_passing_parity: from the gradient of the sums to those of the inputs.

`ds` holds four lines per node: the gradients of S+ and S- forward, then inverse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget
from ..segments import segment_ptr
from .parity_walk import add_rows, parity_tile, split
from .tiles import COLUMNS, wide_spec
from .walk import block_rows


@triton.jit
def _own_dots(ds_ptr, own_ptr, offs_n, mask, offs_c, mask_c, num_columns, DIRECTION: tl.constexpr):
    """relu(u) dS+ and relu(-u) dS- of the self-loops of a tile of nodes."""
    up, down = split(tl.load(own_ptr + offs_c, mask=mask_c, other=0.0))
    at = (offs_n * 4 + 2 * DIRECTION)[:, None] * num_columns + offs_c[None, :]
    d_plus = tl.load(ds_ptr + at, mask=mask, other=0.0)
    d_minus = tl.load(ds_ptr + num_columns + at, mask=mask, other=0.0)
    return up[None, :] * d_plus, down[None, :] * d_minus


@triton.jit(do_not_specialize=["num_nodes"])
def _message_passing_parity_bwd_p_kernel(
    ds_ptr,
    rel_fwd_ptr,
    rel_inv_ptr,
    self_fwd_ptr,
    self_inv_ptr,
    head_ptr,
    tail_ptr,
    tail_begin_ptr,
    tail_fact_ptr,
    head_begin_ptr,
    head_fact_ptr,
    fact_relation_ptr,
    head_count_ptr,
    tail_count_ptr,
    dp_ptr,
    num_nodes,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dp_v = sum_{e: head=v} n <relu(u), dS+[tail]> + <relu(-u), dS-[tail]> forward, the same with
    heads and tails exchanged inverse, and the self-loops, for a tile of nodes v."""
    offs_n, mask_n = block_rows(BLOCK_N, num_nodes)
    dp = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_columns, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_columns
        mask = mask_n[:, None] & mask_c[None, :]
        plus, minus = _own_dots(ds_ptr, self_fwd_ptr, offs_n, mask, offs_c, mask_c, num_columns, 0)
        more_plus, more_minus = _own_dots(
            ds_ptr, self_inv_ptr, offs_n, mask, offs_c, mask_c, num_columns, 1
        )
        plus, minus = add_rows(
            plus + more_plus, minus + more_minus, offs_n, mask_n, offs_c, mask_c, num_columns,
            head_begin_ptr, head_fact_ptr, fact_relation_ptr, tail_ptr, tail_count_ptr, None,
            rel_fwd_ptr, ds_ptr, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        plus, minus = add_rows(
            plus, minus, offs_n, mask_n, offs_c, mask_c, num_columns, tail_begin_ptr,
            tail_fact_ptr, fact_relation_ptr, head_ptr, head_count_ptr, None, rel_inv_ptr,
            ds_ptr + 2 * num_columns, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        dp += tl.sum(plus + minus, 1)
    tl.store(dp_ptr + offs_n, dp, mask=mask_n)


@triton.jit
def _message_passing_parity_bwd_pairs_kernel(
    ds_ptr,
    p_ptr,
    rel_ptr,
    source_ptr,
    target_ptr,
    count_ptr,
    pair_begin_ptr,
    pair_fact_ptr,
    pair_relation_ptr,
    d_pair_ptr,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One direction: sum over the facts of a pair of n p[source] dS+[target] where u > 0, of
    -n p[source] dS-[target] where u < 0."""
    pair = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    end = tl.load(pair_begin_ptr + pair + 1)
    plus = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    minus = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for start in range(tl.load(pair_begin_ptr + pair), end, BLOCK_E):
        slot = start + tl.arange(0, BLOCK_E)
        live = slot < end
        fact = tl.load(pair_fact_ptr + slot, mask=live, other=0)
        target = tl.load(target_ptr + fact, mask=live, other=0).to(tl.int64)
        source = tl.load(source_ptr + fact, mask=live, other=0)
        weight = tl.load(count_ptr + fact, mask=live, other=0).to(tl.float32)
        weight *= tl.load(p_ptr + source, mask=live, other=0.0)
        mask = live[:, None] & mask_c[None, :]
        at = target[:, None] * (4 * num_columns) + offs_c[None, :]
        plus = tl.fma(weight[:, None], tl.load(ds_ptr + at, mask=mask, other=0.0), plus)
        d_minus = tl.load(ds_ptr + num_columns + at, mask=mask, other=0.0)
        minus = tl.fma(weight[:, None], d_minus, minus)
    relation = tl.load(pair_relation_ptr + pair).to(tl.int64)
    u = tl.load(rel_ptr + relation * num_columns + offs_c, mask=mask_c, other=0.0)
    total = tl.where(u < 0, -tl.sum(minus, 0), tl.sum(plus, 0))
    at = pair * num_columns + offs_c
    tl.store(d_pair_ptr + at, tl.where(u == 0, 0.0, total), mask=mask_c)


@triton.jit(do_not_specialize=["num_lines"])
def _message_passing_parity_bwd_sum_kernel(
    table_ptr,
    begin_ptr,
    order_ptr,
    out_ptr,
    num_lines,
    num_columns,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[s, l] = sum of table[row, l] over the rows of segment s, taken from the order if there is
    one; l is one of the lines of a row."""
    place = tl.program_id(0)
    segment = place // num_lines
    line = place - segment * num_lines
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_columns
    end = tl.load(begin_ptr + segment + 1)
    total = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    for start in range(tl.load(begin_ptr + segment), end, BLOCK_E):
        row = start + tl.arange(0, BLOCK_E)
        live = row < end
        if order_ptr is not None:
            row = tl.load(order_ptr + row, mask=live, other=0)
        at = row.to(tl.int64) * num_lines + line
        mask = live[:, None] & mask_c[None, :]
        at = at[:, None] * num_columns + offs_c[None, :]
        total += tl.load(table_ptr + at, mask=mask, other=0.0)
    at = place.to(tl.int64) * num_columns + offs_c
    tl.store(out_ptr + at, tl.sum(total, 0), mask=mask_c)


def launch_p(dp: Tensor, ds: Tensor, tables: Sequence[Tensor], walks: Sequence[Tensor]) -> None:
    """Fills dp [N] from ds [N, 4, C]; tables: relations and self-loops; walks: of the forward."""
    if dp.numel() == 0:
        return
    num_nodes, _, num_columns = ds.shape
    tile = parity_tile(num_columns)
    _message_passing_parity_bwd_p_kernel[(triton.cdiv(num_nodes, tile.rows),)](
        ds,
        *tables,
        *walks,
        dp,
        num_nodes,
        num_columns,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


def launch_relations(
    out: Sequence[Tensor], ds: Tensor, floats: Sequence[Tensor], orders: Sequence[Tensor]
) -> None:
    """Fills those of the two relation gradients [R, C] that are not empty, from ds [N, 4, C].

    Pairs first, then the pairs of a relation in their own order: a relation of a large pack has
    many pairs, and a pair has many facts.
    """
    head, tail, _, _, _, _, pair_ptr, pair_fact, pair_relation, _, head_count, tail_count = (
        x.contiguous() for x in orders
    )
    p, *relations = floats[:3]
    num_pairs, num_columns = pair_relation.shape[0], ds.shape[2]
    tile = parity_tile(num_columns)
    order = torch.argsort(pair_relation, stable=True)
    begin = segment_ptr(pair_relation[order], relations[0].shape[0])
    sides = ((head, tail, tail_count), (tail, head, head_count))
    for direction, (d_rel, rel, side) in enumerate(zip(out, relations, sides, strict=True)):
        if d_rel.numel() == 0:
            continue
        d_pair = ds.new_empty((num_pairs, num_columns))
        if num_pairs > 0:
            _message_passing_parity_bwd_pairs_kernel[tile.grid(num_pairs * tile.rows, num_columns)](
                ds[:, 2 * direction :],
                p,
                rel,
                *side,
                pair_ptr,
                pair_fact,
                pair_relation,
                d_pair,
                num_columns,
                BLOCK_E=tile.rows,
                BLOCK_C=tile.columns,
                **tile.options,
            )
        _launch_sum(d_rel, d_pair, begin, order, 1)


def launch_instruction(out: Tensor, part: Tensor, tile_ptr: Tensor) -> None:
    """Fills out [B, I, C] from the parts [T, 2, I, C] of the tiles of every graph."""
    if out.numel() > 0:
        _launch_sum(out, part, 2 * tile_ptr, None, out.shape[1])


def _launch_sum(
    out: Tensor, table: Tensor, begin: Tensor, order: Tensor | None, num_lines: int
) -> None:
    num_columns = table.shape[-1]
    tile = parity_tile(num_columns)
    rows = (begin.shape[0] - 1) * num_lines
    _message_passing_parity_bwd_sum_kernel[tile.grid(rows * tile.rows, num_columns)](
        table,
        begin,
        order,
        out,
        num_lines,
        num_columns,
        BLOCK_E=tile.rows,
        BLOCK_C=tile.columns,
        **tile.options,
    )


_INDEX = (
    *("fact_relation_ptr", "source_ptr", "target_ptr", "count_ptr", "pair_relation_ptr"),
    "begin_ptr",
)
KERNELS = tuple(
    wide_spec(
        kernel,
        "*fp32",
        parity_tile(columns),
        rows,
        Budget(registers=128, shared=8192, wide_loads=wide_loads),
        {name: "*i32" for name in _INDEX if name in kernel.arg_names} | types,
    )
    for columns in COLUMNS
    for kernel, rows, wide_loads, types in (
        (_message_passing_parity_bwd_p_kernel, "BLOCK_N", 6, {}),
        (_message_passing_parity_bwd_pairs_kernel, "BLOCK_E", 4, {}),
        (_message_passing_parity_bwd_sum_kernel, "BLOCK_E", 2, {"order_ptr": "*i64"}),
        (_message_passing_parity_bwd_sum_kernel, "BLOCK_E", 2, {"order_ptr": None}),
    )
)
