"""Who computes the Mamba-2 convolution and scan: our ops, their definitions, or mamba-ssm."""

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

# Tokens of a chunk of mamba-ssm's scan, as Nemotron-H's configuration has it.
_CHUNK = 128


class MambaOps(NamedTuple):
    """The two ops of a Mamba-2 mixer over packs, with the signatures of `dragkit_kernels`."""

    conv: Callable[..., Tensor]
    scan: Callable[..., Tensor]


def sequence_numbers(position: Tensor) -> Tensor:
    """int32 [1, T]: 0 for the tokens of the first sequence, 1 for those of the second, ..."""
    return (position == 0).cumsum(0, dtype=torch.int32)[None] - 1


def _from_mamba_ssm() -> MambaOps:
    try:
        conv_fn = importlib.import_module("causal_conv1d").causal_conv1d_fn
        scan_fn = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        scan_fn = scan_fn.mamba_chunk_scan_combined
    except Exception as error:  # compiled packages fail to import in every way there is
        raise ConfigError(
            f"generator.mamba_backend: mamba_ssm was asked for and cannot be used: {error!r}. "
            "Build "
            "mamba-ssm and causal-conv1d for this PyTorch (pip install 'dragkit[mamba]', which "
            "needs a CUDA compiler), or leave generator.mamba_backend at dragkit."
        ) from error

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor) -> Tensor:
        numbers = sequence_numbers(position)
        y = conv_fn(x[None].mT, weight, bias, seq_idx=numbers, activation="silu")
        return y[0].mT

    def scan(
        x: Tensor,
        dt: Tensor,
        rate: Tensor,
        into: Tensor,
        out_of: Tensor,
        skip: Tensor,
        position: Tensor,
    ) -> Tensor:
        y = scan_fn(
            x[None],
            dt[None],
            rate,
            into[None],
            out_of[None],
            _CHUNK,
            D=skip,
            seq_idx=sequence_numbers(position),
        )
        return y[0]

    return MambaOps(conv, scan)


def mamba_ops(name: str) -> MambaOps:
    """The ops of a back end of `generator.mamba_backend`.

    Args:
        name: "dragkit", our ops with whatever `DRAGKIT_BACKEND` says; "reference", their
            definitions in plain PyTorch, token by token; "mamba_ssm", the packages mamba-ssm and
            causal-conv1d.

    Raises:
        ConfigError: the packages cannot be imported.
    """
    if name == "mamba_ssm":
        ops = _from_mamba_ssm()
    elif name == "reference":
        ops = MambaOps(causal_conv_ref, ssd_scan_ref)
    else:
        ops = MambaOps(causal_conv, ssd_scan)
    logger.info("Mamba-2 layers: convolution and scan by %s", name)
    return ops
