"""Backends of the Mamba-2 convolution and scan: our ops, their references, or mamba-ssm."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dragkit.errors import ConfigError
from dragkit_kernels import causal_conv, causal_conv_ref, ssd_scan, ssd_scan_ref

logger = logging.getLogger(__name__)

# Tokens per chunk of mamba-ssm's scan, as in the configuration of Nemotron-H.
_CHUNK = 128


class MambaOps(NamedTuple):
    """Convolution and scan over packs, with the signatures of `dragkit_kernels`."""

    conv: Callable[..., Tensor]
    scan: Callable[..., Tensor]


def sequence_numbers(position: Tensor) -> Tensor:
    """`seq_idx` of mamba-ssm: int32 [1, T], the sequence of each token counted from 0."""
    return (position == 0).cumsum(0, dtype=torch.int32)[None] - 1


def _mamba_ssm_ops() -> MambaOps:
    try:
        conv_fn = importlib.import_module("causal_conv1d").causal_conv1d_fn
        scan_fn = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        scan_fn = scan_fn.mamba_chunk_scan_combined
    # A package compiled for another torch fails with other errors than ImportError.
    except Exception as error:
        raise ConfigError(
            f"generator.mamba_backend: mamba_ssm cannot be imported: {error!r}. Build mamba-ssm "
            "and causal-conv1d for this PyTorch (pip install 'dragkit[mamba]', which needs a CUDA "
            "compiler), or leave generator.mamba_backend at dragkit."
        ) from error

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None, seq_pos: Tensor) -> Tensor:
        seq_idx = sequence_numbers(seq_pos)
        y = conv_fn(x[None].mT, weight, bias, seq_idx=seq_idx, activation="silu")
        return y[0].mT

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_pos: Tensor
    ) -> Tensor:
        seq_idx = sequence_numbers(seq_pos)
        y = scan_fn(x[None], dt[None], A, B[None], C[None], _CHUNK, D=D, seq_idx=seq_idx)
        return y[0]

    return MambaOps(conv, scan)


def mamba_ops(name: str) -> MambaOps:
    """The ops of a backend.

    Args:
        name: "dragkit" for our ops, "reference" for their definitions in plain PyTorch, or
            "mamba_ssm" for the packages mamba-ssm and causal-conv1d.

    Raises:
        ConfigError: the packages cannot be imported.
    """
    if name == "mamba_ssm":
        ops = _mamba_ssm_ops()
    elif name == "reference":
        ops = MambaOps(causal_conv_ref, ssd_scan_ref)
    else:
        ops = MambaOps(causal_conv, ssd_scan)
    logger.info("Mamba-2 layers: convolution and scan by %s", name)
    return ops
