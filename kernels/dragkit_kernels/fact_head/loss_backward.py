"""Triton backward of fact_loss: the forward's gradient times the one of the question."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import PAIR_PROGRAMS, Budget, KernelSpec, Tile

TILE = Tile(1024, 4)


@triton.jit(do_not_specialize=["num_questions", "num_facts", "num_blocks"])
def _fact_loss_bwd_kernel(
    grad_ptr,
    gradient_ptr,
    fact_ptr,
    d_logits_ptr,
    num_questions,
    num_facts,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """dl_e = grad_q gradient_e; every num_blocks-th block of a question, or of the rows after."""
    pid = tl.program_id(0)
    pid_q = pid // num_blocks
    live = pid_q < num_questions
    begin = tl.load(fact_ptr + pid_q)
    end = tl.load(fact_ptr + pid_q + 1, mask=live, other=0)
    end = tl.where(live, end, num_facts)
    grad = tl.load(grad_ptr + pid_q, mask=live, other=0.0)
    first = begin + (pid - pid_q * num_blocks) * BLOCK
    for start in range(first, end, num_blocks * BLOCK):
        offs_e = start + tl.arange(0, BLOCK)
        mask_e = offs_e < end
        gradient = tl.load(gradient_ptr + offs_e, mask=mask_e, other=0.0)
        tl.store(d_logits_ptr + offs_e, grad * gradient, mask=mask_e)


def fact_loss_bwd(grad: Tensor, gradient: Tensor, fact_ptr: Tensor, max_facts: int) -> Tensor:
    """Launches the products; see `dragkit::fact_loss_bwd`."""
    num_facts, num_questions = gradient.shape[0], fact_ptr.shape[0] - 1
    d_logits = gradient.new_empty(num_facts)
    if num_facts == 0:
        return d_logits
    num_blocks = min(max(triton.cdiv(max_facts, TILE.block), 1), PAIR_PROGRAMS)
    _fact_loss_bwd_kernel[((num_questions + 1) * num_blocks,)](
        grad.contiguous(),
        gradient.contiguous(),
        fact_ptr.contiguous(),
        d_logits,
        num_questions,
        num_facts,
        num_blocks,
        BLOCK=TILE.block,
        num_warps=TILE.num_warps,
    )
    return d_logits


KERNELS = (
    KernelSpec(
        _fact_loss_bwd_kernel,
        types={
            "grad_ptr": "*fp32",
            "gradient_ptr": "*fp32",
            "fact_ptr": "*i32",
            "d_logits_ptr": "*fp32",
            "num_questions": "i32",
            "num_facts": "i32",
            "num_blocks": "i32",
        },
        constants={"BLOCK": TILE.block},
        num_warps=TILE.num_warps,
        budget=Budget(registers=64, shared=0),
    ),
)
