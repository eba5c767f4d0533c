"""fact_loss by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype


def fact_loss_ref(
    logits: Tensor, label: Tensor, fact_ptr: Tensor, *, rho: float, margin: float
) -> Tensor:
    """rho * mean(BCE) + (1 - rho) * mean over pairs of max(0, m - (l_pos - l_neg)), finite logits.

    It forms every pair, and waits for the device to read the sizes of the questions.
    """
    x = logits.to(accumulator_dtype(logits))
    bounds = fact_ptr.tolist()
    losses = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        logit, positive = x[begin:end], label[begin:end] > 0.5
        if not bool(positive.any()):
            losses.append(logit.sum() * 0)
            continue
        bce = -F.logsigmoid(torch.where(positive, logit, -logit)).mean()
        gap = logit[positive].unsqueeze(1) - logit[~positive]
        rank = torch.relu(margin - gap).sum() / max(gap.numel(), 1)
        losses.append(rho * bce + (1 - rho) * rank)
    return torch.stack(losses) if losses else x.new_zeros(0)
