"""The PyTorch path of gated_rms_norm, by blocks of rows that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import row_blocks
from ..checks import accumulator_dtype
from ..library import empty_gradients


def _inverse_rms(z: Tensor, groups: int, eps: float) -> Tensor:
    """[n, G, 1] 1 / rms of each group."""
    (z,) = _by_group(groups, z)
    # vector_norm needs no temporary for the squares.
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return norm.square_().div_(z.shape[-1]).add_(eps).rsqrt_()


def _by_group(groups: int, *tensors: Tensor) -> list[Tensor]:
    """Views each tensor [n, D] as [n, G, D/G]."""
    return [x.unflatten(1, (groups, -1)) for x in tensors]


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x y. Overwrites x if out has another dtype."""
    if out.dtype == x.dtype:
        torch.mul(x, y, out=out)
    else:
        out.copy_(x.mul_(y))


def gated_rms_norm_fwd(
    y: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """The forward, see gated_rms_norm."""
    weight_acc = weight.to(_accumulator(y, gate, weight))
    out = y.new_empty(y.shape)
    if out.numel() == 0:
        return out
    low_precision = out.dtype != weight_acc.dtype
    for begin, end in row_blocks(y):
        y_acc, gate_acc = _widen(weight_acc, begin, end, y, gate)
        # Compute in the output if it has the accumulator dtype.
        z = torch.empty_like(y_acc) if low_precision else out[begin:end]
        if gate_acc is not None:
            y_acc = torch.ops.aten.silu.out(gate_acc, out=z).mul_(y_acc)
        scale = _inverse_rms(y_acc, groups, eps)
        torch.mul(*_by_group(groups, y_acc), scale, out=_by_group(groups, z)[0])
        z.mul_(weight_acc)
        if low_precision:
            out[begin:end] = z
    return out


def gated_rms_norm_bwd(
    grad: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    groups: int,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dz = (g - n mean(g n)) / rms(z) with n = z / rms(z), g = grad weight, see backward.py."""
    weight_acc = weight.to(_accumulator(y, gate, weight))
    d_y, d_gate, d_weight = out = empty_gradients((y, gate, weight), output_mask)
    needs_gate = gate is not None and output_mask[1]
    total, one = torch.zeros_like(weight_acc), weight_acc.new_ones(())
    buffer: Tensor | None = None
    for begin, end in row_blocks(y) if y.numel() else ():
        if buffer is None:
            # Reuse these buffers: page faults cost more than most of the computation.
            buffer = weight_acc.new_empty(5, end, y.shape[1])
        sig, silu, z, d_z, product = buffer[:, : end - begin]
        grad_acc, y_acc, gate_acc = _widen(weight_acc, begin, end, grad, y, gate)
        if gate_acc is None:
            z = y_acc
        else:
            torch.sigmoid(gate_acc, out=sig)
            torch.mul(gate_acc, sig, out=silu)
            torch.mul(y_acc, silu, out=z)
        scale = _inverse_rms(z, groups, eps)
        if output_mask[2]:
            torch.mul(grad_acc, z, out=product)
            total += (_by_group(groups, product)[0] * scale).flatten(1).sum(0)
        if not output_mask[0] and not needs_gate:
            continue
        if gate_acc is None and d_y.dtype == d_z.dtype:
            d_z = d_y[begin:end]
        torch.mul(grad_acc, weight_acc, out=d_z)
        torch.mul(d_z, z, out=product)
        z_group, d_group, product_group = _by_group(groups, z, d_z, product)
        mean_gn = product_group.mean(-1, keepdim=True).mul_(scale).mul_(scale)
        d_group.addcmul_(z_group, mean_gn, value=-1).mul_(scale)
        if needs_gate:
            # silu'(gate) = sig + silu (1 - sig), the interpolation from silu to 1 at sig.
            torch.lerp(silu, one, sig, out=product).mul_(y_acc)
            _multiply(product, d_z, d_gate[begin:end])
        if output_mask[0] and gate_acc is not None:
            _multiply(d_z, silu, d_y[begin:end])
        elif output_mask[0] and d_y.dtype != d_z.dtype:
            d_y[begin:end] = d_z
    if output_mask[2]:
        d_weight.copy_(total)
    return out


def _accumulator(y: Tensor, gate: Tensor | None, weight: Tensor) -> torch.dtype:
    return accumulator_dtype(y, weight, y if gate is None else gate)


def _widen(like: Tensor, begin: int, end: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Rows begin to end of each tensor in the dtype of `like`."""
    return [None if x is None else x[begin:end].to(like.dtype) for x in tensors]
