"""Logistic noise from a counter: the same for a fact whatever batch or device it is drawn on.

Philox4x32-10 (Salmon et al. 2011) turns 128 counter bits and 64 key bits into four random words.
The counter of a fact is (its index within its question, low word of the question's key, high word
of the key, 0), the two keys are the low and high words of the seed, and output word 0 is used:
`tl.philox(seed, fact, key_low, key_high, 0)[0]` in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_shape
from .segments import segment_ids

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32 block function on broadcastable tensors.

    Args:
        counter: four int64 tensors holding 32-bit words.
        key: two int64 tensors holding 32-bit words.
        rounds: 10 for the standard generator.

    Returns:
        Four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # 64-bit products wrap, which keeps all bits: the mask undoes the arithmetic shift.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((b >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def logistic(word: Tensor) -> Tensor:
    """log u - log(1 - u) of u = (word >> 9 + 1/2) 2^-23: int64 32-bit words to finite float32.

    u is never 0 or 1, and both u and 1 - u are exact in float32.
    """
    u = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return torch.log(u) - torch.log(1.0 - u)


def logistic_noise(
    seed: Tensor, question_key: Tensor, fact_ptr: Tensor, *, num_facts: int | None = None
) -> Tensor:
    """One standard logistic variate per fact, from the counter and keys of the module's head.

    Args:
        seed: int64 [] (a tensor, so that a captured CUDA graph can be replayed with another seed).
        question_key: int64 [B], one number per question, independent of the batch.
        fact_ptr: int [B+1] first fact of each question.
        num_facts: E; without it the last offset is read back, which waits for the device.

    Returns:
        float32 [E].

    Raises:
        ValueError: sizes or dtypes do not fit.
    """
    check_shape("logistic_noise", "seed", seed, ())
    check_shape("logistic_noise", "question_key", question_key, (fact_ptr.shape[0] - 1,))
    if seed.dtype != torch.int64 or question_key.dtype != torch.int64:
        raise ValueError(
            "logistic_noise: seed and question_key must be int64, got "
            f"{seed.dtype} and {question_key.dtype}"
        )
    if num_facts is None:
        num_facts = int(fact_ptr[-1])
    question = segment_ids(fact_ptr, num_facts)
    # Rows after the last question (padding) borrow its counter; nobody reads them.
    question = question.clamp(max=max(question_key.shape[0] - 1, 0))
    fact = torch.arange(num_facts, device=fact_ptr.device) - fact_ptr[question]
    name = question_key[question]
    word = philox4x32(
        (fact & _WORD, name & _WORD, (name >> 32) & _WORD, torch.zeros_like(name)),
        (seed & _WORD, (seed >> 32) & _WORD),
    )[0]
    return logistic(word)
