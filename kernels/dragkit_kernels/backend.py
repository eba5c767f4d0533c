"""The only place that chooses between Triton kernels and PyTorch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the PyTorch path does not need Triton
    triton = None

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")

# Whether op folders can import their kernels.
HAS_TRITON = triton is not None
# Whether kernels run interpreted, on tensors of any device. `triton.jit` reads TRITON_INTERPRET
# when it decorates a kernel, so a later change of the variable has no effect.
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
# Ops that have a Triton kernel. `library.register` adds them.
TRITON_OPS: set[str] = set()

# Read once: reading the environment in a compiled graph would add a guard to every call.
_preferred: str = os.environ.get("DRAGKIT_BACKEND", "auto")
_logged: set[tuple[str, str]] = set()


@contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Makes every op in the `with` block use `backend` instead of `DRAGKIT_BACKEND`.

    Args:
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: `backend` is another name.
    """
    global _preferred
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    previous, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = previous


def resolve_backend(op: str, tensor: Tensor, backend: str = "auto") -> str:
    """Chooses the implementation of `op` for arguments like `tensor`.

    The argument `backend` takes precedence over `force_backend`, and that over `DRAGKIT_BACKEND`.
    "auto" means Triton for CUDA tensors of an op that has a kernel, and PyTorch otherwise. Under
    Triton's interpreter (TRITON_INTERPRET=1) "triton" also accepts CPU tensors.

    Args:
        op: name of the op, such as "message_passing".
        tensor: a floating-point argument, whose device and dtype decide.
        backend: "auto", "triton" or "torch".

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: the argument or `DRAGKIT_BACKEND` is an unknown name.
        RuntimeError: Triton was asked for where it cannot run. Nothing falls back silently.
    """
    requested = _preferred if backend == "auto" else backend
    if requested not in BACKENDS:
        raise ValueError(
            f"unknown backend {requested!r} (argument or DRAGKIT_BACKEND): "
            f"use {', '.join(BACKENDS)}"
        )
    obstacle = _triton_obstacle(op, tensor)
    if requested == "triton" and obstacle:
        raise RuntimeError(
            f"{op}: the Triton backend was asked for but cannot run: {obstacle}. "
            "Use backend 'auto' or 'torch' (environment variable DRAGKIT_BACKEND)."
        )
    use_triton = requested == "triton" or (requested == "auto" and tensor.is_cuda and not obstacle)
    chosen = "triton" if use_triton else "torch"
    if not torch.compiler.is_compiling() and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _log.info("%s runs on the %s backend (%s)", op, chosen, tensor.device.type)
    return chosen


def _triton_obstacle(op: str, tensor: Tensor) -> str:
    """The reason why `op` cannot use Triton for this tensor, or an empty string."""
    if not HAS_TRITON:
        return "triton is not installed"
    if op not in TRITON_OPS:
        return "this op has no Triton kernel"
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32 and the tensors are float64"
    if not tensor.is_cuda and not INTERPRETED:
        return f"the tensors are on the {tensor.device.type} device (and TRITON_INTERPRET is off)"
    return ""
