"""Compiles every kernel for the GPUs it is meant for, without one, and holds it to its budget.

    python -m dragkit_kernels.aot [--triton-path DIR] [--markdown]

One row per kernel, configuration and architecture: registers, spills, stack and shared memory as
the assembler reports them, 128-bit loads in the machine code, and the theoretical occupancy. Exits
with 1 if a kernel is over the budget that stands beside it. Needs triton and its bundled tools.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dragkit_kernels
from dragkit_kernels.launch import KernelSpec

ARCHITECTURES = (90, 100)
# Of one multiprocessor, both architectures: registers, bytes of shared memory, warps, programs.
_REGISTERS, _SHARED, _WARPS, _PROGRAMS = 65536, 233472, 64, 32
_SHARED_RESERVED = 1024  # bytes of every program
_COLUMNS = (
    *("kernel", "configuration", "arch", "triton", "registers", "spills", "stack", "shared"),
    *("wide loads", "occupancy", "over budget"),
)


class Report(NamedTuple):
    """What the assembler made of one configuration of a kernel.

    Attributes:
        registers: per thread; spills, stack: bytes per thread; shared: bytes per program.
        wide_loads: 128-bit global loads.
        occupancy: warps a multiprocessor can hold, of 64.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    wide_loads: int
    occupancy: float

    def excess(self, spec: KernelSpec) -> str:
        """What is over the budget, or an empty string."""
        budget = spec.budget
        over = {
            f"registers > {budget.registers}": self.registers > budget.registers,
            "spills": self.spills > 0,
            "stack": self.stack > 0,
            f"shared > {budget.shared}": self.shared > budget.shared,
            f"wide loads < {budget.wide_loads}": self.wide_loads < budget.wide_loads,
        }
        return ", ".join(name for name, is_over in over.items() if is_over)


def all_specs() -> Iterator[KernelSpec]:
    """The KERNELS of every module of this package."""
    for module in pkgutil.walk_packages(dragkit_kernels.__path__, "dragkit_kernels."):
        if module.name != __name__ and not module.name.endswith(".aot"):
            yield from getattr(importlib.import_module(module.name), "KERNELS", ())


def compile_kernel(spec: KernelSpec, architecture: int) -> Report:
    """Compiles as the launcher would: same types, constants, warps and known divisibility."""
    names = spec.kernel.arg_names
    absent = {name: None for name, kind in spec.types.items() if kind is None}
    constants = {**spec.constants, **absent}
    signature = {n: "constexpr" if n in constants else spec.types[n] for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in spec.divisible
    }
    source = ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": spec.num_warps})
    return _assemble(compiled.asm["ptx"], architecture, compiled.metadata.shared, spec.num_warps)


def _assemble(ptx: str, architecture: int, shared: int, num_warps: int) -> Report:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / "ptxas"
    if f".version {_newest_ptx(ptx)}" and architecture >= 100:
        assembler = tools / "ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx, encoding="utf-8")
        log = _run(
            [assembler, "-v", f"--gpu-name=sm_{architecture}a", "kernel.ptx", "-o", "cubin"], folder
        ).stderr
        code = _run([tools / "nvdisasm", "-c", "cubin"], folder).stdout
    return Report()
