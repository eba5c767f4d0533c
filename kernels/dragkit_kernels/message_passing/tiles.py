"""Shapes of the programs that hold a tile of rows by a block of columns."""

from __future__ import annotations

import torch

from ..launch import Tile2D

# Warps such that a tile of 32 rows takes 32 registers a thread.
_WARPS = {64: 2, 256: 8}
COLUMNS = tuple(_WARPS)
# Nodes of a graph are many and graphs few: tall and narrow.
SELF_TILE = Tile2D(rows=128, columns=64, num_warps=8)


def _tile(num_columns: int, dtype: torch.dtype, rows: int) -> Tile2D:
    """The narrowest tile that holds all columns, half as high for four bytes; several of the widest
    share more columns."""
    columns = next((size for size in COLUMNS if num_columns <= size), COLUMNS[-1])
    return Tile2D(rows if dtype.itemsize == 2 else rows // 2, columns, _WARPS[columns])


def layer_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Tile of nodes of the layer's forward, for tables of a dtype."""
    return _tile(num_columns, dtype, rows=32)._replace(max_registers=128)


def sum_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Tile of rows, or of the facts of one, that sums rows of a table of a dtype."""
    return _tile(num_columns, dtype, rows=32)


def dot_tile(num_columns: int, dtype: torch.dtype) -> Tile2D:
    """Low tile, for two gathered rows per fact, or for a kernel that runs once a step."""
    return _tile(num_columns, dtype, rows=16)


# What `aot` compiles: tables, states and gradients in one dtype, p in float32.
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
