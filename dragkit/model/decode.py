"""Greedy decoding from input embeddings with the model's own key-value and state cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dragkit.model.generator import Generator
from dragkit.model.prompt import NeuralPrompt


@torch.no_grad()
def greedy_decode(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
) -> list[str]:
    """The generator's continuations, one text per prompt.

    Prompts are padded on the left, the side on which neither the attention nor the state-space
    layers of a cached model see the padding.

    Args:
        generator: the model; prompt: without targets; vectors: float [S, M] or None.
        max_new_tokens: bound on each answer.

    Returns:
        Texts without the end token, stripped.
    """
    if prompt.length.numel() == 0:
        return []
    embeds, mask = generator.embed(prompt, vectors, left=True)
    tokens = generator.model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=generator.eos_token_id,
        pad_token_id=generator.eos_token_id,
    )
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
    return [text.strip() for text in texts]
