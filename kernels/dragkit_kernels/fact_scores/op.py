"""dragkit::fact_scores_fwd and _bwd.

`gathers` holds head, pair and tail [Q], and with groups also `groups.row`. `sums` holds ptr and
perm by head, by pair and by tail, and with groups also `groups.ptr` and `groups.fact`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_double_backward, register, register_gradient
from . import torch_impl

if HAS_TRITON:
    from .backward import fact_scores_bwd
    from .forward import fact_scores_fwd
else:
    fact_scores_bwd = fact_scores_fwd = None


def _fwd_fake(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    gathers: list[Tensor],
    *rest: object,
) -> Tensor:
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    return head_score.new_empty(gathers[-1].shape, dtype=dtype)


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
    "Tensor[] gathers, Tensor[] sums, bool triton) -> Tensor",
    torch_impl.fact_scores_fwd,
    _fwd_fake,
    triton=fact_scores_fwd,
)
register(
    "fact_scores_bwd(Tensor grad, Tensor[] sums, bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    torch_impl.fact_scores_bwd,
    _bwd_fake,
    triton=fact_scores_bwd,
)
register_gradient("fact_scores_fwd", _backward, _setup)
forbid_double_backward("fact_scores_bwd")
