"""Greedy answers of the generator as text."""

from __future__ import annotations

from torch import Tensor

from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt


def greedy_decode(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
) -> list[str]:
    """The generator's continuations, one text per prompt.

    Args:
        generator: the model; prompt: without targets; vectors: float [S, M] or None.
        max_new_tokens: bound on each answer.

    Returns:
        Texts without the end token, stripped.
    """
    if len(prompt.ptr) == 1:
        return []
    tokens = generator.greedy_tokens(prompt, vectors, max_new_tokens)
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
    return [text.strip() for text in texts]
