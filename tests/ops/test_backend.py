"""The choice between Triton and PyTorch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from dragkit_kernels import backend, force_backend, resolve_backend, segment_softmax

SCORE, PTR = torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32)


def test_cpu_tensors_take_pytorch() -> None:
    assert resolve_backend("segment_softmax", SCORE) == "torch"
    assert resolve_backend("segment_softmax", SCORE, "torch") == "torch"


def test_triton_raises_where_it_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="segment_softmax: the Triton backend .* cannot run"):
        segment_softmax(SCORE, PTR, backend="triton")
    with force_backend("triton"):
        with pytest.raises(RuntimeError, match="cannot run"):
            segment_softmax(SCORE, PTR)
        assert segment_softmax(SCORE, PTR, backend="torch").shape == (3,)
    assert segment_softmax(SCORE, PTR).shape == (3,)


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if segment_softmax had a Triton kernel and Triton were installed."""
    monkeypatch.setattr(backend, "TRITON_OPS", {"segment_softmax"})
    monkeypatch.setattr(backend, "HAS_TRITON", True)


@pytest.mark.usefixtures("with_kernel")
def test_a_kernel_takes_cpu_tensors_only_when_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert resolve_backend("segment_softmax", SCORE) == "torch"
    with pytest.raises(RuntimeError, match="on the cpu device"):
        resolve_backend("segment_softmax", SCORE, "triton")
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve_backend("segment_softmax", SCORE) == "torch"
    assert resolve_backend("segment_softmax", SCORE, "triton") == "triton"
    with force_backend("triton"):
        assert resolve_backend("segment_softmax", SCORE) == "triton"
        assert resolve_backend("segment_softmax", SCORE, "torch") == "torch"


@pytest.mark.usefixtures("with_kernel")
def test_the_error_names_what_a_kernel_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="the tensors are float64"):
        resolve_backend("segment_softmax", SCORE.double(), "triton")
    with pytest.raises(RuntimeError, match="fact_scores: .* no Triton kernel"):
        resolve_backend("fact_scores", SCORE, "triton")
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve_backend("segment_softmax", SCORE, "triton")


class OnTheGpu:
    """The attributes that resolve_backend reads."""

    is_cuda, dtype, device = True, torch.float32, torch.device("cuda")


@pytest.mark.usefixtures("with_kernel")
def test_cuda_tensors_take_the_kernel_where_there_is_one() -> None:
    assert resolve_backend("segment_softmax", OnTheGpu()) == "triton"
    assert resolve_backend("segment_softmax", OnTheGpu(), "torch") == "torch"
    assert resolve_backend("fact_scores", OnTheGpu()) == "torch"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        resolve_backend("segment_softmax", SCORE, "cuda")
    with pytest.raises(ValueError, match="got 'cuda'"), force_backend("cuda"):
        pass


def test_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="dragkit_kernels.backend"):
        for _ in range(3):
            segment_softmax(SCORE, PTR)
    assert [r.getMessage() for r in caplog.records] == [
        "segment_softmax runs on the torch backend (cpu)"
    ]


def test_the_error_names_a_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_preferred", "gpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu' .*DRAGKIT_BACKEND"):
        segment_softmax(SCORE, PTR)


def test_environment_variable() -> None:
    code = (
        "import torch, dragkit_kernels as k\n"
        "k.segment_softmax(torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32))"
    )
    environment = {**os.environ, "DRAGKIT_BACKEND": "triton"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "RuntimeError: segment_softmax: the Triton backend was asked for" in result.stderr


def test_the_package_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dragkit_kernels as k\n"
        "logits, ptr = torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32)\n"
        "print(k.top_facts(logits, ptr, 2).index.tolist())\n"
        "k.top_facts(logits, ptr, 2, backend='triton')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "[[0, 1]]\n", result.stderr
    assert "cannot run: triton is not installed" in result.stderr
