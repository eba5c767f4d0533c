"""dragkit::fact_scores_fwd and _bwd: three scalar gathers, and three ordered sums back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..segments import ordered_sum

if HAS_TRITON:
    from .backward import fact_scores_bwd
    from .forward import fact_scores_fwd
else:
    fact_scores_bwd = fact_scores_fwd = None

_SORTED = (
    "Tensor head_ptr, Tensor head_fact, Tensor pair_ptr, Tensor pair_fact, "
    "Tensor tail_ptr, Tensor tail_fact, Tensor? group_row, Tensor? group_ptr, Tensor? group_fact"
)


def _torch_fwd(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    head: Tensor,
    tail: Tensor,
    fact_pair: Tensor,
    *sorted_facts: Tensor | None,
) -> Tensor:
    """l_e = a[head_q] + b[pair_q] + c[tail_q] + bias; the sorted facts serve the backward."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    out = head_score.to(dtype).index_select(0, head)
    out += pair_score.to(dtype).index_select(0, fact_pair)
    out += tail_score.to(dtype).index_select(0, tail)
    out.add_(bias.to(dtype))
    group_row = sorted_facts[-3]
    return out if group_row is None else out.index_select(0, group_row)


def _torch_bwd(
    grad: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    group_row: Tensor | None,
    group_ptr: Tensor | None,
    group_fact: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of grad over the facts with head v, of pair r, with tail v, and over all facts."""
    grad = grad.contiguous()  # sum().backward() sends a zero-stride gradient
    if group_ptr is not None and group_fact is not None:
        grad = ordered_sum(grad, group_fact, group_ptr)
    return (
        ordered_sum(grad, head_fact, head_ptr),
        ordered_sum(grad, pair_fact, pair_ptr),
        ordered_sum(grad, tail_fact, tail_ptr),
        grad.sum(),
    )


def _fact_scores_fake(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    head: Tensor,
    *rest: object,
) -> Tensor:
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    group_row = rest[-4]
    return head_score.new_empty((head if group_row is None else group_row).shape, dtype=dtype)


def _fact_scores_bwd_fake(
    grad: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = (grad.new_empty(ptr.shape[0] - 1) for ptr in (head_ptr, pair_ptr, tail_ptr))
    return (*sums, grad.new_empty(()))


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.save_for_backward(*inputs[7:-1])
    ctx.triton = inputs[-1]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.dragkit.fact_scores_bwd(grad, *ctx.saved_tensors, ctx.triton)
    cast = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return (*cast, *(None,) * 13)


register(
    "fact_scores_fwd(Tensor head_score, Tensor pair_score, Tensor tail_score, Tensor bias, "
    f"Tensor head, Tensor tail, Tensor fact_pair, {_SORTED}, bool triton) -> Tensor",
    _torch_fwd,
    _fact_scores_fake,
    triton=fact_scores_fwd,
)
register(
    f"fact_scores_bwd(Tensor grad, {_SORTED}, bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    _torch_bwd,
    _fact_scores_bwd_fake,
    triton=fact_scores_bwd,
)
register_gradient("fact_scores_fwd", _backward, _setup)
forbid_gradient("fact_scores_bwd")
