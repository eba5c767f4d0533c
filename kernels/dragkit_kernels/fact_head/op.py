"""dragkit::fact_scores_fwd and _bwd: three scalar gathers, and three ordered sums back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..segments import ordered_sum

_SORTED = (
    "Tensor head_ptr, Tensor head_fact, Tensor pair_ptr, Tensor pair_fact, "
    "Tensor tail_ptr, Tensor tail_fact"
)


def fact_scores_fwd(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    head: Tensor,
    tail: Tensor,
    fact_pair: Tensor,
    *sorted_facts: Tensor,
) -> Tensor:
    """l_e = a[head_e] + b[pair_e] + c[tail_e] + bias; the sorted facts serve the backward only."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    out = head_score.to(dtype).index_select(0, head)
    out += pair_score.to(dtype).index_select(0, fact_pair)
    out += tail_score.to(dtype).index_select(0, tail)
    return out.add_(bias.to(dtype))


def fact_scores_bwd(
    grad: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of grad over the facts with head v, of pair r, with tail v, and over all facts."""
    grad = grad.contiguous()  # sum().backward() sends a zero-stride gradient
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
    *orders: Tensor,
) -> Tensor:
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    return head_score.new_empty(head.shape, dtype=dtype)


def _fact_scores_bwd_fake(
    grad: Tensor,
    head_ptr: Tensor,
    head_fact: Tensor,
    pair_ptr: Tensor,
    pair_fact: Tensor,
    tail_ptr: Tensor,
    tail_fact: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = (grad.new_empty(ptr.shape[0] - 1) for ptr in (head_ptr, pair_ptr, tail_ptr))
    return (*sums, grad.new_empty(()))


def _setup(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.save_for_backward(*inputs[7:])


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.dragkit.fact_scores_bwd(grad, *ctx.saved_tensors)
    cast = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return (*cast, *(None,) * 9)


register(
    "fact_scores_fwd(Tensor head_score, Tensor pair_score, Tensor tail_score, Tensor bias, "
    f"Tensor head, Tensor tail, Tensor fact_pair, {_SORTED}) -> Tensor",
    fact_scores_fwd,
    _fact_scores_fake,
)
register(
    f"fact_scores_bwd(Tensor grad, {_SORTED}) -> (Tensor, Tensor, Tensor, Tensor)",
    fact_scores_bwd,
    _fact_scores_bwd_fake,
)
register_gradient("fact_scores_fwd", _backward, _setup)
forbid_gradient("fact_scores_bwd")
