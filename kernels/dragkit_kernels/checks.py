"""Argument checks shared by the public functions."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `tensor` has the expected shape. None matches any size."""
    shape = tensor.shape
    # A plain loop, because this runs many times a step.
    if len(shape) == len(expected):
        for actual, size in zip(shape, expected, strict=True):
            if size is not None and actual != size:
                break
        else:
            return
    dims = ["*" if size is None else size for size in expected]
    raise ValueError(
        f"{op}: {name} must have shape [{', '.join(map(str, dims))}], "
        f"got [{', '.join(map(str, shape))}]"
    )


def check_float(op: str, **tensors: Tensor) -> None:
    """Raises ValueError for a tensor that does not hold floating point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_index(op: str, **tensors: Tensor) -> None:
    """Raises ValueError for an index tensor that is not int32."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: {name} must be int32, got {tensor.dtype}")


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: float64 if an argument is float64, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def widest(*tensors: Tensor) -> Tensor:
    """The first float64 argument, else the first: `resolve_backend` reads its dtype."""
    return next((x for x in tensors if x.dtype == torch.float64), tensors[0])
