"""GPU readings against a fake NVML: units and failures. The table of peak rates."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dragkit.observe.gpu import GpuMonitor, card_spec


class NvmlError(Exception):
    """The fake of `pynvml.NVMLError`."""


class FakeNvml:
    """The part of pynvml that the monitor uses, in NVML's units (mW, MHz, bytes, mJ)."""

    NVMLError = NvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *, broken: str = "") -> None:
        self.broken = broken

    def _answer(self, name: str, value: object) -> object:
        if self.broken == name:
            raise NvmlError("Not Supported")
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        return self._answer("handle", ("handle", uuid))

    def nvmlDeviceGetPowerUsage(self, handle: object) -> object:  # noqa: N802
        return self._answer("power", 412_500)

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> object:  # noqa: N802
        return self._answer("clock", {1: 1755, 2: 2619}[kind])

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> object:  # noqa: N802
        return self._answer("memory", SimpleNamespace(used=3 * 2**29))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> object:  # noqa: N802
        return self._answer("energy", 7_250)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab")
    )


def test_a_reading_is_in_the_units_of_its_names(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monitor = GpuMonitor.open("cuda:0")
    reading = monitor.read()
    assert reading.power_w == 412.5
    assert (reading.sm_clock_mhz, reading.memory_clock_mhz) == (1755, 2619)
    assert reading.used_mem_gib == 1.5
    assert reading.energy_j == 7.25
    # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
    assert monitor._handle == ("handle", "GPU-12-ab")


@pytest.mark.parametrize("broken", ["init", "handle", "power", "clock", "memory", "energy"])
def test_a_refusing_driver_gives_no_reading(
    cuda: None, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=broken))
    monitor = GpuMonitor.open()
    assert (monitor is None) == (broken in ("init", "handle"))
    assert monitor is None or monitor.read() is None


def test_without_pynvml_or_cuda_there_is_no_monitor(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMonitor.open() is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert GpuMonitor.open("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert GpuMonitor.open("cuda") is None


def test_the_fake_has_the_names_of_the_real_module() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in names if not hasattr(real, name)] == []
    assert (real.NVML_CLOCK_SM, real.NVML_CLOCK_MEM) == (1, 2)


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 3350),
        ("NVIDIA H100 PCIe", 756.0, 2000),
        ("NVIDIA H100 NVL", 835.5, 3900),
        ("NVIDIA H200", 989.0, 4800),
        ("NVIDIA H200 NVL", 835.5, 4800),
        ("NVIDIA B200", 2250.0, 8000),
    ],
)
def test_peak_rates_by_the_name_a_device_reports(name: str, bf16: float, bandwidth: float) -> None:
    spec = card_spec(name)
    assert (spec.bf16_tflops, spec.memory_gb_per_s) == (bf16, bandwidth)


@pytest.mark.parametrize("name", ["NVIDIA GB200", "NVIDIA A100-SXM4-80GB", "NVIDIA H20", "", "cpu"])
def test_an_unknown_card_has_no_rates(name: str) -> None:
    assert card_spec(name) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_reports_plausible_values() -> None:
    monitor = GpuMonitor.open()
    if monitor is None:
        pytest.skip("NVML does not know this device")
    held = torch.zeros(2**28, device="cuda")
    torch.cuda.synchronize()
    reading = monitor.read()
    assert 5 < reading.power_w < 2000
    assert 0 < reading.sm_clock_mhz < 5000
    assert reading.used_mem_gib > held.numel() * 4 / 2**30
