"""Routed experts, with LoRA or without, as products over groups of rows.

A forward sorts its rows by expert once. Under LoRA it computes x W^T + s (x A^T) B^T over the
groups, whereas PEFT's forward adds s B A to the weights of all experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.generator.nemotron_h.grouped import ALIGNMENT, grouped_linear, grouped_mm_supports

_PROJECTIONS = ("up_proj", "down_proj")


class LoraFactors(NamedTuple):
    """Adapters of one projection: A, float [E, R, I], B, float [E, O, R], and their scale."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float


class _TakeRows(torch.autograd.Function):
    """y[i] = x[index[i] // copies], where `index` is a permutation.

    The backward gathers by the inverse permutation and sums the copies of a row in a fixed order.
    The backward of an indexed read would sum with atomics on a GPU, in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        # `index_select` is faster than x[index] on a CPU.
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        rows = grad.index_select(0, inverse)
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, grad.shape[1]).sum(1)
        return rows, None, None, None


def _lora_linear(x: Tensor, weight: Tensor, factors: LoraFactors | None, ends: Tensor) -> Tensor:
    y = grouped_linear(x, weight, ends)
    if factors is None:
        return y
    lora_a, lora_b = factors.lora_a.to(x.dtype), factors.lora_b.to(x.dtype).contiguous()
    # Zeros raise the rank to a width that `F.grouped_mm` takes, and change no product.
    if missing := -lora_a.shape[1] % (ALIGNMENT // x.dtype.itemsize):
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))
    return y.add_(grouped_linear(grouped_linear(x, lora_a, ends) * factors.scale, lora_b, ends))


def routed_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: nn.Module,
    factors: dict[str, LoraFactors],
) -> Tensor:
    """sum_k w_k down(act(up(x))) over the K experts of every token, adapters included.

    Args:
        x: float [T, M].
        index: int64 [T, K] experts of each token.
        weights: float [T, K].
        experts: a `NemotronHExperts`.
        factors: adapters by the name of their projection.

    Returns:
        [T, M] with the dtype of `x`. Sums over K have the dtype of `weights` if that is wider.
    """
    num_tokens, copies = index.shape
    if num_tokens == 0:
        return x
    expert = index.reshape(-1)
    # A stable sort keeps the order of tokens, so that every run sums in the same order.
    order = torch.argsort(expert, stable=True)
    inverse = torch.argsort(order)
    expert_ids = torch.arange(len(experts.up_proj), device=expert.device)
    ends = torch.searchsorted(expert[order], expert_ids, right=True).int()
    rows = _TakeRows.apply(x.to(experts.up_proj.dtype), order, inverse, copies)
    up = _lora_linear(rows, experts.up_proj, factors.get("up_proj"), ends)
    down = _lora_linear(experts.act_fn(up), experts.down_proj, factors.get("down_proj"), ends)
    per_token = _TakeRows.apply(down, inverse, order, 1).view(num_tokens, copies, -1)
    return (per_token * weights[..., None]).sum(1).to(x.dtype)


def _factors(wrapper: nn.Module, name: str) -> LoraFactors:
    """Factors of a PEFT `ParamWrapper`, whose two linear layers hold all experts side by side."""
    lora_a, lora_b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    num_experts = wrapper.num_experts
    # PEFT lays A out as [E * R, I], and B as [O, R * E] with the expert as the fastest index.
    return LoraFactors(
        lora_a.view(num_experts, -1, lora_a.shape[1]),
        lora_b.view(lora_b.shape[0], -1, num_experts).permute(2, 0, 1),
        wrapper.scaling[name],
    )


def unwrap_lora_experts(wrapper: nn.Module) -> tuple[nn.Module, dict[str, LoraFactors]] | None:
    """The experts inside PEFT's wrappers, and their adapters, or None for PEFT's own forward.

    It is None where adapters are disabled, merged, or several, and under expert parallelism.
    """
    factors, module = {}, wrapper
    while hasattr(module, "parameter_name"):
        active = module.active_adapters
        if module.disable_adapters or module.merged or len(active) != 1:
            return None
        if active[0] not in module.lora_A:
            return None
        factors[module.parameter_name] = _factors(module, active[0])
        module = module.base_layer
    if not factors.keys() <= set(_PROJECTIONS) or getattr(module, "_is_expert_parallel", False):
        return None
    return module, factors


def routed_forward(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """Output of the routed experts of a `NemotronHMoE`, without its shared experts.

    Args:
        mixer: the mixer, with adapters or without.
        hidden: float [T, M].

    Returns:
        float [T, M].
    """
    _, weights, index = mixer.gate(hidden)
    latent = mixer.fc1_latent_proj(hidden)
    unwrapped = unwrap_lora_experts(mixer.experts)
    if unwrapped is None:
        return mixer.fc2_latent_proj(mixer.experts(latent, index, weights))
    return mixer.fc2_latent_proj(routed_experts(latent, index, weights, *unwrapped))


def uses_grouped_mm(mixer: nn.Module) -> bool:
    """Whether the routed experts of a `NemotronHMoE` run by `F.grouped_mm`."""
    unwrapped = unwrap_lora_experts(mixer.experts)
    if unwrapped is None:
        return False
    return all(grouped_mm_supports(getattr(unwrapped[0], name)) for name in _PROJECTIONS)
