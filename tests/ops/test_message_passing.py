"""message_passing and relation_sum: the references against a loop, both backends against these."""

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
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    padded_facts,
    random,
    random_adjacency,
    strided_like,
    to_device,
)
from tests.ops.cases import DTYPES, FORWARD, kernels, layer_inputs
from tests.ops.cases import LAYER_NAMES as NAMES


def _star() -> Adjacency:
    """Node 0 is the tail of all 150 facts, which share one relation. Node 31 is isolated."""
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
    # Nodes and pairs with more than CHUNK facts.
    "hubs": lambda: random_adjacency([(4, 260), (3, 0)], 2),
    "star": _star,
    "chain": _chain,
    "no_facts": lambda: random_adjacency([(3, 0), (2, 0)], 1),
    "no_nodes": lambda: random_adjacency([(0, 0), (0, 0)], 1),
    "padding": lambda: padded_facts(random_adjacency([(5, 9), (3, 4)], 2), 70),
}


@pytest.fixture(params=PACKS, ids=list(PACKS))
def pack(request: pytest.FixtureRequest, device: torch.device) -> Adjacency:
    return to_device(PACKS[request.param](), device)


@pytest.fixture
def small(device: torch.device) -> Adjacency:
    return to_device(random_adjacency([(9, 20), (4, 7)], 4), device)


def layer(pack: Adjacency, inputs: list[Tensor], backend: str = "auto") -> Tensor:
    return message_passing(
        *inputs, fact_index=pack.fact_index, node_graph=pack.node_graph, backend=backend
    )


def check(pack: Adjacency, values: list[Tensor], backend: str, grad: Tensor | None = None) -> None:
    """Asserts equality with the float64 reference and that the op writes all of its buffers."""
    exact, tried = leaves([x.double() for x in values]), leaves(values)
    expected = message_passing_ref(*exact, fact_index=pack.fact_index, node_graph=pack.node_graph)
    if grad is None:
        grad = random(*expected.shape, seed=1).to(values[0])
    with fenced_allocations():
        actual = layer(pack, tried, backend)
        got = gradients(actual, tried, grad)
    assert actual.dtype == values[0].dtype
    assert_close(actual, expected, name="out", tolerance=FORWARD.get(actual.dtype))
    # The op masks the gradient where the rounded output is not positive.
    wanted = torch.autograd.grad(expected, exact, torch.where(actual > 0, grad.double(), 0.0))
    for name, x, g, want in zip(NAMES, values, got, wanted, strict=True):
        assert g.dtype == x.dtype
        assert_close(g, want, name=f"d{name}")


def check_sum(pack: Adjacency, table: Tensor, backend: str) -> None:
    """The same for relation_sum, with an expanded gradient and with a random one."""
    exact, tried = leaves([table.double()]), leaves([table])
    expected = relation_sum_ref(*exact, fact_index=pack.fact_index)
    one = torch.ones((), device=table.device).expand(expected.shape)
    for grad in (one, random(*expected.shape, seed=2).to(table)):
        with fenced_allocations():
            actual = relation_sum(*tried, fact_index=pack.fact_index, backend=backend)
            (got,) = gradients(actual, tried, grad)
        assert actual.dtype == got.dtype == table.dtype
        assert_close(actual, expected, tolerance=FORWARD.get(table.dtype))
        (want,) = gradients(expected, exact, grad, retain_graph=True)
        assert_close(got, want)


def test_references_agree_with_the_loop(pack: Adjacency) -> None:
    """The loop applies the definitions fact by fact, from the plain triples."""
    h, p, table_fwd, table_inv, self_table, weight, bias = values = layer_inputs(
        pack, 7, torch.float64
    )
    fact_index, graph_of = pack.fact_index, pack.node_graph.tolist()
    states = [bias + h[v] @ weight + p[v] * self_table[g] for v, g in enumerate(graph_of)]
    sums = [torch.zeros(7, dtype=torch.float64) for _ in graph_of]
    keys = list(zip(pack.fact_graph.tolist(), pack.relation.tolist(), strict=True))
    rows = {key: i for i, key in enumerate(sorted(set(keys)))}
    for e, key in enumerate(keys):
        head, tail, row = int(fact_index.head[e]), int(fact_index.tail[e]), rows[key]
        for _ in range(int(fact_index.tail_count[e])):
            states[tail] = states[tail] + p[head] * table_fwd[row]
            sums[tail] = sums[tail] + table_fwd[row]
        for _ in range(int(fact_index.head_count[e])):
            states[head] = states[head] + p[tail] * table_inv[row]
            sums[head] = sums[head] + table_fwd[row]
    out = message_passing_ref(*values, fact_index=fact_index, node_graph=pack.node_graph)
    added = relation_sum_ref(table_fwd, fact_index=fact_index)
    assert out.shape == added.shape == (len(graph_of), 7)
    for v in range(len(graph_of)):
        assert_close(out[v], states[v].clamp(min=0), name=f"layer {v}")
        assert_close(added[v], sums[v], name=f"sum {v}")


@DTYPES
def test_result_and_every_gradient(backend: str, pack: Adjacency, dtype: torch.dtype) -> None:
    values = layer_inputs(pack, 7, dtype)
    check(pack, values, backend)
    check_sum(pack, values[2], backend)


