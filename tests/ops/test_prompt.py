"""prompt_tokens and prompt_embeddings against loops, with the gradient of the vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    prompt_embeddings,
    prompt_embeddings_ref,
    prompt_tokens,
    prompt_tokens_ref,
)
from dragkit_kernels.testing import (
    PromptPieces,
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_prompt_pieces,
    strided_like,
)
from tests.ops.cases import DTYPES, FORWARD

OPS = torch.ops.dragkit
# The embeddings are copies: only a cast between dtypes rounds them.
TOLERANCE = FORWARD | {torch.float32: 0.0}


def check_tokens(
    pieces: PromptPieces, question: list[int], backend: str, device: torch.device
) -> None:
    *layout, length = (x.to(device) for x in pieces)
    chosen = torch.tensor(question, dtype=torch.int32, device=device)
    total = length[chosen.long()].cumsum(0)
    ptr = torch.cat([total.new_zeros(1), total]).int()
    sizes = {"ptr": ptr, "num_tokens": int(ptr[-1]), "backend": backend}
    wanted = prompt_tokens_ref(*layout, chosen)
    with fenced_allocations():
        result = prompt_tokens(*layout, chosen, **sizes)
        strided = prompt_tokens(*map(strided_like, layout), strided_like(chosen), **sizes)
    for x, y, z in zip(result, strided, wanted, strict=True):
        assert x.dtype == torch.int32 and torch.equal(x, z) and torch.equal(y, z)


@pytest.mark.parametrize("question", [[0], [1, 0], [4, 2, 0, 1, 3], [5, 5], [3] * 8, []], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 9, 19])
def test_tokens_equal_a_loop(
    backend: str, device: torch.device, count: int, question: list[int]
) -> None:
    for seed in (count, count + 1):
        check_tokens(
            random_prompt_pieces(6, count, longest=7, seed=seed), question, backend, device
        )


def test_prompts_of_only_vectors_and_empty_prompts(backend: str, device: torch.device) -> None:
    pieces = random_prompt_pieces(3, 4, longest=0)
    assert pieces.source.numel() == 0 and int(pieces.length.sum()) > 0
    for part in (pieces, pieces._replace(end=0 * pieces.end, length=0 * pieces.length)):
        check_tokens(part, [2, 0, 1], backend, device)


def test_tokens_by_hand() -> None:
    ints = {"dtype": torch.int32}
    tokens = prompt_tokens(
        torch.tensor([11, 12, 13, 14], **ints),
        torch.tensor([[0, 2, 4], [3, 0, 1]], **ints),  # the last piece is a vector alone
        torch.tensor([[2, 4, 5], [1, 1, 3]], **ints),
        torch.tensor([[-1, 5, 7], [-1, 3, -1]], **ints),
        torch.tensor([1, 0], **ints),
        ptr=torch.tensor([0, 3, 8], **ints),
        num_tokens=8,
    )
    assert tokens.ids.tolist() == [14, 12, 13, 11, 12, 0, 13, 0]
    assert tokens.slot.tolist() == [-1, -1, -1, -1, -1, 5, -1, 7]
    assert tokens.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert tokens.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def inputs(tokens: int, slots: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(table, ids, vectors, slot), where some vectors have no token."""
    draw = torch.Generator().manual_seed(0)
    slot = torch.full((tokens,), -1, dtype=torch.int32)
    used = min(tokens, slots) * 2 // 3
    positions = torch.randperm(tokens, generator=draw)[:used]
    slot[positions] = torch.randperm(slots, generator=draw)[:used].int()
    ids = torch.randint(0, 20, (tokens,), generator=draw, dtype=torch.int32)
    table = torch.randn(20, width, generator=draw).to(dtype)
    return table, ids, torch.randn(slots, width, generator=draw), slot


def test_the_reference_equals_a_loop() -> None:
    table, ids, vectors, slot = inputs(40, 9, 6, torch.float32)
    wanted = [vectors[s] if s >= 0 else table[i] for i, s in zip(ids, slot, strict=True)]
    assert torch.equal(prompt_embeddings_ref(table, ids, vectors, slot), torch.stack(wanted))


