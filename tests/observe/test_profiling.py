"""Profiling ranges and the capture window, with CUDA's calls recorded instead of made."""

from __future__ import annotations

import pytest
import torch

from dragkit.observe.profiling import ProfileWindow, nvtx_range


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been asked of CUDA, in order."""
    seen: list[str] = []

    class Runtime:
        def cudaProfilerStart(self) -> None:  # noqa: N802
            seen.append("start")

        def cudaProfilerStop(self) -> None:  # noqa: N802
            seen.append("stop")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: seen.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("pop"))
    return seen


@pytest.fixture
def no_cuda(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_ranges_nest(calls: list[str]) -> None:
    with nvtx_range("step"), nvtx_range("backward"):
        calls.append("work")
    assert calls == ["push step", "push backward", "work", "pop", "pop"]


def test_a_range_is_closed_when_its_content_fails(calls: list[str]) -> None:
    with pytest.raises(ValueError, match="inside"), nvtx_range("step"):
        raise ValueError("inside")
    assert calls == ["push step", "pop"]


def test_a_range_without_cuda_only_runs_its_content(no_cuda: list[str]) -> None:
    with nvtx_range("step"):
        no_cuda.append("work")
    with pytest.raises(ValueError, match="inside"), nvtx_range("step"):
        raise ValueError("inside")
    assert no_cuda == ["work"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # Stopping waits first, so that the last step's kernels are in the capture.
        ("2:4", ["0", "1", "start", "2", "3", "wait", "stop", "4", "5"]),
        ("0:1", ["start", "0", "wait", "stop", "1", "2", "3", "4", "5"]),
        ("9:12", ["0", "1", "2", "3", "4", "5"]),
        (None, ["0", "1", "2", "3", "4", "5"]),
    ],
)
def test_the_window_holds_its_first_step_and_not_its_last(
    calls: list[str], steps: str | None, expected: list[str]
) -> None:
    window = ProfileWindow(steps)
    for step in range(6):
        window.tick(step)
        calls.append(str(step))
    assert calls == expected


def test_the_window_does_nothing_without_cuda(no_cuda: list[str]) -> None:
    window = ProfileWindow("0:1")
    for step in range(3):
        window.tick(step)
    assert no_cuda == []
