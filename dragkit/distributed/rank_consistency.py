"""What all ranks must have in common before they train: settings, code, weights."""

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

# Values looked at in each frozen tensor: all would take as long as reading the model again.
_SAMPLED_VALUES = 64
# What may differ from rank to rank: places, and how a machine is used.
_MAY_DIFFER = {
    *("run.checkpoint_dir", "run.device", "run.num_threads", "data.cache_dir", "data.num_workers"),
}
_FILE_SETTINGS = {"data.heuristics_path", "data.val_heuristics_path", "data.test_heuristics_path"}


def check_batch_size(config: TrainConfig, phase: int, ranks: Ranks) -> None:
    """Refuses a batch that has less questions than there are ranks, which would have some idle."""
    size = config.optim.batch_size_in(phase)
    if size < ranks.world_size:
        raise ConfigError(
            f"optim.batch_size: {size} in phase {phase} is shared by {ranks.world_size} ranks; "
            f"set --batch_size to {ranks.world_size} or more, or start fewer ranks."
        )


def run_fingerprint(config: TrainConfig) -> dict[str, object]:
    """What all ranks must have in common before anything is loaded: settings and code."""
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
                fingerprint[f"{key} is given"] = value is not None  # the content is compared later
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
    """Digests of a model's weights: all trained values, and some of every frozen tensor."""
    return frozen_fingerprint(model) | trained_fingerprint(model)


def frozen_fingerprint(model: nn.Module) -> dict[str, str]:
    """`weight_fingerprint` of the frozen weights alone, without sharded ones."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    frozen += list(model.named_buffers())
    whole = [(name, tensor) for name, tensor in frozen if not hasattr(tensor, "device_mesh")]
    return {"frozen weights": _digest(whole, whole=False)}


def trained_fingerprint(model: nn.Module) -> dict[str, str]:
    """`weight_fingerprint` of the trained weights alone."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return {"trained weights": _digest(trained, whole=True)}


def _digest(tensors: list[tuple[str, Tensor]], *, whole: bool) -> str:
    """Of names, shapes and values, all or evenly spaced ones."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr([(name, tuple(t.shape)) for name, t in tensors]).encode())
    values = [tensor.flatten() for _, tensor in tensors]
    if not whole:
        values = [v[:: max(len(v) // _SAMPLED_VALUES, 1)][:_SAMPLED_VALUES] for v in values]
    if values:
        # One copy from the device for all of them.
        digest.update(torch.cat([v.float() for v in values]).cpu().numpy().tobytes())
    return digest.hexdigest()
