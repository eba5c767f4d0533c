"""The PyTorch path of causal_conv, by blocks of rows that stay in the cache.

It adds the taps from the oldest to the newest to all rows alike. Few rows are near the start of
their sequence. They are reset to the bias after every tap that reads another sequence.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import row_blocks
from ..checks import accumulator_dtype
from ..library import empty_gradients


class _SequenceStarts:
    """Rows whose sequence is too short for a tap, so that the tap would read another sequence."""

    def __init__(self, seq_pos: Tensor, taps: int) -> None:
        near_start = (seq_pos < taps - 1).nonzero().squeeze(1)
        start_pos = seq_pos[near_start]
        self._rows = [near_start[start_pos < lag] for lag in range(1, taps)]
        self._row_lists = [rows.tolist() for rows in self._rows]

    def rows(self, lag: int, begin: int, end: int) -> Tensor | None:
        """Offsets in the block of the rows t with seq_pos_t < lag, or None if there are none."""
        row_lists = self._row_lists[lag - 1] if lag else []
        first = bisect_left(row_lists, begin)
        last = bisect_left(row_lists, end, lo=first)
        return self._rows[lag - 1][first:last] - begin if last > first else None


def _convolve(
    x: Tensor,
    taps: list[Tensor],
    bias_acc: Tensor,
    starts: _SequenceStarts,
    begin: int,
    end: int,
    out: Tensor,
) -> None:
    """out = bias + sum_j taps[j] x_{t-j} for the rows t from `begin` to `end`."""
    max_lag = len(taps) - 1
    first = max(begin - max_lag, 0)
    x_acc = x[first:end].to(out.dtype)
    # The first max_lag rows of the pack lack some taps, so they start from the bias.
    if begin < max_lag:
        out.copy_(bias_acc.expand_as(out))
    for lag in range(max_lag, -1, -1):
        source = x_acc[max(begin - first - lag, 0) : max(end - first - lag, 0)]
        if lag == max_lag and begin >= lag:
            torch.addcmul(bias_acc, source, taps[lag], out=out)
        else:
            out[max(lag - begin, 0) :].addcmul_(source, taps[lag])
        rows = starts.rows(lag, begin, end)
        if rows is not None:
            # All taps added so far to these rows read another sequence: start again.
            out.index_copy_(0, rows, bias_acc.expand(len(rows), -1))


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_pos: Tensor
) -> tuple[list[Tensor], Tensor, _SequenceStarts]:
    """(taps [C] from lag 0 on, bias [C], sequence starts), in the accumulator dtype."""
    taps = weight.to(accumulator_dtype(x, weight)).mT.contiguous()
    bias_acc = taps.new_zeros(taps.shape[1]) if bias is None else bias.to(taps.dtype)
    return list(taps.flip(0)), bias_acc, _SequenceStarts(seq_pos, taps.shape[0])


def causal_conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, seq_pos: Tensor) -> Tensor:
    """The forward, see causal_conv."""
    taps, bias_acc, starts = _prepare(x, weight, bias, seq_pos)
    out = x.new_empty(x.shape)
    low_precision = out.dtype != bias_acc.dtype
    for begin, end in row_blocks(x):
        block = out[begin:end]
        y = bias_acc.new_empty(block.shape) if low_precision else block
        _convolve(x, taps, bias_acc, starts, begin, end, y)
        F.silu(y, inplace=True)
        if low_precision:
            block.copy_(y)
    return out


def causal_conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_pos: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_t = sum_j weight[:, W-1-j] d_{t+j}, where d is the gradient before the silu."""
    taps, bias_acc, starts = _prepare(x, weight, bias, seq_pos)
    width = len(taps)
    d_x, d_weight, d_bias = out = empty_gradients((x, weight, bias), output_mask)
    low_precision = d_x.dtype != bias_acc.dtype
    d_taps, d_base = bias_acc.new_zeros(width, x.shape[1]), torch.zeros_like(bias_acc)
    buffer: Tensor | None = None
    for begin, end in row_blocks(x):
        # dx of a block needs the gradients of up to W - 1 later rows.
        count, last = end - begin, min(end + width - 1, x.shape[0])
        if buffer is None:
            # Reuse this buffer: page faults cost more than the sums.
            buffer = bias_acc.new_empty(last, x.shape[1])
        d = _d_preactivation(grad, x, taps, bias_acc, starts, begin, last, buffer)
        y = bias_acc.new_empty(count, x.shape[1]) if low_precision else d_x[begin:end]
        for lag in range(width):
            rows = starts.rows(lag, begin, last)
            if rows is not None:
                # These rows have no tap at this lag, nor at a larger one.
                d.index_fill_(0, rows, 0.0)
            source = d[lag : lag + count]
            if output_mask[0] and lag == 0:
                torch.mul(source, taps[0], out=y)
            elif output_mask[0]:
                y[: len(source)].addcmul_(source, taps[lag])
            if output_mask[1]:
                d_taps[lag] += _tap_sum(d, x, starts, lag, begin, end)
            if output_mask[2] and lag == 0:
                d_base += source.sum(0)
        if output_mask[0] and low_precision:
            d_x[begin:end] = y
    if output_mask[1]:
        d_weight.copy_(d_taps.flip(0).mT)
    if output_mask[2]:
        d_bias.copy_(d_base)
    return out


def _d_preactivation(
    grad: Tensor,
    x: Tensor,
    taps: list[Tensor],
    bias_acc: Tensor,
    starts: _SequenceStarts,
    begin: int,
    end: int,
    buffer: Tensor,
) -> Tensor:
    """Gradient before the silu for the rows from `begin` to `end`, written into `buffer`."""
    d, x_acc = buffer[: end - begin], grad[begin:end].to(buffer.dtype)
    _convolve(x, taps, bias_acc, starts, begin, end, d)
    return torch.ops.aten.silu_backward.grad_input(x_acc, d, grad_input=d)


def _tap_sum(
    d: Tensor, x: Tensor, starts: _SequenceStarts, lag: int, begin: int, end: int
) -> Tensor:
    """[C] sum of d_t x_{t-lag} over the rows t of a block with seq_pos_t >= lag."""
    begin, first = max(begin, lag), begin
    product = x[begin - lag : max(end - lag, 0)] * d[begin - first : end - first]
    rows = starts.rows(lag, begin, end)
    if rows is not None:
        product.index_fill_(0, rows, 0.0)
    return product.sum(0)
