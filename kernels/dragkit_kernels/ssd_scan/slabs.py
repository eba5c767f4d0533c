"""Layout, decays and state passing of a slab: n consecutive chunks that are processed together.

Tensors of a slab are [n, G, q, R, ...] for chunks of q rows and groups of R heads. The heads of a
group are adjacent, so that one matrix product with B or C serves the whole group. Products merge n
and G into one batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Clamp of the log2 of one row's decay. exp2 of less is subnormal or 0 in float32, and differences
# of larger sums would be less accurate.
LOWEST_LOG = -127.0
# Approximate bytes of the temporary tensors of a slab, which should stay in the cache.
SLAB_BYTES = 12 * 2**20
# Bytes of one state of the groups that are processed together. Further groups take turns.
STATE_BYTES = 2**19


class ScanSizes(NamedTuple):
    """T rows, G groups, R heads per group, head width P, N states, q rows per chunk."""

    num_rows: int
    num_groups: int
    heads_per_group: int
    head_dim: int
    state_dim: int
    chunk: int

    @classmethod
    def infer(cls, x: Tensor, B: Tensor, chunk: int | None = None) -> ScanSizes:
        """The sizes of the arguments of ssd_scan."""
        num_rows, num_heads, head_dim = x.shape
        num_groups, state_dim = B.shape[1:]
        if chunk is None:
            # Larger chunks have more products of rows and fewer products with states.
            chunk = 32 if head_dim * state_dim <= 2048 else 64
        return cls(num_rows, num_groups, num_heads // num_groups, head_dim, state_dim, chunk)

    @property
    def num_chunks(self) -> int:
        """Number of chunks that cover all rows."""
        return -(-self.num_rows // self.chunk)

    def group_ranges(self) -> Iterator[tuple[slice, slice]]:
        """(slice of groups, slice of their heads) for each turn."""
        state = 4 * self.heads_per_group * self.head_dim * self.state_dim
        step = max(1, STATE_BYTES // max(state, 1))
        for begin in range(0, self.num_groups, step):
            end = min(begin + step, self.num_groups)
            yield slice(begin, end), slice(begin * self.heads_per_group, end * self.heads_per_group)

    def slab_ranges(self) -> Iterator[tuple[int, int]]:
        """(first chunk, end chunk) of each slab, in order."""
        inner, by_head = self.heads_per_group * self.head_dim, 3 * self.chunk + 2 * self.state_dim
        row = self.num_groups * (6 * inner + by_head)
        state = 3 * self.num_groups * inner * self.state_dim
        step = max(1, SLAB_BYTES // (4 * (self.chunk * row + state)))
        for begin in range(0, self.num_chunks, step):
            yield begin, min(begin + step, self.num_chunks)


def log2_decays(dt: Tensor, A: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cumulative sums along `dim` of log2 of the decays exp(A dt), and a mask of the clamped ones.

    A clamped decay has no gradient. The base is 2, because exp2 is several times faster than exp on
    a CPU where results are near 0.
    """
    log = dt * (A.double() * math.log2(math.e))
    # Sum in float64: all later decays inherit the rounding error of a sum.
    at_lowest = log < LOWEST_LOG
    return log.clamp_(min=LOWEST_LOG).cumsum(dim).to(dtype), at_lowest


class Slab:
    """Inputs and decays of the chunks in `span` = (first chunk, end chunk).

    Attributes:
        shape: (n, G, q, R, P).
        rows: slice of the rows of the pack in the slab.
        dt: [n, G, q, R, 1].
        x_dt: [n, G, q, R, P] x dt.
        x_dt_to_end: [n G, q, R P] x_dt decayed to the chunk's end.
        B: [n G, q, N].
        log: [R, n, G, q] cumulative log2 of the decays from the chunk's first row.
        at_lowest: bool [n, G, q, R] clamped logarithms, see log2_decays.
        causal_mask: [n, q, q] 1 where row i depends on row j, else 0.
        decay_from_start: [n, G, q, R, 1] decay from the state before the chunk to a row, 0 if a
            sequence begins in between.
        decay_to_end: [n, G, q, R, 1] decay from a row to the chunk's end, 0 likewise.
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
        # Mask the logarithms with -inf, because exp2 would overflow above the diagonal.
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
        """[T, ...] -> [n, q, ...], padded with zeros after the last row of the pack."""
        n, _, q, _, _ = self.shape
        tensor = tensor[self.rows]
        if pad := n * q - len(tensor):
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, pad))
        return tensor.reshape(n, q, *tensor.shape[1:])

    def by_group(self, tensor: Tensor) -> Tensor:
        """[T, H, ...] -> contiguous [n, G, q, R, ...]."""
        grouped = self.chunked(tensor).unflatten(2, (self.shape[1], -1)).transpose(1, 2)
        return grouped.to(self.dtype).contiguous()

    def bc_by_group(self, tensor: Tensor) -> Tensor:
        """[T, G, N] -> contiguous [n G, q, N]."""
        return self.chunked(tensor).transpose(1, 2).to(self.dtype).contiguous().flatten(0, 1)

    def to_rows(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[n, G, q, R, ...] or [n G, q, N] -> the slab's rows, each of the given shape."""
        n, groups, chunk, _, _ = self.shape
        rows = tensor.reshape(n, groups, chunk, math.prod(shape) // groups).transpose(1, 2)
        return rows.reshape(n * chunk, *shape)[: self.rows.stop - self.rows.start]

    def merge_heads(self, tensor: Tensor) -> Tensor:
        """[n, G, q, R, P] -> [n G, q, R P]."""
        return tensor.flatten(3).flatten(0, 1)

    def head_matrix(self, tensor: Tensor, r: int) -> Tensor:
        """[n, G, q, R, P] -> [n G, q, P] for head r of every group."""
        return tensor[:, :, :, r].flatten(0, 1)

    def decay(self, r: int, out: Tensor) -> Tensor:
        """[n G, q, q] decay from row j to row i for head r of every group, written into `out`."""
        log = self.log[r]
        square = out.view(*log.shape, log.shape[-1])
        torch.add(self._log_mask, log.unsqueeze(-1), out=square)
        return square.sub_(log.unsqueeze(-2)).exp2_().flatten(0, 1)

    def new_buffer(self, columns: int) -> Tensor:
        """Uninitialised [n G, q, columns]."""
        n, groups, chunk, _, _ = self.shape
        return self.x_dt.new_empty(n * groups, chunk, columns)

    def state_passing_fwd(self, states: Tensor) -> None:
        """In place s_{c+1} = gain_c + decay_c s_c on [n + 1, G, N, R P] of s_0, gain_0, ..."""
        by_head = states.unflatten(3, self.shape[3:]).unbind()
        chunk_decay = self.chunk_decay.unbind()
        for before, after, decay in zip(by_head, by_head[1:], chunk_decay, strict=False):
            after.addcmul_(before, decay)

    def state_passing_bwd(self, states: Tensor) -> None:
        """In place ds_c += decay_c ds_{c+1} on [n + 1, G, N, R P], last chunk first."""
        by_head = states.unflatten(3, self.shape[3:]).unbind()[::-1]
        chunk_decay = self.chunk_decay.unbind()[::-1]
        for after, before, decay in zip(by_head, by_head[1:], chunk_decay, strict=False):
            before.addcmul_(after, decay)
