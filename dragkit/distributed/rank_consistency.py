"""Fingerprints that must be equal on all ranks before they train: settings, code, weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from dragkit import __version__
from dragkit.config import TrainConfig
from dragkit.distributed.ranks import Ranks
from dragkit.errors import ConfigError

# Values hashed of each frozen tensor. Hashing all of them takes as long as loading the model.
_SAMPLED_VALUES = 64
# Settings that may differ from rank to rank: paths, and how a machine is used.
_MAY_DIFFER = {
    *("run.checkpoint_dir", "run.device", "run.num_threads", "data.cache_dir", "data.num_workers"),
}
_FILE_SETTINGS = {"data.heuristics_path", "data.val_heuristics_path", "data.test_heuristics_path"}


def check_batch_size(config: TrainConfig, phase: int, ranks: Ranks) -> None:
    """Refuses a batch with fewer questions than ranks, in which some ranks would always be idle.

    Raises:
        ConfigError: `optim.batch_size` in this phase is below the number of ranks.
    """
    size = config.optim.batch_size_in(phase)
    if size < ranks.world_size:
        raise ConfigError(
            f"optim.batch_size: a batch of {size} in phase {phase} leaves some of the "
            f"{ranks.world_size} ranks without a question. Set --batch_size to {ranks.world_size} "
            "or more, or start fewer ranks."
        )


def run_fingerprint(config: TrainConfig) -> dict[str, object]:
    """Versions, a digest of the source code, and all settings that must be equal, by name."""
    fingerprint: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "dragkit": __version__,
        "source code": _source_digest(),
    }
    for section, values in config.model_dump(mode="json").items():
        for name, value in (values if isinstance(values, dict) else {"": values}).items():
            key = f"{section}.{name}".rstrip(".")
            if key in _FILE_SETTINGS:
                # Paths may differ. The trainer compares the files' content.
                fingerprint[f"{key} is given"] = value is not None
            elif key not in _MAY_DIFFER:
                fingerprint[key] = value
    return fingerprint


def _source_digest() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for package in ("dragkit", "dragkit_kernels"):
        folder = Path(importlib.util.find_spec(package).origin).parent  # type: ignore[union-attr, arg-type]
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def weight_fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of a model's weights: all trained values, and a sample of every frozen tensor."""
    return frozen_fingerprint(model) | trained_fingerprint(model)


def frozen_fingerprint(model: nn.Module) -> dict[str, str]:
    """Digest of a sample of all frozen weights and buffers. Sharded weights are left out."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    frozen += list(model.named_buffers())
    unsharded = [(name, tensor) for name, tensor in frozen if not hasattr(tensor, "device_mesh")]
    return {"frozen weights": _digest(unsharded, max_values=_SAMPLED_VALUES)}


def trained_fingerprint(model: nn.Module) -> dict[str, str]:
    """Digest of all trained weights."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return {"trained weights": _digest(trained)}


def _digest(tensors: list[tuple[str, Tensor]], max_values: int | None = None) -> str:
    """Hashes names, shapes and at most `max_values` evenly spaced values of each tensor."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr([(name, tuple(t.shape)) for name, t in tensors]).encode())
    values = [tensor.flatten() for _, tensor in tensors]
    if max_values is not None:
        values = [v[:: max(len(v) // max_values, 1)][:max_values] for v in values]
    if values:
        # One copy to the host for all tensors.
        digest.update(torch.cat([v.float() for v in values]).cpu().numpy().tobytes())
    return digest.hexdigest()
