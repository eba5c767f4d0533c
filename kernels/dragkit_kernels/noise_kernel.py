"""Triton forward of logistic_noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NOISE_TILE, ResourceLimits, spec
from .triton_math import logistic_noise_block


@triton.jit(do_not_specialize=["num_facts", "num_questions"])
def _logistic_noise_fwd_kernel(
    seed_ptr, question_key_ptr, fact_ptr, noise_ptr, num_facts, num_questions, BLOCK: tl.constexpr
):
    """noise_e = log u - log(1 - u) with u from the counter of fact e, and 0 for padding rows.

    Programs have two axes: the questions with one more for the padding rows after the last
    question, and the draws.
    """
    pid_q, draw = tl.program_id(0), tl.program_id(1)
    has_question = pid_q < num_questions
    first = tl.load(fact_ptr + pid_q)
    size = tl.load(fact_ptr + pid_q + 1, mask=has_question, other=num_facts) - first
    question_key = tl.load(question_key_ptr + pid_q, mask=has_question, other=0)
    seed = tl.load(seed_ptr)
    noise_ptr += draw.to(tl.int64) * num_facts
    for start in range(0, size, BLOCK):
        offs_e = start + tl.arange(0, BLOCK)
        noise = logistic_noise_block(seed, question_key, draw, offs_e)
        tl.store(noise_ptr + first + offs_e, tl.where(has_question, noise, 0.0), mask=offs_e < size)


def logistic_noise_fwd(
    seed: Tensor, question_key: Tensor, fact_ptr: Tensor, num_facts: int, num_draws: int
) -> Tensor:
    """Launches the kernel with the arguments of `logistic_noise`."""
    noise = seed.new_empty(num_draws, num_facts, dtype=torch.float32)
    num_questions = fact_ptr.shape[0] - 1
    _logistic_noise_fwd_kernel[(num_questions + 1, num_draws)](
        *(seed, question_key.contiguous(), fact_ptr.contiguous()),
        *(noise, num_facts, num_questions),
        BLOCK=NOISE_TILE.block,
        **NOISE_TILE.options,
    )
    return noise


KERNELS = (
    spec(_logistic_noise_fwd_kernel, ResourceLimits(registers=64, shared_bytes=0), tile=NOISE_TILE),
)
