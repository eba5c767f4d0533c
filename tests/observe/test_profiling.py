"""Profiling ranges and the capture window; CUDA's calls are recorded instead of made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from dragkit.observe.profiling import ProfileWindow, nvtx_range


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to CUDA, in order."""
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


@pytest.mark.parametrize("cuda", [True, False])
def test_ranges_nest_and_close_after_an_error(
    calls: list[str], cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(ValueError, match="inside"), nvtx_range("step"), nvtx_range("backward"):
        calls.append("work")
        raise ValueError("inside")
    assert calls == (["push step", "push backward", "work", "pop", "pop"] if cuda else ["work"])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # The stop synchronises first, so that the capture holds the last step's kernels.
        ("2:4", ["0", "1", "start", "2", "3", "wait", "stop", "4", "5"]),
        ("0:1", ["start", "0", "wait", "stop", "1", "2", "3", "4", "5"]),
        ("9:12", ["0", "1", "2", "3", "4", "5"]),
        (None, ["0", "1", "2", "3", "4", "5"]),
    ],
)
def test_the_window_includes_its_first_step_but_not_its_end(
    calls: list[str], steps: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        window = ProfileWindow(steps)
        for step in range(6):
            window.tick(step)
            calls.append(str(step))
        assert calls == (expected if cuda else list("012345"))
        calls.clear()


def names_in(trace: Path) -> list[str]:
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(ranges, key=lambda event: event["ts"])]


def run_steps(window: ProfileWindow, steps: range) -> None:
    for step in steps:
        window.tick(step)
        with nvtx_range(f"step {step}"), nvtx_range("inside"):
            torch.ones(3).sum()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUPTI would start in the first steps")
def test_a_trace_holds_only_the_ranges_of_the_window(tmp_path: Path) -> None:
    window = ProfileWindow("2:4", tmp_path)
    run_steps(window, range(6))
    assert names_in(tmp_path / "trace-2-4.json.gz") == ["step 2", "inside", "step 3", "inside"]


def test_an_open_window_is_closed_at_the_end(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProfileWindow("1:9") as window:
        for step in range(2):
            window.tick(step)
    assert calls == ["start", "wait", "stop"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KeyError), ProfileWindow("1:9", tmp_path) as window:
        run_steps(window, range(3))
        raise KeyError
    assert names_in(tmp_path / "trace-1-9.json.gz") == ["step 1", "inside", "step 2", "inside"]
    run_steps(window, range(9, 11))
    assert len(list(tmp_path.iterdir())) == 1
    with ProfileWindow("1:9", tmp_path / "never") as window:
        run_steps(window, range(1))
    assert not (tmp_path / "never").exists()
