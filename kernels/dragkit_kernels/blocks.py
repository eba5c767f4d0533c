"""Blocks of rows, so that several passes over a matrix find it in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of a block for each thread: a few such blocks fit into the cache, and fewer would make the
# calls of the single passes count.
_BLOCK = 1 << 18
# Rows at least: a block may need some rows of its neighbours as well.
_ROWS = 32


def row_blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, end) of blocks that cover a matrix. A GPU takes all rows at once.

    Args:
        x: [T, C]. Only its shape and device are read.
    """
    num_rows, num_columns = x.shape
    rows = num_rows
    if x.device.type == "cpu":
        rows = max(_BLOCK * torch.get_num_threads() // max(num_columns, 1), _ROWS)
    for begin in range(0, num_rows, max(rows, 1)):
        yield begin, min(begin + rows, num_rows)
