"""The kernels of message_passing and relation_sum against the references, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    message_passing,
    message_passing_ref,
    relation_sum,
    relation_sum_ref,
)
from dragkit_kernels.message_passing import backward, chunks
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random_adjacency,
    strided_like,
)
from tests.triton_ops.cases import FORWARD, layer_inputs, to_device
from tests.triton_ops.cases import LAYER_NAMES as NAMES


def _star() -> Adjacency:
    """Node 0 is the tail of 150 facts of one relation and the head of none; node 31 is alone."""
    head = 1 + torch.arange(150) % 30
    return adjacency([(32, 150)], head, torch.zeros_like(head), torch.zeros_like(head))


def _chain() -> Adjacency:
    node = torch.arange(39)
    return adjacency([(40, 39)], node, node + 1, node % 3)


PACKS: dict[str, Callable[[], Adjacency]] = {
    "empty_first_middle_last": lambda: random_adjacency(
        [(0, 0), (5, 12), (1, 3), (0, 0), (34, 71), (4, 0), (0, 0)], 6
    ),
    "many_graphs": lambda: random_adjacency([(3, 4)] * 11, 3),
    # Nodes and pairs of more facts than are walked one by one.
    "hubs": lambda: random_adjacency([(4, 260), (3, 0)], 2),
    "star": _star,
    "chain": _chain,
    "no_facts": lambda: random_adjacency([(3, 0), (2, 0)], 1),
    "no_nodes": lambda: random_adjacency([(0, 0), (0, 0)], 1),
}


@pytest.fixture(params=PACKS, ids=list(PACKS))
def pack(request: pytest.FixtureRequest, device: torch.device) -> Adjacency:
    return to_device(PACKS[request.param](), device)


def layer(pack: Adjacency, inputs: list[Tensor]) -> Tensor:
    return message_passing(
        *inputs, orders=pack.orders, node_graph=pack.node_graph, backend="triton"
    )


def check(pack: Adjacency, values: list[Tensor], grad: Tensor | None = None) -> None:
    """Result and gradients of kernels and float64 reference agree; every buffer is filled."""
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    expected = message_passing_ref(*exact, orders=pack.orders, node_graph=pack.node_graph)
    if grad is None:
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        grad = grad.to(expected.device, values[0].dtype)
    with fenced_allocations():
        actual = layer(pack, tried)
        got = gradients(actual, tried, grad)
    assert actual.dtype == values[0].dtype
    assert_close(actual, expected, name="out", tolerance=FORWARD.get(actual.dtype))
    # The kernels see where the rounded output is positive.
    wanted = torch.autograd.grad(expected, exact, torch.where(actual > 0, grad.double(), 0.0))
    for name, x, g, want in zip(NAMES, values, got, wanted, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, name=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer_with_every_gradient(pack: Adjacency, dtype: torch.dtype) -> None:
    check(pack, layer_inputs(pack, 7, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_summed_by_chunks(
    pack: Adjacency, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a large pack, where every whole chunk has its program; other places hold NaN."""
    monkeypatch.setattr(chunks, "SPLIT_FACTS", 1)
    check(pack, layer_inputs(pack, 7, dtype))
    check_relation_sum(pack, layer_inputs(pack, 7, dtype)[2])


