"""Where the weights of the bundled generator lie; `dragkit.tiny` made them."""

from __future__ import annotations

from pathlib import Path

from dragkit.errors import MissingInputError


def tiny_generator_path() -> Path:
    """Folder of the shipped generator, in the layout of any Hugging Face causal language model.

    Raises:
        MissingInputError: if the installation lacks the folder's files.
    """
    folder = Path(__file__).resolve().parents[1] / "tiny" / "model"
    missing = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise MissingInputError(
            f"{folder}: the shipped generator lacks {', '.join(missing)}; reinstall dragkit, or "
            f"make it again with: python -m dragkit.tiny.warmup --out {folder}"
        )
    return folder
