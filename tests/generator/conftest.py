"""What a computation makes in memory, and how it is compiled and threaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dragkit.retriever.retriever import Retriever
from dragkit.trainer.compile import compile_retriever


class Made(TorchDispatchMode):
    """Collects shape and type of every tensor that is made, forward and backward; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.tensors.append((tuple(t.shape), t.dtype))
        return out


@pytest.fixture
def made() -> Made:
    """A context manager; afterwards its `tensors` are what was made in it."""
    return Made()


@pytest.fixture
def compile_with(monkeypatch) -> Iterator[Callable]:
    """compile_retriever with another backend; the flags it sets are taken back afterwards."""

    def compiled(model: Retriever, backend: object) -> Callable:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return compile_retriever(model)

    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        # Without the second, Dynamo traces twice: it finds late that a dropout rate is a constant.
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=True),
    ):
        yield compiled


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products in one thread, so that two runs add up in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