@pytest.mark.parametrize("sizes", [(64, 128, 63, 1, 192), (1, 65, 64, 0, 130), (127, 129)])
def test_chunks_begin_with_their_rows(
    device: torch.device, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows just below, at and above whole chunks, at every offset of the slots."""
    monkeypatch.setattr(chunks, "SPLIT_FACTS", 1)
    tail = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    head = torch.arange(len(tail)) % len(sizes)
    # As many facts of every pair as of every tail.
    pack = to_device(adjacency([(len(sizes), len(tail))], head, tail, tail), device)
    check(pack, layer_inputs(pack, 3, torch.float32))
    check_relation_sum(pack, layer_inputs(pack, 3, torch.float32)[2])


@pytest.mark.parametrize("width", [1, 64, 96, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths(device: torch.device, dtype: torch.dtype, width: int) -> None:
    pack = to_device(random_adjacency([(9, 20), (0, 0), (33, 60)], 4), device)
    check(pack, layer_inputs(pack, width, dtype))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("places", [(0, 2, 3, 5), (0, 2, 3, 4), (1, 5, 6)])
def test_mixed_precision(device: torch.device, low: torch.dtype, places: tuple[int, ...]) -> None:
    pack = to_device(random_adjacency([(9, 20), (4, 7)], 4), device)
    values = layer_inputs(pack, 16, torch.float32)
    for place in places:
        values[place] = values[place].to(low)
    check(pack, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(device: torch.device, dtype: torch.dtype) -> None:
    pack = to_device(random_adjacency([(9, 20), (4, 7)], 4), device)
    values = layer_inputs(pack, 20, dtype)
    one = torch.ones((), device=device, dtype=dtype).expand(13, 20)
    check(pack, [strided_like(x) for x in values], one)
    columns = torch.randn(20, 13, device=device).to(dtype).t()
    check(pack, [*values[:5], values[5].t().contiguous().t(), values[6]], columns)


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_each_gradient_alone(device: torch.device, place: int) -> None:
    pack = to_device(random_adjacency([(9, 20), (4, 7)], 4), device)
    values = layer_inputs(pack, 20, torch.float32)
    every = leaves(values)
    want = gradients(layer(pack, every), every, torch.ones(13, 20, device=device))[place]
    alone = [x.detach() for x in values]
    alone[place].requires_grad_()
    (got,) = gradients(layer(pack, alone), [alone[place]], torch.ones(13, 20, device=device))
    assert torch.equal(got, want)


def test_unwanted_gradients_are_not_computed(device: torch.device) -> None:
    pack = to_device(random_adjacency([(9, 20), (4, 7)], 4), device)
    values = layer_inputs(pack, 20, torch.float32)
    out = layer(pack, values)
    mask = [False, True, False, False, True, False, False]
    got = backward.message_passing_bwd(
        torch.ones_like(out), out, *values, list(pack.orders), pack.node_graph, mask
    )
    assert [g.numel() > 0 for g in got] == mask


def test_infinite_and_missing_numbers_stay_in_their_rows(device: torch.device) -> None:
    pack = to_device(_chain(), device)
    values = layer_inputs(pack, 20, torch.float32)
    values[0][3, 0] = float("nan")
    values[1][7] = float("inf")
    # The pair of every third fact: only its columns are touched.
    values[2][1, 4] = float("nan")
    out = layer(pack, values)
    wanted = message_passing_ref(*values, orders=pack.orders, node_graph=pack.node_graph)
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    assert 0 < int((~out.isfinite()).any(1).sum()) < 20


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    pack = to_device(random_adjacency([(3, 150), (20, 30)], 2), device)
    inputs = leaves(layer_inputs(pack, 33, torch.float32))
    runs = []
    for _ in range(2):
        out = layer(pack, inputs)
        runs.append([out, *gradients(out, inputs, out.detach())])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_autocast_changes_nothing(device: torch.device) -> None:
    pack = to_device(random_adjacency([(9, 20), (4, 7)], 4), device)
    inputs = leaves(layer_inputs(pack, 20, torch.float32))
    plain = layer(pack, inputs)
    wanted = gradients(plain, inputs, torch.ones_like(plain))
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(pack, inputs)
        got = gradients(out, inputs, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip((out, *got), (plain, *wanted), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relation_sum(pack: Adjacency, dtype: torch.dtype) -> None:
    check_relation_sum(pack, layer_inputs(pack, 7, dtype)[2])


@pytest.mark.parametrize("width", [1, 64, 96, 257])
def test_relation_sum_widths(device: torch.device, width: int) -> None:
    pack = to_device(random_adjacency([(9, 20), (0, 0), (33, 60)], 4), device)
    check_relation_sum(pack, strided_like(layer_inputs(pack, width, torch.float32)[2]))


def check_relation_sum(pack: Adjacency, table: Tensor) -> None:
    tried, exact = table.detach().requires_grad_(), table.double().requires_grad_()
    expected = relation_sum_ref(exact, orders=pack.orders)
    grad = torch.ones((), device=table.device).expand(expected.shape)
    with fenced_allocations():
        actual = relation_sum(tried, orders=pack.orders, backend="triton")
        (got,) = gradients(actual, [tried], grad)
    assert actual.dtype == table.dtype
    assert_close(actual, expected, tolerance=FORWARD.get(table.dtype))
    assert_close(got, gradients(expected, [exact], grad)[0])
