"""Block sizes and warps from sizes: plain functions over short tables, no autotuning.

A table lists every configuration a launcher can choose, so that `aot` can compile all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Rows of one program, its warps, and the registers of a thread (None: the assembler's choice).

    Without a limit, the assembler may spill a few registers to fit one more program.
    """

    block: int
    num_warps: int
    max_registers: int | None = None

    @property
    def sizes(self) -> tuple[int]:
        """The constants of a kernel that the tile gives, in the kernel's order."""
        return (self.block,)

    @property
    def options(self) -> dict[str, int | None]:
        """Keyword arguments of a launch besides the kernel's own."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}


class Tile2D(NamedTuple):
    """Rows and columns of one program, its warps, and the registers of a thread."""

    rows: int
    columns: int
    num_warps: int
    max_registers: int = 80

    @property
    def sizes(self) -> tuple[int, int]:
        """The constants of a kernel that the tile gives, in the kernel's order."""
        return self.rows, self.columns

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch besides the kernel's own."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Programs that cover the given sizes."""
        return -(-num_rows // self.rows), -(-num_columns // self.columns)


class ResourceLimits(NamedTuple):
    """Limits of one compiled kernel. Spills and stack are never allowed.

    Attributes:
        registers: most registers of a thread.
        shared: most bytes of shared memory of a program.
        wide_loads: least number of 128-bit global loads in the machine code.
        products: least number of tensor core instructions in the machine code.
    """

    registers: int
    shared_bytes: int
    vector_loads: int = 0
    mma_instructions: int = 0


class KernelSpec(NamedTuple):
    """One configuration of a kernel as its launcher compiles it, for `aot`. `spec` makes them.

    Attributes:
        kernel: the jit function.
        types: argument name to type, such as "*fp32", "i32" or "fp32". An argument that the
            launcher passes as None has None here.
        constants: constexpr name to value.
        num_warps: warps of a program.
        budget: see Budget.
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
        *("begin", "code", "colptr", "count", "end", "fact", "fact_relation", "graph", "head"),
        *("ids", "index", "key", "order", "pair", "pair_relation", "perm", "place", "pos"),
        *("position", "ptr", "question", "row", "rowptr", "sender", "sequence"),
        *("slot", "slots", "source", "start", "tail", "target"),
    ),
    "*i64": ("last_row", "question_key", "seed"),
    # Accumulators, probabilities and steps stay float32 where the tables have a narrower dtype.
    "*fp32": (
        *("A", "D", "chunk", "chunk_decay", "chunk_fwd", "chunk_in", "chunk_inv"),
        *("chunk_out", "dot", "dp", "dt", "log", "p", "product"),
        *("score_weight", "state", "state_dot", "sums"),
    ),
}
_BY_NAME = {name: kind for kind, names in _POINTERS.items() for name in names}
# Arguments that are Python floats.
_FLOATS = ("bound", "eps", "scale")


def row_strided(tensor: Tensor) -> Tensor:
    """The tensor itself if only its rows have gaps, such as columns of a wider matrix, else a copy.

    Args:
        tensor: at least one axis; the first is the rows.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _type_of(name: str, dtype: str) -> str:
    """The type of a kernel's argument by its name."""
    if not name.endswith("_ptr"):
        return "fp32" if name in _FLOATS else "i32"
    name = name.removesuffix("_ptr")
    if name.startswith("d_"):  # a gradient, which is never an integer
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
    """Specification of a kernel for `aot`, by the names of its arguments.

    Args:
        kernel: the jit function.
        budget: see Budget.
        tile: gives warps, registers, and `sizes` for the constexpr arguments that `constants`
            lacks, in the kernel's order.
        dtype: type of the pointers whose names `_POINTERS` lacks.
        constants: values of constexpr arguments.
        types: exceptions: argument name to type, None for an argument that is not there.

    Returns:
        The specification. Integers that the kernel specialises count as multiples of 16.

    Raises:
        ValueError: the tile has too many or too few sizes for the kernel.
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


# Matrix rows that are summed: columns are split over programs, since a sum of many rows is the work
# of one. A tile takes 16 registers a thread.
ROW_TILE = Tile2D(rows=32, columns=64, num_warps=4)
NOISE_TILE = Tile(1024, 8)
# Facts of a question that a program holds in registers: all, or the first 8192. Without a limit the
# assembler of Triton 3.6 spills in the second tile.
TOPK_TILES = (Tile(512, 4), Tile(2048, 8, 96))
TOPK_STREAM = Tile(8192, 16)
# Facts at a time of the others.
TOPK_STEP = 2048


def topk_tile(max_facts: int) -> tuple[Tile, bool]:
    """The tile for questions of up to `max_facts` facts, and whether a program streams the rest."""
    for tile in TOPK_TILES:
        if max_facts <= tile.block:
            return tile, False
    return TOPK_STREAM, True
