"""dragkit::fact_loss_fwd and _bwd: the loss of every question and, in one pass, its gradient.

One sort of all facts counts the pairs, and nothing asks the device for a size, so a GPU needs no
kernel of its own here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype
from ..library import forbid_double_backward, register, register_gradient


def _fwd(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float
) -> tuple[Tensor, Tensor]:
    """(loss [B], gradient [E]); given the violating pairs the loss is linear in the logits.

    Rows after the last question are treated as one more question, whose results are dropped.
    """
    x = logits.to(accumulator_dtype(logits))
    ptr, question = _questions(fact_ptr, logits.shape[0])
    facts = ptr.diff()
    positive = label > 0.5
    # In float64, because with a common offset of the logits the terms of a question cancel.
    shifted = torch.add(x.double(), positive, alpha=-margin)
    count = _violations(x, shifted, positive, ptr, question)
    # Every violating pair is counted at both of its facts, with opposite signs. A fact without
    # violations adds nothing, even if its logit is infinite.
    hinges = _sums(shifted.mul_(count).masked_fill_(count == 0, 0.0), ptr)

    # softplus(l) - y l and its derivative sigmoid(l) - y, without loss where a fact is certain.
    sign = torch.rsub(positive.to(x.dtype), 1, alpha=2)
    wrong = sign * x
    bce = _sums(F.softplus(wrong, threshold=40.0).double(), ptr)
    gradient = wrong.sigmoid_().mul_(sign)

    positives = _sums(positive.double(), ptr)
    per_fact = rho / facts.double()
    per_pair = (1 - rho) / (facts - positives).mul_(positives).clamp_(min=1)
    dead = positives == 0
    dead[-1:].fill_(True)
    loss = _finite_without(rho, bce) * per_fact
    loss.addcmul_(_finite_without(1 - rho, hinges), per_pair).masked_fill_(dead, 0.0)
    # NaN at one fact is NaN at all facts of its question.
    per_fact = per_fact.masked_fill_(loss.isnan(), math.nan).to(x.dtype)
    gradient.mul_(per_fact.index_select(0, question))
    gradient.addcmul_(per_pair.to(x.dtype).index_select(0, question), count.to(x.dtype))
    gradient.masked_fill_(dead.index_select(0, question), 0.0)
    return loss[:-1].to(x.dtype), gradient


def _questions(fact_ptr: Tensor, num_facts: int) -> tuple[Tensor, Tensor]:
    """int32 [B+2] first fact of every question, the last of padding; int32 [E] question of each."""
    ptr = F.pad(fact_ptr, (0, 1), value=num_facts)
    return ptr, torch.repeat_interleave(ptr.diff(), output_size=num_facts)


def _sums(value: Tensor, ptr: Tensor) -> Tensor:
    """Sum of every segment, in the order of the rows."""
    return torch.segment_reduce(value, "sum", offsets=ptr, unsafe=True)


def _finite_without(weight: float, value: Tensor) -> Tensor:
    """`value`, in which infinity counts for nothing if the term has no weight in the loss."""
    return value if weight else value.masked_fill(value.isinf(), 0.0)


def _violations(
    x: Tensor, shifted: Tensor, positive: Tensor, ptr: Tensor, question: Tensor
) -> Tensor:
    """Partners with which a fact violates the margin, int64 [E], negative at the positives.

    A pair violates the margin when l_neg > l_pos - m. Facts are sorted by question, then by
    `shifted`, which is l_pos - m or l_neg, then negatives first, so that a tie is no violation. A
    negative counts the positives before it, a positive counts the negatives after it.

    Args:
        x: float32 or float64 [E]; shifted: float64 [E], the margin subtracted at the positives.
        positive: bool [E]; question: int32 [E]; ptr: int32 [B+2] facts before each question.
    """
    order = _order(x, shifted, positive, question)
    positive = positive.index_select(0, order)
    up_to = positive.cumsum(0)
    before = F.pad(up_to, (1, 0)).index_select(0, ptr)
    negatives = (ptr - before).index_select(0, question + 1)
    rank = torch.arange(1, len(order) + 1, device=x.device)
    after = negatives.sub_(rank).add_(up_to)  # with the negatives up to here, rank - up_to
    count = torch.where(positive, after.neg_(), up_to - before.index_select(0, question))
    return torch.empty_like(count).index_copy_(0, order, count)


def _order(x: Tensor, shifted: Tensor, positive: Tensor, question: Tensor) -> Tensor:
    """int64 [E] facts in the order of `_violations`.

    One key of 64 bits sorts float32 logits. Shifts are rounded down, which leaves no logit between
    the key and the exact value. Float64 does not fit into a key and takes one sort per criterion.
    """
    if x.dtype == torch.float64:
        order = torch.arange(len(x), device=x.device)
        for value in (positive.int(), shifted, question):
            order = order[value[order].argsort(stable=True)]
        return order
    rounded = shifted.to(x.dtype)
    # These bits sort as the floats do, NaN as its bits. Adding zero leaves no negative zero.
    bits = rounded.add(0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().sub_((rounded > shifted).long())
    return key.mul_(2).add_(positive).add_(question.long() << 33).argsort()


def _bwd(grad: Tensor, gradient: Tensor, fact_ptr: Tensor) -> Tensor:
    """The gradient of every fact times the one of its question."""
    _, question = _questions(fact_ptr, gradient.shape[0])
    return F.pad(grad, (0, 1)).index_select(0, question).mul_(gradient)


def _fwd_fake(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float
) -> tuple[Tensor, Tensor]:
    x = logits.new_empty(logits.shape, dtype=accumulator_dtype(logits))
    return x.new_empty(fact_ptr.shape[0] - 1), x


def _bwd_fake(grad: Tensor, gradient: Tensor, fact_ptr: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, fact_ptr, *_ = inputs
    ctx.logits_dtype = logits.dtype
    ctx.save_for_backward(output[1], fact_ptr)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: object, grad: Tensor, _: Tensor | None) -> Tensor:
    return torch.ops.dragkit.fact_loss_bwd(grad, *ctx.saved_tensors).to(ctx.logits_dtype)


register(
    "fact_loss_fwd(Tensor logits, Tensor label, Tensor fact_ptr, float rho, float margin)"
    " -> (Tensor loss, Tensor gradient)",
    _fwd,
    _fwd_fake,
)
register("fact_loss_bwd(Tensor grad, Tensor gradient, Tensor fact_ptr) -> Tensor", _bwd, _bwd_fake)
register_gradient("fact_loss_fwd", _backward, _setup)
forbid_double_backward("fact_loss_bwd")
