"""The fingerprints of a generator's files, which do not depend on their place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dragkit.generator.weight_files import weight_files

# What the tokenizers of transformers read.
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
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


def tokenizer_files_fingerprint(folder: Path) -> str:
    """Hashes names and bytes of a tokenizer's files.

    Args:
        folder: a model.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def generator_fingerprints(folder: Path) -> dict[str, str]:
    """The fingerprints of weights and tokenizer, by their keys in a checkpoint."""
    return {
        "generator": weights_fingerprint(folder),
        "tokenizer": tokenizer_files_fingerprint(folder),
    }
