"""Products of rows by the matrix of their group, as operators that a graph holds whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the operands of a grouped product begin at multiples of this many bytes.
ALIGNMENT = 16
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_mm_supports(weight: Tensor) -> bool:
    """Whether the library's grouped product takes weight [E, O, I] and rows of its type."""
    if not hasattr(F, "grouped_mm") or weight.dtype not in _TYPES:
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    if any(width * weight.dtype.itemsize % ALIGNMENT for width in weight.shape[1:]):
        return False
    # Weights mapped from a file may begin anywhere.
    return weight.data_ptr() % ALIGNMENT == 0


def _groups(ends: Tensor) -> list[int]:
    begins = [0, *ends.tolist()]
    return [end - begin for begin, end in zip(begins, begins[1:], strict=False)]


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if grouped_mm_supports(weight):
        return F.grouped_mm(x, weight.mT, offs=ends)
    pairs = zip(x.split(_groups(ends)), weight.unbind(0), strict=True)
    return torch.cat([rows @ matrix.mT for rows, matrix in pairs])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if grouped_mm_supports(weight):
        return F.grouped_mm(grad.mT, x, offs=ends)
    sizes = _groups(ends)
    return torch.stack(
        [g.mT @ rows for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)]
    )


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of group e by weight[e]^T.

    By the library where it takes them, else group by group, which makes a GPU wait. A trace holds
    one operator: it knows nothing of what decides between the two, and the library's own is traced
    in bfloat16 alone and may be handed operands laid out as it does not take them.

    Args:
        x: float [S, I], sorted by group; weight: float [E, O, I]; ends: int32 [E], where the groups
            end.

    Returns:
        float [S, O].
    """
    if torch.compiler.is_compiling():
        return torch.ops.dragkit.grouped_linear(x, weight, ends)
    return _product(x, weight, ends)


@torch.library.custom_op("dragkit::grouped_linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _product(x, weight, ends).contiguous()


@_op.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("dragkit::grouped_linear_weight_grad", mutates_args=())
def _gradient_op(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _weight_gradient(grad, x, weight, ends).contiguous()


@_gradient_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # A trace drops what its backward pass does not read, such as the rows of a frozen stack.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad_x = grad_weight = None
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dragkit.grouped_linear(grad, weight.mT, ends)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.dragkit.grouped_linear_weight_grad(grad, x, weight, ends)
    return grad_x, grad_weight, None


_op.register_autograd(_backward, setup_context=_setup)
