"""The blocks of a Nemotron-H compiled for training: one graph for each kind of block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h.decoder import TokenMixing, block_forward, residual_block

# An attribute of modules that FSDP shards.
_MARK = "_is_fsdp_managed_module"


class CompiledBlocks:
    """`block_forward` in a training pass: all blocks of a kind share a graph.

    Weights are inputs of a graph, and the numbers of tokens and of sequences are symbols in it.
    Without gradients, and at rows alone, blocks run as they stand.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        foreign: kinds of blocks that call code which cannot be traced.
    """

    def __init__(self, model: nn.Module, foreign: tuple[str, ...] = ()) -> None:
        block_types = dict.fromkeys(block.block_type for block in model.layers)
        self.block_types = tuple(kind for kind in block_types if kind not in foreign)
        self._compiled: Callable[..., Tensor] = torch.compile(
            residual_block, fullgraph=True, dynamic=True
        )

    def __call__(self, block: nn.Module, hidden: Tensor, mixing: TokenMixing) -> Tensor:
        """Hidden states behind a block; see `block_forward`."""
        training = torch.is_grad_enabled() and mixing.rows is None
        if training and block.block_type in self.block_types:
            if hasattr(block, _MARK):
                # FSDP's hooks make a view of the input in the forward, and none when a block is
                # recomputed. Without this line each of the two would have its own graph.
                hidden = hidden.view_as(hidden)
            return self._compiled(block.norm, block.mixer, block.block_type, hidden, mixing)
        return block_forward(block, hidden, mixing)
