"""The language model on neural prompts, and its loss at the supervised tokens alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.generator.nemotron_h import (
    ACTIVATION_CHECKPOINTING,
    CompiledBlocks,
    Pack,
    block_forward,
    decode_step,
    hidden_at_rows,
    is_supported,
    mamba_ops,
    pad_to_multiple,
    prefill_in_microbatches,
)
from dragkit.generator.prompt import NeuralPrompt, PromptTemplate
from dragkit_kernels import prompt_embeddings

logger = logging.getLogger(__name__)

# Rows of logits that exist at the same time.
LOGIT_ROWS = 4096


class PassCoordinator(Protocol):
    """Keeps ranks that gather weights together at equally many passes (`distributed.sharding`)."""

    def all_reduce_max(self, number: int) -> int:
        """The largest of a number over these ranks; each of them must call it."""
        ...

    def run_dummy_passes(self, *, vectors: bool) -> None:
        """Runs passes that change nothing until no rank announces another."""
        ...


class GeneratorOutput(NamedTuple):
    """Loss of one pass: float32 [] summed over target tokens, and how many of them were right."""

    loss_sum: Tensor
    num_correct: Tensor


class Generator(nn.Module):
    """A causal language model that reads neural prompts.

    A Nemotron-H runs over packs, prompts end to end, by our own forward
    (`dragkit.generator.nemotron_h`); other models by their own, in batches padded on the right.

    Args:
        model: a Hugging Face causal LM, with its adapters if any.
        tokenizer: of that model.
        mamba_backend: who computes Mamba-2 layers, see `GeneratorConfig.mamba_backend`.
        pad_to_multiple_of: packs are padded to a multiple of so many tokens; None is 256 on a GPU,
            where
            few sizes save compiled graphs, and 1 elsewhere.
        activation_checkpointing: which blocks of a Nemotron-H are recomputed in the backward, see
            `GeneratorConfig.activation_checkpointing`; here "auto" is "none".
        max_tokens_per_microbatch: see `GeneratorConfig`; None is no limit.

    Attributes:
        lockstep: with the ranks that share the weights; None where this one has all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        *,
        mamba_backend: str = "dragkit",
        pad_to_multiple_of: int | None = None,
        activation_checkpointing: str = "none",
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = (
            "none" if activation_checkpointing == "auto" else activation_checkpointing
        )
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)  # type: ignore[attr-defined]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # In lists, so that the modules are not registered a second time.
        self._decoder = [base.base_model, base.get_output_embeddings()]
        self._embedding = [base.get_input_embeddings()]
        self._mamba = mamba_ops(mamba_backend) if is_supported(base.config) else None
        self._foreign = ("linear_attention",) if mamba_backend == "mamba_ssm" else ()
        self._block_fn = block_forward
        self._pad_to_multiple_of = pad_to_multiple_of
        self.pass_coordinator: PassCoordinator | None = None

    @property
    def dim(self) -> int:
        """Width M of the token embeddings."""
        return self._embedding[0].weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are."""
        return self._embedding[0].weight.device

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
    def bos_ids(self) -> list[int]:
        """Tokens in front of every prompt."""
        bos = self.tokenizer.bos_token_id  # type: ignore[attr-defined]
        return [] if bos is None else [int(bos)]

    def tokenizer_fingerprint(self) -> str:
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

    def compile_blocks(self) -> None:
        """Compiles the blocks of a Nemotron-H for training; other models run as they stand."""
        if self._mamba is None:
            logger.info("the generator is not compiled: it is not a Nemotron-H")
            return
        self._block_fn = CompiledBlocks(self._decoder[0], self._foreign)
        for kind in self._foreign:
            logger.info("blocks of kind %s are not compiled: their kernels are foreign", kind)

    def embed(self, prompt: NeuralPrompt, vectors: Tensor | None) -> Tensor:
        """Embeddings of packed prompts.

        Args:
            prompt: packed prompts; vectors: float [S, M] structural vectors that `slot` points at.

        Returns:
            float [L, M].
        """
        embedding, ids = self._embedding[0], prompt.input_ids.int()
        if vectors is None:
            return embedding(ids)
        table = embedding.weight
        if type(embedding) is not nn.Embedding:  # some scale what they look up
            table = embedding(ids)
            ids = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        return prompt_embeddings(table, ids, vectors, prompt.slot.int())

    def pad(self, embeds: Tensor, prompt: NeuralPrompt, *, left: bool) -> tuple[Tensor, Tensor]:
        """The same as a batch, for models that run in batches.

        Args:
            embeds: float [L, M] of `embed`; prompt: theirs.
            left: pad on the left (generation) instead of the right (training).

        Returns:
            float [B, W, M] and the attention mask, int64 [B, W].
        """
        batch, width = prompt.length.shape[0], prompt.longest
        column = prompt.position
        if left:
            column = column + (width - prompt.length)[prompt.question]
        place = prompt.question * width + column
        padded = embeds.new_zeros(batch * width, embeds.shape[1]).index_copy(0, place, embeds)
        mask = torch.zeros(batch * width, dtype=torch.int64, device=embeds.device)
        mask[place] = 1
        return padded.view(batch, width, -1), mask.view(batch, width)

    def _hidden_at_targets(self, embeds: Tensor, prompt: NeuralPrompt) -> Tensor:
        decoder, rows = self._decoder[0], prompt.target_row
        if self._mamba is not None:
            multiple = self._pad_to_multiple_of or (256 if embeds.is_cuda else 1)
            pack = Pack(prompt.position.int(), prompt.question, prompt.ptr, prompt.longest)
            embeds, pack = pad_to_multiple(embeds, pack, multiple)
            again = ACTIVATION_CHECKPOINTING[self.activation_checkpointing]
            return hidden_at_rows(decoder, embeds, pack, rows, self._mamba, again, self._block_fn)
        # Every layer is causal, so padding on the right reaches no real token: no mask is needed,
        # and without one attention takes its fastest path.
        padded, _ = self.pad(embeds, prompt, left=False)
        hidden = decoder(inputs_embeds=padded, use_cache=False).last_hidden_state
        return hidden[prompt.question[rows], prompt.position[rows]]

    def forward(
        self, prompt: NeuralPrompt, vectors: Tensor | None, eos_weight: float = 1.0
    ) -> GeneratorOutput:
        """Cross-entropy at the answer and end tokens; logits exist at those rows only.

        Args:
            prompt: with targets; vectors: float [S, M]; eos_weight: weight of the end tokens.

        Returns:
            Sums over the target tokens.
        """
        hidden = self._hidden_at_targets(self.embed(prompt, vectors), prompt)
        head = self._decoder[1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for rows, ids in zip(
            hidden.split(LOGIT_ROWS), prompt.target_id.split(LOGIT_ROWS), strict=True
        ):
            logits = head(rows).float()
            each = F.cross_entropy(logits, ids, reduction="none")
            weight = torch.where(ids == self.eos_token_id, eos_weight, 1.0)
            loss = loss + (each * weight).sum()
            correct = correct + (logits.argmax(-1) == ids).sum()
        return GeneratorOutput(loss, correct)

    def run_dummy_passes(self, *, vectors: bool = False) -> None:
        """Called behind the last pass of a kind; waits for ranks that share the weights with this.

        It takes part in what they gather, in passes that change nothing: training passes where
        gradients are enabled, else continuations.

        Args:
            vectors: training passes of this run have structural vectors.
        """
        if self.pass_coordinator is not None:
            self.pass_coordinator.run_dummy_passes(vectors=vectors)

    @torch.no_grad()
    def greedy_tokens(
        self, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
    ) -> list[list[int]]:
        """The most likely continuation of every prompt, token by token, without its end token.

        Args:
            prompt: without targets, at least one; vectors: float [S, M] or None.
            max_new_tokens: bound on each.
        """
        embeds = self.embed(prompt, vectors)
        if self._mamba is None:
            rows = self._generate(embeds, prompt, max_new_tokens)
        else:
            rows = self._decode(embeds, prompt, max_new_tokens)
        cut = [row + [self.eos_token_id] for row in rows]
        return [row[: row.index(self.eos_token_id)] for row in cut]

    def _generate(self, embeds: Tensor, prompt: NeuralPrompt, limit: int) -> list[list[int]]:
        # On the left neither attention nor a state sees the padding of a cached model.
        padded, mask = self.pad(embeds, prompt, left=True)
        return self.model.generate(
            inputs_embeds=padded,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.eos_token_id,
            synced_gpus=self.pass_coordinator is not None,
        ).tolist()

    def _decode(self, embeds: Tensor, prompt: NeuralPrompt, limit: int) -> list[list[int]]:
        decoder, head = self._decoder
        hidden, states = prefill_in_microbatches(
            decoder,
            embeds,
            prompt.length,
            self._mamba,
            max_new_tokens=limit,
            tokens=self.max_tokens_per_microbatch,
            all_reduce_max=None
            if self.pass_coordinator is None
            else self.pass_coordinator.all_reduce_max,
        )
        produced = []
        going = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        for _ in range(limit):
            token = head(hidden).float().argmax(-1)
            produced.append(token)
            going = going & (token != self.eos_token_id)
            if len(produced) == limit:
                break
            more = int(going.any())
            if self.pass_coordinator is not None:
                more = self.pass_coordinator.all_reduce_max(more)
            if not more:
                break
            hidden = decode_step(decoder, self._embedding[0](token), states)
        return torch.stack(produced, 1).tolist()
