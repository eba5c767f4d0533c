"""The blocks of a Nemotron-H compiled for training: one graph for each kind of block."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dragkit.model.nemotron_h.decoder import Mixing, after
from dragkit.model.nemotron_h.experts import by_groups

logger = logging.getLogger(__name__)


class CompiledBlocks:
    """`after` in a training pass: all blocks of a kind share a graph, and so do packs of all sizes.

    Weights are inputs of a graph, and the numbers of tokens and of sequences are symbols in it.
    Without gradients, and at rows alone, blocks run as they stand.

    Args:
        model: a `NemotronHModel`, with adapters or without.
        foreign: kinds of blocks that call code which cannot be traced.
    """

    def __init__(self, model: nn.Module, foreign: tuple[str, ...] = ()) -> None:
        kinds = dict.fromkeys(block.block_type for block in model.layers)
        experts = [block.mixer for block in model.layers if block.block_type == "moe"]
        left = {kind: "its kernels are another package's" for kind in foreign if kind in kinds}
        if not all(by_groups(mixer, traced=True) for mixer in experts):
            left["moe"] = "grouped products of its experts are traced in bfloat16 alone"
        for kind, reason in left.items():
            logger.info("blocks of kind %s are not compiled: %s", kind, reason)
        self.kinds = tuple(kind for kind in kinds if kind not in left)
        self._compiled: Callable[..., Tensor] = torch.compile(after, fullgraph=True, dynamic=True)

    def __call__(self, block: nn.Module, hidden: Tensor, mixing: Mixing) -> Tensor:
        """Hidden states behind a block; see `after`."""
        training = torch.is_grad_enabled() and mixing.rows is None
        if training and block.block_type in self.kinds:
            return self._compiled(block, hidden, mixing)
        return after(block, hidden, mixing)
