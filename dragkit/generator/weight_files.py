"""The files of a generator's folder: read far enough to know that they can be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragkit.errors import ConfigError, MissingInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POINTER = b"version https://git-lfs.github.com/spec/"
_INDEX = "model.safetensors.index.json"
# What the configurations of transformers call the number of positions.
_POSITIONS = ("max_position_embeddings", "max_seq_len")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or all of its folder.

    Raises:
        MissingInputError: there are none, or the index cannot be read.
    """
    index = folder / _INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MissingInputError(
                f"{index}: the list of the weight files cannot be read: {_problem(index, error)}. "
                f"{_again(folder)}"
            ) from error
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingInputError(
            f"{folder}: this folder holds no weights: there is no *.safetensors file. "
            f"{_again(folder)} Older formats are converted by save_pretrained of transformers."
        )
    return files


def check_weight_files(folder: Path) -> None:
    """Opens every weight file of a model, without reading its tensors.

    Raises:
        MissingInputError: a file is missing, cut short, or the pointer of Git LFS to it.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        if not file.is_file():
            raise MissingInputError(f"{file}: this weight file is missing. {_again(folder)}")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise MissingInputError(
                f"{file}: the weights cannot be read: {_problem(file, error)}. {_again(folder)}"
            ) from error


def _problem(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            return "this is the pointer that a checkout without Git LFS leaves"
    return f"{str(error).splitlines()[0]} ({file.stat().st_size:,} bytes)"


def _again(folder: Path) -> str:
    return (
        f"Fetch the files of {folder} again (hf download, or git lfs pull), or name another model "
        "with --generator_model."
    )


def read_config(folder: Path) -> Any:
    """The model's configuration, a `PreTrainedConfig`.

    Raises:
        MissingInputError: transformers cannot read it, or does not know the family.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # The checks of some two hundred families raise anything.
    except Exception as error:
        file = folder / "config.json"
        raise MissingInputError(
            f"{file}: the model's configuration cannot be used: {_problem(file, error)}. "
            f"{_again(folder)}"
        ) from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        MissingInputError: transformers cannot read it.
        ConfigError: it has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The readers of several libraries raise anything, also a bare Exception.
    except Exception as error:
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        file = next((f for f in files if f.is_file()), folder)
        problem = _problem(file, error) if file.is_file() else str(error).splitlines()[0]
        raise MissingInputError(
            f"{file}: the tokenizer cannot be read: {problem}. {_again(folder)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{folder}: the tokenizer has no end token, and training needs one. Name another model "
            "with --generator_model."
        )
    return tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """Checks that every token that a prompt can hold has a row in the embedding table.

    Args:
        tokenizer: the model's tokenizer.
        rows: rows of the embedding table.
        folder: the model's folder, for messages.

    Raises:
        MissingInputError: a token has none. Control tokens other than begin and end are in no
            prompt, so they may lack one.
    """
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    control -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    beyond = [f"{t!r} ({i})" for t, i in vocabulary if i >= rows and i not in control]
    if beyond:
        raise MissingInputError(
            f"{folder}: the tokenizer knows {len(beyond)} tokens for which the embedding table of "
            f"{rows} rows has none: {', '.join(beyond[:3])}. Give the table more rows with "
            "resize_token_embeddings of transformers, or use the tokenizer that the model was "
            "trained with."
        )


def num_positions(config: Any) -> int | None:
    """Number of tokens that a model was made for, or None where nothing bounds it.

    Args:
        config: the model's configuration.
    """
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((int(n) for n in found if n), None)
