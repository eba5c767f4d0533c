"""The PyTorch paths of prompt_tokens and prompt_embeddings. They never wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_tokens_fwd(
    source: Tensor,
    start: Tensor,
    end: Tensor,
    slot: Tensor,
    question: Tensor,
    ptr: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of prompt_tokens: repeats each piece, then indexes its text."""
    if num_tokens == 0:
        return tuple(source.new_empty(0) for _ in range(4))
    start, end, slot = (x.index_select(0, question) for x in (start, end, slot))
    begin = torch.cat([end.new_zeros(end.shape[0], 1), end[:, :-1]], 1)
    piece = torch.repeat_interleave((end - begin).flatten(), output_size=num_tokens)
    sequence = piece // end.shape[1]
    token = torch.arange(num_tokens, dtype=torch.int32, device=source.device)
    position = token - ptr.index_select(0, sequence)
    piece_offset = position - begin.flatten().index_select(0, piece)
    slot = slot.flatten().index_select(0, piece)
    is_vector = (slot >= 0) & (piece_offset == 0)
    source_row = start.flatten().index_select(0, piece) + piece_offset - (slot >= 0).int()
    # Row 0 of `padded` serves vectors: a piece of a vector alone has no text to read.
    padded = torch.cat([source.new_zeros(1), source])
    ids = padded.index_select(0, (source_row + 1).masked_fill_(is_vector, 0))
    return ids, torch.where(is_vector, slot, -1), position, sequence.int()


def _token_of(slot: Tensor, num_slots: int) -> Tensor:
    """int64 [num_slots] token of every slot, -1 for a slot without a token."""
    token = torch.full((num_slots + 1,), -1, dtype=torch.int64, device=slot.device)
    # Text has slot -1, which writes to the spare last row.
    token[slot.long()] = torch.arange(slot.shape[0], device=slot.device)
    return token[:-1]


def prompt_embeddings_fwd(table: Tensor, ids: Tensor, vectors: Tensor, slot: Tensor) -> Tensor:
    """Gathers table rows, then overwrites some by vectors. A spare row takes unused vectors."""
    size = ids.shape[0]
    out = table.new_empty(size + 1, table.shape[1])
    torch.index_select(table, 0, ids, out=out[:size])
    token = _token_of(slot, vectors.shape[0])
    out.index_copy_(0, torch.where(token < 0, size, token), vectors.to(table.dtype))
    # Shrink in place: compiled blocks specialise on whether their input is a view.
    return out.resize_(size, table.shape[1])


def prompt_embeddings_bwd(grad: Tensor, slot: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """dvectors_s = grad of the token with slot s, 0 if no token has it."""
    if slot.shape[0] == 0:
        return grad.new_zeros(num_slots, grad.shape[1], dtype=dtype)
    token = _token_of(slot, num_slots)
    rows = grad.index_select(0, token.clamp(min=0)).to(dtype)
    return rows.masked_fill_((token < 0).unsqueeze(1), 0.0)
