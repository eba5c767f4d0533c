"""Block sizes of the scan's kernels, readable without Triton."""

from __future__ import annotations

from typing import NamedTuple


class ScanTile(NamedTuple):
    """Block sizes of the scan's kernels.

    Attributes:
        chunk: rows of a chunk, Q.
        width: columns of x per block, BLOCK_P.
        states: columns of B and C per block, BLOCK_N.
        num_warps: warps of a program.
        low: 1 if tl.dot takes float16 or bfloat16 operands, 0 for float32.
        max_registers: `maxnreg` of all kernels but one.
        output_registers: `maxnreg` of the output kernel. 128 lets two programs share a
            multiprocessor.
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
        """The constants Q, BLOCK_P, BLOCK_N and LOW_PREC."""
        return self[:3] + (self.low,)

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch: constants, warps and registers."""
        constants = zip(("Q", "BLOCK_P", "BLOCK_N", "LOW_PREC"), self.sizes, strict=True)
        return {**dict(constants), "num_warps": self.num_warps, "maxnreg": self.max_registers}

    @property
    def for_output(self) -> ScanTile:
        """The tile of the output kernel."""
        return self._replace(max_registers=self.output_registers)


HALF_TILE = ScanTile(chunk=64, width=64, states=64, num_warps=8, low=1)
FLOAT32_TILE = ScanTile(chunk=32, width=32, states=32, num_warps=8, low=0, output_registers=255)


def scan_chunk(itemsize: int) -> int:
    """Rows of a chunk of the Triton kernels. They keep one state for each chunk.

    Args:
        itemsize: bytes per value of x, B and C.
    """
    return HALF_TILE.chunk if itemsize == 2 else FLOAT32_TILE.chunk
