"""Shared fixtures: the KGQA data, the seed, the cache folder, and helpers of several tests."""

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
    """The folder of published KGQA sets. A test that needs it is skipped if it is absent."""
    named = os.environ.get("DRAGKIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "sample.jsonl").is_file():
        pytest.skip(f"no KGQA data in {folder}; set DRAGKIT_DATA to a folder with sample.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Seeds every test, and resets the process-wide settings of training after it."""
    torch.manual_seed(0)
    # monkeypatch cannot restore an attribute that a module serves by `__getattr__`.
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(torch.backends.cuda.matmul, name) for name in names}
    yield
    for name, value in before.items():
        setattr(torch.backends.cuda.matmul, name, value)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points the cache at a temporary folder, so that tests do not write to the user's cache."""
    if not os.environ.get("DRAGKIT_CACHE"):
        monkeypatch.setenv("DRAGKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _patch_language_once_per_launch() -> Iterator[None]:
    """Makes Triton's interpreter patch `triton.language` once per launch.

    By default it patches again at every call of a helper, which takes longer than the helper.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    def patch_once(function: types.FunctionType) -> object:
        # The patch depends on the language modules among the globals of the function.
        modules = (x for x in function.__globals__.values() if isinstance(x, types.ModuleType))
        key = tuple(sorted({id(x) for x in modules if x.__name__.startswith("triton.language")}))
        if key in patched:
            return None
        patched.add(key)
        return patch_lang(function)

    def launch_and_reset(self: object, *arguments: object, **options: object) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_and_reset)
        yield


class Made(TorchDispatchMode):
    """Collects shape and dtype of every allocated tensor, forward and backward, without views."""

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
    """A context manager that collects the tensors allocated in it."""
    return Made()


@pytest.fixture
def compile_with(monkeypatch) -> Iterator[Callable]:
    """compile_retriever with another backend. The flags that it sets are reset afterwards."""

    from dragkit.trainer.compile import compile_retriever

    def compiled(model: torch.nn.Module, backend: object) -> Callable:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return compile_retriever(model)

    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        # Without specialize_float Dynamo traces twice: it learns late that dropout is constant.
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=True),
    ):
        yield compiled


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, so that two runs add in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
