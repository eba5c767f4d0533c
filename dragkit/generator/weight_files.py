"""The files of a generator's folder: read far enough to know that they can be used."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dragkit.config.unique_keys import unique_keys
from dragkit.errors import ConfigError, MissingInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POINTER = b"version https://git-lfs.github.com/spec/"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_MAX_JSON_BYTES = 50_000_000
# What the configurations of transformers call the number of positions.
_POSITIONS = ("max_position_embeddings", "max_seq_len")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or all of its folder.

    Raises:
        MissingInputError: there are none, or the index cannot be read or names a file elsewhere.
    """
    index = folder / _INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = sorted({PurePath(name) for name in _read_json(index)["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MissingInputError(
                f"{index}: the list of the weight files cannot be read: {_problem(index, error)}. "
                f"{_again(folder)}"
            ) from error
        # Neither the size of the model nor its fingerprint would cover a file elsewhere.
        if elsewhere := [name for name in names if name.is_absolute() or ".." in name.parts]:
            raise MissingInputError(
                f"{index}: it names the weight file {elsewhere[0]}, which is not in the model's "
                f"folder. Move that file into {folder}, and correct the list."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingInputError(
            f"{folder}: this folder holds no weights: there is no *.safetensors file. "
            f"{_again(folder)} Older formats are converted by save_pretrained of transformers."
        )
    return files


def _read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError, RecursionError: it is no JSON, nested too deeply, or gives a key twice. Or it
            is longer than any such file.
    """
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {_MAX_JSON_BYTES:,} bytes")
    return json.loads(file.read_bytes(), object_pairs_hook=unique_keys)


def check_weight_files(folder: Path) -> None:
    """Opens every weight file of a model, without reading its tensors.

    Raises:
        MissingInputError: a file is missing, cut short, or the pointer of Git LFS to it. Or the
            folder holds an adapter, too.
    """
    from safetensors import SafetensorError, safe_open

    adapter = folder / _ADAPTER
    if adapter.exists():
        # The library would load this adapter, and the model that it names instead of this one.
        raise MissingInputError(
            f"{adapter}: the generator's folder holds a PEFT adapter beside the model. Merge the "
            "adapter into the weights with merge_and_unload of peft, or move it to another folder."
        )

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


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _problem(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            return "this is the pointer that a checkout without Git LFS leaves"
    return f"{first_line(error)} ({file.stat().st_size:,} bytes)"


def _again(folder: Path) -> str:
    return (
        f"Fetch the files of {folder} again (hf download, or git lfs pull), or name another model "
        "with --generator_model."
    )


def read_config(folder: Path) -> Any:
    """The model's configuration, a `PreTrainedConfig`.

    Raises:
        MissingInputError: it gives a key twice, or transformers cannot read it or does not know
            the family.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        # The library silently keeps the last value of a key that is given twice.
        _read_json(file)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # The checks of some two hundred families raise anything.
    except Exception as error:
        raise MissingInputError(
            f"{file}: the model's configuration cannot be used: {_problem(file, error)}. "
            f"{_again(folder)}"
        ) from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        MissingInputError: transformers cannot read it, or it lacks its vocabulary.
        ConfigError: it has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The readers of several libraries raise anything, also a bare Exception.
    except Exception as error:
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
        file = next((f for f in files if f.is_file()), folder)
        problem = _problem(file, error) if file.is_file() else first_line(error)
        raise MissingInputError(
            f"{file}: the tokenizer cannot be read: {problem}. {_again(folder)}"
        ) from error
    # Where files are missing, the library makes tokenizers of some families without a vocabulary.
    ids = tokenizer(["one two", "six ten"], add_special_tokens=False)["input_ids"]
    if ids[0] == ids[1]:
        raise MissingInputError(
            f"{folder}: the tokenizer tells no texts apart, so its vocabulary is missing. "
            f"{_again(folder)}"
        )
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
