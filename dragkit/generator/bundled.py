"""Folder of the bundled generator, whose weights `dragkit.tiny` has trained."""

from __future__ import annotations

from pathlib import Path

from dragkit.errors import MissingInputError

_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def tiny_generator_path() -> Path:
    """Folder of the bundled generator, in the layout of a Hugging Face causal language model.

    Raises:
        MissingInputError: the installation lacks a file of it.
    """
    folder = Path(__file__).resolve().parents[1] / "tiny" / "model"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise MissingInputError(
            f"{folder}: the bundled generator lacks {', '.join(missing)}. Reinstall dragkit, or "
            f"train it again with: python -m dragkit.tiny.warmup --out {folder}"
        )
    return folder
