"""dragkit::fact_scores_fwd and _bwd: three scalar gathers, and three ordered sums back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_double_backward, register, register_gradient
from ..segments import ordered_sum

if HAS_TRITON:
    from .backward import fact_scores_bwd
    from .forward import fact_scores_fwd
else:
    fact_scores_bwd = fact_scores_fwd = None

# `facts` are head, pair and tail [Q], and with groups row [E]. `sums` are ptr and order of the sums
# over head, pair and tail, and with groups of those over the facts of a row.


def _torch_fwd(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    facts: list[Tensor],
    sums: list[Tensor],
) -> Tensor:
    """l_e = a[head_q] + b[pair_q] + c[tail_q] + bias. The sums serve the backward."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    head, pair, tail, *row = facts
    out = head_score.to(dtype).index_select(0, head)
    out += pair_score.to(dtype).index_select(0, pair)
    out += tail_score.to(dtype).index_select(0, tail)
    out.add_(bias.to(dtype))
    return out.index_select(0, row[0]) if row else out


def _torch_bwd(grad: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of grad over the facts with head v, of pair r, with tail v, and over all facts."""
    grad = grad.contiguous()  # sum().backward() sends a zero-stride gradient
    tables = list(zip(sums[::2], sums[1::2], strict=True))
    for ptr, order in tables[3:]:
        grad = ordered_sum(grad, order, ptr)
    return (*(ordered_sum(grad, order, ptr) for ptr, order in tables[:3]), grad.sum())


def _fwd_fake(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    facts: list[Tensor],
    *rest: object,
) -> Tensor:
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    return head_score.new_empty(facts[-1].shape, dtype=dtype)


def _bwd_fake(
    grad: Tensor, sums: list[Tensor], triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*(grad.new_empty(ptr.shape[0] - 1) for ptr in sums[:6:2]), grad.new_empty(()))


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *scores, _, sums, ctx.triton = inputs
    ctx.dtypes = [x.dtype for x in scores]
    ctx.save_for_backward(*sums)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
    grads = torch.ops.dragkit.fact_scores_bwd(grad, list(ctx.saved_tensors), ctx.triton)
    return tuple(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


register(
    "fact_scores_fwd(Tensor head_score, Tensor pair_score, Tensor tail_score, Tensor bias, "
    "Tensor[] facts, Tensor[] sums, bool triton) -> Tensor",
    _torch_fwd,
    _fwd_fake,
    triton=fact_scores_fwd,
)
register(
    "fact_scores_bwd(Tensor grad, Tensor[] sums, bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    _torch_bwd,
    _bwd_fake,
    triton=fact_scores_bwd,
)
register_gradient("fact_scores_fwd", _backward, _setup)
forbid_double_backward("fact_scores_bwd")
