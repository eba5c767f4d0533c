"""Block sizes of the scan's kernels, by dtype and sizes, and the specifications for `aot`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import INTERPRETED
from ..launch import ResourceLimits, Tile

# Others are multiplied in float32; the interpreter computes bfloat16 wrongly.
TENSOR_CORE_DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Elements of a state that a program of the passing kernel carries from chunk to chunk.
STATE_PASSING_TILE = Tile(512, 4)


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
    def sizes(self) -> tuple[int, ...]:
        """The kernels' constants Q, BLOCK_P, BLOCK_N and LOW."""
        return self[:3] + (self.low,)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch besides the kernel's own arguments."""
        constants = zip(("Q", "BLOCK_P", "BLOCK_N", "LOW_PREC"), self.sizes, strict=True)
        return {**dict(constants), "num_warps": self.num_warps, "maxnreg": self.max_registers}

    @property
    def for_output(self) -> ScanTile:
        """The tile of the kernel of the output."""
        return self._replace(max_registers=self.output_registers)


HALF_TILE = ScanTile(chunk=64, width=64, states=64, num_warps=8, low=1)
FLOAT32_TILE = ScanTile(chunk=32, width=32, states=32, num_warps=8, low=0, output_registers=255)
TILES = {"*bf16": HALF_TILE, "*fp32": FLOAT32_TILE}
GRADIENT_LIMITS = {
    HALF_TILE: ResourceLimits(registers=240, shared_bytes=32768),
    FLOAT32_TILE: ResourceLimits(registers=176, shared_bytes=16384),
}


def scan_tile(*tensors: Tensor) -> ScanTile:
    """The tile, given all tensors that are operands of products; any width works with any."""
    dtypes = {t.dtype for t in tensors}
    return HALF_TILE if len(dtypes) == 1 and dtypes <= set(TENSOR_CORE_DTYPES) else FLOAT32_TILE
