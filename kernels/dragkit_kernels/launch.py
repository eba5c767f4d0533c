"""Tiles, resource limits and specifications of kernels.

Launchers choose from short tables without autotuning, so that `aot` can compile every choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Block size, warps and `maxnreg` of a program. None leaves the registers to ptxas.

    Without maxnreg, ptxas aims for higher occupancy and may spill.
    """

    block: int
    num_warps: int
    max_registers: int | None = None

    @property
    def sizes(self) -> tuple[int]:
        """Values of the kernel's block size constants, in the order of its arguments."""
        return (self.block,)

    @property
    def options(self) -> dict[str, int | None]:
        """Keyword arguments of a launch: warps and registers."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}


class Tile2D(NamedTuple):
    """Rows and columns of a block, warps and `maxnreg` of a program."""

    rows: int
    columns: int
    num_warps: int
    max_registers: int = 80

    @property
    def sizes(self) -> tuple[int, int]:
        """Values of the kernel's block size constants, in the order of its arguments."""
        return self.rows, self.columns

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch: warps and registers."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Grid of the programs that cover a matrix."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)


class ResourceLimits(NamedTuple):
    """Limits of one compiled kernel. Spills and stack are never allowed.

    Attributes:
        registers: maximum number of registers of a thread.
        shared_bytes: maximum shared memory of a program.
        vector_loads: minimum number of 128-bit global loads in the PTX.
        mma_instructions: minimum number of tensor core instructions in the PTX.
    """

    registers: int
    shared_bytes: int
    vector_loads: int = 0
    mma_instructions: int = 0


class KernelSpec(NamedTuple):
    """One configuration of a kernel as its launcher compiles it. `spec` builds it for `aot`.

    Attributes:
        kernel: the jit function.
        types: argument name to type, such as "*fp32", "i32" or "fp32", or None for an argument
            that the launcher passes as None.
        constants: constexpr name to value.
        num_warps: warps of a program.
        limits: see ResourceLimits.
        divisible: integer arguments that are multiples of 16.
        max_registers: `maxnreg` of the launch.
    """

    kernel: object
    types: Mapping[str, str | None]
    constants: Mapping[str, int]
    num_warps: int
    limits: ResourceLimits
    divisible: tuple[str, ...] = ()
    max_registers: int | None = None


# Types of pointers by the last words of their names. Other pointers have the dtype of the spec.
_POINTERS = {
    "*i32": (
        *("code", "count", "end", "fact", "graph", "head", "ids", "key", "pair", "pair_relation"),
        *("perm", "pos", "position", "question", "row", "rowptr", "sender", "sequence", "slot"),
        *("slots", "source", "start", "tail"),
    ),
    "*i64": ("last_row", "question_key", "seed"),
    # Accumulators, probabilities and dt are float32 whatever the dtype of the tables.
    "*fp32": (
        *("A", "D", "chunk", "chunk_decay", "chunk_fwd", "chunk_in", "chunk_inv", "chunk_out"),
        *("dot", "dp", "dt", "log", "p", "product", "state", "state_dot", "sums"),
    ),
}
_BY_NAME = {name: dtype for dtype, names in _POINTERS.items() for name in names}
# Arguments that are Python floats. Other arguments without _ptr are integers.
_FLOATS = ("bound", "eps", "scale")


def row_strided(tensor: Tensor) -> Tensor:
    """The tensor if each row is contiguous, such as a column slice of a matrix, else a copy.

    Args:
        tensor: [T, ...] of at least one dimension.
    """
    expected = 1
    # A stride must be the product of the later sizes, from the last dimension on.
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _type_of(name: str, dtype: str) -> str:
    """The type of a kernel argument by its name."""
    if not name.endswith("_ptr"):
        return "fp32" if name in _FLOATS else "i32"
    name = name.removesuffix("_ptr")
    if name.startswith("d_"):  # a gradient is never an integer
        return "*fp32" if name[2:] in _POINTERS["*fp32"] else dtype
    return _BY_NAME.get(name) or _BY_NAME.get(name.rpartition("_")[2], dtype)


def spec(
    kernel: object,
    limits: ResourceLimits,
    *,
    tile: Tile | Tile2D,
    dtype: str = "*fp32",
    constants: Mapping[str, int] | None = None,
    **types: str | None,
) -> KernelSpec:
    """The specification of a kernel for `aot`, derived from the names of its arguments.

    Args:
        kernel: the jit function.
        limits: see ResourceLimits.
        tile: gives warps, registers, and `sizes` for the constexpr arguments that `constants`
            lacks, in the order of the arguments.
        dtype: type of the pointers whose names `_POINTERS` lacks.
        constants: values of constexpr arguments.
        types: exceptions, argument name to type, or None for an argument passed as None.

    Returns:
        The specification. Integers that the kernel specialises on count as multiples of 16.

    Raises:
        ValueError: the tile has more or fewer sizes than the kernel needs.
    """
    values = dict(constants or {})
    annotations = inspect.get_annotations(kernel.fn)
    constexprs = [
        name for name in kernel.arg_names if str(annotations.get(name)).endswith("constexpr")
    ]
    unset = [name for name in constexprs if name not in values]
    values.update(zip(unset, tile.sizes, strict=True))
    arg_types = {n: _type_of(n, dtype) for n in kernel.arg_names if n not in constexprs} | types
    unspecialised = getattr(kernel, "do_not_specialize", None) or ()
    return KernelSpec(
        kernel,
        types=arg_types,
        constants={name: values[name] for name in constexprs},
        num_warps=tile.num_warps,
        limits=limits,
        divisible=tuple(n for n, t in arg_types.items() if t == "i32" and n not in unspecialised),
        max_registers=tile.max_registers,
    )


# Sums of matrix rows. Programs split the columns, because one program sums all rows of a segment. A
# tile takes 16 registers per thread.
ROW_TILE = Tile2D(rows=32, columns=64, num_warps=4)
NOISE_TILE = Tile(1024, 8)
# Facts of a question in registers: all, or the first 8192 if it streams. Without maxnreg the ptxas
# of Triton 3.6 spills in the second tile.
TOPK_TILES = (Tile(512, 4), Tile(2048, 8, 96))
TOPK_STREAM = Tile(8192, 16)
# Facts per step of the streamed rest.
TOPK_STEP = 2048


def topk_tile(max_facts: int) -> tuple[Tile, bool]:
    """The tile for questions of up to `max_facts` facts, and whether they are streamed."""
    for tile in TOPK_TILES:
        if max_facts <= tile.block:
            return tile, False
    return TOPK_STREAM, True
