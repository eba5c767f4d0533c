"""Shapes of the programs that hold a tile of rows by a block of columns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class WideTile(NamedTuple):
    """Rows and columns of one program, and the warps that share them."""

    rows: int
    columns: int
    num_warps: int

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Programs that cover the given sizes."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)


# Warps such that a tile of 32 rows takes 32 registers a thread.
_WARPS = {64: 2, 128: 4, 256: 8}
COLUMNS = tuple(_WARPS)
# Nodes of a graph are many and graphs few: tall and narrow.
SELF_TILE = WideTile(rows=128, columns=64, num_warps=8)


def column_tile(num_columns: int, rows: int) -> WideTile:
    """The narrowest tile that holds all columns; several of the widest share more."""
    columns = next((size for size in COLUMNS if num_columns <= size), COLUMNS[-1])
    return WideTile(rows, columns, _WARPS[columns])


def node_tile(num_columns: int, table: Tensor) -> WideTile:
    """Tile of nodes that sums rows of `table`: half as many of float32."""
    return column_tile(num_columns, rows=32 if table.element_size() == 2 else 16)
