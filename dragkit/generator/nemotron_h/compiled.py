"""The blocks of a Nemotron-H compiled for training, with one graph per type of block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h.decoder import TokenMixing, block_forward, residual_block
from dragkit.generator.nemotron_h.patches import is_under_fsdp


class CompiledBlocks:
    """`block_forward`, compiled where gradients are enabled and all rows are wanted.

    Weights are inputs of a graph, and the numbers of tokens and sequences are symbolic. So all
    blocks of a type and packs of all sizes share a graph.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        uncompiled: types of blocks whose code cannot be traced.
    """

    def __init__(self, model: nn.Module, uncompiled: tuple[str, ...] = ()) -> None:
        block_types = dict.fromkeys(block.block_type for block in model.layers)
        self.block_types = tuple(name for name in block_types if name not in uncompiled)
        self._compiled: Callable[..., Tensor] = torch.compile(
            residual_block, fullgraph=True, dynamic=True
        )

    def __call__(self, block: nn.Module, hidden: Tensor, mixing: TokenMixing) -> Tensor:
        """Hidden states after a block, as `block_forward` returns them."""
        training = torch.is_grad_enabled() and mixing.rows is None
        if training and block.block_type in self.block_types:
            if is_under_fsdp(block):
                # FSDP's hooks pass a view of the input in the forward, but not in a recompute.
                # A view in both cases keeps them on one graph.
                hidden = hidden.view_as(hidden)
            return self._compiled(block.norm, block.mixer, block.block_type, hidden, mixing)
        return block_forward(block, hidden, mixing)
