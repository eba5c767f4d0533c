"""Checks at full size on a GPU: hubs, packed sequences, more than 2^31 elements.

With the interpreter the same tests run on small packs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactIndex,
    causal_conv,
    gated_rms_norm,
    gumbel_topk,
    message_passing,
    message_passing_ref,
    relation_sum,
    relation_sum_ref,
    segment_softmax,
    segment_softmax_ref,
)
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.op_cases import LARGE, OPS, SEQUENCE_OPS, SMALL, given, inputs
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
    to_device,
)
from tests.ops.cases import layer_inputs

pytestmark = pytest.mark.triton

SIZES = SMALL if INTERPRETED else LARGE
WIDTH = SIZES.width
# The interpreter computes bfloat16 products wrongly.
LOW = torch.float16 if INTERPRETED else torch.bfloat16


def star(facts: int) -> Adjacency:
    head = torch.arange(1, facts + 1)
    return adjacency([(facts + 1, facts)], head, torch.zeros_like(head), torch.zeros_like(head))


def chain(nodes: int) -> Adjacency:
    node = torch.arange(nodes - 1)
    return adjacency([(nodes, nodes - 1)], node, node + 1, node % 3)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(lambda: star(200 if INTERPRETED else 10**6), id="star"),
        pytest.param(lambda: chain(50 if INTERPRETED else 10**5), id="chain"),
        pytest.param(
            lambda: random_adjacency([(40, 90) if INTERPRETED else (400_000, 10**6)], 20),
            id="many_facts",
        ),
    ],
)
def test_extreme_graphs(device: torch.device, shape: Callable[[], Adjacency]) -> None:
    pack = to_device(shape(), device)
    narrow = [x / 16 for x in layer_inputs(pack, 8)]
    tried, exact = leaves(narrow), leaves([x.double() for x in narrow])
    options = {"fact_index": pack.fact_index, "node_graph": pack.node_graph}
    out = message_passing(*tried, **options, backend="triton")
    wanted = message_passing_ref(*exact, **options)
    assert_close(out, wanted, name="out")
    grad = torch.ones_like(out)
    pairs = zip(
        gradients(out, tried, grad), gradients(wanted, exact, (out > 0).double()), strict=True
    )
    for number, (x, y) in enumerate(pairs):
        assert_close(x, y, name=str(number))
    assert_close(
        relation_sum(narrow[2], fact_index=pack.fact_index, backend="triton"),
        relation_sum_ref(narrow[2].double(), fact_index=pack.fact_index),
    )
    score = narrow[0].sum(1)
    assert_close(
        segment_softmax(score, pack.node_ptr, backend="triton"),
        segment_softmax_ref(score.double(), pack.node_ptr),
    )


def test_beyond_the_range_of_an_int32(device: torch.device) -> None:
    """Offsets into states and tables need 64 bits, in the forward and the backward."""
    nodes = 40 if INTERPRETED else 2**31 // WIDTH + 1000
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 64 * 2**30:
        pytest.skip("needs 64 GiB of free device memory")
    # Fact i goes from node i to node i + 1 and uses table row i.
    node = torch.arange(nodes - 1, device=device)
    ones = torch.ones_like(node, dtype=torch.int32)
    as_int = [x.int() for x in (node, node + 1)]
    ptr = torch.arange(nodes + 1, device=device, dtype=torch.int32)
    fact_index = FactIndex(
        head=as_int[0],
        tail=as_int[1],
        tail_ptr=(ptr - 1).clamp(min=0),
        tail_perm=as_int[0],
        head_ptr=ptr.clamp(max=nodes - 1),
        head_perm=as_int[0],
        pair_ptr=ptr[:-1],
        pair_perm=as_int[0],
        pair_relation=as_int[0],
        pair_graph=torch.zeros_like(as_int[0]),
        fact_pair=as_int[0],
        head_count=ones,
        tail_count=ones,
    )
    sampled = [0, 1, nodes // 2, nodes - 3, nodes - 2]
    if not INTERPRETED:
        wrap = 2**31 // WIDTH
        sampled += [wrap - 2, wrap - 1, wrap, wrap + 1]
    rows = torch.tensor(sorted(sampled), device=device)
    table = torch.zeros(nodes - 1, WIDTH, device=device, dtype=LOW)
    table[rows] = torch.randn(len(sampled), WIDTH, device=device).to(LOW)
    table.requires_grad_()
    out = relation_sum(table, fact_index=fact_index, backend="triton")
    wanted = table.detach()[rows].float()
    assert_close(out[rows] - _others(table, rows - 1), wanted.to(LOW).float(), tolerance=8e-3)
    grad = torch.zeros_like(out)
    grad[rows] = 1.0
    (d_table,) = torch.autograd.grad(out, table, grad)
    expected = grad[rows].float() + grad[rows + 1].float()
    assert_close(d_table[rows].float(), expected)
    del out, d_table, grad

    h = torch.zeros(nodes, WIDTH, device=device, dtype=LOW)
    h[rows] = torch.randn(len(sampled), WIDTH, device=device).to(LOW)
    weight = torch.eye(WIDTH, device=device, dtype=LOW)
    zeros = torch.zeros(nodes, device=device)
    graph = torch.zeros(nodes, device=device, dtype=torch.int32)
    self_table = torch.zeros(1, WIDTH, device=device, dtype=LOW)
    with torch.no_grad():
        out = message_passing(
            h, zeros, table, table, self_table, weight, self_table[0],
            fact_index=fact_index, node_graph=graph, backend="triton",
        )  # fmt: skip
    assert torch.equal(out[rows], h[rows].relu())


def _others(table: Tensor, rows: Tensor) -> Tensor:
    """The table row of the fact that ends in each node, zeros for node 0."""
    incoming = table.detach()[rows.clamp(min=0)].float()
    return torch.where((rows >= 0).unsqueeze(1), incoming, 0.0)


def test_a_draw_is_the_same_on_cpu_and_gpu(device: torch.device) -> None:
    """Equal counters give equal noise, so both devices select the same facts."""
    sizes = torch.tensor([0, 30, 0, 7] if INTERPRETED else [0, 2000, 0, 50, 9000])
    ptr = sizes.cumsum(0)
    ptr = torch.cat([ptr[:1] * 0, ptr]).int()
    logits = torch.randn(int(sizes.sum()), generator=torch.Generator().manual_seed(2))
    keys = torch.arange(len(sizes))
    for mode in ("bernoulli", "exact_k"):
        options = {"mode": mode, "max_facts": int(sizes.max())}
        host = gumbel_topk(
            logits, ptr, 20, seed=torch.tensor(5), question_key=keys, backend="torch", **options
        )
        on_device = gumbel_topk(
            logits.to(device), ptr.to(device), 20, seed=torch.tensor(5, device=device),
            question_key=keys.to(device), backend="triton", **options,
        )  # fmt: skip
        assert torch.equal(on_device.index.cpu(), host.index)
        assert torch.equal(on_device.count.cpu(), host.count)
        assert_close(on_device.soft.cpu(), host.soft.double(), tolerance=1e-5)


@pytest.mark.parametrize("name", SEQUENCE_OPS)
def test_packed_sequences_equal_sequences_alone(device: torch.device, name: str) -> None:
    o = given(SIZES, device)
    values, rows, begin = inputs(name, SIZES, o, LOW), len(o.seq_pos), 0
    (whole,) = OPS[name](values, o, "triton")
    for length in SIZES.lengths:
        part = slice(begin, begin + length)
        part_values = [x[part].contiguous() if len(x) == rows else x for x in values]
        (alone,) = OPS[name](part_values, o._replace(seq_pos=o.seq_pos[part].clone()), "triton")
        assert_close(whole[part], alone.double(), name=f"{name} from {begin}")
        begin += length


@pytest.mark.parametrize("name", ["causal_conv", "gated_rms_norm"])
def test_rows_beyond_the_range_of_an_int32(device: torch.device, name: str) -> None:
    """Rows beyond 2^31 elements equal the same rows near the start."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    columns = 64 if INTERPRETED else 4096
    period = 8
    rows = 64 if INTERPRETED else (2**31 // columns // period + 4) * period
    draw = torch.Generator().manual_seed(1)
    pattern = torch.randn(period, columns, generator=draw).to(device, LOW)
    x = pattern.repeat(rows // period, 1)
    seq_pos = torch.arange(period, dtype=torch.int32, device=device).repeat(rows // period)
    weight = torch.randn(columns, 4, generator=draw).to(device, LOW)

    def run(x: Tensor, seq_pos: Tensor) -> Tensor:
        if name == "causal_conv":
            return causal_conv(x, weight, None, seq_pos, backend="triton")
        return gated_rms_norm(x, x, weight[:, 0], groups=1, eps=1e-5, backend="triton")

    with torch.no_grad():
        whole = run(x, seq_pos)
        small = run(pattern.contiguous(), seq_pos[:period].contiguous())
    assert torch.equal(whole[:period], small) and torch.equal(whole[-period:], small)
