"""Rates against a fake clock, and peak memory against /proc."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dragkit.observe import throughput
from dragkit.observe.throughput import ThroughputMeter, peak_memory_gib


def test_rates_are_sums_divided_by_the_time_since_the_last_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = ThroughputMeter(torch.device("cpu"))
    for questions, facts, tokens in [(16, 800, 2000), (16, 900, 2400), (8, 300, 1600)]:
        now[0] += 0.5
        meter.add(questions, facts, tokens)
    reading = meter.read()
    rates = (reading.questions_per_s, reading.facts_per_s, reading.tokens_per_s, reading.step_ms)
    assert rates == pytest.approx((40 / 1.5, 2000 / 1.5, 4000.0, 500.0))
    now[0] += 2.0
    meter.add(4, 10, 0)
    reading = meter.read()
    assert (reading.questions_per_s, reading.facts_per_s, reading.tokens_per_s) == (2.0, 5.0, 0.0)
    assert reading.step_ms == pytest.approx(2000.0)
    reading = meter.read()  # without a step or elapsed time
    assert reading.questions_per_s == reading.facts_per_s == reading.tokens_per_s == 0.0
    assert 0.0 <= reading.step_ms < 1e-3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_process_high_water_mark() -> None:
    def recorded_gib(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) / 2**20

    block = torch.ones(2**24)
    held = recorded_gib("VmRSS")
    del block
    peak = peak_memory_gib(torch.device("cpu"))
    assert peak == pytest.approx(recorded_gib("VmHWM"), rel=0.01)
    assert peak >= 0.99 * held


def test_peak_memory_of_a_gpu_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def allocated(device: torch.device) -> int:
        asked.append(device)
        return 3 * 2**29

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated)
    assert peak_memory_gib(torch.device("cuda", 1)) == 1.5
    assert asked == [torch.device("cuda", 1)]
