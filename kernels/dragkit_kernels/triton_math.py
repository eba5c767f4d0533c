"""Triton helpers of several ops."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_code(x):
    """int32 codes that sort like float32 `x`. -0.0 and 0.0 are equal, NaN sorts by its bits."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def noise_word(seed, question_key, draw, offs_e):
    """uint32 word 0 of Philox4x32-10 for the facts `offs_e` (int32) of a question, as in noise.py.

    `seed` and `question_key` are int64 scalars, `draw` is an int32 scalar.
    """
    zero = offs_e.to(tl.uint32, bitcast=True) * 0
    key_low = (question_key & 0xFFFFFFFF).to(tl.uint32) + zero
    key_high = ((question_key >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    word, _, _, _ = tl.philox(seed, offs_e, key_low, key_high, draw.to(tl.uint32) + zero)
    return word


@triton.jit
def logistic_noise_block(seed, question_key, draw, offs_e):
    """float32 log u - log(1 - u) with u = (noise_word >> 9 + 1/2) 2^-23, which is never 0 or 1."""
    word = noise_word(seed, question_key, draw, offs_e)
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return tl.log(u) - tl.log(1.0 - u)
