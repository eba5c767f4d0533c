"""torch.compile and mixed precision, applied from outside the models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._dynamo.utils
import torch.fx.experimental._config
from torch import nn

from dragkit.generator.generator import Generator


def use_dynamic_shapes() -> None:
    """Settings of the compiler without which packs of other sizes cost graphs of their own."""
    # Sizes that happen to be equal in one pack (as many questions as tokens, say) must not be taken
    # to be equal in all: each such coincidence would cost a graph of its own.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 32
    # Dropout rates are constants; as inputs they make every graph be traced twice.
    torch._dynamo.config.specialize_float = True


def compile_retriever(retriever: nn.Module) -> Callable:
    """The whole retriever as one graph with dynamic sizes."""
    use_dynamic_shapes()
    return torch.compile(retriever, fullgraph=True, dynamic=True)


def compile_generator(generator: Generator) -> None:
    """The blocks of a generator, a graph for each kind of them with dynamic sizes."""
    use_dynamic_shapes()
    generator.compile_blocks()


def num_compiled_graphs() -> int:
    """Graphs that this process has compiled so far; in a run it soon stays as it is."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager:
    """Mixed precision of retriever and projector: bfloat16 on a GPU unless told otherwise.

    Args:
        precision: of the configuration; device: of the tensors.
        cache: keep the converted weights; not while a CUDA graph is recorded.
    """
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache)
    return nullcontext()
