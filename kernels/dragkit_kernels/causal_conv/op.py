"""dragkit::causal_conv_fwd and _bwd: nothing is kept but the inputs.

The PyTorch form takes a block of rows through all passes while it is in the cache. It adds the taps
from the oldest to the newest for all rows alike and puts rows whose sequence began in between back
to their start: few rows, and by selection, so that nothing passes from one sequence to another.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..blocks import row_blocks
from ..checks import accumulator_dtype
from ..library import (
    empty_gradients,
    forbid_gradient,
    register,
    register_gradient,
    wanted_gradients,
)

if HAS_TRITON:
    from .backward import causal_conv_bwd
    from .forward import causal_conv_fwd
else:
    causal_conv_bwd = causal_conv_fwd = None


class _Starts:
    """Rows that a tap does not reach because their sequence begins after the row it would read."""

    def __init__(self, position: Tensor, taps: int) -> None:
        near = (position < taps - 1).nonzero().squeeze(1)
        place = position[near]
        self._rows = [near[place < back] for back in range(1, taps)]
        self._places = [rows.tolist() for rows in self._rows]

    def rows(self, back: int, begin: int, end: int) -> Tensor | None:
        """Rows t of a block, from its first, with position_t < back; None instead of none."""
        places = self._places[back - 1] if back else []
        low = bisect_left(places, begin)
        high = bisect_left(places, end, lo=low)
        return self._rows[back - 1][low:high] - begin if high > low else None


def _convolve(
    x: Tensor,
    taps: list[Tensor],
    base: Tensor,
    starts: _Starts,
    begin: int,
    end: int,
    out: Tensor,
) -> None:
    """out = base + sum_j taps[j] x_{t-j} for the rows t from `begin` to `end`."""
    furthest = len(taps) - 1
    first = max(begin - furthest, 0)
    wide = x[first:end].to(out.dtype)
    if begin < furthest:
        out.copy_(base.expand_as(out))
    for back in range(furthest, -1, -1):
        source = wide[max(begin - first - back, 0) : max(end - first - back, 0)]
        if back == furthest and begin >= back:
            torch.addcmul(base, source, taps[back], out=out)
        else:
            out[max(back - begin, 0) :].addcmul_(source, taps[back])
        rows = starts.rows(back, begin, end)
        if rows is not None:
            out.index_copy_(0, rows, base.expand(len(rows), -1))


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor
) -> tuple[list[Tensor], Tensor, _Starts]:
    """The taps [C] from the token itself back, the bias [C], and the rows near the starts."""
    taps = weight.to(accumulator_dtype(x, weight)).mT.contiguous()
    base = taps.new_zeros(taps.shape[1]) if bias is None else bias.to(taps.dtype)
    return list(taps.flip(0)), base, _Starts(position, taps.shape[0])


def _torch_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor) -> Tensor:
    """See causal_conv."""
    taps, base, starts = _prepared(x, weight, bias, position)
    out = x.new_empty(x.shape)
    narrow = out.dtype != base.dtype
    for begin, end in row_blocks(x):
        part = out[begin:end]
        y = base.new_empty(part.shape) if narrow else part
        _convolve(x, taps, base, starts, begin, end, y)
        F.silu(y, inplace=True)
        if narrow:
            part.copy_(y)
    return out


def _torch_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_t = sum_j weight[:, W-1-j] d_{t+j}, d the gradient before the activation."""
    taps, base, starts = _prepared(x, weight, bias, position)
    width = len(taps)
    d_x, d_weight, d_bias = out = empty_gradients((x, weight, bias), output_mask)
    narrow = d_x.dtype != base.dtype
    d_taps, d_base = base.new_zeros(width, x.shape[1]), torch.zeros_like(base)
    room: Tensor | None = None
    for begin, end in row_blocks(x):
        count, last = end - begin, min(end + width - 1, x.shape[0])
        if room is None:
            # Reuse this buffer: page faults cost more than the sums.
            room = base.new_empty(last, x.shape[1])
        d = _before_activation(grad, x, taps, base, starts, begin, last, room)
        y = base.new_empty(count, x.shape[1]) if narrow else d_x[begin:end]
        for back in range(width):
            rows = starts.rows(back, begin, last)
            if rows is not None:
                # They reach no row so far back, nor any before it.
                d.index_fill_(0, rows, 0.0)
            source = d[back : back + count]
            if output_mask[0] and back == 0:
                torch.mul(source, taps[0], out=y)
            elif output_mask[0]:
                y[: len(source)].addcmul_(source, taps[back])
            if output_mask[1]:
                d_taps[back] += _tap_sum(d, x, starts, back, begin, end)
            if output_mask[2] and back == 0:
                d_base += source.sum(0)
        if output_mask[0] and narrow:
            d_x[begin:end] = y
    if output_mask[1]:
        d_weight.copy_(d_taps.flip(0).mT)
    if output_mask[2]:
        d_bias.copy_(d_base)
    return out


def _before_activation(
    grad: Tensor,
    x: Tensor,
    taps: list[Tensor],
    base: Tensor,
    starts: _Starts,
    begin: int,
    end: int,
    room: Tensor,
) -> Tensor:
    """The gradient of the sums of the rows from `begin` to `end`, in `room`."""
    d, wide = room[: end - begin], grad[begin:end].to(room.dtype)
    _convolve(x, taps, base, starts, begin, end, d)
    return torch.ops.aten.silu_backward.grad_input(wide, d, grad_input=d)


def _tap_sum(d: Tensor, x: Tensor, starts: _Starts, back: int, begin: int, end: int) -> Tensor:
    """[C] sum of d_t x_{t-back} over the rows t of a block that reach so far."""
    begin, first = max(begin, back), begin
    product = x[begin - back : max(end - back, 0)] * d[begin - first : end - first]
    rows = starts.rows(back, begin, end)
    if rows is not None:
        product.index_fill_(0, rows, 0.0)
    return product.sum(0)


def _causal_conv_fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _causal_conv_bwd_fake(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[:3], arguments[-2])


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    x, weight, bias, position, ctx.triton = inputs
    ctx.save_for_backward(x, weight, bias, position)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.dragkit.causal_conv_bwd(grad, *ctx.saved_tensors, wanted, ctx.triton)
    return *wanted_gradients(grads, wanted), None, None


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor position"
register(
    f"causal_conv_fwd({_INPUTS}, bool triton) -> Tensor",
    _torch_fwd,
    _causal_conv_fake,
    triton=causal_conv_fwd,
)
register(
    f"causal_conv_bwd(Tensor grad, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor)",
    _torch_bwd,
    _causal_conv_bwd_fake,
    triton=causal_conv_bwd,
)
register_gradient("causal_conv_fwd", _backward, _setup)
forbid_gradient("causal_conv_bwd")
