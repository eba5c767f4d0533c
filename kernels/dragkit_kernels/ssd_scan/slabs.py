"""What both passes of the chunked scan make of a slab of chunks: layout, decays, states.

Of n chunks of q rows everything is laid out [n, G, q, R, ...]: R heads stand beside one another in
their group, so that a product with a map is one of a whole group. In products n and G are one axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A token's binary logarithm of the decay is not below this: float32 has hardly a smaller number,
# and the differences of large sums would be rough.
LOWEST_LOG = -127.0
# Bytes that the temporary tensors of a slab may take, about.
SLAB_BYTES = 12 * 2**20
# Bytes of a state that are worked at together; groups of heads beyond take turns.
STATE_BYTES = 2**19


class ScanSizes(NamedTuple):
    """T rows, G groups of R heads, head width P, N states, chunks of q rows."""

    num_rows: int
    num_groups: int
    heads_per_group: int
    head_dim: int
    state_dim: int
    chunk: int

    @classmethod
    def infer(cls, x: Tensor, B: Tensor, chunk: int | None = None) -> ScanSizes:
        """The sizes of the arguments of ssd_scan."""
        rows, heads, width = x.shape
        groups, states = B.shape[1:]
        if chunk is None:
            # Products within a chunk grow with its size, those with its states shrink.
            chunk = 32 if width * states <= 2048 else 64
        return cls(rows, groups, heads // groups, width, states, chunk)

    @property
    def num_chunks(self) -> int:
        """Chunks that cover all rows."""
        return -(-self.num_rows // self.chunk)

    def group_ranges(self) -> Iterator[tuple[slice, slice]]:
        """(groups, their heads) that take turns."""
        state = 4 * self.heads_per_group * self.head_dim * self.state_dim
        step = max(1, STATE_BYTES // max(state, 1))
        for begin in range(0, self.num_groups, step):
            end = min(begin + step, self.num_groups)
            yield slice(begin, end), slice(begin * self.heads_per_group, end * self.heads_per_group)

    def slab_ranges(self) -> Iterator[tuple[int, int]]:
        """(first chunk, end) of each slab, in order."""
        inner, by_head = self.heads_per_group * self.head_dim, 3 * self.chunk + 2 * self.state_dim
        row = self.num_groups * (6 * inner + by_head)
        state = 3 * self.num_groups * inner * self.state_dim
        step = max(1, SLAB_BYTES // (4 * (self.chunk * row + state)))
        for begin in range(0, self.num_chunks, step):
            yield begin, min(begin + step, self.num_chunks)


def log2_decays(dt: Tensor, A: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums along `dim` of the binary logarithms of the decays exp(A dt), and which are at their
    lowest, where a change of the step makes none.

    Binary because exp2 is several times faster than exp where results are 0 or nearly.
    """
    log = dt * (A.double() * math.log2(math.e))
    # Summed in double precision: an error of a sum is one of all decays after it.
    at_lowest = log < LOWEST_LOG
    return log.clamp_(min=LOWEST_LOG).cumsum(dim).to(dtype), at_lowest


