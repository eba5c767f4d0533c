"""Registration of dragkit::prompt_tokens_fwd and prompt_embeddings_fwd and _bwd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import forbid_double_backward, register, register_gradient
from . import torch_impl

if HAS_TRITON:
    from .backward import prompt_embeddings_bwd
    from .forward import prompt_embeddings_fwd, prompt_tokens_fwd
else:
    prompt_embeddings_bwd = prompt_embeddings_fwd = prompt_tokens_fwd = None


def _tokens_fake(source: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(source.new_empty(rest[-2]) for _ in range(4))


def _embeddings_fake(table: Tensor, ids: Tensor, *rest: object) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


def _embeddings_bwd_fake(
    grad: Tensor, slot: Tensor, num_slots: int, dtype: torch.dtype, triton: bool
) -> Tensor:
    return grad.new_empty(num_slots, grad.shape[1], dtype=dtype)


def _embeddings_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, _, vectors, slot, ctx.triton = inputs
    ctx.num_slots, ctx.dtype = vectors.shape[0], vectors.dtype
    ctx.save_for_backward(slot)


def _embeddings_backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    (slot,) = ctx.saved_tensors
    bwd = torch.ops.dragkit.prompt_embeddings_bwd
    return None, None, bwd(grad, slot, ctx.num_slots, ctx.dtype, ctx.triton)


register(
    "prompt_tokens_fwd(Tensor source, Tensor start, Tensor end, Tensor slot, Tensor question, "
    "Tensor ptr, SymInt num_tokens, bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    torch_impl.prompt_tokens_fwd,
    _tokens_fake,
    triton=prompt_tokens_fwd,
)
register(
    "prompt_embeddings_fwd(Tensor table, Tensor ids, Tensor vectors, Tensor slot, bool triton) "
    "-> Tensor",
    torch_impl.prompt_embeddings_fwd,
    _embeddings_fake,
    triton=prompt_embeddings_fwd,
)
register(
    "prompt_embeddings_bwd(Tensor grad, Tensor slot, SymInt num_slots, ScalarType dtype, "
    "bool triton) -> Tensor",
    torch_impl.prompt_embeddings_bwd,
    _embeddings_bwd_fake,
    triton=prompt_embeddings_bwd,
)
register_gradient("prompt_embeddings_fwd", _embeddings_backward, _embeddings_setup)
forbid_double_backward("prompt_embeddings_bwd")
