"""Shared fixtures: where the real KGQA data lies, and a seed."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(scope="session")
def kgqa_data() -> Path:
    """The folder of published KGQA sets; a test that asks for it is skipped where it is absent."""
    named = os.environ.get("DRAGKIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "sample.jsonl").is_file():
        pytest.skip(f"no KGQA data in {folder}; set DRAGKIT_DATA to a folder with sample.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Every test starts from one seed, and training's process-wide settings end with it."""
    torch.manual_seed(0)
    # By hand: monkeypatch cannot put back what a module answers for by `__getattr__`.
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing a test builds reaches the user's cache."""
    if not os.environ.get("DRAGKIT_CACHE"):
        monkeypatch.setenv("DRAGKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _language_replaced_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces the language's functions again at every call of a helper, which
    takes longer than the helper; what a launch has replaced stays so until its end."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    def replace_once(function: types.FunctionType) -> object:
        # What it replaces depends on the modules that the function sees.
        modules = (x for x in function.__globals__.values() if isinstance(x, types.ModuleType))
        key = tuple(sorted({id(x) for x in modules if x.__name__.startswith("triton.language")}))
        if key in done:
            return None
        done.add(key)
        return replace(function)

    def launch_anew(self: object, *arguments: object, **options: object) -> None:
        done.clear()
        launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


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

    from dragkit.trainer.compile import compile_retriever

    def compiled(model: torch.nn.Module, backend: object) -> Callable:
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
