"""The kernels of prompt_tokens and prompt_embeddings against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    prompt_embeddings,
    prompt_embeddings_ref,
    prompt_tokens,
    prompt_tokens_ref,
)
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_pieces,
    strided_like,
)

# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 19])
@pytest.mark.parametrize("question", [[0], [1, 0], [4, 2, 0, 1, 3], [3] * 8, []], ids=str)
def test_tokens(device: torch.device, count: int, question: list[int]) -> None:
    *layout, length = (x.to(device) for x in random_pieces(5, count, longest=7, seed=count))
    chosen = torch.tensor(question, dtype=torch.int32, device=device)
    total = length[chosen.long()].cumsum(0)
    ptr = torch.cat([total.new_zeros(1), total]).int()
    sizes = {"ptr": ptr, "num_tokens": int(ptr[-1]), "backend": "triton"}
    wanted = prompt_tokens_ref(*layout, chosen)
    with fenced_allocations():
        found = prompt_tokens(*layout, chosen, **sizes)
        strided = prompt_tokens(*map(strided_like, layout), strided_like(chosen), **sizes)
    for x, y, z in zip(found, strided, wanted, strict=True):
        assert torch.equal(x, z) and torch.equal(y, z)


def inputs(tokens: int, slots: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    slot = torch.full((tokens,), -1, dtype=torch.int32)
    used = min(tokens, slots) * 2 // 3
    at = torch.randperm(tokens, generator=draw)[:used]
    slot[at] = torch.randperm(slots, generator=draw)[:used].int()
    ids = torch.randint(0, 20, (tokens,), generator=draw, dtype=torch.int32)
    table = torch.randn(20, width, generator=draw).to(dtype)
    return table, ids, torch.randn(slots, width, generator=draw), slot


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("vectors", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(33, 9, 7), (5, 8, 257), (4, 2, 256), (6, 0, 5), (0, 3, 5)], ids=str
)
def test_embeddings_and_their_gradient(
    device: torch.device, dtype: torch.dtype, vectors: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    table, ids, rows, slot = (x.to(device) for x in inputs(*sizes, dtype))
    tried, exact = leaves([rows.to(vectors)]), leaves([rows.to(vectors).double()])
    expected = prompt_embeddings_ref(table.double(), ids, *exact, slot)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(table)
    (wanted,) = gradients(expected, exact, grad.double())
    for given in (grad, strided_like(grad)):
        with fenced_allocations():
            out = prompt_embeddings(table, ids, *tried, slot, backend="triton")
            (found,) = gradients(out, tried, given)
        assert out.dtype == dtype and found.dtype == vectors
        assert_close(out, expected, tolerance=TOLERANCE[dtype])
        text = slot < 0
        assert torch.equal(out[text], table[ids[text].long()])
        assert_close(found, wanted, tolerance=TOLERANCE[vectors])


def test_nan_and_infinity_stay_in_their_rows(device: torch.device) -> None:
    table, ids, rows, slot = (x.to(device) for x in inputs(12, 6, 5, torch.float32))
    ids[slot >= 0] = 0  # what stands under a slot
    table[0] = torch.nan
    rows[[s for s in range(6) if s not in slot.tolist()]] = torch.inf
    out = prompt_embeddings(table, ids, rows, slot, backend="triton")
    assert_close(out, prompt_embeddings_ref(table, ids, rows, slot))
    rows.requires_grad_()
    out = prompt_embeddings(table, ids, rows, slot, backend="triton")
    grad = torch.ones_like(out).masked_fill((slot < 0).unsqueeze(1), torch.nan)
    (found,) = gradients(out, [rows], grad)
    assert found.isfinite().all() and int(found.sum()) == 5 * int((slot >= 0).sum())


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    table, ids, rows, slot = (x.to(device) for x in inputs(33, 9, 7, torch.float16))
    rows.requires_grad_()
    runs = []
    for _ in range(2):
        out = prompt_embeddings(table, ids, rows, slot, backend="triton")
        runs.append([out, *gradients(out, [rows], torch.ones_like(out))])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
