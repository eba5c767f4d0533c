"""The Triton helpers of several ops, and the noise kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from dragkit_kernels import logistic_noise
from dragkit_kernels.noise import philox4x32
from dragkit_kernels.testing import assert_close, fenced_allocations
from dragkit_kernels.triton_math import noise_word, order_code

pytestmark = pytest.mark.triton


@triton.jit
def _word_kernel(seed_ptr, key_ptr, out_ptr, BLOCK: tl.constexpr):
    offs_e, draw = tl.arange(0, BLOCK), tl.program_id(0)
    word = noise_word(tl.load(seed_ptr), tl.load(key_ptr), draw, offs_e)
    tl.store(out_ptr + draw * BLOCK + offs_e, word.to(tl.int64))


@triton.jit
def _code_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs_e = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs_e, order_code(tl.load(x_ptr + offs_e)))


@pytest.mark.parametrize("seed", [0, 42, (1 << 40) + 17, (1 << 62) + 5, -3])
@pytest.mark.parametrize("key", [0, 7, (5 << 32) + 9, -1, -(1 << 63)])
def test_philox_words_are_those_of_the_reference(device: torch.device, seed: int, key: int) -> None:
    low = 0xFFFFFFFF
    fact, zero = torch.arange(256), torch.zeros(256, dtype=torch.int64)
    draw = torch.arange(3).unsqueeze(1)
    counter = (fact, zero + (key & low), zero + ((key >> 32) & low), draw)
    words = tuple(torch.tensor(w) for w in (seed & low, (seed >> 32) & low))
    out = torch.empty(3, 256, dtype=torch.int64, device=device)
    _word_kernel[(3,)](
        torch.tensor(seed, device=device), torch.tensor(key, device=device), out, BLOCK=256
    )
    assert torch.equal(out.cpu(), philox4x32(counter, words)[0])


def test_order_codes_sort_as_the_numbers_do(device: torch.device) -> None:
    inf = float("inf")
    values = [-inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 2.0, 3e38, inf]
    x = torch.tensor([*values, *torch.randn(52).tolist()], device=device)
    out = torch.empty(64, dtype=torch.int32, device=device)
    _code_kernel[(1,)](x, out, BLOCK=64)
    assert torch.equal(out[:, None] < out[None, :], x[:, None] < x[None, :])
    assert torch.equal(out[:, None] == out[None, :], x[:, None] == x[None, :])


@pytest.mark.parametrize("sizes", [[], [0], [0, 1, 31, 0, 32, 33, 1023, 1024, 1025, 0], [2100, 5]])
def test_noise_kernel(device: torch.device, sizes: list[int]) -> None:
    ptr = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
    seed = torch.tensor((9 << 32) + 4, device=device)
    keys = (torch.arange(len(sizes), device=device) << 30) - 5
    num_facts = sum(sizes) + 70  # padding rows
    with fenced_allocations():
        got = logistic_noise(seed, keys, ptr, num_facts=num_facts, backend="triton")
    want = logistic_noise(seed, keys, ptr, num_facts=num_facts, backend="torch")
    assert_close(got, want.double(), tolerance=1e-6)
    assert (got[sum(sizes) :] == 0).all()
