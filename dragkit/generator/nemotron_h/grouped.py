"""Linear layers over groups of rows, one weight per group, also as ops that a graph can hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# `F.grouped_mm` requires the rows of its operands to begin at multiples of this many bytes.
ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_mm_supports(weight: Tensor) -> bool:
    """Whether `F.grouped_mm` takes weight [E, O, I] and rows of its dtype."""
    if weight.dtype not in _DTYPES:
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    if any(width * weight.dtype.itemsize % ALIGNMENT for width in weight.shape[1:]):
        return False
    # A weight that is memory-mapped from a file may begin anywhere.
    return weight.data_ptr() % ALIGNMENT == 0


def _group_sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if grouped_mm_supports(weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    pairs = zip(x.split(_group_sizes(ends)), weight.unbind(0), strict=True)
    return torch.cat([rows @ matrix.mT for rows, matrix in pairs])


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if grouped_mm_supports(weight):
        return F.grouped_mm(grad.mT, x, offs=ends)
    sizes = _group_sizes(ends)
    return torch.stack(
        [g.mT @ rows for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)]
    )


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies the rows of group e by weight[e]^T.

    Runs `F.grouped_mm` where it takes the weight. Otherwise the groups run one by one, and the host
    waits for their sizes. A trace records one op of ours: it cannot decide between the two, and
    `F.grouped_mm` itself can be traced in bfloat16 only.

    Args:
        x: float [S, I], sorted by group.
        weight: float [E, O, I].
        ends: int32 [E] group e ends before row ends[e].

    Returns:
        float [S, O].
    """
    if torch.compiler.is_compiling():
        return torch.ops.dragkit.grouped_linear(x, weight, ends)
    return _linear(x, weight, ends)


@torch.library.custom_op("dragkit::grouped_linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _linear(x, weight, ends).contiguous()


@_op.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("dragkit::grouped_linear_weight_grad", mutates_args=())
def _weight_grad_op(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _weight_grad(grad, x, weight, ends).contiguous()


@_weight_grad_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # A trace drops what its backward does not read, such as x where the weight is frozen.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad_x = grad_weight = None
    # The gradient of a sum arrives expanded, with strides of 0.
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dragkit.grouped_linear(grad, weight.mT, ends)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.dragkit.grouped_linear_weight_grad(grad, x, weight, ends)
    return grad_x, grad_weight, None


_op.register_autograd(_backward, setup_context=_setup)
