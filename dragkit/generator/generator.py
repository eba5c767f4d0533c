"""The language model on neural prompts: its loss at the supervised tokens, and greedy decoding."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.errors import ConfigError
from dragkit.generator.causal_lm import CausalLM
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
from dragkit.generator.plain_text import answer_texts, plain_tokens, tokenizer_fingerprint
from dragkit.generator.prompt import NeuralPrompt
from dragkit_kernels import prompt_embeddings, segment_sum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Rows of logits that are alive at the same time: 2 GiB in float32 at a vocabulary of 131072.
LOGIT_ROWS = 4096


class PassCoordinator(Protocol):
    """Makes ranks that gather weights together run equally many passes (`UnevenPasses`)."""

    def announce_pass(self, max_new_tokens: int = 1) -> None:
        """Announces to the other ranks a pass of this rank, or the decoding of a batch."""
        ...

    def all_reduce_max(self, number: int) -> int:
        """Returns the largest number of these ranks. Each of them must call it."""
        ...

    def run_dummy_passes(self, *, vectors: bool) -> None:
        """Runs passes without effect until no rank announces another."""
        ...


class GeneratorOutput(NamedTuple):
    """Sums over the target tokens of one pass.

    Attributes:
        loss_sum: float32 [] cross-entropy in nats.
        prompt_loss: float32 [G] the part of each prompt, detached.
        num_correct: int64 [] tokens that are the argmax.
    """

    loss_sum: Tensor
    prompt_loss: Tensor
    num_correct: Tensor


class Generator(nn.Module):
    """A causal language model that reads neural prompts.

    A Nemotron-H runs over packs by our own forward (`dragkit.generator.nemotron_h`). Other models
    run their own forward over padded batches (`dragkit.generator.causal_lm`).

    Args:
        model: a Hugging Face causal LM, with or without adapters.
        tokenizer: the tokenizer of that model.
        mamba_backend: see `GeneratorConfig.mamba_backend`.
        pad_to_multiple_of: packs are padded to a multiple of this many tokens. None is 256 on a
            GPU and 1 elsewhere.
        activation_checkpointing: see `GeneratorConfig.activation_checkpointing`. Here "auto" is
            "none".
        max_tokens_per_microbatch: bound on the tokens of a prefill. None reads all prompts at once.

    Attributes:
        causal_lm: the model's own forward. A Nemotron-H takes it for comparison alone.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mamba_backend: str = "dragkit",
        pad_to_multiple_of: int | None = None,
        activation_checkpointing: str = "none",
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        super().__init__()
        policy = "none" if activation_checkpointing == "auto" else activation_checkpointing
        self._checkpointed = ACTIVATION_CHECKPOINTING[policy]
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._mamba = mamba_ops(mamba_backend) if is_supported(base.config) else None
        # Lists, and an object that is no module, keep nn.Module from registering these modules a
        # second time.
        self._embedding = [base.get_input_embeddings()]
        if self._mamba is not None:
            self._decoder = [base.base_model, base.get_output_embeddings()]
        self.causal_lm = CausalLM(base, self.eos_token_id)
        # The kernels of mamba-ssm cannot be traced.
        self._uncompiled = ("linear_attention",) if mamba_backend == "mamba_ssm" else ()
        self._block_fn = block_forward
        self._pad_to_multiple_of = pad_to_multiple_of
        self._passes: PassCoordinator | None = None

    @property
    def dim(self) -> int:
        """Width M of the token embeddings."""
        return self._embedding[0].weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the token embeddings."""
        return self._embedding[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token embeddings."""
        return self._embedding[0].weight.dtype

    @property
    def is_packed(self) -> bool:
        """Whether the model runs over packs, whose tokens can have gates."""
        return self._mamba is not None

    @property
    def has_adapters(self) -> bool:
        """Whether the model has LoRA layers."""
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
        """Tokens before every prompt: the tokenizer's begin token, or none."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [int(bos)]

    def tokenizer_fingerprint(self) -> str:
        """Digest of all that token rows depend on, see `plain_text.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    def embedding_rms(self) -> float:
        """Root mean square of the token embeddings, as the embedding layer gives them."""
        embedding = self._embedding[0]
        rows = embedding.weight.detach()
        # A subclass may scale the rows of its table.
        if type(embedding) is not nn.Embedding:
            with torch.no_grad():
                rows = embedding(torch.arange(len(rows), device=rows.device))
        return float(rows.float().pow(2).mean().sqrt())

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, see `plain_tokens`."""
        return plain_tokens(self.tokenizer, texts)

    def compile_blocks(self) -> None:
        """Compiles the blocks of a Nemotron-H for training. Other models are not compiled."""
        if self._mamba is None:
            logger.info("the generator is not compiled, because it is not a Nemotron-H")
            return
        self._block_fn = CompiledBlocks(self._decoder[0], self._uncompiled)
        for block_type in self._uncompiled:
            logger.info("%s blocks are not compiled: mamba_ssm cannot be traced", block_type)

    def coordinate_passes(self, passes: PassCoordinator) -> None:
        """Announces every pass to the other ranks from now on.

        Call it after FSDP has wrapped the generator: the announcement must come before FSDP's
        all-gather, so its hook is put in front of FSDP's.

        Raises:
            ConfigError: the model decodes one prompt at a time, and ranks have different numbers.
        """
        if self.causal_lm.decodes_alone:
            raise ConfigError(
                "run.generator_fsdp: the generator decodes one prompt at a time, because its "
                "answers depend on the batch, so ranks cannot decode together. Use --set "
                "run.generator_fsdp=false."
            )
        self._passes = passes
        self.register_forward_pre_hook(lambda *_: passes.announce_pass(), prepend=True)

    def run_dummy_passes(self, *, vectors: bool = False) -> None:
        """Takes part in the all-gathers of ranks that still have passes to run.

        Call it after the last pass of a step or of a validation. The passes are training passes
        where gradients are enabled, and decoding otherwise. They change nothing.

        Args:
            vectors: whether the training passes of this run have structural vectors.
        """
        if self._passes is not None:
            self._passes.run_dummy_passes(vectors=vectors)

    def embed(self, prompt: NeuralPrompt, vectors: Tensor | None) -> Tensor:
        """Embeddings of packed prompts, float [L, M].

        Args:
            prompt: packed prompts.
            vectors: float [S, M] structural vectors of their slots.
        """
        embedding, ids = self._embedding[0], prompt.input_ids.int()
        if vectors is None:
            return embedding(ids)
        table = embedding.weight
        # A subclass may scale its embeddings, so its forward looks them up and gives the table.
        if type(embedding) is not nn.Embedding:
            table = embedding(ids)
            ids = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        return prompt_embeddings(table, ids, vectors, prompt.slot.int())

    def target_logits(self, prompt: NeuralPrompt, vectors: Tensor | None) -> Iterator[Tensor]:
        """Logits at the target tokens, float [<= `LOGIT_ROWS`, V] at a time, in their order.

        Args:
            prompt: packed prompts with targets.
            vectors: float [S, M] or None.
        """
        embeds = self.embed(prompt, vectors)
        if self._mamba is None:
            return iter(self.causal_lm.target_logits(embeds, prompt).split(LOGIT_ROWS))
        multiple = self._pad_to_multiple_of or (256 if embeds.is_cuda else 1)
        sizes = prompt.position.int(), prompt.question, prompt.ptr, prompt.longest
        embeds, pack = pad_to_multiple(embeds, Pack(*sizes, prompt.gate), multiple)
        decoder, head = self._decoder
        hidden = hidden_at_rows(
            decoder,
            embeds,
            pack,
            prompt.target_row,
            self._mamba,
            self._checkpointed,
            self._block_fn,
        )
        return (head(rows) for rows in hidden.split(LOGIT_ROWS))

    def forward(
        self, prompt: NeuralPrompt, vectors: Tensor | None, eos_weight: float = 1.0
    ) -> GeneratorOutput:
        """Cross-entropy at the answer and end tokens. Only these tokens get logits.

        Args:
            prompt: packed prompts with targets.
            vectors: float [S, M] or None.
            eos_weight: weight of the end tokens in the loss.
        """
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        token_losses = []
        logits_by_chunk = self.target_logits(prompt, vectors)
        for chunk, ids in zip(logits_by_chunk, prompt.target_id.split(LOGIT_ROWS), strict=True):
            # In half precision, the sum over the vocabulary would round small terms away.
            logits = chunk.float()
            token_loss = F.cross_entropy(logits, ids, reduction="none")
            token_loss = token_loss * torch.where(ids == self.eos_token_id, eos_weight, 1.0)
            token_losses.append(token_loss.detach())
            loss = loss + token_loss.sum()
            correct = correct + (logits.argmax(-1) == ids).sum()
        prompt_loss = segment_sum(
            torch.cat(token_losses).unsqueeze(1),
            prompt.question[prompt.target_row].int(),
            len(prompt.ptr) - 1,
        )
        return GeneratorOutput(loss, prompt_loss.squeeze(1), correct)

    def greedy_tokens(
        self, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, without its end token.

        Args:
            prompt: at least one prompt, without targets.
            vectors: float [S, M] or None.
            max_new_tokens: bound on each continuation.
        """
        if self._passes is not None:
            self._passes.announce_pass(max_new_tokens)
        return self.unannounced_greedy_tokens(prompt, vectors, max_new_tokens)

    @torch.no_grad()
    def unannounced_greedy_tokens(
        self, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
    ) -> list[list[int]]:
        """`greedy_tokens` after its announcement. FSDP gathers weights before this call."""
        embeds = self.embed(prompt, vectors)
        if self._mamba is None:
            synced = self._passes is not None
            tokens = self.causal_lm.greedy_tokens(
                embeds, prompt, max_new_tokens, synced_ranks=synced
            )
        else:
            tokens = self._decode(embeds, prompt, max_new_tokens)
        # A prompt that ends early is still decoded in its batch, so cut after its end token.
        ended = [row + [self.eos_token_id] for row in tokens]
        return [row[: row.index(self.eos_token_id)] for row in ended]

    def greedy_texts(
        self, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
    ) -> list[str]:
        """`greedy_tokens` as stripped texts. Without prompts the list is empty."""
        if len(prompt.ptr) == 1:
            return []
        tokens = self.greedy_tokens(prompt, vectors, max_new_tokens)
        return answer_texts(self.tokenizer, tokens)

    def _decode(self, embeds: Tensor, prompt: NeuralPrompt, limit: int) -> list[list[int]]:
        decoder, head = self._decoder
        hidden, states = prefill_in_microbatches(
            decoder,
            embeds,
            prompt.length,
            self._mamba,
            max_new_tokens=limit,
            max_tokens=self.max_tokens_per_microbatch,
            all_reduce_max=None if self._passes is None else self._passes.all_reduce_max,
        )
        tokens = []
        unfinished = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        for _ in range(limit):
            token = head(hidden).float().argmax(-1)
            tokens.append(token)
            unfinished = unfinished & (token != self.eos_token_id)
            if len(tokens) == limit:
                break
            # The host waits here only: without it, all prompts would run to the limit.
            go_on = int(unfinished.any())
            # Every rank steps until the last one is done: a step gathers weights.
            if self._passes is not None:
                go_on = self._passes.all_reduce_max(go_on)
            if not go_on:
                break
            hidden = decode_step(decoder, self._embedding[0](token), states)
        return torch.stack(tokens, 1).tolist()
