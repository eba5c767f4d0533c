"""Gated relation rows: the reference against a loop over pairs, both backends against it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import grouped_index, relation_gate, relation_gate_ref
from dragkit_kernels.testing import (
    assert_close,
    fenced_allocations,
    gradients,
    leaves,
    random,
    strided_like,
)
from tests.ops.cases import DTYPES, FORWARD, GRADIENT

# The interpreter also computes masked elements, and NumPy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RELATIONS, GRAPHS = 6, 4
Pairs = tuple[Tensor, Tensor]


def _pack() -> Pairs:
    """Pairs as in a retriever: ascending by graph, then one self-loop per graph.

    Self-loops have the last relation. The first and the third graph have no other pair.
    Relations 0 and 3 do not occur.
    """
    relation = [1, 2, 4, 1, 4, *[RELATIONS - 1] * GRAPHS]
    return torch.tensor(relation).int(), torch.tensor([1, 1, 1, 3, 3, *range(GRAPHS)]).int()


def _random() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    relation, graph = (torch.randint(0, n, (41,), generator=generator) for n in (6, 4))
    return relation.int(), graph.int()


def _hub() -> Pairs:
    """All pairs but one have the same relation and graph, which fills several blocks of rows."""
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
    width: int,
    instructions: int = 2,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = (2, RELATIONS, width), (GRAPHS, instructions, width)
    return [random(*s, seed=i).to(device, dtype) for i, s in enumerate(shapes)]


def on(device: torch.device, pairs: Pairs) -> Pairs:
    return tuple(x.to(device) for x in pairs)


def grouped_pairs(pairs: Pairs) -> dict[str, object]:
    names = (("pairs_by_relation", RELATIONS), ("pairs_by_graph", GRAPHS))
    return {name: grouped_index(x, n) for (name, n), x in zip(names, pairs, strict=True)}


def check(
    values: list[Tensor],
    pairs: Pairs,
    backend: str,
    grad: Tensor | None = None,
    *,
    with_index: bool = False,
) -> None:
    """Asserts equality with the float64 reference and that the op writes all of its buffers."""
    tried, exact = leaves(values), leaves([x.double() for x in values])
    expected, dtype = relation_gate_ref(*exact, *pairs), values[0].dtype
    if grad is None:
        grad = random(*expected.shape, seed=9).to(values[0])
    with fenced_allocations():
        actual = relation_gate(
            *tried, *pairs, **(grouped_pairs(pairs) if with_index else {}), backend=backend
        )
        got = gradients(actual, tried, grad)
        zero_grads = gradients(relation_gate(*tried, *pairs, backend=backend), tried, 0 * grad)
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert_close(actual, expected, tolerance=FORWARD[dtype])
    # The op masks the gradient where the rounded output is not positive.
    wanted = torch.autograd.grad(expected, exact, torch.where(actual <= 0, 0.0, grad.double()))
    for name, g, want in zip("ui", got, wanted, strict=True):
        assert g.dtype == dtype
        assert_close(g, want, name=f"d{name}", tolerance=GRADIENT[dtype])
    assert not any(g.any() for g in zero_grads)


@pytest.mark.parametrize("name", PAIRS)
def test_the_reference_matches_the_loop(name: str) -> None:
    relation, graph = PAIRS[name]()
    u, i = (x.double() for x in make_values(3))
    out = relation_gate_ref(u, i, relation, graph)
    assert out.shape == (2, len(relation), 2, 3)
    for d in (0, 1):
        for p, (r, g) in enumerate(zip(relation.tolist(), graph.tolist(), strict=True)):
            for k in (0, 1):
                assert torch.equal(out[d, p, k], (u[d, r] * i[g, k]).clamp(min=0))


@pytest.mark.parametrize("with_index", [False, True], ids=["sorts", "with_index"])
@pytest.mark.parametrize("name", PAIRS)
def test_matches_the_reference(
    backend: str, device: torch.device, name: str, with_index: bool
) -> None:
    pairs = on(device, PAIRS[name]())
    check(make_values(7, 3, device=device), pairs, backend, with_index=with_index)
    low = make_values(7, 1, device=device, dtype=torch.float16)
    check(low, pairs, backend, with_index=with_index)


@DTYPES
@pytest.mark.parametrize("width", [0, 1, 64, 96, 257])
def test_widths(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    check(make_values(width, device=device, dtype=dtype), on(device, _pack()), backend)


def test_strided_inputs_and_gradients(backend: str, device: torch.device) -> None:
    values = [strided_like(x) for x in make_values(7, device=device)]
    pairs = tuple(strided_like(x) for x in on(device, _random()))
    grad = torch.randn(2, 41, 2, 7, device=device)
    check(values, pairs, backend, strided_like(grad), with_index=True)
    check(values, pairs, backend, torch.ones((), device=device).expand(2, 41, 2, 7))


@pytest.mark.triton
def test_what_underflows_has_no_gradient(device: torch.device) -> None:
    """A product below the smallest float16 is zero. The backward must round as the forward did."""
    values = [x * 2.5e-4 for x in make_values(64, device=device, dtype=torch.float16)]
    pairs, results = on(device, _random()), []
    for backend in ("triton", "torch"):
        tried = leaves(values)
        out = relation_gate(*tried, *pairs, backend=backend)
        results.append([out, *gradients(out, tried, torch.full_like(out, 64.0))])
    positive = (results[0][0] > 0).float().mean()
    assert 0.1 < positive < 0.4, "half of the products would be positive"
    for got, want in zip(*results, strict=True):
        assert_close(got, want.double())


def test_nan_and_infinity_pass_through_as_in_pytorch(backend: str, device: torch.device) -> None:
    values, pairs = make_values(7, device=device), on(device, _pack())
    values[0][1, 1, 2], values[0][0, 2, 3], values[1][1, 0, 1] = math.nan, math.inf, -math.inf
    tried, plain = leaves(values), leaves(values)
    actual = relation_gate(*tried, *pairs, backend=backend)
    expected = relation_gate_ref(*plain, *pairs)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    grad = torch.randn_like(expected)
    for got, want in zip(
        gradients(actual, tried, grad), gradients(expected, plain, grad), strict=True
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_only_the_pytorch_path_saves_the_output(backend: str, device: torch.device) -> None:
    """Under dropout no other op saves the output, so the kernels free its memory."""
    values, pairs = leaves(make_values(7, device=device)), on(device, _pack())
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: shapes.append(x.shape) or x, lambda x: x
    ):
        out = relation_gate(*values, *pairs, backend=backend)
    assert (out.shape in shapes) == (backend == "torch")


def test_low_precision_sums_do_not_stall(backend: str, device: torch.device) -> None:
    """A relation has 2000 pairs. A bfloat16 sum of ones stops growing at 256."""
    ones = [torch.ones(s, device=device).bfloat16() for s in ((2, 1, 1), (1, 1, 1))]
    ones, rows = leaves(ones), torch.zeros(2000, device=device).int()
    out = relation_gate(*ones, rows, rows, backend=backend)
    du, di = gradients(out, ones, torch.ones_like(out))
    assert_close(du, torch.full((2, 1, 1), 2000.0))
    assert_close(di, torch.full((1, 1, 1), 4000.0))


def test_wrong_arguments() -> None:
    (u, i), (relation, graph) = make_values(7), _random()
    by_relation, by_graph = grouped_pairs((relation, graph)).values()
    for inputs, options, message in (
        ((u[0], i, relation, graph), {}, r"relation must have shape \[2, \*, 7\], got \[6, 7\]"),
        ((u, i, relation, graph.long()), {}, "pair_graph must be int32"),
        ((u, i[:, :0], relation, graph), {}, "at least one instruction"),
        (
            (u, i, relation, graph),
            {"pairs_by_graph": by_graph},
            "both pairs_by_relation and pairs_by_graph",
        ),
        (
            (u, i, relation, graph),
            {
                "pairs_by_relation": by_relation._replace(ptr=by_relation.ptr[1:]),
                "pairs_by_graph": by_graph,
            },
            r"pairs_by_relation.ptr must have shape \[7\], got \[6\]",
        ),
        (
            (u, i, relation, graph),
            {"pairs_by_relation": by_relation, "pairs_by_graph": grouped_index(graph[1:], 4)},
            r"pairs_by_graph.perm must have shape \[41\], got \[40\]",
        ),
        (
            (u, i, relation, graph),
            {
                "pairs_by_relation": by_relation._replace(perm=by_relation.perm.long()),
                "pairs_by_graph": by_graph,
            },
            "pairs_by_relation.perm must be int32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            relation_gate(*inputs, **options)
