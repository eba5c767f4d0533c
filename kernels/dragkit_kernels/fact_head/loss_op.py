"""dragkit::fact_loss_fwd and _bwd: the loss of every question and, in one pass, its gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import forbid_gradient, register, register_gradient

if HAS_TRITON:
    from .loss_backward import fact_loss_bwd
    from .loss_forward import fact_loss_fwd
else:
    fact_loss_bwd = fact_loss_fwd = None


def _torch_fwd(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, rho: float, margin: float, max_facts: int
) -> tuple[Tensor, Tensor]:
    """(loss [B], gradient [E]); given the violating pairs the loss is linear in the logits.

    Rows after the last question are treated as one more question, whose results are dropped.
    """
    num_facts = logits.shape[0]
    # Zeros all positive: equal logits must have equal bits.
    x = logits.to(accumulator_dtype(logits)) + 0.0
    y = label.to(x.dtype)
    ptr = F.pad(fact_ptr.long(), (0, 1), value=num_facts)
    question = _questions(ptr, num_facts)
    positive = label > 0.5
    row = positive.nonzero().squeeze(1)  # on a GPU this waits for the device
    positive_ptr = F.pad(positive.cumsum(0), (1, 0)).index_select(0, ptr)
    count = _violations(x, row, question, ptr, positive_ptr, margin)
    bce, d_bce = _cross_entropy(x, y)

    facts, positives = ptr.diff(), positive_ptr.diff()
    pairs = (positives * (facts - positives)).clamp_(min=1).double()
    facts = facts.clamp_(min=1).double()
    # In float64, because with a common offset of the logits these terms cancel. A fact without
    # violations adds nothing even if it is infinite.
    term = count.double().mul_(x).masked_fill_(count == 0, 0.0)
    # Every violating pair is counted at both of its facts, with opposite signs.
    margins = _sums(count.clamp(min=0).double(), ptr) * margin
    rank = (_sums(term, ptr) + margins) / pairs
    mean = _sums(bce.double(), ptr) / facts
    dead = positives == 0
    dead[-1:] = True
    loss = _weighted(mean, rho) + _weighted(rank, 1 - rho)
    loss = loss.masked_fill_(dead, 0.0)

    # NaN at one fact is NaN at all facts of its question.
    per_fact = (rho / facts).masked_fill_(loss.isnan(), math.nan).to(x.dtype)
    per_pair = ((1 - rho) / pairs).to(x.dtype)
    gradient = d_bce.mul_(per_fact.index_select(0, question))
    gradient.addcmul_(per_pair.index_select(0, question), count.to(x.dtype))
    gradient.masked_fill_(dead.index_select(0, question), 0.0)
    return loss[:-1].to(x.dtype), gradient


def _questions(ptr: Tensor, num_facts: int) -> Tensor:
    """Segment of every row, int64 [E], for segments that cover all rows."""
    numbers = torch.arange(ptr.shape[0] - 1, device=ptr.device)
    return numbers.repeat_interleave(ptr.diff(), output_size=num_facts)


def _sums(value: Tensor, ptr: Tensor) -> Tensor:
    """Sum of every segment, in the order of the rows."""
    return torch.segment_reduce(value, "sum", offsets=ptr, unsafe=True)


def _weighted(value: Tensor, weight: float) -> Tensor:
    """weight * value, where no weight makes nothing even of infinity."""
    return value * weight if weight else value.masked_fill(value.isinf(), 0.0) * 0.0


def _cross_entropy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(x) - y x and sigmoid(x) - y, without cancellation where the fact is certain."""
    e = x.abs().neg_().exp_()
    slope = (x >= 0).to(x.dtype).sub_(y)
    # Infinite logits on the right side cost nothing.
    bce = (slope * x).masked_fill_(slope == 0, 0.0).add_(e.log1p())
    return bce, slope.sub_((e / (1 + e)).copysign_(x))


def _violations(
    x: Tensor, row: Tensor, question: Tensor, ptr: Tensor, positive_ptr: Tensor, margin: float
) -> Tensor:
    """Partners with which a fact violates the margin, int64 [E], negative at the positives.

    A pair violates it when l_neg > l_pos - m. One sort of the shifted positives of all questions
    and one search in it count for every negative; a histogram of these counts answers for the
    positives.

    Args:
        x: float32 or float64 [E]; row: int64 [P] its positives; question: int64 [E].
        ptr, positive_ptr: int64 [B+2] facts and positives before each question.
    """
    of_row = question.index_select(0, row)
    key, positive_key = _keys(x, row, question, of_row, margin)
    positive_key, order = positive_key.sort()
    below = torch.searchsorted(positive_key, key)
    # One place for every count from none to all of a question's positives, and one for the rest.
    size = row.shape[0] + ptr.shape[0]
    place = (below + question).index_fill_(0, row, size - 1)
    up_to = torch.bincount(place, minlength=size).cumsum(0)
    below -= positive_ptr.index_select(0, question)
    rank = torch.arange(row.shape[0], device=x.device)
    negatives = (ptr - positive_ptr).index_select(0, of_row + 1)
    # Rows ascend by question, so the sorted positive of a rank has the question of that row.
    above = negatives - up_to.index_select(0, rank + of_row)
    return below.index_copy_(0, row.index_select(0, order), above.neg_())


def _keys(
    x: Tensor, row: Tensor, question: Tensor, of_row: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """int64 keys of all facts and of the positives shifted by the margin, by (question, logit).

    The shift is rounded down, which leaves no logit between it and the exact value.
    """
    exact = x.index_select(0, row).double() - margin
    shifted = exact.to(x.dtype)
    if x.dtype == torch.float32:
        lower = torch.nextafter(shifted, torch.full_like(shifted, -math.inf))
        shifted = torch.where(shifted > exact, lower, shifted) + 0.0
        return _code(x).add_(question << 32), _code(shifted).add_(of_row << 32)
    # Wider than a key: ranks in its place.
    value, owner = torch.cat([x, shifted]), torch.cat([question, of_row])
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    value, owner = value[order], owner[order]
    fresh = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
    rank = F.pad(fresh.cumsum(0), (1, 0))[: len(order)]
    key = torch.empty_like(order).index_copy_(0, order, rank)
    return key[: x.shape[0]], key[x.shape[0] :]


def _code(x: Tensor) -> Tensor:
    """An int64 within 32 bits that sorts as the float32 does, NaN as its bits."""
    bits = x.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _torch_bwd(grad: Tensor, gradient: Tensor, fact_ptr: Tensor, max_facts: int) -> Tensor:
    """The gradient of every fact times the one of its question."""
    num_facts = gradient.shape[0]
    question = _questions(F.pad(fact_ptr.long(), (0, 1), value=num_facts), num_facts)
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
