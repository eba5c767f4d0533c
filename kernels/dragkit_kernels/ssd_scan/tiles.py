"""Block sizes of the scan's kernels, by dtype and sizes, and the specifications for `aot`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import INTERPRETED
from ..launch import Budget, KernelSpec

# Others are multiplied in float32; the interpreter computes bfloat16 wrongly.
TENSOR_CORE_DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Elements of a state that a program of the passing kernel carries from chunk to chunk.
PASS_BLOCK, PASS_WARPS = 512, 4


class ScanTile(NamedTuple):
    """Rows of a chunk, columns of x and of a map at a time, warps, operands of products.

    Attributes:
        low: 1 if products take operands of low precision, 0 for float32.
        max_registers: of a thread; output_registers: the same for the kernel of the output, which
            is content with as many as let a second program in.
    """

    chunk: int
    width: int
    states: int
    num_warps: int
    low: int
    max_registers: int = 255
    output_registers: int = 128

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"Q": self.chunk, "BLOCK_P": self.width, "BLOCK_N": self.states, "LOW": self.low}

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told beside its arguments."""
        return {**self.constants, "num_warps": self.num_warps, "maxnreg": self.max_registers}


WIDE = ScanTile(chunk=64, width=64, states=64, num_warps=8, low=1)
FULL = ScanTile(chunk=32, width=32, states=32, num_warps=8, low=0, output_registers=255)
TILES = {"*bf16": WIDE, "*fp32": FULL}


def scan_tile(*tensors: Tensor) -> ScanTile:
    """The tile, given all tensors that are operands of products; any width works with any."""
    dtypes = {t.dtype for t in tensors}
    return WIDE if len(dtypes) == 1 and dtypes <= set(TENSOR_CORE_DTYPES) else FULL


def scan_specs(
    kernel: object,
    budgets: dict[ScanTile, Budget],
    constants: dict[str, int] | None = None,
    registers: str = "max_registers",
) -> Iterator[KernelSpec]:
    """Specifications of a kernel, one for each tile.

    Args:
        kernel: the jit function; budgets: by tile; constants: beside those of the tile.
        registers: the tile's field that limits them.
    """
    low = ("x_ptr", "into_ptr", "out_of_ptr", "grad_ptr", "y_ptr", "d_x_ptr", "d_into_ptr")
    low = (*low, "d_out_of_ptr", "map_ptr", "d_map_ptr")
    sizes = ("num_width", "num_states", "stride_x", "stride_into", "stride_out_of", "stride_grad")
    sizes = (*sizes, "stride_map")
    for kind, tile in TILES.items():
        every = {**tile.constants, **(constants or {})}
        every = {name: every[name] for name in kernel.arg_names if name in every}
        types = {
            name: kind if name in low else "*fp32" if name.endswith("_ptr") else "i32"
            for name in kernel.arg_names
            if name not in every
        }
        types |= {name: "*i32" for name in types if name == "position_ptr"}
        types |= {name: "*i64" for name in types if name == "last_ptr"}
        yield KernelSpec(
            kernel,
            types=types,
            constants=every,
            num_warps=tile.num_warps,
            budget=budgets[tile],
            divisible=tuple(name for name in sizes if name in types),
            max_registers=getattr(tile, registers),
        )


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself if only its rows lie apart, as parts of wider rows do, else a copy."""
    inner, expected = tensor.stride()[1:], 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(inner), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor
