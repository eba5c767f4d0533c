"""Block sizes and warps from sizes: plain functions over short tables, no autotuning.

A table lists every configuration a launcher can choose, so that `aot` can compile all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows that one program holds at a time, and the warps that share them."""

    block: int
    num_warps: int


class WideTile(NamedTuple):
    """Rows and columns of one program, the warps that share them, and registers of a thread.

    Without a limit of its own the assembler spills a few registers to fit one more program.
    """

    rows: int
    columns: int
    num_warps: int
    max_registers: int = 80

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told beside its arguments."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Programs that cover the given sizes."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)


class Budget(NamedTuple):
    """What one compiled kernel may use; spills and stack are never allowed.

    Attributes:
        registers: per thread.
        shared: bytes per program.
        wide_loads: least number of 128-bit global loads in the machine code.
        products: least number of products on the tensor cores in it.
    """

    registers: int
    shared: int
    wide_loads: int = 0
    products: int = 0


class KernelSpec(NamedTuple):
    """One configuration of a kernel as its launcher compiles it, for `aot`.

    Attributes:
        kernel: the jit function.
        types: argument name to type, such as "*fp32", "i32" or "fp32"; an argument the launcher
            passes as None has None here.
        constants: constexpr name to value.
        num_warps: warps of a program.
        budget: see Budget.
        divisible: integer arguments that the launcher knows to be multiples of 16. Pointers always
            are; integers that the kernel does not specialise never are.
        max_registers: what the launcher allows a thread (`maxnreg`); None leaves it to the
            assembler, which may spill a few to fit one more program.
    """

    kernel: object
    types: Mapping[str, str | None]
    constants: Mapping[str, int]
    num_warps: int
    budget: Budget
    divisible: tuple[str, ...] = ()
    max_registers: int | None = None


# How the layer's forward sums the facts of a tile of nodes, by the dtype of its tables: the j-th
# facts of all nodes together ("slots"), or blocks of facts by a product on the tensor cores
# ("one-hot"), where the layer's own product is made there as well. Other dtypes have slots alone.
SUM = {torch.float16: "slots", torch.bfloat16: "slots"}
# Facts of a block: with 64 a thread has no registers left.
ONE_HOT_FACTS = 32


def sum_way(dtype: torch.dtype) -> str:
    """ "slots" or "one-hot", for tables of a dtype."""
    return SUM.get(dtype, "slots")


@contextmanager
def force_sum(way: str) -> Iterator[None]:
    """Tables that have a choice are summed this way inside the `with` block.

    Args:
        way: "slots" or "one-hot".

    Raises:
        ValueError: another name.
    """
    if way not in ("slots", "one-hot"):
        raise ValueError(f"way must be slots or one-hot, got {way!r}")
    previous = dict(SUM)
    SUM.update(dict.fromkeys(SUM, way))
    try:
        yield
    finally:
        SUM.update(previous)


# Matrix rows that are summed: columns are split over programs, since a sum of many rows is the work
# of one. A tile takes 16 registers a thread.
ROW_TILE = WideTile(rows=32, columns=64, num_warps=4)
NOISE_TILE = Tile(1024, 8)
# Facts of a question that a program holds from one end to the other, or walks in blocks.
TOPK_TILES = (Tile(512, 4), Tile(2048, 8), Tile(8192, 16))
WALK_TILES = (Tile(512, 4), Tile(2048, 8))
# Facts at a time beyond those that fit.
TOPK_STEP = 2048
# Kept facts ranked by one program, and how many it compares them with at a time.
RANK_TILE = Tile(128, 4)
RANK_STEP = 32


def topk_tile(max_facts: int) -> tuple[Tile, bool]:
    """The tile for questions of up to `max_facts` facts, and whether some need several tiles."""
    for tile in TOPK_TILES:
        if max_facts <= tile.block:
            return tile, False
    return TOPK_TILES[-1], True


def walk_tile(max_facts: int) -> Tile:
    """The tile in which a program walks the facts of a question."""
    return WALK_TILES[int(max_facts > WALK_TILES[0].block)]
