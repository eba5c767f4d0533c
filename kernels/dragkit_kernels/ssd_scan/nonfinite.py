"""Keeps a NaN or an infinity of one sequence out of its neighbours in the same chunk.

The products of a chunk mix all of its rows under a mask, and zero times NaN is NaN. So rows that
are not finite are computed as zeros, and the rows that depend on them are NaN afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def known_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are known to be finite; never waits for a device, so False on one."""
    return all(not x.is_cuda and bool(x.sum().isfinite()) for x in tensors)


def nonfinite_rows(*tensors: Tensor) -> Tensor:
    """bool [T]: rows in which some tensor has a number that is not finite."""
    finite = [x.isfinite().flatten(1).all(1) for x in tensors]
    return ~torch.stack(finite).all(0)


def zero_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """A copy with zeros in the given rows."""
    return tensor.masked_fill(rows.view(-1, *(1,) * (tensor.dim() - 1)), 0)


def fill_nan(tensor: Tensor, rows: Tensor) -> None:
    """Writes NaN into the given rows."""
    tensor.masked_fill_(rows.view(-1, *(1,) * (tensor.dim() - 1)), float("nan"))


def rows_from(nonfinite: Tensor, seq_pos: Tensor) -> Tensor:
    """bool [T]: rows with a bad one at or before them in their sequence."""
    running_count = nonfinite.cumsum(0)
    sequence_start = (torch.arange(len(nonfinite), device=nonfinite.device) - seq_pos).clamp_(min=0)
    return running_count > running_count[sequence_start] - nonfinite[sequence_start].long()


def sequence_rows(nonfinite: Tensor, seq_pos: Tensor) -> Tensor:
    """bool [T]: rows of sequences that have a bad one."""
    sequence = (seq_pos == 0).cumsum(0)
    running_count = torch.zeros(len(nonfinite) + 1, dtype=torch.int64, device=nonfinite.device)
    return running_count.index_add_(0, sequence, nonfinite.long())[sequence] > 0
