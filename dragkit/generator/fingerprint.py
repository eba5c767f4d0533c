"""The fingerprint of a generator's weights, which does not depend on their place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dragkit.generator.weight_files import weight_files

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def weights_fingerprint(folder: Path) -> str:
    """Hashes names, sizes and evenly spaced samples of the weight files, and the configuration.

    Hashing all bytes of a 30B would take minutes. Every file is sampled at 64 places of 4 KiB, the
    first of which holds the names of its tensors.

    Args:
        folder: a model with safetensors files and config.json.
    """
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    # An index may name files in sub-folders.
    for path in sorted({*folder.glob("*.safetensors"), *weight_files(folder)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
