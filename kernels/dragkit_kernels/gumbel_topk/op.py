"""Registration of dragkit::gumbel_topk_fwd and _bwd, which take keys with their noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import forbid_double_backward, register, register_gradient
from ..segments import segment_ids
from .reference import MAX_LOGIT, select_facts

if HAS_TRITON:
    from .forward import gumbel_topk_fwd
else:
    gumbel_topk_fwd = None


def _torch_fwd(
    x: Tensor, key: Tensor, fact_ptr: Tensor, k: int, max_facts: int, bound: float, exact_k: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward by its definition, one draw after the other."""
    draws = [
        select_facts(*draw, fact_ptr, k, max_facts=max_facts, bound=bound, exact_k=exact_k)
        for draw in zip(x, key, strict=True)
    ]
    index, gate, count, soft = map(torch.stack, zip(*draws, strict=True))
    return gate, soft, index, count


def _bwd(grad: Tensor, x: Tensor, soft: Tensor, fact_ptr: Tensor, exact_k: bool) -> Tensor:
    """dx = d (g - m) with d = s (1 - s), and m = (d . g) / sum(d) per question or m = 0.

    m is 0 without exact_k, and dx is 0 where x is certain. segment_reduce adds in the order of
    facts on every device.
    """
    slope = soft * (1 - soft)
    if exact_k:
        # The padding rows after the last question are one more segment.
        ptr = F.pad(fact_ptr, (0, 1), value=x.shape[1])
        mean, slope_sum = (
            torch.segment_reduce(value.t().contiguous(), "sum", offsets=ptr, unsafe=True)
            for value in (slope * grad, slope)
        )
        mean = mean.div_(slope_sum.clamp_(min=1e-30))
        grad = grad - mean.index_select(0, segment_ids(fact_ptr, x.shape[1])).t()
    return (slope * grad).masked_fill_(x.abs() > MAX_LOGIT, 0.0)


def _fwd_fake(
    x: Tensor, key: Tensor, fact_ptr: Tensor, k: int, *options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], fact_ptr.shape[0] - 1)
    return (
        x.new_empty(*shape, k),
        x.new_empty(x.shape),
        fact_ptr.new_empty(*shape, k),
        fact_ptr.new_empty(shape),
    )


def _bwd_fake(grad: Tensor, x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    x, _, fact_ptr, _, _, _, ctx.exact_k, _ = inputs
    _, soft, index, _ = output
    ctx.save_for_backward(x, soft, fact_ptr, index)


def _backward(ctx: object, *grads: Tensor) -> Tensor:
    d_gate, d_soft, *_ = grads
    x, soft, fact_ptr, index = ctx.saved_tensors
    # A fact has at most one slot per draw, so the indexed add has no duplicates. An empty slot, -1,
    # writes to the spare last column.
    grad, fact = F.pad(d_soft, (0, 1)), index.flatten(1).long().remainder(x.shape[1] + 1)
    grad = grad.scatter(1, fact, grad.gather(1, fact) + d_gate.flatten(1))
    return torch.ops.dragkit.gumbel_topk_bwd(grad[:, :-1], x, soft, fact_ptr, ctx.exact_k)


register(
    "gumbel_topk_fwd(Tensor x, Tensor key, Tensor fact_ptr, SymInt k, SymInt max_facts,"
    " float bound, bool exact_k, bool triton)"
    " -> (Tensor gate, Tensor soft, Tensor index, Tensor count)",
    _torch_fwd,
    _fwd_fake,
    triton=gumbel_topk_fwd,
)
register(
    "gumbel_topk_bwd(Tensor grad, Tensor x, Tensor soft, Tensor fact_ptr, bool exact_k) -> Tensor",
    _bwd,
    _bwd_fake,
)
register_gradient("gumbel_topk_fwd", _backward, _setup)
forbid_double_backward("gumbel_topk_bwd")
