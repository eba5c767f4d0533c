"""The generator's frozen weights cut between ranks, for cards that do not hold all of them.

FSDP2 gathers the weights of a block when it is called, frees them behind it, and does both again in
its backward pass; embeddings and output layer stay gathered for the whole of a pass. Only frozen
weights are cut. What is trained is small and stays whole on every rank, so that gradients,
clipping, optimizer and checkpoints are those of a run without sharding, for any number of ranks:
there is no sharded state that would have to be saved.
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
    """The blocks of a causal language model, as the library names what belongs on one device.

    Args:
        model: a Hugging Face causal LM, with adapters or without.

    Raises:
        ConfigError: the model names none, or has none of that name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"run.generator_fsdp: the blocks of a {type(base).__name__} are not known, so its "
            "weights "
            "cannot be gathered block by block. Its class must name them in _no_split_modules. "
            "Use --set run.generator_fsdp=false."
        )
    return found


def shard_generator(
    generator: Generator, mesh: DeviceMesh, all_reduce_max: Callable[[int], int]
) -> None:
    """Leaves this rank its part of the generator's frozen weights, on the mesh's device.

    The model may be on the host: its blocks go to the device one at a time, each to be cut there
    before the next.

    Args:
        generator: the same on all ranks; mesh: of the ranks that share it, in one dimension.
        all_reduce_max: of a number on each of these ranks, the largest; every rank must call it.

    Raises:
        ConfigError: the model's blocks are not known.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    trained = {p for p in generator.parameters() if p.requires_grad}
    # From the inside out, where one holds another.
    for block in reversed(decoder_blocks(generator.model)):
        fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(generator, mesh=mesh, ignored_params=trained)
    unmark_fsdp_modules(generator)
    register_fsdp_forward_method(generator, "unannounced_greedy_tokens")
    generator.coordinate_passes(UnevenPasses(generator, all_reduce_max))


class UnevenPasses:
    """Sees to it that ranks which gather weights together run equally many passes.

    A gather returns when all ranks have come to it, but each has prompts and passes of its own
    number. So a rank announces each pass, and when it has no more it runs idle ones, until none
    announces any.

    Args:
        generator: whose passes; all_reduce_max: as in `shard_generator`.
    """

    def __init__(self, generator: Generator, all_reduce_max: Callable[[int], int]) -> None:
        self.all_reduce_max = all_reduce_max
        self._generator = generator
        self._idle = False

    def announce_pass(self, max_new_tokens: int = 1) -> None:
        """As `PassCoordinator.announce_pass`; dummy passes are not announced."""
        if not self._idle:
            self.all_reduce_max(max_new_tokens)

    def run_dummy_passes(self, *, vectors: bool) -> None:
        """As `Generator.run_dummy_passes`."""
        self._idle = True
        try:
            while announced := self.all_reduce_max(0):
                if torch.is_grad_enabled():
                    self._train(vectors)
                else:
                    self._generator.greedy_tokens(self._prompt(), None, announced)
        finally:
            self._idle = False
        # Behind passes without gradients they are still gathered, until a checkpoint is written;
        # and that is written by one rank.
        self._generator.reshard()  # type: ignore[operator]

    def _prompt(self) -> NeuralPrompt:
        """Two prompts of two end tokens each: for sizes of one, compiled blocks are made anew."""
        place = torch.arange(4, device=self._generator.device)
        token = torch.full_like(place, self._generator.eos_token_id)
        return NeuralPrompt(
            input_ids=token,
            slot=torch.full_like(place, -1),
            position=place % 2,
            question=place // 2,
            ptr=2 * torch.arange(3, dtype=torch.int32, device=place.device),
            target_row=place[::2],
            target_id=token[::2],
            longest=2,
        )

    def _train(self, vectors: bool) -> None:
        """A pass whose gradients are zero, over as much of the graph as others have."""
        generator = self._generator
        slots = None
        if vectors:
            slots = torch.zeros(1, generator.dim, device=generator.device, requires_grad=True)
        loss = generator(self._prompt(), slots).loss_sum * 0.0
        if loss.requires_grad:
            loss.backward()
