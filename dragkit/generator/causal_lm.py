"""A causal language model of transformers on packed prompts, run by its own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dragkit.generator.prompt import NeuralPrompt


class CausalLM:
    """Runs the model's own forward and its own `generate`, over batches of padded token ids.

    A family may scale its embeddings, its logits, or both, and may read the ids elsewhere. So the
    model gets ids, its first lookup gives the embeddings of the neural prompt, and its head reads
    the supervised tokens alone.

    Args:
        model: a causal LM of transformers, with LoRA layers or without.
        eos_token_id: token that ends an answer, and that fills up answers that end early.

    Attributes:
        decodes_alone: decode one prompt at a time, since the answers of this model depend on the
            other prompts of the batch, or on padding that the attention mask excludes.
    """

    def __init__(self, model: nn.Module, eos_token_id: int) -> None:
        from transformers import GenerationConfig

        self.model = model
        self.decodes_alone = False
        self._eos_token_id = eos_token_id
        # `generate` fills what a call leaves open with the model's settings, which come from the
        # file generation_config.json beside the weights: penalties, or answers as dictionaries.
        self.model.generation_config = GenerationConfig()

    @contextmanager
    def _looked_up(self, embeds: Tensor) -> Iterator[None]:
        """The next lookup of input embeddings gives `embeds`, float [B, W, M]."""

        def replace(*_: object) -> Tensor:
            handle.remove()
            return embeds

        handle = self.model.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def target_logits(self, embeds: Tensor, prompt: NeuralPrompt) -> Tensor:
        """Logits at the supervised tokens, float [A, V], in the order of `prompt.target_row`.

        Args:
            embeds: float [L, M] embeddings of the packed tokens.
            prompt: the packed prompts.
        """
        ids, padded, _ = pad(embeds, prompt, left=False)
        row = prompt.question[prompt.target_row], prompt.position[prompt.target_row]

        def at_targets(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0][row].unsqueeze(0), *inputs[1:])

        # Only the supervised tokens need logits, and whatever the family does to these.
        handle = self.model.get_output_embeddings().register_forward_pre_hook(at_targets)
        try:
            with self._looked_up(padded):
                # No mask: every layer is causal, so padding on the right reaches no real token, and
                # attention without a mask takes its fastest path.
                logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits.flatten(0, 1)

    def greedy_tokens(
        self, embeds: Tensor, prompt: NeuralPrompt, max_new_tokens: int, *, synced_ranks: bool
    ) -> list[list[int]]:
        """Greedy continuations, each up to its end token or `max_new_tokens`, in order.

        Args:
            embeds: float [L, M] embeddings of the packed tokens.
            prompt: the packed prompts.
            max_new_tokens: bound on each continuation.
            synced_ranks: whether all ranks step until the last one is done.
        """
        ids, padded, mask = pad(embeds, prompt, left=True)
        if not self.decodes_alone:
            output = self.generate(ids, padded, mask, max_new_tokens, synced_gpus=synced_ranks)
            return output.sequences[:, ids.shape[1] :].tolist()
        continued = []
        for row, length in enumerate(prompt.length.tolist()):
            # Without the padding on its left.
            batch = (x[row : row + 1, -length:] for x in (ids, padded, mask))
            output = self.generate(*batch, max_new_tokens)
            continued.append(output.sequences[0, length:].tolist())
        return continued

    def generate(
        self, ids: Tensor, embeds: Tensor, mask: Tensor, max_new_tokens: int, **options: bool
    ) -> Any:
        """Greedy decoding by transformers' `generate`.

        Args:
            ids: int64 [B, W], padded on the left.
            embeds: float [B, W, M] what the first lookup gives.
            mask: int64 [B, W] attention mask.
            max_new_tokens: bound on each continuation.
            options: further options of `generate`.

        Returns:
            transformers' `GenerateDecoderOnlyOutput`. Its `sequences` begin with `ids`.
        """
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self._eos_token_id,
            pad_token_id=self._eos_token_id,
            return_dict_in_generate=True,
            output_logits=options.pop("output_logits", False),
        )
        with self._looked_up(embeds):
            return self.model.generate(
                ids, attention_mask=mask, generation_config=settings, **options
            )


def pad(embeds: Tensor, prompt: NeuralPrompt, *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens as a padded batch.

    Args:
        embeds: float [L, M].
        prompt: the packed prompts.
        left: pad on the left (generation) instead of the right (training).

    Returns:
        Token ids, int64 [B, W], embeddings, float [B, W, M], and the attention mask, int64 [B, W].
        Padding is token 0 with an embedding of zeros.
    """
    batch, width = prompt.length.shape[0], prompt.longest
    # On the left, prompts of different lengths end in the same column.
    column = prompt.position
    if left:
        column = column + (width - prompt.length)[prompt.question]
    index = prompt.question * width + column
    padded = embeds.new_zeros(batch * width, embeds.shape[1]).index_copy(0, index, embeds)
    mask = torch.zeros(batch * width, dtype=torch.int64, device=embeds.device)
    mask[index] = 1
    ids = torch.zeros_like(mask).index_copy(0, index, prompt.input_ids.long())
    return ids.view(batch, width), padded.view(batch, width, -1), mask.view(batch, width)
