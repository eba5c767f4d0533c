"""The language model on neural prompts, and its loss at the supervised tokens alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.model.nemotron_h import computes, hidden_at_rows
from dragkit.model.prompt import NeuralPrompt, PromptTemplate

_LOGIT_ROWS = 4096


class GeneratorOutput(NamedTuple):
    """Loss of one pass: float32 [] summed over target tokens, and how many of them were right."""

    loss_sum: Tensor
    num_correct: Tensor


class Generator(nn.Module):
    """A causal language model that reads neural prompts.

    Args:
        model: a Hugging Face causal LM, with its adapters if any.
        tokenizer: of that model.
    """

    def __init__(self, model: nn.Module, tokenizer: object) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)  # type: ignore[attr-defined]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # In lists, so that the modules are not registered a second time.
        self._decoder = [base.base_model, base.get_output_embeddings()]
        self._computed_here = computes(base.config)
        self._embedding = [base.get_input_embeddings()]

    @property
    def dim(self) -> int:
        """Width M of the token embeddings."""
        return self._embedding[0].weight.shape[1]

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA layers are in the model."""
        return hasattr(self.model, "peft_config")

    def save_adapters(self, folder: Path) -> None:
        """Writes the adapters in PEFT's layout, as `PeftModel.from_pretrained` reads it."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors under PEFT's file names, sharing memory with the model."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)

    @property
    def begin(self) -> list[int]:
        """Tokens in front of every prompt."""
        bos = self.tokenizer.bos_token_id  # type: ignore[attr-defined]
        return [] if bos is None else [int(bos)]

    def prompt_key(self) -> str:
        """Names everything that token rows depend on: the tokeniser and the prompt's texts."""
        probe = PromptTemplate()
        texts = [probe.prefix("?"), probe.fact("a", "b", "c"), probe.cue, probe.target(["x", "y"])]
        digest = hashlib.blake2b(digest_size=16)
        vocabulary = sorted(self.tokenizer.get_vocab().items())  # type: ignore[attr-defined]
        digest.update(repr((texts, self.tokenize(texts), vocabulary)).encode())
        return digest.hexdigest()

    def embedding_rms(self) -> float:
        """Root mean square of the token embeddings."""
        weight = self._embedding[0].weight.detach().float()
        return float(weight.pow(2).mean().sqrt())

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[operator]

    def embed(
        self, prompt: NeuralPrompt, vectors: Tensor | None, *, left: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompts in a padded batch.

        Args:
            prompt: packed prompts; vectors: float [S, M] structural vectors that `slot` points at.
            left: pad on the left (generation) instead of the right (training).

        Returns:
            float [B, L, M] and the attention mask, int64 [B, L].
        """
        batch = prompt.length.shape[0]
        width = int(prompt.length.max()) if batch else 0
        column = prompt.position
        if left:
            column = column + (width - prompt.length)[prompt.question]
        place = prompt.question * width + column
        packed = self._embedding[0](prompt.input_ids)
        if vectors is not None:
            slotted = (prompt.slot >= 0).nonzero().squeeze(1)
            rows = vectors[prompt.slot[slotted]].to(packed.dtype)
            packed = packed.index_copy(0, slotted, rows)
        padded = packed.new_zeros(batch * width, packed.shape[1]).index_copy(0, place, packed)
        mask = torch.zeros(batch * width, dtype=torch.int64, device=packed.device)
        mask[place] = 1
        return padded.view(batch, width, -1), mask.view(batch, width)

    def forward(
        self, prompt: NeuralPrompt, vectors: Tensor | None, eos_weight: float = 1.0
    ) -> GeneratorOutput:
        """Cross-entropy at the answer and end tokens; logits exist at those rows only.

        Args:
            prompt: with targets; vectors: float [S, M]; eos_weight: weight of the end tokens.

        Returns:
            Sums over the target tokens.
        """
        embeds, _ = self.embed(prompt, vectors, left=False)
        decoder, head = self._decoder
        row, place = prompt.question[prompt.target_row], prompt.position[prompt.target_row]
        if self._computed_here and embeds.device.type == "cpu":
            hidden = hidden_at_rows(decoder, embeds, row, place)
        else:
            # Every layer is causal, so padding on the right reaches no real token: no mask is
            # needed, and without one attention takes its fastest path.
            hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[row, place]
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for rows, ids in zip(
            hidden.split(_LOGIT_ROWS), prompt.target_id.split(_LOGIT_ROWS), strict=True
        ):
            logits = head(rows).float()
            each = F.cross_entropy(logits, ids, reduction="none")
            weight = torch.where(ids == self.eos_token_id, eos_weight, 1.0)
            loss = loss + (each * weight).sum()
            correct = correct + (logits.argmax(-1) == ids).sum()
        return GeneratorOutput(loss, correct)
