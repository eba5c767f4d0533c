"""Shapes of the programs that hold a tile of rows by a block of columns."""

from __future__ import annotations

import torch

from ..launch import Budget, KernelSpec, WideTile

# Warps such that a tile of 32 rows takes 32 registers a thread.
_WARPS = {64: 2, 256: 8}
COLUMNS = tuple(_WARPS)
# Nodes of a graph are many and graphs few: tall and narrow.
SELF_TILE = WideTile(rows=128, columns=64, num_warps=8)


def _tile(num_columns: int, dtype: torch.dtype, rows: int) -> WideTile:
    """The narrowest tile that holds all columns, half as high for four bytes; several of the widest
    share more columns."""
    columns = next((size for size in COLUMNS if num_columns <= size), COLUMNS[-1])
    return WideTile(rows if dtype.itemsize == 2 else rows // 2, columns, _WARPS[columns])


def layer_tile(num_columns: int, dtype: torch.dtype) -> WideTile:
    """Tile of nodes of the layer's forward, for tables of a dtype."""
    return _tile(num_columns, dtype, rows=32)._replace(max_registers=128)


def sum_tile(num_columns: int, dtype: torch.dtype) -> WideTile:
    """Tile of rows, or of the facts of one, that sums rows of a table of a dtype."""
    return _tile(num_columns, dtype, rows=32)


def dot_tile(num_columns: int, dtype: torch.dtype) -> WideTile:
    """Low tile, for two gathered rows per fact, or for a kernel that runs once a step."""
    return _tile(num_columns, dtype, rows=16)


# What `aot` compiles: tables, states and gradients in one dtype, p in float32.
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
INDEX = (
    *("head_ptr", "tail_ptr", "tail_begin_ptr", "tail_fact_ptr", "head_begin_ptr"),
    *("head_fact_ptr", "pair_begin_ptr", "pair_fact_ptr", "graph_begin_ptr", "fact_pair_ptr"),
    *("head_count_ptr", "tail_count_ptr", "node_graph_ptr"),
)


def wide_spec(
    kernel: object,
    kind: str,
    tile: WideTile,
    rows: str,
    budget: Budget,
    types: dict[str, str | None] | None = None,
    constants: dict[str, int] | None = None,
    chunks: str | None = None,
) -> KernelSpec:
    """Specification of a kernel of this folder for a width of its tile's columns.

    Args:
        kernel: the jit function; kind: "*bf16" or "*fp32"; tile: of the launcher.
        rows: name of the constant that holds the tile's rows.
        budget: see Budget.
        types, constants: what differs from the common arguments.
        chunks: type of the sums of long rows' chunks; None where there are none.
    """
    constants = {**(constants or {}), rows: tile.rows, "BLOCK_C": tile.columns}
    common = {
        name: "*i32" if name in INDEX else kind if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    common |= {name: "*fp32" for name in ("p_ptr", "dp_ptr") if name in common}
    common |= {name: chunks for name in common if name.startswith("chunk_")}
    return KernelSpec(
        kernel,
        types={**common, **(types or {})},
        constants=constants,
        num_warps=tile.num_warps,
        budget=budget,
        max_registers=tile.max_registers,
        divisible=("num_columns",),
    )
