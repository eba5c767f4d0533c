"""Counter-based logistic noise: a fact has the same noise in any batch and on any device.

Philox4x32-10 (Salmon et al. 2011) maps a counter of four 32-bit words and a key of two to four
random words. The counter of a fact is (index of the fact in its question, low word of the
question's key, high word of that key, number of the draw). The Philox key is (low, high) word of
the seed. Word 0 of the output is used: `tl.philox(seed, fact, key_low, key_high, draw)[0]` in
Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import HAS_TRITON, resolve_backend
from .checks import check_shape
from .library import register
from .segments import segment_ids

if HAS_TRITON:
    from .noise_kernel import logistic_noise_fwd
else:
    logistic_noise_fwd = None

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32 block function on broadcastable tensors.

    Args:
        counter: four int64 tensors of 32-bit words.
        key: two int64 tensors of 32-bit words.
        rounds: 10 for the standard generator.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A wrapped 64-bit product keeps all its bits, and the mask undoes the arithmetic shift. c1
        # and c3 are masked where they are used.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((b >> 32) ^ c1 ^ k0) & _WORD
        c2 = ((a >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = b, a
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def logistic(word: Tensor) -> Tensor:
    """float32 log u - log(1 - u) with u = (word >> 9 + 1/2) 2^-23 for int64 32-bit words.

    u and 1 - u are exact in float32 and never 0, so the result is finite.
    """
    u = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return torch.log(u) - torch.log(1.0 - u)


def check_counter(op: str, seed: Tensor, question_key: Tensor, fact_ptr: Tensor) -> None:
    """Raises ValueError unless seed is int64 [] and question_key int64 [B]."""
    check_shape(op, "seed", seed, ())
    check_shape(op, "question_key", question_key, (fact_ptr.shape[0] - 1,))
    if seed.dtype != torch.int64 or question_key.dtype != torch.int64:
        raise ValueError(
            f"{op}: seed and question_key must be int64, got {seed.dtype} and {question_key.dtype}"
        )


def logistic_noise(
    seed: Tensor,
    question_key: Tensor,
    fact_ptr: Tensor,
    *,
    num_facts: int | None = None,
    num_draws: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard logistic variates of every fact. Padding rows after the last question have 0.

    Args:
        seed: int64 [], a tensor, so that a captured CUDA graph can be replayed with another seed.
        question_key: int64 [B] key of each question, independent of the batch.
        fact_ptr: int [B+1] first fact of each question.
        num_facts: E. None reads the last offset from the device, and waits.
        num_draws: number M of independent draws. None makes one, without the dimension M.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 [M, E], or [E] where `num_draws` is None. The first of M draws is the only one of
        None.

    Raises:
        ValueError: sizes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    check_counter("logistic_noise", seed, question_key, fact_ptr)
    if num_facts is None:
        num_facts = int(fact_ptr[-1])
    triton = resolve_backend("logistic_noise", seed, backend) == "triton"
    noise = torch.ops.dragkit.logistic_noise_fwd(
        seed, question_key, fact_ptr, num_facts, num_draws or 1, triton
    )
    return noise[0] if num_draws is None else noise


def _torch_fwd(
    seed: Tensor, question_key: Tensor, fact_ptr: Tensor, num_facts: int, num_draws: int
) -> Tensor:
    question = segment_ids(fact_ptr, num_facts)
    has_question = question < question_key.shape[0]
    key = F.pad(question_key, (0, 1))[question]
    fact = torch.arange(num_facts, device=fact_ptr.device) - fact_ptr[question]
    draw = torch.arange(num_draws, device=fact_ptr.device).unsqueeze(1)
    word = philox4x32(
        (fact & _WORD, key & _WORD, (key >> 32) & _WORD, draw),
        (seed & _WORD, (seed >> 32) & _WORD),
    )[0]
    return torch.where(has_question, logistic(word), 0.0)


def _fake(
    seed: Tensor,
    question_key: Tensor,
    fact_ptr: Tensor,
    num_facts: int,
    num_draws: int,
    triton: bool,
) -> Tensor:
    return seed.new_empty(num_draws, num_facts, dtype=torch.float32)


register(
    "logistic_noise_fwd(Tensor seed, Tensor question_key, Tensor fact_ptr, SymInt num_facts,"
    " SymInt num_draws, bool triton) -> Tensor",
    _torch_fwd,
    _fake,
    triton=logistic_noise_fwd,
)
