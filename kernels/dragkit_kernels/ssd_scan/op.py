"""dragkit::ssd_scan_fwd and _bwd, which saves the inputs only, and dragkit::ssd_state_fwd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import (
    empty_gradients,
    forbid_gradient,
    register,
    register_gradient,
    wanted_gradients,
)
from .finite import bad_rows, from_then_on, spoil, surely_finite, whole_sequences, zeroed
from .torch_impl import scan_backward, scan_forward, scan_states

if HAS_TRITON:
    from .backward import ssd_scan_bwd
    from .forward import ssd_scan_fwd, ssd_state_fwd
else:
    ssd_scan_bwd = ssd_scan_fwd = ssd_state_fwd = None

_NUM_DIFFERENTIABLE = 6


def _torch_fwd(*inputs: Tensor) -> Tensor:
    """The scan of x, dt, A, B, C, D and seq_pos; what is not finite stays in its sequence."""
    x, dt, A, B, C, D, seq_pos = inputs
    if surely_finite(x, dt, B, C):
        return scan_forward(*inputs)
    bad, unread = bad_rows(x, dt, B), bad_rows(C)
    clean = zeroed(x, bad), zeroed(dt, bad), A, zeroed(B, bad), zeroed(C, unread)
    y = scan_forward(*clean, D, seq_pos)
    spoil(y, from_then_on(bad, seq_pos) | unread)
    return y


def _torch_bwd(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs; all of a sequence are NaN if one number in it is."""
    x, dt, A, B, C, D, seq_pos, output_mask = arguments
    by_row = (grad, x, dt, B, C)
    if surely_finite(*by_row):
        return scan_backward(grad, *arguments)
    bad = bad_rows(*by_row)
    grad, x, dt, B, C = (zeroed(t, bad) for t in by_row)
    out = scan_backward(grad, x, dt, A, B, C, D, seq_pos, output_mask)
    bad = whole_sequences(bad, seq_pos)
    for d_input, t, wanted in zip(out, (x, dt, A, B, C, D), output_mask, strict=True):
        if wanted:
            # A and D have a sum over all rows.
            spoil(d_input, bad.any().expand(len(t)) if t is A or t is D else bad)
    return out


def _torch_state(*inputs: Tensor) -> Tensor:
    """States of x, dt, A, B, seq_pos at `last`; what is not finite stays in its sequence."""
    x, dt, A, B, seq_pos, last = inputs
    if surely_finite(x, dt, B):
        return scan_states(*inputs)
    bad = bad_rows(x, dt, B)
    state = scan_states(zeroed(x, bad), zeroed(dt, bad), A, zeroed(B, bad), seq_pos, last)
    spoil(state, from_then_on(bad, seq_pos)[last])
    return state


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(grad: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return empty_gradients(rest[:_NUM_DIFFERENTIABLE], rest[-2])


def _state_fake(*arguments: object) -> Tensor:
    x, dt, A, B, _, last, _ = arguments
    shape = (last.shape[0], *x.shape[1:], B.shape[2])
    return x.new_empty(shape, dtype=accumulator_dtype(x, dt, A, B))


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    grads = torch.ops.dragkit.ssd_scan_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)
    return (*wanted_gradients(grads, mask), None, None)


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor seq_pos"
register(f"ssd_scan_fwd({_INPUTS}, bool triton) -> Tensor", _torch_fwd, _fake, triton=ssd_scan_fwd)
register(
    f"ssd_scan_bwd(Tensor grad, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _torch_bwd,
    _bwd_fake,
    triton=ssd_scan_bwd,
)
register_gradient("ssd_scan_fwd", _backward, _setup)
forbid_gradient("ssd_scan_bwd")
register(
    "ssd_state_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor seq_pos, Tensor last, "
    "bool triton) -> Tensor",
    _torch_state,
    _state_fake,
    triton=ssd_state_fwd,
)
