"""RMS norm over groups of columns, with or without a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import gated_rms_norm_ref

__all__ = ["gated_rms_norm", "gated_rms_norm_ref"]


def gated_rms_norm(
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """z rsqrt(mean(z^2) + eps) weight with z = y silu(gate), or z = y without a gate.

    The mean is over each of `groups` groups of D / groups consecutive columns. The computation is
    in float32, or float64 if an input is. The op saves only its inputs and recomputes everything
    else in the backward.

    Args:
        y: float [T, D]. It may be row-strided, such as a column slice of a wider matrix.
        gate: float [T, D] or None. It may be row-strided.
        weight: float [D].
        groups: a divisor of D.
        eps: added to the mean square.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, D] of y's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.

    Source: RMS norm, https://arxiv.org/abs/1910.07467, with the gate of Mamba-2,
    https://arxiv.org/abs/2405.21060.
    """
    check_shape("gated_rms_norm", "y", y, (None, None))
    check_shape("gated_rms_norm", "weight", weight, (y.shape[1],))
    check_float("gated_rms_norm", y=y, weight=weight)
    tensors = [y, weight]
    if gate is not None:
        check_shape("gated_rms_norm", "gate", gate, tuple(y.shape))
        check_float("gated_rms_norm", gate=gate)
        tensors.append(gate)
    if groups < 1 or y.shape[1] % groups:
        raise ValueError(
            f"gated_rms_norm: groups must divide the columns of y, got {groups} for "
            f"shape {list(y.shape)}"
        )
    triton = resolve_backend("gated_rms_norm", widest(*tensors), backend) == "triton"
    return torch.ops.dragkit.gated_rms_norm_fwd(y, gate, weight, groups, eps, triton)
