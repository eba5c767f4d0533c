"""The kernels of relation_gate against the reference in float64, with both gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import relation_gate, relation_gate_ref, row_order
from dragkit_kernels.relation_gate import backward
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    strided_like,
)

RELATIONS, GRAPHS = 6, 4
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}

Pairs = tuple[Tensor, Tensor]


def _pack() -> Pairs:
    """As a retriever has them: graphs one after the other, the first and third without pairs, then
    one self-loop of the last relation for each. Relations 0 and 3 occur nowhere."""
    relation = [1, 2, 4, 1, 4, *[RELATIONS - 1] * GRAPHS]
    return torch.tensor(relation).int(), torch.tensor([1, 1, 1, 3, 3, *range(GRAPHS)]).int()


def _random() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    relation, graph = (torch.randint(0, n, (41,), generator=generator) for n in (6, 4))
    return relation.int(), graph.int()


def _hub() -> Pairs:
    """One relation and one graph in all pairs but one: several blocks of rows."""
    relation, graph = torch.full((101,), 2).int(), torch.full((101,), 1).int()
    relation[50], graph[50] = 4, 3
    return relation, graph


PAIRS: dict[str, Callable[[], Pairs]] = {
    "pack": _pack,
    "random": _random,
    "hub": _hub,
    "one": lambda: (torch.tensor([5]).int(), torch.tensor([3]).int()),
    "none": lambda: (torch.zeros(0).int(), torch.zeros(0).int()),
}


def make_values(
    device: torch.device, dtype: torch.dtype, width: int, instructions: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = (2, RELATIONS, width), (GRAPHS, instructions, width)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def check(
    values: list[Tensor], pairs: Pairs, grad: Tensor | None = None, *, ordered: bool = False
) -> None:
    """Result and gradients of kernels and float64 reference agree; every buffer is filled."""
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected = relation_gate_ref(*exact, *pairs)
    if grad is None:
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        grad = grad.to(values[0].device, values[0].dtype)
    orders = {}
    if ordered:
        orders["relation_order"] = row_order(pairs[0], RELATIONS)
        orders["graph_order"] = row_order(pairs[1], GRAPHS)
    with fenced_allocations():
        actual = relation_gate(*tried, *pairs, **orders, backend="triton")
        got = gradients(actual, tried, grad)
    dtype = values[0].dtype
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert_close(actual, expected, tolerance=FORWARD[dtype])
    # The kernels see where the rounded output is positive.
    wanted = torch.autograd.grad(expected, exact, torch.where(actual <= 0, 0.0, grad.double()))
    for name, g, want in zip("ui", got, wanted, strict=True):
        assert g.dtype == dtype
        assert_close(g, want, name=f"d{name}", tolerance=GRADIENT[dtype])


def on(device: torch.device, pairs: Pairs) -> Pairs:
    return tuple(x.to(device) for x in pairs)


@pytest.mark.parametrize("ordered", [False, True], ids=["sorts", "ordered"])
@pytest.mark.parametrize("name", PAIRS)
def test_matches_the_reference(device: torch.device, name: str, ordered: bool) -> None:
    pairs = on(device, PAIRS[name]())
    check(make_values(device, torch.float32, 7, instructions=3), pairs, ordered=ordered)
    check(make_values(device, torch.float16, 7, instructions=1), pairs, ordered=ordered)


@pytest.mark.parametrize("width", [1, 64, 96, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths(device: torch.device, dtype: torch.dtype, width: int) -> None:
    check(make_values(device, dtype, width), on(device, _pack()))


def test_strided_inputs_and_gradients(device: torch.device) -> None:
    relation, graph = on(device, _random())
    values = [strided_like(x) for x in make_values(device, torch.float32, 7)]
    pairs = strided_like(relation), strided_like(graph)
    grad = torch.randn(2, 41, 2, 7, device=device)
    check(values, pairs, strided_like(grad), ordered=True)
    check(values, pairs, torch.ones((), device=device).expand(2, 41, 2, 7))


def test_what_underflows_has_no_gradient(device: torch.device) -> None:
    """Products below the smallest float16 are zero: the backward must round as the forward did."""
    values, pairs = make_values(device, torch.float16, 64), on(device, _random())
    values = [x * 2.5e-4 for x in values]
    results = []
    for backend in ("triton", "torch"):
        tried = leaves(values)
        out = relation_gate(*tried, *pairs, backend=backend)
        results.append([out, *gradients(out, tried, torch.full_like(out, 64.0))])
    share = (results[0][0] > 0).float().mean()
    assert 0.1 < share < 0.4, "half of the products would be positive"
    for got, want in zip(*results, strict=True):
        assert_close(got, want.double())


def test_nan_and_infinity_stay_what_they_are(device: torch.device) -> None:
    values = make_values(device, torch.float32, 7)
    values[0][1, 1, 2], values[0][0, 2, 3], values[1][1, 0, 1] = math.nan, math.inf, -math.inf
    pairs = on(device, _pack())
    tried, plain = leaves(values), leaves(values)
    actual = relation_gate(*tried, *pairs, backend="triton")
    expected = relation_gate_ref(*plain, *pairs)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    grad = torch.randn_like(expected)
    for got, want in zip(
        gradients(actual, tried, grad), gradients(expected, plain, grad), strict=True
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_no_gradient_in_none_out_and_no_columns(device: torch.device) -> None:
    values, pairs = leaves(make_values(device, torch.float32, 7)), on(device, _random())
    with fenced_allocations():
        out = relation_gate(*values, *pairs, backend="triton")
        got = gradients(out, values, torch.zeros_like(out))
    assert not any(g.any() for g in got)
    check(make_values(device, torch.float32, 0), pairs)


@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_nobody_wants_is_not_computed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    kernel = ("_relation_gate_bwd_instruction_kernel", "_relation_gate_bwd_relation_kernel")[place]
    monkeypatch.setattr(backward, kernel, None)  # a launch would raise
    values, pairs = make_values(device, torch.float32, 7), on(device, _pack())
    values[place].requires_grad_()
    out = relation_gate(*values, *pairs, backend="triton")
    torch.autograd.grad(out.sum(), values[place])


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    values, pairs = leaves(make_values(device, torch.float32, 7)), on(device, _hub())
    grad = torch.randn(2, 101, 2, 7, device=device)
    runs = []
    for _ in range(2):
        out = relation_gate(*values, *pairs, backend="triton")
        runs.append([out, *gradients(out, values, grad)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_the_kernels_keep_no_output(device: torch.device) -> None:
    """Under dropout the output has no other reader and its memory is free again."""
    values, pairs = leaves(make_values(device, torch.float32, 7)), on(device, _pack())
    for backend, kept in (("triton", False), ("torch", True)):
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, shapes=shapes: shapes.append(x.shape) or x, lambda x: x
        ):
            out = relation_gate(*values, *pairs, backend=backend)
        assert (out.shape in shapes) == kept
