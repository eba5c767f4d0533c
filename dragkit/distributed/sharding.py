"""The generator's frozen weights sharded between ranks, for GPUs that cannot hold all of them.

FSDP2 all-gathers a block's weights before its forward and frees them after it, and does the same
around its backward. Embeddings and LM head stay gathered for a whole pass. Only frozen weights are
sharded. Trained weights are small and stay replicated, so gradients, clipping, optimizer and
checkpoints are those of an unsharded run on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from dragkit.errors import ConfigError
from dragkit.generator.nemotron_h.patches import unmark_fsdp_modules
from dragkit.generator.prompt import NeuralPrompt

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dragkit.generator.generator import Generator


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a causal language model, found by transformers' `_no_split_modules`.

    Args:
        model: a Hugging Face causal LM, with adapters or without.

    Raises:
        ConfigError: the model's class names no blocks, or contains none of that name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"run.generator_fsdp: the blocks of a {type(base).__name__} are not known, so FSDP "
            "cannot gather its weights block by block. Name them in the _no_split_modules of its "
            "class, or use --set run.generator_fsdp=false."
        )
    return blocks


def shard_generator(
    generator: Generator, mesh: DeviceMesh, all_reduce_max: Callable[[int], int]
) -> None:
    """Shards the generator's frozen weights over a mesh. This rank keeps its shard on its device.

    The model may be in host memory. FSDP moves one block at a time to the device and shards it
    there before it moves the next.

    Args:
        generator: the model, equal on all ranks.
        mesh: the one-dimensional mesh of these ranks.
        all_reduce_max: returns the largest of the ranks' numbers. Every rank must call it.

    Raises:
        ConfigError: the model's blocks are not known.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    trained = {p for p in generator.parameters() if p.requires_grad}
    # Inner blocks first: FSDP requires children to be wrapped before their parents.
    for block in reversed(decoder_blocks(generator.model)):
        fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(generator, mesh=mesh, ignored_params=trained)
    unmark_fsdp_modules(generator)
    register_fsdp_forward_method(generator, "unannounced_greedy_tokens")
    generator.coordinate_passes(UnevenPasses(generator, all_reduce_max))


class UnevenPasses:
    """Gives ranks that all-gather each other's shards the same number of passes.

    An all-gather returns only when every rank has entered it, but ranks have different numbers of
    prompts. Each rank announces every pass with an all-reduce. A rank that has finished runs dummy
    passes until no rank announces another. (`torch.distributed.algorithms.Join` does this for DDP.)

    Args:
        generator: the sharded generator.
        all_reduce_max: see `shard_generator`.
    """

    def __init__(self, generator: Generator, all_reduce_max: Callable[[int], int]) -> None:
        self.all_reduce_max = all_reduce_max
        self._generator = generator
        self._is_dummy = False

    def announce_pass(self, max_new_tokens: int = 1) -> None:
        """See `PassCoordinator.announce_pass`. Dummy passes are not announced."""
        if not self._is_dummy:
            self.all_reduce_max(max_new_tokens)

    def run_dummy_passes(self, *, vectors: bool) -> None:
        """See `Generator.run_dummy_passes`."""
        self._is_dummy = True
        try:
            while max_new_tokens := self.all_reduce_max(0):
                if torch.is_grad_enabled():
                    self._dummy_training_pass(vectors)
                else:
                    self._generator.greedy_tokens(self._dummy_prompt(), None, max_new_tokens)
        finally:
            self._is_dummy = False
        # FSDP leaves weights gathered after no-grad passes. Reshard now, while all ranks are here:
        # later only rank 0 writes the checkpoint.
        self._generator.reshard()  # type: ignore[operator]

    def _dummy_prompt(self) -> NeuralPrompt:
        """Two prompts of two end tokens each. A size of one would recompile the blocks."""
        index = torch.arange(4, device=self._generator.device)
        token = torch.full_like(index, self._generator.eos_token_id)
        return NeuralPrompt(
            input_ids=token,
            slot=torch.full_like(index, -1),
            position=index % 2,
            question=index // 2,
            ptr=2 * torch.arange(3, dtype=torch.int32, device=index.device),
            target_row=index[::2],
            target_id=token[::2],
            longest=2,
        )

    def _dummy_training_pass(self, vectors: bool) -> None:
        """A forward and a backward with zero gradients that enter the same all-gathers."""
        generator = self._generator
        slots = None
        if vectors:
            slots = torch.zeros(1, generator.dim, device=generator.device, requires_grad=True)
        loss = generator(self._dummy_prompt(), slots).loss_sum * 0.0
        if loss.requires_grad:
            loss.backward()
