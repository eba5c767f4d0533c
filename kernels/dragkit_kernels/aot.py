"""Compiles every kernel ahead of time, without a GPU, and checks it against its limits.

    python -m dragkit_kernels.aot [--triton-path DIR] [--markdown]

The table has one row per kernel, configuration and architecture: registers and stack of a thread,
spill instructions, shared memory of a program, 128-bit loads, tensor core instructions, and
occupancy. The exit status is 1 if a kernel exceeds the limits in its specification. The tools
come with the Triton wheel.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dragkit_kernels
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.launch import KernelSpec

ARCHITECTURES = (90, 100)
# One multiprocessor of either architecture: registers, bytes of shared memory, warps, programs.
_REGISTERS, _SHARED, _WARPS, _PROGRAMS = 65536, 233472, 64, 32
_SHARED_RESERVED = 1024  # bytes per program
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_COLUMNS = (
    *("kernel", "configuration", "arch", "triton", "registers", "spills", "stack", "shared"),
    *("128-bit loads", "mma", "occupancy", "over limits"),
)


class Usage(NamedTuple):
    """Resources of one compiled configuration.

    Attributes:
        registers: per thread.
        spills: instructions that move registers to or from local memory.
        stack_bytes: per thread.
        shared_bytes: per program.
        vector_loads: global loads of at least 128 bits, loops counted once.
        mma_instructions: tensor core instructions, loops counted once.
    """

    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    vector_loads: int
    mma_instructions: int = 0

    def occupancy(self, num_warps: int) -> float:
        """Resident warps of a multiprocessor as a fraction of its maximum."""
        allocated = -(-self.registers // 8) * 8
        programs = min(
            _REGISTERS // (allocated * 32 * num_warps),
            _SHARED // (self.shared_bytes + _SHARED_RESERVED),
            _WARPS // num_warps,
            _PROGRAMS,
        )
        return programs * num_warps / _WARPS

    def over_limits(self, spec: KernelSpec) -> str:
        """The exceeded limits by name, or an empty string."""
        limit = spec.limits
        exceeded = {
            f"registers > {limit.registers}": self.registers > limit.registers,
            "spills": self.spills > 0,
            "stack": self.stack_bytes > 0,
            f"shared > {limit.shared_bytes}": self.shared_bytes > limit.shared_bytes,
            f"vector loads < {limit.vector_loads}": self.vector_loads < limit.vector_loads,
            f"mma < {limit.mma_instructions}": self.mma_instructions < limit.mma_instructions,
        }
        return ", ".join(name for name, is_over in exceeded.items() if is_over)


def all_specs() -> Iterator[KernelSpec]:
    """The KERNELS of every module of this package, in the order of module names."""
    for module in pkgutil.walk_packages(dragkit_kernels.__path__, "dragkit_kernels."):
        if module.name != "dragkit_kernels.aot":
            yield from getattr(importlib.import_module(module.name), "KERNELS", ())


def compile_spec(spec: KernelSpec, architecture: int) -> Usage:
    """Compiles with the types, constants, warps and divisibility of the launcher."""
    constants = {**spec.constants, **{n: None for n, t in spec.types.items() if t is None}}
    names = spec.kernel.arg_names
    signature = {n: "constexpr" if n in constants else spec.types[n] for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in spec.divisible
    }
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": spec.num_warps, "maxnreg": spec.max_registers}
    compiled = triton.compile(source, target=target, options=options)
    return _usage(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _usage(cubin: bytes, ptx: str, shared_bytes: int) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        resources = _output(_TOOLS / "cuobjdump", "-res-usage", path)
        registers, stack_bytes = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
        # Spills need a stack. Disassemble only then, because that takes longer than compiling.
        code = _output(_TOOLS / "nvdisasm", "-c", path) if stack_bytes else ""
    vectors = re.findall(r"\bld\.global[.\w:]*?\.v(\d)\.[bfsu](\d+)\b", ptx)
    return Usage(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        vector_loads=sum(int(count) * int(bits) >= 128 for count, bits in vectors),
        mma_instructions=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _configuration(spec: KernelSpec) -> str:
    parts = [f"{name}={value}" for name, value in spec.constants.items()]
    parts.append(f"{spec.num_warps} warps")
    absent = [name.removesuffix("_ptr") for name, t in spec.types.items() if t is None]
    return ", ".join(parts) + (f", no {' '.join(absent)}" if absent else "")


def _compile_job(job: tuple[int, int]) -> Usage:
    """Compiles `all_specs()`[index]. Kernels cannot be pickled, so a worker gets the index."""
    index, architecture = job
    return compile_spec(next(islice(all_specs(), index, None)), architecture)


def compile_all(specs: list[KernelSpec]) -> list[tuple[KernelSpec, int, Usage]]:
    """Compiles `all_specs()` for every architecture in one process per core."""
    jobs = [(index, arch) for index in range(len(specs)) for arch in ARCHITECTURES]
    # Forked workers inherit the imported kernels.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        usages = list(pool.map(_compile_job, jobs))
    return [(specs[n], arch, usage) for (n, arch), usage in zip(jobs, usages, strict=True)]


def _row(spec: KernelSpec, architecture: int, usage: Usage) -> tuple[str, ...]:
    name = spec.kernel.fn.__name__
    return (
        *(name, _configuration(spec), f"sm_{architecture}", triton.__version__),
        *map(str, usage),
        f"{usage.occupancy(spec.num_warps):.2f}",
        usage.over_limits(spec),
    )


def summary(results: list[tuple[KernelSpec, int, Usage]]) -> str:
    """One line: the number of compiled kernels, and the extremes of their resources."""
    usages = [usage for _, _, usage in results]
    kernels = {spec.kernel.fn.__name__ for spec, _, _ in results}
    exceeded = sum(bool(usage.over_limits(spec)) for spec, _, usage in results)
    return (
        f"triton {triton.__version__}: {len(kernels)} kernels in "
        f"{len(results) // len(ARCHITECTURES)} configurations x {len(ARCHITECTURES)} "
        f"architectures = {len(results)} compiled. Registers "
        f"{min(u.registers for u in usages)}-{max(u.registers for u in usages)}, spills "
        f"{sum(u.spills for u in usages)}, shared memory up to "
        f"{max(u.shared_bytes for u in usages)} "
        f"bytes, over limits {exceeded}"
    )


def _write(rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---|---|---|---|" + "---:|" * (len(_COLUMNS) - 5) + "---|")
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dragkit_kernels.aot", description=__doc__)
    parser.add_argument(
        "--triton-path", help="folder with a second Triton to repeat the check with"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("interpreted kernels cannot be compiled. Unset TRITON_INTERPRET.")
    results = compile_all(list(all_specs()))
    _write([_COLUMNS, *(_row(*entry) for entry in results)], options.markdown)
    sys.stdout.write(summary(results) + "\n")
    sys.stdout.flush()
    status = int(any(usage.over_limits(spec) for spec, _, usage in results))
    if options.triton_path:
        path = os.pathsep.join([options.triton_path, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "dragkit_kernels.aot"]
        command += ["--markdown"] if options.markdown else []
        second = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
        status = status or second.returncode
    return status


if __name__ == "__main__":
    raise SystemExit(main())
