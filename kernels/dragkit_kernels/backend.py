"""Which implementation runs: the only place that chooses between Triton kernels and PyTorch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")

# Ops that have a Triton kernel; a kernel's own module adds its op when it is imported.
TRITON_OPS: set[str] = set()

# Read once: looking at the environment inside a compiled graph would be a guard on every call.
_preferred: str = os.environ.get("DRAGKIT_BACKEND", "auto")
_logged: set[tuple[str, str]] = set()


@contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Makes every op inside the `with` block use `backend`, whatever `DRAGKIT_BACKEND` says.

    Args:
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: another name.
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
    """The path that `op` takes for arguments like `tensor`.

    A call's own `backend` wins over `force_backend`, which wins over `DRAGKIT_BACKEND`. "auto"
    means Triton for CUDA tensors of an op that has a Triton kernel, and PyTorch otherwise.

    Args:
        op: stem of the op, such as "message_passing".
        tensor: any tensor argument; its device decides.
        backend: "auto", "triton" or "torch".

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: an unknown name, in the call or in `DRAGKIT_BACKEND`.
        RuntimeError: Triton was asked for where it cannot run. There is no silent fallback.
    """
    wanted = _preferred if backend == "auto" else backend
    if wanted not in BACKENDS:
        raise ValueError(
            f"unknown backend {wanted!r} (argument or DRAGKIT_BACKEND); use {', '.join(BACKENDS)}"
        )
    obstacle = _triton_obstacle(op, tensor)
    if wanted == "triton" and obstacle:
        raise RuntimeError(
            f"{op}: the Triton backend was asked for but cannot run: {obstacle}; "
            "use backend 'auto' or 'torch' (environment variable DRAGKIT_BACKEND)"
        )
    chosen = "torch" if wanted == "torch" or obstacle else "triton"
    if not torch.compiler.is_compiling() and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _log.info("%s runs on the %s backend (%s)", op, chosen, tensor.device.type)
    return chosen


def _triton_obstacle(op: str, tensor: Tensor) -> str:
    """Why `op` cannot use Triton for this tensor, or an empty string."""
    if op not in TRITON_OPS:
        return "this op has no Triton kernel yet"
    if not tensor.is_cuda:
        return f"the tensors are on the {tensor.device.type} device"
    return ""
