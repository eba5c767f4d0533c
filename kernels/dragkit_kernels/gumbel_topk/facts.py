"""What a program of gumbel_topk reads of its question: shared by forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import logistic_noise_block, order_code

LOWEST = tl.constexpr(-0x80000000)
CERTAIN = tl.constexpr(1e4)
# Types of the arguments that carry noise, for `aot`; what is not named is passed as None.
DRAWN = {"noise_ptr": None, "seed_ptr": "*i64", "question_key_ptr": "*i64"}
GIVEN = {"noise_ptr": "*fp32", "seed_ptr": None, "question_key_ptr": None}
NO_NOISE = {"noise_ptr": None, "seed_ptr": None, "question_key_ptr": None}


@triton.jit
def question_bounds(fact_ptr, question_key_ptr, pid_q, num_questions, num_facts):
    """(first fact, facts, key) of a question; the one after the last owns the padding rows."""
    live = pid_q < num_questions
    first = tl.load(fact_ptr + pid_q)
    end = tl.load(fact_ptr + pid_q + 1, mask=live, other=num_facts)
    question_key = tl.full((), 0, tl.int64)
    if question_key_ptr is not None:
        question_key = tl.load(question_key_ptr + pid_q, mask=live, other=0)
    return first, end - first, question_key


@triton.jit
def load_logits(logits_ptr, noise_ptr, seed_ptr, question_key, first, offs_e, mask_e):
    """(l, l + noise) in float32: the noise is given, or drawn from the seed, or there is none."""
    logit = tl.load(logits_ptr + first + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    key = logit
    if noise_ptr is not None:
        key += tl.load(noise_ptr + first + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        key += logistic_noise_block(tl.load(seed_ptr), question_key, offs_e)
    return logit, key


@triton.jit
def relaxed_argument(x, temperature, mask_e):
    """x / T, certain beyond +-CERTAIN so that no infinity meets nu; -inf outside the question."""
    x = tl.clamp(x / temperature, -CERTAIN, CERTAIN, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(mask_e, x, float("-inf"))


@triton.jit
def masked_code(key, mask_e):
    """Order code of the key, LOWEST outside the question."""
    return tl.where(mask_e, order_code(key), LOWEST)


@triton.jit
def load_codes(logits_ptr, noise_ptr, first, size, offs_e):
    """Order codes of facts whose noise is given."""
    mask_e = offs_e < size
    _, key = load_logits(logits_ptr, noise_ptr, None, 0, first, offs_e, mask_e)
    return masked_code(key, mask_e)


@triton.jit
def load_relaxed(logits_ptr, noise_ptr, first, size, offs_e, temperature, concrete):
    """Relaxed arguments of facts whose noise is given."""
    mask_e = offs_e < size
    logit, key = load_logits(logits_ptr, noise_ptr, None, 0, first, offs_e, mask_e)
    return relaxed_argument(tl.where(concrete != 0, key, logit), temperature, mask_e)
