"""Linear layers with LoRA, in as few matrix products as exact gradients need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _MergedLinear(torch.autograd.Function):
    """y = x (W + s B A)^T for a frozen W, with gradients for x, A and B.

    W + s B A costs one small product, and x then passes through one matrix instead of three. The
    gradients of A and B keep the low rank, so none has the size of W. A stacks the layers' factors,
    and `lora_b` holds one B per layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        lora_a: Tensor,
        scale: float,
        *lora_b: Tensor,
    ) -> tuple[Tensor, ...]:
        ranks = [b.shape[1] for b in lora_b]
        update = [b @ a for b, a in zip(lora_b, lora_a.split(ranks), strict=True)]
        merged = torch.add(weight, _cat(update), alpha=scale)
        ctx.save_for_backward(x, merged, lora_a, *lora_b)
        ctx.scale, ctx.sizes = scale, list(sizes)
        biases = [None] * len(sizes) if bias is None else bias.split(ctx.sizes)
        return tuple(
            F.linear(x, part, b) for part, b in zip(merged.split(ctx.sizes), biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, lora_a, *lora_b = ctx.saved_tensors
        grads = [grad.flatten(0, -2) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            first, *rest = merged.split(ctx.sizes)
            grad_x = grads[0] @ first
            # In place, so that no second tensor of this size exists.
            for grad, part in zip(grads[1:], rest, strict=True):
                grad_x.addmm_(grad, part)
            grad_x = grad_x.view_as(x)
        # The outputs may be cut elsewhere than between layers.
        widths = [b.shape[0] for b in lora_b]
        if widths != ctx.sizes:
            grads = _cat(grads, 1).split(widths, dim=1)
        rows = x.flatten(0, -2)
        # A of all layers gets its gradient from one product with x.
        grad_low_rank = _cat([grad @ b for grad, b in zip(grads, lora_b, strict=True)], 1)
        grad_a = (grad_low_rank.mT @ rows) * ctx.scale
        low_rank = (rows @ lora_a.mT).split([b.shape[1] for b in lora_b], dim=1)
        grad_b = [(grad.mT @ r) * ctx.scale for grad, r in zip(grads, low_rank, strict=True)]
        return grad_x, None, None, None, grad_a, None, *grad_b


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


def _plain_adapter(layer: nn.Module) -> str | None:
    """Name of the only adapter, if the layer is frozen and the adapter adds s B A x and no more."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    base = layer.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return None
    dropout = layer.lora_dropout[name]
    drops = dropout.training and getattr(dropout, "p", 0.0) > 0.0
    return None if layer.lora_B[name].bias is not None or drops else name


def _low_rank_linear(
    x: Tensor, layers: Sequence[nn.Module], names: Sequence[str | None]
) -> list[Tensor]:
    """Outputs of the layers. A layer with an adapter name computes base + s (x A^T) B^T."""
    outputs = [
        layer(x) if name is None else layer.base_layer(x)
        for layer, name in zip(layers, names, strict=True)
    ]
    plain = [i for i, name in enumerate(names) if name is not None]
    if not plain:
        return outputs
    # A and B are cast to the dtype of x. PEFT casts x instead, by far the largest of the three, and
    # keeps the cast for the backward.
    lora_a = _cat([layers[i].lora_A[names[i]].weight for i in plain]).to(x.dtype)
    ranks = [layers[i].lora_A[names[i]].weight.shape[0] for i in plain]
    low_rank = F.linear(x.flatten(0, -2), lora_a).split(ranks, dim=1)
    for i, part in zip(plain, low_rank, strict=True):
        lora_b, scale = layers[i].lora_B[names[i]].weight.to(x.dtype), layers[i].scaling[names[i]]
        y = outputs[i]
        # One rounding of the sum, in `addmm`.
        outputs[i] = torch.addmm(y.flatten(0, -2), part, lora_b.mT, alpha=scale).view_as(y)
    return outputs


def _split_linear(
    x: Tensor, layer: nn.Module, name: str | None, sizes: Sequence[int]
) -> list[Tensor]:
    """Output of one layer in parts, each computed by its own product.

    Views of one product would keep all of it alive as long as one view is needed.
    """
    base = layer if name is None else layer.base_layer
    biases = [None] * len(sizes) if base.bias is None else base.bias.split(sizes)
    parts = zip(base.weight.split(sizes), biases, strict=True)
    outputs = [F.linear(x, weight, bias) for weight, bias in parts]
    if name is None:
        return outputs
    low_rank = F.linear(x.flatten(0, -2), layer.lora_A[name].weight.to(x.dtype))
    lora_b = layer.lora_B[name].weight.to(x.dtype).split(sizes)
    return [
        torch.addmm(y.flatten(0, -2), low_rank, b.mT, alpha=layer.scaling[name]).view_as(y)
        for y, b in zip(outputs, lora_b, strict=True)
    ]


def adapted_linear(
    x: Tensor, layers: Sequence[nn.Module], sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Outputs of linear layers that read the same rows.

    A layer whose only adapter is plain LoRA runs as x W^T + s (x A^T) B^T. In float32 or float64,
    layers that all have one run as x (W + s B A)^T if the rows are many enough to pay for the sum.
    Half precision never adds to W, because the sum would round the update away. Every other layer
    (no adapter, active dropout, several adapters) runs its own forward.

    Args:
        x: float [..., I].
        layers: linear layers of width I, with a PEFT adapter or without.
        sizes: widths into which the concatenated outputs are split. None gives one per layer.

    Returns:
        float [..., O_i], contiguous where computed here.
    """
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    names = [_plain_adapter(layer) for layer in layers]
    widths = [base.out_features for base in bases]
    sizes = widths if sizes is None else list(sizes)
    has_bias = {base.bias is not None for base in bases}
    scales = {layer.scaling[n] for layer, n in zip(layers, names, strict=True) if n is not None}
    mergeable = None not in names and len(scales) == 1 and len(has_bias) == 1
    if not mergeable or not _is_exact(x, layers, names) or _has_few_rows(x, sum(widths)):
        single = len(layers) == 1 and type(bases[0]) is nn.Linear
        if sizes != widths and single and (names[0] is not None or layers[0] is bases[0]):
            return tuple(_split_linear(x, layers[0], names[0], sizes))
        outputs = _low_rank_linear(x, layers, names)
        return tuple(outputs) if sizes == widths else _cat(outputs, -1).split(sizes, dim=-1)
    lora_a = _cat([layer.lora_A[n].weight for layer, n in zip(layers, names, strict=True)])
    lora_b = [layer.lora_B[n].weight for layer, n in zip(layers, names, strict=True)]
    weight = _cat([base.weight for base in bases])
    bias = None if bases[0].bias is None else _cat([base.bias for base in bases])
    return _MergedLinear.apply(x, weight, bias, sizes, lora_a, scales.pop(), *lora_b)


def _has_few_rows(x: Tensor, outer: int) -> bool:
    """Whether W + s B A costs more than it saves. A trace assumes many rows."""
    if torch.compiler.is_compiling():
        return False
    inner = x.shape[-1]
    return x.numel() // max(inner, 1) * (inner + outer) < inner * outer


def _is_exact(x: Tensor, layers: Sequence[nn.Module], names: Sequence[str]) -> bool:
    """Whether all dtypes are equal and W + s B A rounds no more than a sum of products."""
    dtypes = {x.dtype}
    for layer, name in zip(layers, names, strict=True):
        dtypes |= {layer.base_layer.weight.dtype, layer.lora_A[name].weight.dtype}
    return len(dtypes) == 1 and x.dtype.itemsize >= 4
