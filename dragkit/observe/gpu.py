"""The GPU's own account of itself: power, clocks and memory by NVML, and peak rates by its name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CardSpec:
    """Peak rates of one GPU as its maker states them, dense (without 2:4 sparsity).

    Attributes:
        bf16_tflops, tf32_tflops: tensor cores; fp32_tflops: plain vector units.
        memory_gb_per_s: bandwidth of the device memory, 10^9 bytes a second.
        memory_mib: size of the device memory as the driver reports it; 0 where no plan needs it.
    """

    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    memory_mib: int = 0


# The sheets print tensor-core rates with sparsity; half of that is the dense rate. Longer names
# stand before the names that they begin with.
_CARD_SPECS: dict[str, CardSpec] = {
    # "NVIDIA H100 Tensor Core GPU" data sheet, column PCIe.
    "H100 PCIe": CardSpec(756.0, 378.0, 51.0, 2000.0),
    # The same sheet, column NVL.
    "H100 NVL": CardSpec(835.5, 417.5, 60.0, 3900.0),
    # The same sheet, column SXM: 1,979 and 989 TFLOPS with sparsity, 3.35 TB/s.
    "H100": CardSpec(989.0, 494.7, 67.0, 3350.0, 81_559),
    # "NVIDIA H200 Tensor Core GPU" data sheet, column NVL.
    "H200 NVL": CardSpec(835.5, 417.5, 60.0, 4800.0),
    # The same sheet, column SXM: the arithmetic of an H100 with 4.8 TB/s of memory.
    "H200": CardSpec(989.0, 494.7, 67.0, 4800.0, 143_771),
    # "NVIDIA Blackwell" architecture brief, HGX B200 at 1,000 W: 4.5 and 2.2 PFLOPS with sparsity.
    # A B200 inside a GB200 has other limits and is not this device.
    "B200": CardSpec(2250.0, 1100.0, 80.0, 8000.0, 183_359),
}
# The cards that a run can be planned for.
CARDS = {name: spec for name, spec in _CARD_SPECS.items() if spec.memory_mib}


def card_spec(name: str) -> CardSpec | None:
    """Peak rates of the GPU called `name`, as torch and NVML call it; None if it is not known."""
    words = name.replace("-", " ").split()
    for known, spec in _CARD_SPECS.items():
        wanted = known.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return spec
    return None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at a GPU.

    Attributes:
        power_w: draw; sm_clock_mhz, memory_clock_mhz: now, not the highest possible.
        used_mem_gib: by all processes, what the driver itself takes included.
        energy_j: since the driver was loaded; differences are what counts.
    """

    power_w: float
    sm_clock_mhz: int
    memory_clock_mhz: int
    used_mem_gib: float
    energy_j: float


class GpuMonitor:
    """Reads one GPU through NVML, which costs well below a millisecond and stops no kernel.

    Use `open`, which gives None where there is nothing to read.

    Args:
        nvml: the module `pynvml`, initialised; handle: of the device.
    """

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, device: torch.device | str = "cuda") -> GpuMonitor | None:
        """The monitor of a device; None on a machine without GPU, driver or `pynvml`.

        Args:
            device: as torch counts them: `CUDA_VISIBLE_DEVICES` may rename the driver's.
        """
        import torch

        if torch.device(device).type != "cuda" or not torch.cuda.is_available():
            return None
        try:
            import pynvml
        except ImportError:
            logger.info("no GPU readings: the package nvidia-ml-py is not installed")
            return None
        try:
            pynvml.nvmlInit()
            identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity))
        except pynvml.NVMLError as error:
            # A slice of a GPU, or a container without the driver's management library.
            logger.info("no GPU readings: %s", error)
            return None

    def read(self) -> GpuReading | None:
        """What the device does right now; None where the driver does not tell."""
        nvml, handle = self._nvml, self._handle
        try:
            return GpuReading(
                power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                memory_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                used_mem_gib=nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
                energy_j=nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            )
        except nvml.NVMLError as error:
            logger.debug("no GPU reading: %s", error)
            return None