class Slab:
    """Inputs and decays of the chunks begin to end.

    Attributes:
        shape: (n, G, q, R, P).
        rows: slice of the rows that exist.
        dt: [n, G, q, R, 1]; value: dt x, [n, G, q, R, P].
        log: [R, n, G, q] sums of the binary logarithms of the decays from the chunk's first row on.
        lost: bool [n, G, q, R], see binary_logs.
        causal_mask: [n, q, q] 1 where row i depends on row j, else 0.
        from_start, to_end: [n, G, q, R, 1] decays to a row from the state before the chunk, and
            from a row to the chunk's end; 0 where they are of different sequences.
        chunk_decay: [n, G, 1, R, 1] decay of a state over the chunk, 0 where a sequence begins.
    """

    def __init__(
        self,
        sizes: ScanSizes,
        span: tuple[int, int],
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        seq_pos: Tensor,
        dtype: torch.dtype,
    ) -> None:
        begin, end = span
        _, groups, heads, width, states, chunk = sizes
        self.shape = (end - begin, groups, chunk, heads, width)
        self.state_dim, self.dtype = states, dtype
        self.rows = slice(begin * chunk, min(end * chunk, sizes.num_rows))
        self.dt = self.by_group(dt).unsqueeze(-1)
        self.x_dt = self.by_group(x).mul(self.dt)
        self.B = self.bc_by_group(B)
        log, self.at_lowest = log2_decays(self.dt.squeeze(-1), A.view(groups, 1, heads), 2, dtype)
        offs_q = torch.arange(chunk, device=x.device)
        seq_pos = self.chunked(seq_pos).long()
        last_pos = seq_pos[:, -1:]
        distance = offs_q[:, None] - offs_q
        causal_mask = (distance >= 0) & (distance <= seq_pos[:, :, None])
        self.causal_mask = causal_mask.to(dtype)
        # As a logarithm: added before exp2, which would overflow above the diagonal.
        log_mask = torch.zeros_like(self.causal_mask).masked_fill_(~causal_mask, float("-inf"))
        self._log_mask = log_mask.unsqueeze(1)
        by_row = (len(seq_pos), 1, chunk, 1)
        reaches_start = (seq_pos > offs_q).view(by_row)
        reaches_end = (chunk - 1 - offs_q <= last_pos).view(by_row)
        self.decay_from_start = log.exp2().mul_(reaches_start).unsqueeze(-1)
        self.decay_to_end = (log[:, :, -1:] - log).exp2_().mul_(reaches_end).unsqueeze(-1)
        self.chunk_decay = self.decay_from_start[:, :, -1:]
        self.log = log.permute(3, 0, 1, 2).contiguous()
        self.x_dt_to_end = self.merge_heads(self.x_dt * self.decay_to_end)

    def chunked(self, tensor: Tensor) -> Tensor:
        """[T, ...] as the slab's rows [n, q, ...], zeros behind the last."""
        n, _, q, _, _ = self.shape
        tensor = tensor[self.rows]
        if pad := n * q - len(tensor):
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, pad))
        return tensor.reshape(n, q, *tensor.shape[1:])

    def by_group(self, tensor: Tensor) -> Tensor:
        """[T, H, ...] as contiguous [n, G, q, R, ...]."""
        grouped = self.chunked(tensor).unflatten(2, (self.shape[1], -1)).transpose(1, 2)
        return grouped.to(self.dtype).contiguous()

    def bc_by_group(self, tensor: Tensor) -> Tensor:
        """[T, G, N] as contiguous [n G, q, N]."""
        return self.chunked(tensor).transpose(1, 2).to(self.dtype).contiguous().flatten(0, 1)

    def to_rows(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[n, G, q, R, ...] or [n G, q, N] as the slab's rows, each of the given shape."""
        n, groups, chunk, _, _ = self.shape
        rows = tensor.reshape(n, groups, chunk, math.prod(shape) // groups).transpose(1, 2)
        return rows.reshape(n * chunk, *shape)[: self.rows.stop - self.rows.start]

    def merge_heads(self, tensor: Tensor) -> Tensor:
        """[n, G, q, R, P] as the matrices of whole groups [n G, q, R P]."""
        return tensor.flatten(3).flatten(0, 1)

    def head_matrix(self, tensor: Tensor, r: int) -> Tensor:
        """[n, G, q, R, P] as the matrices of head r of every group, [n G, q, P]."""
        return tensor[:, :, :, r].flatten(0, 1)

    def decay(self, r: int, out: Tensor) -> Tensor:
        """Decays from row j to row i for head r of every group: [n G, q, q]."""
        log = self.log[r]
        square = out.view(*log.shape, log.shape[-1])
        torch.add(self._log_mask, log.unsqueeze(-1), out=square)
        return square.sub_(log.unsqueeze(-2)).exp2_().flatten(0, 1)

    def new_buffer(self, columns: int) -> Tensor:
        """New memory [n G, q, columns]."""
        n, groups, chunk, _, _ = self.shape
        return self.x_dt.new_empty(n * groups, chunk, columns)

    def state_passing_fwd(self, states: Tensor) -> None:
        """Turns gains into states: [n + 1, G, N, R P], the first of them the state before all."""
        by_head = states.unflatten(3, self.shape[3:]).unbind()
        chunk_decay = self.chunk_decay.unbind()
        for before, after, decay in zip(by_head, by_head[1:], chunk_decay, strict=False):
            after.addcmul_(before, decay)

    def state_passing_bwd(self, states: Tensor) -> None:
        """The way back: each of [n + 1, G, N, R P] gets what the next one hands on."""
        by_head = states.unflatten(3, self.shape[3:]).unbind()[::-1]
        chunk_decay = self.chunk_decay.unbind()[::-1]
        for after, before, decay in zip(by_head, by_head[1:], chunk_decay, strict=False):
            before.addcmul_(after, decay)
