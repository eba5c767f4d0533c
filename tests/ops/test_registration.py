"""The registered ops under opcheck and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dragkit_kernels import (
    FactGroups,
    fact_scores,
    message_passing,
    relation_sum,
    segment_softmax,
)
from dragkit_kernels.testing import Adjacency, assert_close, random_adjacency

WIDTH = 6


def floats(pack: Adjacency, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    nodes, pairs = pack.fact_index.num_nodes, pack.fact_index.num_pairs
    shapes = {
        "h": (nodes, WIDTH),
        "p": (nodes,),
        "table_fwd": (pairs, WIDTH),
        "table_inv": (pairs, WIDTH),
        "self_table": (len(pack.node_ptr) - 1, WIDTH),
        "weight": (WIDTH, WIDTH),
        "bias": (WIDTH,),
    }
    return {n: torch.randn(s).to(dtype).requires_grad_() for n, s in shapes.items()}


def fact_groups(rows: int) -> FactGroups:
    """Two facts for every merged fact."""
    row = torch.arange(2 * rows, dtype=torch.int32) % rows
    ptr = torch.arange(rows + 1, dtype=torch.int32) * 2
    return FactGroups(row, ptr, torch.argsort(row, stable=True).int())


def test_opcheck_message_passing() -> None:
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    x = list(floats(pack).values())
    index = (list(pack.fact_index), pack.node_graph)
    torch.library.opcheck(torch.ops.dragkit.message_passing_fwd.default, (*x, *index, False))
    plain = [t.detach() for t in x]
    out = torch.ops.dragkit.message_passing_fwd(*plain, *index, False)
    for mask in ([True] * 7, [False, True, False, True, False, True, False]):
        arguments = (torch.randn_like(out), out, *plain, *index, mask, False)
        torch.library.opcheck(torch.ops.dragkit.message_passing_bwd.default, arguments)


def test_opcheck_relation_sum_and_segment_softmax() -> None:
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    o, ops = pack.fact_index, torch.ops.dragkit
    table = torch.randn(o.num_pairs, WIDTH).requires_grad_()
    torch.library.opcheck(ops.relation_sum_fwd.default, (table, list(o), False))
    rows = torch.randn(9, WIDTH)
    torch.library.opcheck(
        ops.relation_sum_bwd.default,
        (rows, list(o), False),
    )
    score = torch.randn(9).requires_grad_()
    for count in (None, pack.node_count):
        arguments = (score, pack.node_ptr, count, False)
        torch.library.opcheck(ops.segment_softmax_fwd.default, arguments)
    p = torch.rand(9)
    counted = (p, p, pack.node_ptr, pack.node_count, False)
    torch.library.opcheck(ops.segment_softmax_bwd.default, counted)


def test_fake_tensors_have_the_dtypes_of_low_precision() -> None:
    pack = random_adjacency([(5, 9), (0, 0), (4, 6)], 4)
    x = [t.detach() for t in floats(pack, torch.bfloat16).values()]
    index = list(pack.fact_index)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dragkit.message_passing_fwd.default,
        (*x, index, pack.node_graph, False),
        test_utils=utils,
    )
    torch.library.opcheck(
        torch.ops.dragkit.relation_sum_fwd.default, (x[2], index, False), test_utils=utils
    )
    torch.library.opcheck(
        torch.ops.dragkit.segment_softmax_fwd.default,
        (x[1], pack.node_ptr, pack.node_count, False),
        test_utils=utils,
    )


def test_second_derivatives_are_refused() -> None:
    pack = random_adjacency([(5, 9), (4, 6)], 4)
    x = floats(pack)
    index, node_graph = list(pack.fact_index), pack.node_graph
    outputs = {
        "message_passing_bwd": torch.ops.dragkit.message_passing_fwd(
            *x.values(), index, node_graph, False
        ),
        "segment_softmax_bwd": segment_softmax(x["p"], pack.node_ptr),
        "relation_sum_bwd": relation_sum(x["table_fwd"], fact_index=pack.fact_index),
    }
    for name, out in outputs.items():
        inputs = [t for t in x.values() if name.startswith("message")] or [x["p"], x["table_fwd"]]
        grads = torch.autograd.grad(
            (out**2).sum(), inputs, create_graph=True, materialize_grads=True
        )
        with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
            sum(g.sum() for g in grads).backward()


def model(pack: Adjacency, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A small retriever: initial node states, two layers with softmax, fact scores."""
    h = torch.relu(relation_sum(x["table_inv"], fact_index=pack.fact_index)) + x["h"]
    p = x["p"]
    for _ in range(2):
        h = message_passing(
            h,
            p,
            x["table_fwd"],
            x["table_inv"],
            x["self_table"],
            x["weight"].t(),
            x["bias"],
            fact_index=pack.fact_index,
            node_graph=pack.node_graph,
        )
        p = segment_softmax(h.sum(1), pack.node_ptr, count=pack.node_count)
    logits = fact_scores(
        h @ x["bias"],
        x["table_fwd"].sum(1),
        h.sum(1),
        x["bias"][0],
        fact_index=pack.fact_index,
        groups=fact_groups(pack.fact_index.num_facts),
    )
    return h, p, logits


def test_compiled_equals_eager_for_any_size() -> None:
    """One graph serves packs of every size, gradients included.

    The sizes of the first pack all differ, because compile treats equal sizes as one symbol.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for sizes in ([(6, 9), (13, 20)], [(4, 7), (0, 0), (9, 30)], [(3, 2)] * 5):
        pack = random_adjacency(sizes, 6)
        x = floats(pack)
        outputs = []
        for function in (model, compiled):
            out = function(pack, x)
            loss = sum((i + 1) * (t * t).sum() for i, t in enumerate(out))
            outputs.append((*out, *torch.autograd.grad(loss, list(x.values()))))
        for number, (want, got) in enumerate(zip(*outputs, strict=True)):
            assert_close(got, want.double(), name=f"output {number} of {sizes}")
    assert counter.frame_count == 1
