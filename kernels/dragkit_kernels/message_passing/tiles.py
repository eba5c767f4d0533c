"""Shapes of the programs that hold a tile of rows by a block of columns."""

from __future__ import annotations

from typing import NamedTuple


class WideTile(NamedTuple):
    """Rows and columns of one program, and the warps that share them."""

    rows: int
    columns: int
    num_warps: int

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Programs that cover the given sizes."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)


# Columns of a tile and the warps that hold 32 rows of them in 32 registers a thread.
COLUMN_BLOCKS = ((64, 2), (128, 4), (256, 8))

# Nodes of a graph are many and graphs few: tall and narrow.
SELF_TILE = WideTile(rows=128, columns=64, num_warps=8)


def column_tile(num_columns: int, rows: int) -> WideTile:
    """The narrowest tile that holds all columns; several of the widest share more."""
    for columns, num_warps in COLUMN_BLOCKS:
        if num_columns <= columns:
            break
    return WideTile(rows, columns, num_warps)


def layer_tile(num_columns: int, exact: bool) -> WideTile:
    """Tile of the layer's forward: products of float32 take twice the registers."""
    return column_tile(num_columns, rows=16 if exact else 32)
