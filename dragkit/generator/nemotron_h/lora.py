"""Linear layers with low-rank adapters, in as few matrix products as exact gradients need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _AdaptedLinear(torch.autograd.Function):
    """y = x (W + s B A)^T for a frozen W; gradients for x, A and B.

    The adapted weight costs one small product, after which x passes through one matrix instead of
    three. Only the weights' gradients keep the low rank: they never have the size of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        down: Tensor,
        scale: float,
        *up: Tensor,
    ) -> tuple[Tensor, ...]:
        ranks = [b.shape[1] for b in up]
        update = [b @ a for b, a in zip(up, down.split(ranks), strict=True)]
        whole = torch.add(weight, _joined(update), alpha=scale)
        ctx.save_for_backward(x, whole, down, *up)
        ctx.scale, ctx.sizes = scale, list(sizes)
        biases = [None] * len(sizes) if bias is None else bias.split(ctx.sizes)
        return tuple(
            F.linear(x, part, b) for part, b in zip(whole.split(ctx.sizes), biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, down, *up = ctx.saved_tensors
        grads = [grad.flatten(0, -2) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            first, *rest = whole.split(ctx.sizes)
            grad_x = grads[0] @ first
            for grad, part in zip(grads[1:], rest, strict=True):
                grad_x.addmm_(grad, part)
            grad_x = grad_x.view_as(x)
        heights = [b.shape[0] for b in up]
        if heights != ctx.sizes:
            grads = _joined(grads, 1).split(heights, dim=1)
        rows = x.flatten(0, -2)
        inner = _joined([grad @ b for grad, b in zip(grads, up, strict=True)], 1)
        grad_down = (inner.mT @ rows) * ctx.scale
        reduced = (rows @ down.mT).split([b.shape[1] for b in up], dim=1)
        grad_up = [(grad.mT @ r) * ctx.scale for grad, r in zip(grads, reduced, strict=True)]
        return grad_x, None, None, None, grad_down, None, *grad_up


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


def _plain_adapter(layer: nn.Module) -> str | None:
    """Name of the only adapter, if it adds s B A x to a frozen linear layer and nothing else."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    base = layer.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return None
    dropout, up = layer.lora_dropout[name], layer.lora_B[name]
    if up.bias is not None or (dropout.training and getattr(dropout, "p", 0.0) > 0.0):
        return None
    return name


def _add_low_rank(
    x: Tensor, layers: Sequence[nn.Module], names: Sequence[str | None]
) -> list[Tensor]:
    """Outputs of the layers; those with a name are base + s (x A^T) B^T, rounded once.

    A and B take the type of x, not x that of PEFT's float32 adapters: x is by far the largest of
    the three, and a cast of it would be kept for the backward.
    """
    outputs = [
        layer(x) if name is None else layer.base_layer(x)
        for layer, name in zip(layers, names, strict=True)
    ]
    plain = [i for i, name in enumerate(names) if name is not None]
    if not plain:
        return outputs
    down = _joined([layers[i].lora_A[names[i]].weight for i in plain]).to(x.dtype)
    ranks = [layers[i].lora_A[names[i]].weight.shape[0] for i in plain]
    reduced = F.linear(x.flatten(0, -2), down).split(ranks, dim=1)
    for i, part in zip(plain, reduced, strict=True):
        up, scale = layers[i].lora_B[names[i]].weight.to(x.dtype), layers[i].scaling[names[i]]
        y = outputs[i]
        outputs[i] = torch.addmm(y.flatten(0, -2), part, up.mT, alpha=scale).view_as(y)
    return outputs


def _cut(x: Tensor, layer: nn.Module, name: str | None, sizes: Sequence[int]) -> list[Tensor]:
    """The outputs of one layer in parts, each a product of its own.

    Views of one product would keep all of it as long as the last of them is needed.
    """
    base = layer if name is None else layer.base_layer
    cuts = list(sizes)
    biases = [None] * len(cuts) if base.bias is None else base.bias.split(cuts)
    parts = zip(base.weight.split(cuts), biases, strict=True)
    outputs = [F.linear(x, weight, bias) for weight, bias in parts]
    if name is None:
        return outputs
    reduced = F.linear(x.flatten(0, -2), layer.lora_A[name].weight.to(x.dtype))
    ups = layer.lora_B[name].weight.to(x.dtype).split(cuts)
    return [
        torch.addmm(y.flatten(0, -2), reduced, up.mT, alpha=layer.scaling[name]).view_as(y)
        for y, up in zip(outputs, ups, strict=True)
    ]


def adapted_linear(
    x: Tensor, layers: Sequence[nn.Module], sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Outputs of linear layers that read the same rows.

    Layers under plain LoRA share their products. In float32 or float64, where all have an adapter,
    x passes through W + s B A if its rows are many enough to pay for that sum; in half precision
    the sum would round what a sum of products keeps. Otherwise it is x W^T + s (x A^T) B^T.
    Whatever else stands there (no adapter, dropout at work, several adapters) computes itself.

    Args:
        x: float [..., I]; layers: linear layers of width I, with a PEFT adapter or without.
        sizes: widths into which all outputs, side by side, are cut; None is one per layer.

    Returns:
        float [..., O_i], contiguous where computed here.
    """
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    names = [_plain_adapter(layer) for layer in layers]
    widths = [base.out_features for base in bases]
    alike = {base.bias is None for base in bases}
    scales = {layer.scaling[n] for layer, n in zip(layers, names, strict=True) if n is not None}
    inner, outer = x.shape[-1], sum(widths)
    alone = None in names or len(scales) > 1 or len(alike) > 1
    if alone or not _exact(x, layers, names) or _few(x, inner, outer):
        one = len(layers) == 1 and type(bases[0]) is nn.Linear
        if sizes is not None and one and (names[0] is not None or layers[0] is bases[0]):
            return tuple(_cut(x, layers[0], names[0], sizes))
        outputs = _add_low_rank(x, layers, names)
        if sizes is None or list(sizes) == widths:
            return tuple(outputs)
        return _joined(outputs, -1).split(list(sizes), dim=-1)
    down = _joined([layer.lora_A[n].weight for layer, n in zip(layers, names, strict=True)])
    up = [layer.lora_B[n].weight for layer, n in zip(layers, names, strict=True)]
    weight = _joined([base.weight for base in bases])
    bias = None if bases[0].bias is None else _joined([base.bias for base in bases])
    return _AdaptedLinear.apply(x, weight, bias, sizes or widths, down, scales.pop(), *up)


def _few(x: Tensor, inner: int, outer: int) -> bool:
    """Whether W + s B A costs more than it saves for the rows of x; a trace takes them as many."""
    if torch.compiler.is_compiling():
        return False
    return x.numel() // max(inner, 1) * (inner + outer) < inner * outer


def _exact(x: Tensor, layers: Sequence[nn.Module], names: Sequence[str]) -> bool:
    """Whether all is of one type, and W + s B A rounds no more than a sum of products."""
    kinds = {x.dtype}
    for layer, name in zip(layers, names, strict=True):
        kinds |= {layer.base_layer.weight.dtype, layer.lora_A[name].weight.dtype}
    return len(kinds) == 1 and x.dtype.itemsize >= 4
