"""Tokens and embeddings of prompts against loops, with the gradient of the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    prompt_embeddings,
    prompt_embeddings_ref,
    prompt_tokens,
    prompt_tokens_ref,
)
from dragkit_kernels.testing import Pieces, assert_close, gradients, leaves, random_pieces

OPS = torch.ops.dragkit


def assembled(pieces: Pieces, question: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Found and wanted columns of some prompts."""
    chosen = torch.tensor(question, dtype=torch.int32)
    ptr = torch.cat([torch.zeros(1), pieces.length[chosen.long()].cumsum(0)]).int()
    *layout, _ = pieces
    found = prompt_tokens(*layout, chosen, ptr=ptr, num_tokens=int(ptr[-1]), backend="torch")
    return list(found), list(prompt_tokens_ref(*layout, chosen))


@pytest.mark.parametrize("question", [range(7), [3], [6, 0, 2], [5, 5], []], ids=str)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_tokens_equal_those_of_a_loop(question: Sequence[int], count: int) -> None:
    for seed in range(5):
        found, wanted = assembled(random_pieces(7, count, seed=seed), question)
        assert all(x.dtype == torch.int32 for x in found)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_tokens_by_hand() -> None:
    ints = {"dtype": torch.int32}
    tokens = prompt_tokens(
        torch.tensor([11, 12, 13, 14], **ints),
        torch.tensor([[0, 2, 4], [3, 0, 1]], **ints),  # the vector at the end has no text
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


def test_prompts_of_vectors_alone_and_of_nothing() -> None:
    pieces = random_pieces(3, 4, longest=0)
    assert pieces.source.numel() == 0 and int(pieces.length.sum()) > 0
    for part in (pieces, pieces._replace(end=0 * pieces.end, length=0 * pieces.length)):
        found, wanted = assembled(part, [2, 0, 1])
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def embedding_inputs(tokens: int, slots: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Table, ids, vectors and slots; some vectors stand nowhere."""
    table = torch.randn(20, 6).to(dtype)
    ids = torch.randint(0, 20, (tokens,), dtype=torch.int32)
    slot = torch.full((tokens,), -1, dtype=torch.int32)
    used = min(tokens, slots) * 2 // 3
    slot[torch.randperm(tokens)[:used]] = torch.randperm(slots)[:used].int()
    return table, ids, torch.randn(slots, 6), slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(40, 9), (1, 1), (5, 0), (0, 4), (0, 0), (9, 30)], ids=str)
def test_embeddings(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    table, ids, vectors, slot = embedding_inputs(*sizes, dtype)
    out = prompt_embeddings(table, ids, vectors, slot)
    wanted = [vectors[s].to(dtype) if s >= 0 else table[i] for i, s in zip(ids, slot, strict=True)]
    assert out.dtype == dtype and out.shape == (sizes[0], 6)
    assert torch.equal(out, torch.stack(wanted) if wanted else table[:0])
    assert torch.equal(out, prompt_embeddings_ref(table, ids, vectors, slot))


@pytest.mark.parametrize("sizes", [(40, 9), (5, 0), (0, 4), (9, 30)], ids=str)
def test_gradient_of_the_vectors(sizes: tuple[int, int]) -> None:
    table, ids, vectors, slot = embedding_inputs(*sizes, torch.float64)
    grad = torch.randn(sizes[0], 6, dtype=torch.float64)
    (tried,) = leaves([vectors.double()])
    (found,) = gradients(prompt_embeddings(table, ids, tried, slot), [tried], grad)
    wanted = torch.zeros_like(found)
    for token, s in enumerate(slot.tolist()):
        if s >= 0:
            wanted[s] = grad[token]
    assert torch.equal(found, wanted)
    if min(sizes):
        call = lambda x: prompt_embeddings(table, ids, x, slot)  # noqa: E731
        assert torch.autograd.gradcheck(call, tried)
        exact = prompt_embeddings_ref(table, ids, tried, slot)
        assert_close(gradients(exact, [tried], grad)[0], found)


def test_a_low_precision_gradient_has_the_vectors_dtype() -> None:
    table, ids, vectors, slot = embedding_inputs(12, 5, torch.bfloat16)
    vectors.requires_grad_()
    out = prompt_embeddings(table, ids, vectors, slot)
    (found,) = gradients(out, [vectors], torch.ones_like(out))
    stands = torch.tensor([s in slot.tolist() for s in range(5)])
    assert found.dtype == torch.float32
    assert torch.equal(found, stands.float().unsqueeze(1).expand(5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": lambda x: x[:, 1:]}, "end must have shape"),
        ({"slot": lambda x: x.long()}, "slot must be int32"),
        ({"question": lambda x: x[:, None]}, "question must have shape"),
        ({"ptr": lambda x: x[1:]}, "ptr must have shape"),
    ],
)
def test_wrong_tokens_are_refused(change: dict[str, Callable], message: str) -> None:
    pieces = random_pieces(2, 3)
    question = torch.arange(2, dtype=torch.int32)
    ptr = torch.cat([torch.zeros(1), pieces.length.cumsum(0)]).int()
    given = {**pieces._asdict(), "question": question, "ptr": ptr}
    given.pop("length")
    given |= {name: edit(given[name]) for name, edit in change.items()}
    with pytest.raises(ValueError, match=f"prompt_tokens: {message}"):
        prompt_tokens(**given, num_tokens=int(pieces.length.sum()))


def test_wrong_embeddings_are_refused() -> None:
    table, ids, vectors, slot = embedding_inputs(6, 3, torch.float32)
    with pytest.raises(ValueError, match="vectors must have shape"):
        prompt_embeddings(table, ids, vectors[:, 1:], slot)
    with pytest.raises(ValueError, match="ids must be int32"):
        prompt_embeddings(table, ids.long(), vectors, slot)
    with pytest.raises(ValueError, match="requires a gradient"):
        prompt_embeddings(table.requires_grad_(), ids, vectors, slot)


def test_opcheck() -> None:
    table, ids, vectors, slot = embedding_inputs(12, 5, torch.float32)
    arguments = (table, ids, vectors.requires_grad_(), slot, False)
    torch.library.opcheck(OPS.prompt_embeddings_fwd.default, arguments)
    arguments = (torch.randn(12, 6), slot, 5, torch.float32, False)
    torch.library.opcheck(OPS.prompt_embeddings_bwd.default, arguments)
    *layout, length = random_pieces(3, 4)
    question = torch.tensor([2, 0], dtype=torch.int32)
    ptr = torch.cat([torch.zeros(1), length[question.long()].cumsum(0)]).int()
    arguments = (*layout, question, ptr, int(ptr[-1]), False)
    # The checks of gradients want a float output.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.prompt_tokens_fwd.default, arguments, test_utils=checks)