@DTYPES
@pytest.mark.parametrize("vectors", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(33, 9, 7), (5, 8, 257), (4, 2, 256), (6, 0, 5), (0, 3, 5), (0, 0, 5), (9, 30, 1)],
    ids=str,
)
def test_embeddings_and_their_gradient(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    vectors: torch.dtype,
    sizes: tuple[int, int, int],
) -> None:
    table, ids, rows, slot = (x.to(device) for x in inputs(*sizes, dtype))
    leaf, exact_leaf = leaves([rows.to(vectors)]), leaves([rows.to(vectors).double()])
    grad = torch.randn(sizes[0], sizes[2], generator=torch.Generator().manual_seed(1)).to(table)
    one = torch.ones((), device=device, dtype=dtype)
    for given in (grad, strided_like(grad), one.expand(grad.shape)):
        expected = prompt_embeddings_ref(table.double(), ids, *exact_leaf, slot)
        (wanted,) = gradients(expected, exact_leaf, given)
        with fenced_allocations():
            out = prompt_embeddings(table, ids, *leaf, slot, backend=backend)
            (result,) = gradients(out, leaf, given)
        assert out.dtype == dtype and result.dtype == vectors
        assert_close(out, expected, tolerance=TOLERANCE[dtype])
        text = slot < 0
        assert torch.equal(out[text], table[ids[text].long()])
        assert_close(result, wanted, tolerance=TOLERANCE[vectors])


def test_nan_and_infinity_stay_in_their_rows(backend: str, device: torch.device) -> None:
    table, ids, rows, slot = (x.to(device) for x in inputs(12, 6, 5, torch.float32))
    ids[slot >= 0] = 0  # ids are ignored at vectors
    table[0] = torch.nan
    rows[[s for s in range(6) if s not in slot.tolist()]] = torch.inf
    rows.requires_grad_()
    out = prompt_embeddings(table, ids, rows, slot, backend=backend)
    assert_close(out, prompt_embeddings_ref(table, ids, rows, slot))
    grad = torch.ones_like(out).masked_fill((slot < 0).unsqueeze(1), torch.nan)
    (result,) = gradients(out, [rows], grad)
    assert result.isfinite().all() and int(result.sum()) == 5 * int((slot >= 0).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": lambda x: x[:, 1:]}, "end must have shape"),
        ({"slot": lambda x: x.long()}, "slot must be int32"),
        ({"question": lambda x: x[:, None]}, "question must have shape"),
        ({"ptr": lambda x: x[1:]}, "ptr must have shape"),
    ],
)
def test_wrong_tokens_raise(change: dict[str, Callable], message: str) -> None:
    pieces = random_prompt_pieces(2, 3)
    question = torch.arange(2, dtype=torch.int32)
    ptr = torch.cat([torch.zeros(1), pieces.length.cumsum(0)]).int()
    given = {**pieces._asdict(), "question": question, "ptr": ptr}
    given.pop("length")
    given |= {name: edit(given[name]) for name, edit in change.items()}
    with pytest.raises(ValueError, match=f"prompt_tokens: {message}"):
        prompt_tokens(**given, num_tokens=int(pieces.length.sum()))


def test_wrong_embeddings_raise() -> None:
    table, ids, vectors, slot = inputs(6, 3, 6, torch.float32)
    with pytest.raises(ValueError, match="vectors must have shape"):
        prompt_embeddings(table, ids, vectors[:, 1:], slot)
    with pytest.raises(ValueError, match="ids must be int32"):
        prompt_embeddings(table, ids.long(), vectors, slot)
    with pytest.raises(ValueError, match="requires a gradient"):
        prompt_embeddings(table.requires_grad_(), ids, vectors, slot)


def test_opcheck_of_tokens() -> None:
    *layout, length = random_prompt_pieces(3, 4)
    question = torch.tensor([2, 0], dtype=torch.int32)
    ptr = torch.cat([torch.zeros(1), length[question.long()].cumsum(0)]).int()
    arguments = (*layout, question, ptr, int(ptr[-1]), False)
    # The autograd checks need a float output.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.prompt_tokens_fwd.default, arguments, test_utils=checks)
