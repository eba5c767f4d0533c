"""dragkit::ssd_scan_fwd and _bwd, which saves the inputs only, and dragkit::ssd_state_fwd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from .finite import bad_rows, from_then_on, spoil, surely_finite, whole_sequences, zeroed
from .reference import ssd_scan_ref, ssd_state_ref
from .reference_backward import ssd_scan_bwd_ref

if HAS_TRITON:
    from .backward import ssd_scan_bwd
    from .forward import ssd_scan_fwd, ssd_state_fwd
else:
    ssd_scan_bwd = ssd_scan_fwd = ssd_state_fwd = None

_INPUTS = (
    "Tensor x, Tensor dt, Tensor rate, Tensor into, Tensor out_of, Tensor skip, Tensor position"
)
_NUM_DIFFERENTIABLE = 6


def _torch_fwd(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
) -> Tensor:
    """The scan; what is not finite stays in its sequence."""
    if surely_finite(x, dt, into, out_of):
        return ssd_scan_ref(x, dt, rate, into, out_of, skip, position)
    bad, unread = bad_rows(x, dt, into), bad_rows(out_of)
    clean = [zeroed(t, bad) for t in (x, dt, into)]
    y = ssd_scan_ref(*clean[:2], rate, clean[2], zeroed(out_of, unread), skip, position)
    spoil(y, from_then_on(bad, position) | unread)
    return y


def _torch_bwd(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs; all of a sequence are NaN if one number in it is."""
    by_row = (grad, x, dt, into, out_of)
    if surely_finite(*by_row):
        return ssd_scan_bwd_ref(grad, x, dt, rate, into, out_of, skip, position, output_mask)
    bad = bad_rows(*by_row)
    grad, x, dt, into, out_of = (zeroed(t, bad) for t in by_row)
    out = ssd_scan_bwd_ref(grad, x, dt, rate, into, out_of, skip, position, output_mask)
    bad = whole_sequences(bad, position)
    for place, d_input in enumerate(out):
        if output_mask[place]:
            over_rows = place in (2, 5)
            spoil(d_input, bad.any().expand(d_input.shape[0]) if over_rows else bad)
    return out


def _torch_state(
    x: Tensor, dt: Tensor, rate: Tensor, into: Tensor, position: Tensor, last: Tensor
) -> Tensor:
    """States at the ends of sequences; what is not finite stays in its sequence."""
    if surely_finite(x, dt, into):
        return ssd_state_ref(x, dt, rate, into, position, last)
    bad = bad_rows(x, dt, into)
    clean = [zeroed(t, bad) for t in (x, dt, into)]
    state = ssd_state_ref(*clean[:2], rate, clean[2], position, last)
    spoil(state, from_then_on(bad, position)[last])
    return state


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(grad: Tensor, *rest: object) -> tuple[Tensor, ...]:
    inputs, mask = rest[:_NUM_DIFFERENTIABLE], rest[-2]
    return tuple(
        x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip(inputs, mask, strict=True)
    )


def _state_fake(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    position: Tensor,
    last: Tensor,
    triton: bool,
) -> Tensor:
    shape = (last.shape[0], *x.shape[1:], into.shape[2])
    return x.new_empty(shape, dtype=accumulator_dtype(x, dt, rate, into))


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    grads = torch.ops.dragkit.ssd_scan_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)
    wanted = tuple(g if need else None for g, need in zip(grads, mask, strict=True))
    return (*wanted, None, None)


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
    "ssd_state_fwd(Tensor x, Tensor dt, Tensor rate, Tensor into, Tensor position, Tensor last, "
    "bool triton) -> Tensor",
    _torch_state,
    _state_fake,
    triton=ssd_state_fwd,
)
