"""Routed experts, with LoRA or without: products over groups of rows, never a loop over experts.

The rows of a forward are sorted by expert once. Under LoRA every token meets its experts' low-rank
factors, x W^T + s (x A^T) B^T over the groups, where PEFT adapts the stacked weights of all experts
before each forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.generator.nemotron_h.grouped import ALIGNMENT, grouped_linear, grouped_mm_supports

_PROJECTIONS = ("up_proj", "down_proj")


class _Factors(NamedTuple):
    """Adapter of one projection: A float [E, R, I], B float [E, O, R] and its scale."""

    down: Tensor
    up: Tensor
    scale: float


class _TakeRows(torch.autograd.Function):
    """y[i] = x[index[i] // copies], where `index` is a permutation.

    The gradient is gathered by the inverse permutation and summed over the copies of a row, so its
    order is fixed; that of an indexed read is a sum by atomics on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        # Faster than x[index] on a CPU.
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        rows = grad.index_select(0, inverse)
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, grad.shape[1]).sum(1)
        return rows, None, None, None


def _adapted(x: Tensor, weight: Tensor, factors: _Factors | None, ends: Tensor) -> Tensor:
    y = grouped_linear(x, weight, ends)
    if factors is None:
        return y
    down, up = factors.down.to(x.dtype), factors.up.to(x.dtype).contiguous()
    # A rank that fills no whole 16 bytes: zeros beside it change no product.
    step = ALIGNMENT // x.dtype.itemsize
    if missing := -down.shape[1] % step:
        down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
    return y.add_(grouped_linear(grouped_linear(x, down, ends) * factors.scale, up, ends))


def routed_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: nn.Module,
    factors: dict[str, _Factors],
) -> Tensor:
    """sum_k w_k down(act(up(x))) over the experts of every token, adapters included.

    Args:
        x: float [T, M]; index: int64 [T, K] experts of each token; weights: float [T, K].
        experts: a `NemotronHExperts`; factors: adapters of its projections, by name.

    Returns:
        float [T, M], of the type of `x`; sums over K have the type of `weights` if that is wider.
    """
    tokens, copies = index.shape
    if tokens == 0:
        return x
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.argsort(order)
    number = torch.arange(len(experts.up_proj), device=flat.device)
    ends = torch.searchsorted(flat[order], number, right=True).int()
    rows = _TakeRows.apply(x.to(experts.up_proj.dtype), order, inverse, copies)
    up = _adapted(rows, experts.up_proj, factors.get("up_proj"), ends)
    down = _adapted(experts.act_fn(up), experts.down_proj, factors.get("down_proj"), ends)
    back = _TakeRows.apply(down, inverse, order, 1).view(tokens, copies, -1)
    return (back * weights[..., None]).sum(1).to(x.dtype)


def _factors(wrapper: nn.Module, name: str) -> _Factors:
    """The adapter of a PEFT `ParamWrapper`, whose linear layers hold all experts side by side."""
    down, up = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    number = wrapper.num_experts
    return _Factors(
        down.view(number, -1, down.shape[1]),
        up.view(up.shape[0], -1, number).permute(2, 0, 1),
        wrapper.scaling[name],
    )


def unwrap_lora_experts(outer: nn.Module) -> tuple[nn.Module, dict[str, _Factors]] | None:
    """The experts and their adapters; None where PEFT's own forward has to run."""
    factors, module = {}, outer
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
    """What the routed experts of a `NemotronHMoE` add, without its shared ones.

    Args:
        mixer: with adapters or without; hidden: float [T, M].

    Returns:
        float [T, M].
    """
    _, weights, index = mixer.gate(hidden)
    latent = mixer.fc1_latent_proj(hidden)
    plan = unwrap_lora_experts(mixer.experts)
    if plan is None:
        return mixer.fc2_latent_proj(mixer.experts(latent, index, weights))
    return mixer.fc2_latent_proj(routed_experts(latent, index, weights, *plan))


def uses_grouped_mm(mixer: nn.Module) -> bool:
    """Whether the routed experts of a `NemotronHMoE` compute by the library's grouped product."""
    plan = unwrap_lora_experts(mixer.experts)
    if plan is None:
        return False
    stacks = [getattr(plan[0], name) for name in _PROJECTIONS]
    return all(grouped_mm_supports(weight) for weight in stacks)