def test_float64(pack: Adjacency) -> None:
    values = layer_inputs(pack, 7, torch.float64)
    check(pack, values, "torch")
    check_sum(pack, values[2], "torch")


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_rows_are_summed_by_chunks(
    pack: Adjacency, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a large pack, each whole chunk has a program. Entries of no chunk hold NaN."""
    monkeypatch.setattr(kernels("chunk_sums"), "SPLIT_FACTS", 1)
    values = layer_inputs(pack, 7, dtype)
    check(pack, values, "triton")
    check_sum(pack, values[2], "triton")


@pytest.mark.triton
@pytest.mark.parametrize("split", [True, False], ids=["chunks", "tile"])
@pytest.mark.parametrize("sizes", [(64, 128, 63, 1, 192), (1, 65, 64, 0, 130), (127, 129)])
def test_chunks_are_counted_from_the_first_fact_of_a_row(
    device: torch.device, sizes: tuple[int, ...], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of just below, exactly and just above whole chunks begin at many offsets."""
    if split:
        monkeypatch.setattr(kernels("chunk_sums"), "SPLIT_FACTS", 1)
    tail = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    head = torch.arange(len(tail)) % len(sizes)
    # Every pair has as many facts as the tail of the same number.
    pack = to_device(adjacency([(len(sizes), len(tail))], head, tail, tail), device)
    check(pack, layer_inputs(pack, 3), "triton")
    check_sum(pack, layer_inputs(pack, 3)[2], "triton")


@DTYPES
@pytest.mark.parametrize("width", [1, 64, 96, 257])
def test_widths(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    pack = to_device(random_adjacency([(9, 20), (0, 0), (33, 60)], 4), device)
    values = layer_inputs(pack, width, dtype)
    check(pack, values, backend)
    check_sum(pack, strided_like(values[2]), backend)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arguments", [(0, 2, 3, 5), (0, 2, 3, 4), (1, 5, 6)])
def test_mixed_precision(
    backend: str, small: Adjacency, low: torch.dtype, arguments: tuple[int, ...]
) -> None:
    values = layer_inputs(small, 16)
    for argument in arguments:
        values[argument] = values[argument].to(low)
    check(small, values, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(backend: str, small: Adjacency, dtype: torch.dtype) -> None:
    values = layer_inputs(small, 20, dtype)
    one = torch.ones((), device=values[0].device, dtype=dtype).expand(13, 20)
    check(small, [strided_like(x) for x in values], backend, one)
    columns = random(20, 13).to(values[0]).t()
    check(small, [*values[:5], values[5].t().contiguous().t(), values[6]], backend, columns)
    if backend == "triton":
        gaps = small._replace(
            fact_index=small.fact_index._make(strided_like(x) for x in small.fact_index)
        )
        check(gaps, values, backend)
        check_sum(gaps, values[2], backend)


def test_infinity_and_nan_stay_in_their_rows(backend: str, device: torch.device) -> None:
    pack = to_device(_chain(), device)
    values = layer_inputs(pack, 20)
    values[0][3, 0] = float("nan")
    values[1][7] = float("inf")
    # Table rows of every third fact: they reach one column of one node per fact.
    values[2][1, 4], values[3][2, 5] = float("nan"), float("inf")
    out = layer(pack, values, backend)
    wanted = message_passing_ref(*values, fact_index=pack.fact_index, node_graph=pack.node_graph)
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out.isnan(), wanted.isnan())
    assert 10 < int((~out.isfinite()).sum()) < 120


def test_autocast_changes_nothing(backend: str, small: Adjacency) -> None:
    inputs = leaves(layer_inputs(small, 20))
    plain = layer(small, inputs, backend)
    wanted = gradients(plain, inputs, torch.ones_like(plain))
    with torch.autocast(plain.device.type, torch.bfloat16):
        out = layer(small, inputs, backend)
        got = gradients(out, inputs, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip((out, *got), (plain, *wanted), strict=True))


def test_uninitialised_memory_is_never_read() -> None:
    """Deterministic mode makes PyTorch fill the memory that it allocates with NaN."""
    pack = random_adjacency([(0, 0), (9, 20), (4, 0)], 4)
    inputs = leaves(layer_inputs(pack, 7))
    torch.use_deterministic_algorithms(True)
    try:
        out = layer(pack, inputs)
        grads = gradients(out, inputs, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize(
    ("argument", "bad", "message"),
    [
        (0, torch.zeros(12, 7), r"h must have shape \[13, \*\], got \[12, 7\]"),
        (1, torch.zeros(13, 1), r"p must have shape \[13\], got \[13, 1\]"),
        (2, torch.zeros(1, 7), r"table_fwd must have shape"),
        (5, torch.zeros(7, 8), r"weight must have shape \[7, 7\], got \[7, 8\]"),
        (6, torch.zeros(7, dtype=torch.int64), r"bias must be floating point"),
    ],
)
def test_wrong_arguments(small: Adjacency, argument: int, bad: Tensor, message: str) -> None:
    inputs = layer_inputs(small, 7)
    inputs[argument] = bad
    with pytest.raises(ValueError, match=message):
        layer(small, inputs)
    with pytest.raises(ValueError, match=r"table must have shape \[8, \*\], got \[1, 7\]"):
        relation_sum(torch.zeros(1, 7), fact_index=small.fact_index)


def test_wrong_fact_index(small: Adjacency) -> None:
    inputs, fact_index = layer_inputs(small, 7), small.fact_index
    for wrong, message in (
        ({"tail_perm": fact_index.tail_perm.long()}, r"fact_index\.tail_perm must be int32"),
        (
            {"head_ptr": fact_index.head_ptr[1:]},
            r"fact_index\.head_ptr must have shape \[14\], got \[13\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer(small._replace(fact_index=fact_index._replace(**wrong)), inputs)
    with pytest.raises(ValueError, match="node_graph must be int32"):
        layer(small._replace(node_graph=small.node_graph.long()), inputs)
