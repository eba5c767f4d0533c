"""What measured kernels might take on another GPU: arithmetic on data sheets, not a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.reading import Results
from bench.tables import KernelComparison
from dragkit.observe.gpu import DeviceSpec, device_spec

LABEL = "projection, not measured"
# float32 rows are held to float32's accuracy, which the tensor cores' tf32 does not reach.
_UNITS = {"bfloat16": "bf16_tflops", "float16": "bf16_tflops", "float32": "fp32_tflops"}


class NoProjection(Exception):
    """The rows give nothing to project from."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The least time that a device's data sheet allows a row.

    Attributes:
        ms: of the slower of both; by: "memory" or "arithmetic".
    """

    ms: float
    by: str


def ceiling(spec: DeviceSpec, count_bytes: float, flops: float, dtype: str) -> Ceiling:
    """Bytes at the memory's rate, or operations at the rate of `dtype`, whichever takes longer."""
    rate = getattr(spec, _UNITS[dtype])
    memory = count_bytes / (spec.memory_gb_per_s * 1e6)
    arithmetic = flops / (rate * 1e9)
    return Ceiling(memory, "memory") if memory >= arithmetic else Ceiling(arithmetic, "arithmetic")


def project(
    row_ms: float, count_bytes: float, flops: float, dtype: str, here: DeviceSpec, there: DeviceSpec
) -> tuple[float, float]:
    """Milliseconds on `there` if a row reaches the same share of its ceiling, and that share.

    Both ceilings are those of data sheets. A copy reaches less than the sheet says on either
    device, so that a share of a measured copy would be too large for the other's sheet.
    """
    share = ceiling(here, count_bytes, flops, dtype).ms / row_ms
    return ceiling(there, count_bytes, flops, dtype).ms / share, share


def _measured_spec(result: Results) -> tuple[str, DeviceSpec]:
    name = result.machine.get("gpu")
    if not isinstance(name, str):
        raise NoProjection(
            f"{result.path}: was measured on {result.machine['device']}, which is no GPU"
        )
    spec = device_spec(name)
    if spec is None:
        raise NoProjection(f"{result.path}: the peak rates of {name} are not known")
    return name, spec


def _lines(result: Results, target: str, there: DeviceSpec) -> Iterator[str]:
    name, here = _measured_spec(result)
    for comparison in result.comparisons:
        dtype = str(comparison.about.get("dtype", "no dtype"))
        what = f"{comparison.name}, {dtype}"
        if not isinstance(comparison, KernelComparison):
            yield f"{comparison.name}: refused, its bytes and operations are not counted"
            continue
        counted = comparison.bytes is not None and comparison.flops is not None
        if not counted or dtype not in _UNITS:
            yield f"{what}: refused, its bytes and operations are not counted"
            continue
        for row in comparison.timings:
            if row.ms is None:
                continue
            at = (comparison.bytes, comparison.flops, dtype)
            ms, share = project(row.ms[0], *at, here, there)
            now, then = ceiling(here, *at).by, ceiling(there, *at).by
            yield (
                f"{what}: {row.name}: {ms:.4g} ms on {target} by {then} "
                f"({name}: {row.ms[0]:.4g} ms, {share:.1%} of its {now} ceiling)"
            )


def projection(results: Sequence[Results], target: str) -> list[str]:
    """Lines for every row of the kernel benchmarks; each says that it is a projection.

    Args:
        results: of a GPU whose peak rates are known; target: such as "b200".

    Raises:
        NoProjection: an unknown target, rows of a CPU, or none at all.
    """
    there = device_spec(target.upper())
    if there is None:
        raise NoProjection(f"the peak rates of {target} are not known")
    lines = [
        f"{target.upper()}: {there.memory_gb_per_s / 1e3:g} TB/s, {there.bf16_tflops:,g} TFLOP/s "
        "dense bfloat16, by its data sheet; each row at the share of its ceiling that it reached "
        "where it was measured",
        "small shares mean that launches or latency decide: what does not depend on a peak rate "
        "will not shrink with it",
    ]
    found = [line for result in results for line in _lines(result, target.upper(), there)]
    if not found:
        raise NoProjection("there are no rows of kernel benchmarks")
    return [f"{LABEL}: {line}" for line in [*lines, *found]]
