"""fact_loss in PyTorch, loss and gradient in one pass.

One sort of all facts counts the violating pairs, and no size is read back from the device. So a GPU
needs no kernel for this op.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype


def fact_loss_fwd(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float
) -> tuple[Tensor, Tensor]:
    """(loss [B], gradient [E]) (see `fact_loss`).

    For fixed violating pairs the loss is linear in the logits. Rows of padding form one more
    question, whose results are dropped.
    """
    x = logits.to(accumulator_dtype(logits))
    ptr, question = _questions(fact_ptr, logits.shape[0])
    num_facts = ptr.diff()
    positive = label > 0.5
    # Computed in float64, because the terms of a question cancel if its logits share an offset.
    shifted = torch.add(x.double(), positive, alpha=-margin)
    count = _violations(x, shifted, positive, ptr, question)
    # Every violating pair is counted at both of its facts, with opposite signs. A fact without
    # violations adds nothing, even if its logit is infinite.
    hinge = _sums(shifted.mul_(count).masked_fill_(count == 0, 0.0), ptr)

    # softplus(l) - y l = softplus(sign l), with derivative sign sigmoid(sign l). In this form facts
    # that are certain keep their relative precision.
    sign = torch.rsub(positive.to(x.dtype), 1, alpha=2)
    signed = sign * x
    bce = _sums(F.softplus(signed, threshold=40.0).double(), ptr)
    gradient = signed.sigmoid_().mul_(sign)

    num_positives = _sums(positive.double(), ptr)
    per_fact = rho / num_facts.double()
    per_pair = (1 - rho) / (num_facts - num_positives).mul_(num_positives).clamp_(min=1)
    no_loss = num_positives == 0
    no_loss[-1:].fill_(True)
    loss = _drop_infinite(rho, bce) * per_fact
    loss.addcmul_(_drop_infinite(1 - rho, hinge), per_pair).masked_fill_(no_loss, 0.0)
    # NaN at one fact is NaN at all facts of its question.
    per_fact = per_fact.masked_fill_(loss.isnan(), math.nan).to(x.dtype)
    gradient.mul_(per_fact.index_select(0, question))
    gradient.addcmul_(per_pair.to(x.dtype).index_select(0, question), count.to(x.dtype))
    gradient.masked_fill_(no_loss.index_select(0, question), 0.0)
    return loss[:-1].to(x.dtype), gradient


def fact_loss_bwd(grad: Tensor, gradient: Tensor, fact_ptr: Tensor) -> Tensor:
    """The stored gradient of every fact times `grad` of its question, 0 for padding."""
    _, question = _questions(fact_ptr, gradient.shape[0])
    return F.pad(grad, (0, 1)).index_select(0, question).mul_(gradient)


def _questions(fact_ptr: Tensor, num_facts: int) -> tuple[Tensor, Tensor]:
    """First fact of each question and of padding, int32 [B+2], and question of each fact, [E]."""
    ptr = F.pad(fact_ptr, (0, 1), value=num_facts)
    return ptr, torch.repeat_interleave(ptr.diff(), output_size=num_facts)


def _sums(value: Tensor, ptr: Tensor) -> Tensor:
    """Sum of every segment, in the order of the rows."""
    return torch.segment_reduce(value, "sum", offsets=ptr, unsafe=True)


def _drop_infinite(weight: float, value: Tensor) -> Tensor:
    """`value`, with infinity replaced by 0 if the term's weight in the loss is 0."""
    return value if weight else value.masked_fill(value.isinf(), 0.0)


def _violations(
    x: Tensor, shifted: Tensor, positive: Tensor, ptr: Tensor, question: Tensor
) -> Tensor:
    """Number of facts with which each fact violates the margin, negative at the positives.

    A pair violates the margin when l_neg > l_pos - m. Facts are sorted by question, then by
    `shifted`, which is l_pos - m or l_neg, then negatives first, so that a tie is no violation. A
    negative counts the positives before it. A positive counts the negatives after it.

    Args:
        x: float32 or float64 [E] logits.
        shifted: float64 [E] logits, with the margin subtracted at the positives.
        positive: bool [E].
        ptr: int32 [B+2] first fact of each question.
        question: int32 [E].

    Returns:
        int64 [E].
    """
    perm = _sort_facts(x, shifted, positive, question)
    positive = positive.index_select(0, perm)
    positives_up_to = positive.cumsum(0)
    positives_before = F.pad(positives_up_to, (1, 0)).index_select(0, ptr)
    # Negatives after a fact: all up to the end of its question, less those up to the fact.
    negatives = (ptr - positives_before).index_select(0, question + 1)
    position = torch.arange(1, len(perm) + 1, device=x.device)
    negatives_after = negatives.sub_(position).add_(positives_up_to)
    own_positives = positives_up_to - positives_before.index_select(0, question)
    count = torch.where(positive, negatives_after.neg_(), own_positives)
    return torch.empty_like(count).index_copy_(0, perm, count)


def _sort_facts(x: Tensor, shifted: Tensor, positive: Tensor, question: Tensor) -> Tensor:
    """int64 [E] facts in the order of `_violations`."""
    if x.dtype == torch.float64:
        # float64 values do not fit into a key: one stable sort per criterion, the last one first.
        perm = torch.arange(len(x), device=x.device)
        for value in (positive.int(), shifted, question):
            perm = perm[value[perm].argsort(stable=True)]
        return perm
    # One key of 64 bits: question, shifted, positive. `shifted` is rounded down to float32, so no
    # logit lies between the key and the exact value.
    rounded = shifted.to(x.dtype)
    # These bits sort as the floats do, NaN as its bits. Adding zero turns -0.0 into 0.0.
    bits = rounded.add(0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().sub_((rounded > shifted).long())
    return key.mul_(2).add_(positive).add_(question.long() << 33).argsort()
