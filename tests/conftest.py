"""Shared fixtures: where the real KGQA data lies, and a seed."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


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
