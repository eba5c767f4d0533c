"""GPU readings by NVML (power, clocks, memory), and the table of cards with their peak rates."""

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
    """Peak dense rates of one GPU (no 2:4 sparsity) as its maker states them, 0 if unknown.

    Attributes:
        name: name of the card in the table, else the driver's name.
        bf16_tflops, tf32_tflops: rates of the tensor cores, 10^12 FLOP/s.
        fp32_tflops: rate of the vector units, 10^12 FLOP/s.
        memory_gb_per_s: bandwidth of the device memory, 10^9 byte/s.
        memory_bytes: size of the device memory as the driver reports it.
    """

    name: str
    bf16_tflops: float = 0.0
    tf32_tflops: float = 0.0
    fp32_tflops: float = 0.0
    memory_gb_per_s: float = 0.0
    memory_bytes: int = 0


# The data sheets print tensor-core rates with sparsity. Half of that is the dense rate. Longer
# names stand before the names that they begin with, because `card_spec` takes the first match.
_CARD_SPECS = (
    # "NVIDIA H100 Tensor Core GPU" data sheet, column PCIe.
    CardSpec("H100 PCIe", 756.0, 378.0, 51.0, 2000.0),
    # The same sheet, column NVL.
    CardSpec("H100 NVL", 835.5, 417.5, 60.0, 3900.0),
    # The same sheet, column SXM: 1,979 and 989 TFLOPS with sparsity, 3.35 TB/s.
    CardSpec("H100", 989.0, 494.7, 67.0, 3350.0, 81_559 << 20),
    # "NVIDIA H200 Tensor Core GPU" data sheet, column NVL.
    CardSpec("H200 NVL", 835.5, 417.5, 60.0, 4800.0),
    # The same sheet, column SXM: the arithmetic of an H100 with 4.8 TB/s of memory.
    CardSpec("H200", 989.0, 494.7, 67.0, 4800.0, 143_771 << 20),
    # "NVIDIA Blackwell" architecture brief, HGX B200 at 1,000 W: 4.5 and 2.2 PFLOPS with sparsity.
    # A B200 inside a GB200 has other limits and is not this card.
    CardSpec("B200", 2250.0, 1100.0, 80.0, 8000.0, 183_359 << 20),
)
# The cards that a run can be planned for.
CARDS = {spec.name: spec for spec in _CARD_SPECS if spec.memory_bytes}


def card_spec(name: str) -> CardSpec | None:
    """The entry of the GPU that torch and NVML call `name`, or None if the table lacks it."""
    words = name.replace("-", " ").split()
    for spec in _CARD_SPECS:
        wanted = spec.name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return spec
    return None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """The state of a GPU at one moment.

    Attributes:
        power_w: current draw.
        sm_clock_mhz, memory_clock_mhz: current clocks.
        used_mem_gib: memory in use by all processes and the driver.
        energy_j: energy since the driver was loaded. Only differences have a meaning.
    """

    power_w: float
    sm_clock_mhz: int
    memory_clock_mhz: int
    used_mem_gib: float
    energy_j: float


class GpuMonitor:
    """Reads one GPU through NVML, which takes well below a millisecond and stops no kernel.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: NVML's handle of the device.
    """

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, device: torch.device | str = "cuda") -> GpuMonitor | None:
        """The monitor of a device, or None on a machine without GPU, driver or `pynvml`.

        Args:
            device: torch's device. `CUDA_VISIBLE_DEVICES` may change its number.
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
            # Look the device up by UUID, because NVML ignores CUDA_VISIBLE_DEVICES.
            identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity))
        except pynvml.NVMLError as error:
            # The device is a MIG slice, or the container lacks the management library.
            logger.info("no GPU readings: %s", error)
            return None

    def read(self) -> GpuReading | None:
        """The current state of the device, or None if the driver refuses a value."""
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
