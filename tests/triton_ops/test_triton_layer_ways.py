"""The layer's forward by one-hot products, and its scores: what both say beside the other tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragkit_kernels import message_passing
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.launch import SUM, force_sum, sum_way
from dragkit_kernels.message_passing import _walks, chunks, forward
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
from tests.triton_ops.cases import LAYER_NAMES as NAMES
from tests.triton_ops.cases import layer_inputs, to_device

LOW = (torch.float16, torch.bfloat16)


def layer(pack: Adjacency, inputs: list[Tensor], score: Tensor | None = None) -> object:
    where = {"orders": pack.orders, "node_graph": pack.node_graph, "backend": "triton"}
    return message_passing(*inputs, score_weight=score, **where)


def padded(pack: Adjacency, rows: int) -> Adjacency:
    """The pack with facts after its last offset, which belong to no node."""
    o = pack.orders
    grown = {
        name: torch.cat([getattr(o, name), getattr(o, name).new_full((rows,), value)])
        for name, value in (
            *((name, 0) for name in ("head", "tail", "fact_pair")),
            *((name, o.num_facts - 1) for name in ("tail_fact", "head_fact", "pair_fact")),
            *((name, 1) for name in ("head_count", "tail_count")),
        )
    }
    return pack._replace(orders=o._replace(**grown))


def hub() -> Adjacency:
    """Of 70 nodes, the 33rd has 100 facts as a tail and the first 33 as a head; some have none."""
    head = torch.cat([torch.arange(100) % 20 + 40, torch.zeros(33, dtype=torch.int64)])
    tail = torch.cat([torch.full((100,), 32), torch.arange(33)])
    return adjacency([(70, 133)], head, tail, torch.arange(133) % 3)


PACKS = {
    "empty_first_middle_last": lambda: random_adjacency(
        [(0, 0), (5, 12), (1, 3), (0, 0), (34, 71), (4, 0), (0, 0)], 6
    ),
    "hub": hub,
    # As many facts of a tile as a block has, one less and one more.
    "blocks": lambda: adjacency(
        [(96, 97)],
        torch.arange(97) % 7,
        torch.arange(96).repeat_interleave(
            torch.tensor([1] * 31 + [0] + [1] * 32 + [2] + [1] * 30 + [2])
        ),
        torch.arange(97) % 2,
    ),
    "no_facts": lambda: random_adjacency([(3, 0), (2, 0)], 1),
    "padding": lambda: padded(random_adjacency([(5, 9), (3, 4)], 2), 40),
}


def rounded_reference(pack: Adjacency, values: list[Tensor], tables: torch.dtype) -> Tensor:
    """float64, with every weight n p rounded as the matrix of the product holds it."""
    h, p, fwd, inv, own, weight, bias = [x.double() for x in values]
    o = pack.orders
    n = int(o.tail_ptr[-1])
    out = h @ weight + bias + p.unsqueeze(1) * own[pack.node_graph.long()]
    for source, target, count, table in (
        (o.head, o.tail, o.tail_count, fwd),
        (o.tail, o.head, o.head_count, inv),
    ):
        sent = (values[1].float()[source[:n].long()] * count[:n]).to(tables).double()
        rows = sent.unsqueeze(1) * table[o.fact_pair[:n].long()]
        out = out.index_add(0, target[:n].long(), rows)
    return out.relu()


@pytest.mark.parametrize("tables", LOW)
@pytest.mark.parametrize("name", PACKS)
def test_one_hot_is_the_sum_of_rounded_weights(
    device: torch.device, name: str, tables: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result against float64 with the same rounding; gradients are those of the slots."""
    monkeypatch.setattr(chunks, "SPLIT_FACTS", 1)  # chunks would be made, and must not be
    pack = to_device(PACKS[name](), device)
    # The product of the layer itself has to be on the tensor cores, too.
    dtype = torch.float16 if INTERPRETED else tables
    values = layer_inputs(pack, 20, dtype)
    values[1] = values[1].float()
    values[2], values[3] = values[2].to(tables), strided_like(values[3].to(tables))
    tried = leaves(values)
    launches = []
    monkeypatch.setattr(forward, "chunk_sums", lambda *_: launches.append(1))
    with fenced_allocations(), force_sum("one-hot"):
        out = layer(pack, tried)
        got = gradients(out, tried, torch.ones_like(out))
    assert not launches
    expected = rounded_reference(pack, values, tables)
    # The interpreter cuts a weight in bfloat16 off instead of rounding it.
    cut = INTERPRETED and tables == torch.bfloat16
    assert_close(out, expected, tolerance=8e-3 if cut else 1e-3 if dtype == LOW[0] else 4e-3)
    again = torch.ops.dragkit.message_passing_bwd
    wanted = again(
        torch.ones_like(out),
        out.detach(),
        *values,
        *_walks(pack.orders),
        pack.node_graph,
        [True] * 7,
        True,
    )
    for x, y, field in zip(got, wanted, NAMES, strict=True):
        assert torch.equal(x, y), field


@pytest.mark.parametrize("width", [1, 64, 96, 257])
def test_one_hot_widths(device: torch.device, width: int) -> None:
    pack = to_device(random_adjacency([(9, 20), (0, 0), (33, 60)], 4), device)
    values = layer_inputs(pack, width, torch.float16)
    with fenced_allocations(), force_sum("one-hot"):
        out = layer(pack, values)
    assert_close(out, rounded_reference(pack, values, torch.float16), tolerance=1e-3)


def test_a_broken_table_row_stays_in_its_columns_and_tiles(device: torch.device) -> None:
    """By slots only the row's own nodes have it; a broken p reaches no other node either way."""
    node = torch.arange(95)
    pack = to_device(adjacency([(96, 95)], node, node + 1, node), device)
    values = layer_inputs(pack, 20, torch.float16)
    # Fact 40 has the pair 40 of its own, from node 40 to node 41: the second tile of 32 nodes.
    values[2][40, 3] = float("nan")
    values[3][70, 5] = float("inf")
    for way in ("slots", "one-hot"):
        with force_sum(way):
            out = layer(pack, values)
        broken = torch.zeros(96, 20, dtype=torch.bool, device=device)
        if way == "one-hot":
            broken[32:64, 3] = broken[64:96, 5] = True
            assert torch.equal(~out.isfinite(), broken)
        else:
            broken[41, 3] = broken[70, 5] = True
            assert bool((out.isfinite() | broken).all()) and bool(out[41, 3].isnan())
    values = layer_inputs(pack, 20, torch.float16)
    values[1][50] = float("nan")
    with force_sum("one-hot"):
        out = layer(pack, values)
    rows = (~out.isfinite()).any(1).nonzero().flatten().tolist()
    assert rows == [49, 50, 51]


def test_the_table_says_slots_and_is_put_back() -> None:
    before = dict(SUM)
    assert set(before.values()) == {"slots"} and sum_way(torch.float32) == "slots"
    with pytest.raises(ZeroDivisionError), force_sum("one-hot"):
        assert sum_way(torch.bfloat16) == "one-hot" and sum_way(torch.float32) == "slots"
        raise ZeroDivisionError
    assert before == SUM
    with pytest.raises(ValueError, match="slots or one-hot, got 'rows'"), force_sum("rows"):
        pass
