"""dragkit::fact_loss_fwd and _bwd: the loss of every question and, in one pass, its gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient
from ..segments import longest

if HAS_TRITON:
    from .loss_backward import fact_loss_bwd
    from .loss_forward import fact_loss_fwd
else:
    fact_loss_bwd = fact_loss_fwd = None

# Positives of a pack times the most facts of a question, up to which all are compared.
FEW_PAIRS = 2**14


def _torch_fwd(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float, max_facts: int
) -> tuple[Tensor, Tensor]:
    """(loss [B], gradient [E]); given the violating pairs the loss is linear in the logits.

    Rows after the last question are treated as one more question, whose results are dropped.
    """
    num_facts = logits.shape[0]
    x = logits.to(accumulator_dtype(logits))
    ptr = F.pad(fact_ptr, (0, 1), value=num_facts)
    facts = ptr.diff()
    question = torch.repeat_interleave(facts, output_size=num_facts)
    positive = label > 0.5
    row = positive.nonzero().squeeze(1)  # on a GPU this waits for the device
    # In float64, because with a common offset of the logits the terms of a question cancel.
    shifted = torch.add(x.double(), positive, alpha=-margin)
    of_row = question.index_select(0, row)
    width = max_facts or longest(fact_ptr)
    if row.shape[0] * width <= FEW_PAIRS:
        count = _compare(shifted, positive, row, of_row, ptr, width)
    else:
        positive_ptr = F.pad(positive.cumsum(0), (1, 0)).index_select(0, ptr)
        count = _violations(x, shifted, row, question, of_row, ptr, positive_ptr)
    # Every violating pair is counted at both of its facts, with opposite signs; without violations
    # even an infinite logit adds nothing.
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


def _sums(value: Tensor, ptr: Tensor) -> Tensor:
    """Sum of every segment, in the order of the rows."""
    return torch.segment_reduce(value, "sum", offsets=ptr, unsafe=True)


def _finite_without(share: float, value: Tensor) -> Tensor:
    """`value`, in which infinity counts for nothing if the term has no share in the loss."""
    return value if share else value.masked_fill(value.isinf(), 0.0)


def _compare(
    shifted: Tensor, positive: Tensor, row: Tensor, of_row: Tensor, ptr: Tensor, width: int
) -> Tensor:
    """As `_violations`, every positive with the `width` facts from its question's first on: for few
    facts, where the number of calls is what costs."""
    end = ptr.index_select(0, of_row + 1).unsqueeze(1)
    fact = torch.arange(width, device=ptr.device) + ptr.index_select(0, of_row).unsqueeze(1)
    found = fact < end
    fact = fact.clamp_(max=shifted.shape[0] - 1)
    other = shifted.masked_fill(positive, -math.inf)
    found &= other[fact] > shifted.index_select(0, row).unsqueeze(1)
    below = torch.zeros_like(shifted, dtype=torch.int64)
    below.index_add_(0, fact.flatten(), found.flatten().long())
    return below.index_copy_(0, row, found.sum(1).neg_())


def _violations(
    x: Tensor,
    shifted: Tensor,
    row: Tensor,
    question: Tensor,
    of_row: Tensor,
    ptr: Tensor,
    positive_ptr: Tensor,
) -> Tensor:
    """Partners with which a fact violates the margin, int64 [E], negative at the positives.

    A pair violates it when l_neg > l_pos - m. One sort of the shifted positives of all questions
    and one search in it count for every negative; a histogram of these counts answers for the
    positives.

    Args:
        x: float32 or float64 [E]; shifted: float64 [E], the margin subtracted at the positives.
        row: int64 [P] the positives; question: int32 [E]; of_row: int32 [P] question[row].
        ptr, positive_ptr: int [B+2] facts and positives before each question.
    """
    key = _keys(x, shifted.index_select(0, row), torch.cat([question, of_row]))
    positive_key, order = key[x.shape[0] :].sort()
    below = torch.searchsorted(positive_key, key[: x.shape[0]])
    # One place for every count from none to all of a question's positives, and one for the rest.
    size = row.shape[0] + ptr.shape[0]
    place = (below + question).index_fill_(0, row, size - 1)
    up_to = torch.bincount(place, minlength=size).cumsum(0)
    below -= positive_ptr.index_select(0, question)
    # Rows ascend by question, so the positive of a rank belongs to the question of that row.
    negatives = (ptr - positive_ptr).index_select(0, of_row + 1)
    place = torch.arange(row.shape[0], device=x.device).add_(of_row)
    above = negatives - up_to.index_select(0, place)
    return below.index_copy_(0, row.index_select(0, order), above.neg_())


def _keys(x: Tensor, shifted: Tensor, owner: Tensor) -> Tensor:
    """int64 keys of all facts, then of the shifted positives, by (question, logit).

    Shifts are rounded down, which leaves no logit between the key and the exact value.
    """
    if x.dtype == torch.float32:
        rounded = shifted.to(x.dtype)
        # Sorts as the floats do, NaN as its bits; adding zero leaves no negative zero.
        bits = torch.cat([x, rounded]).add_(0.0).view(torch.int32)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + (owner.long() << 32)
        key[x.shape[0] :] -= (rounded > shifted).long()
        return key
    # Wider than a key: ranks in its place.
    value = torch.cat([x, shifted])
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    value, owner = value[order], owner[order]
    fresh = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
    rank = F.pad(fresh.cumsum(0), (1, 0))[: len(order)]
    return torch.empty_like(order).index_copy_(0, order, rank)


def _torch_bwd(grad: Tensor, gradient: Tensor, fact_ptr: Tensor, max_facts: int) -> Tensor:
    """The gradient of every fact times the one of its question."""
    facts = F.pad(fact_ptr, (0, 1), value=gradient.shape[0]).diff()
    question = torch.repeat_interleave(facts, output_size=gradient.shape[0])
    return F.pad(grad, (0, 1)).index_select(0, question).mul_(gradient)


def _fwd_fake(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(logits)
    return (
        logits.new_empty(fact_ptr.shape[0] - 1, dtype=dtype),
        logits.new_empty(logits.shape, dtype=dtype),
    )


def _bwd_fake(grad: Tensor, gradient: Tensor, *rest: object) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _setup(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, fact_ptr, _, _, ctx.max_facts, ctx.triton = inputs
    ctx.logits_dtype = logits.dtype
    ctx.save_for_backward(output[1], fact_ptr)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: object, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    d_logits = torch.ops.dragkit.fact_loss_bwd(grad, *ctx.saved_tensors, ctx.max_facts, ctx.triton)
    return d_logits.to(ctx.logits_dtype), *(None,) * 6


register(
    "fact_loss_fwd(Tensor logits, Tensor label, Tensor fact_ptr, float rho, float margin,"
    " SymInt max_facts, bool triton) -> (Tensor loss, Tensor gradient)",
    _torch_fwd,
    _fwd_fake,
    triton=fact_loss_fwd,
)
register(
    "fact_loss_bwd(Tensor grad, Tensor gradient, Tensor fact_ptr, SymInt max_facts, bool triton)"
    " -> Tensor",
    _torch_bwd,
    _bwd_fake,
    triton=fact_loss_bwd,
)
register_gradient("fact_loss_fwd", _backward, _setup)
forbid_gradient("fact_loss_bwd")
