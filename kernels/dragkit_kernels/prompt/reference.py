"""Prompt ops by their definitions: a loop on the host, and plain PyTorch with autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_tokens_ref(
    source: Tensor, start: Tensor, end: Tensor, slot: Tensor, question: Tensor
) -> tuple[Tensor, ...]:
    """(ids, slot, position, sequence), int32 [T] each, by appending piece after piece."""
    text = source.tolist()
    rows: list[tuple[int, int, int, int]] = []
    for sequence, chosen in enumerate(question.tolist()):
        position = 0
        pieces = zip(*(x[chosen].tolist() for x in (start, end, slot)), strict=True)
        for first, stop, vector in pieces:
            following = iter(text[first:])
            if vector >= 0 and position < stop:
                rows.append((0, vector, position, sequence))
                position += 1
            while position < stop:
                rows.append((next(following), -1, position, sequence))
                position += 1
    columns = torch.tensor(rows, dtype=torch.int32, device=source.device).view(-1, 4)
    return columns.unbind(1)


def prompt_embeddings_ref(table: Tensor, ids: Tensor, vectors: Tensor, slot: Tensor) -> Tensor:
    """out_t = vectors[slot_t] if slot_t >= 0, else table[ids_t]. See prompt_embeddings."""
    rows = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])[slot.long()]
    return torch.where((slot < 0).unsqueeze(1), table[ids.long()], rows.to(table.dtype))
