"""Every op as a function of its float inputs, at several sizes, for tests and the self-test."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dragkit_kernels import (
    FactGroups,
    GroupedIndex,
    causal_conv,
    fact_loss,
    fact_rows,
    fact_scores,
    gated_rms_norm,
    gather_rows,
    grouped_index,
    gumbel_topk,
    message_passing,
    prompt_embeddings,
    relation_gate,
    relation_sum,
    segment_softmax,
    segment_sum,
    ssd_scan,
)
from dragkit_kernels.testing import (
    Adjacency,
    leaves,
    positions,
    random,
    random_adjacency,
    to_device,
)


class Sizes(NamedTuple):
    """Graphs as (nodes, facts), lengths of sequences, and widths."""

    graphs: list[tuple[int, int]]
    width: int
    relations: int
    lengths: tuple[int, ...]
    heads: int
    head_width: int
    groups: int
    states: int


SMALL = Sizes([(9, 25), (0, 0), (4, 7)], 6, 4, (3, 70, 1, 20), 4, 16, 2, 16)
# The 30B model's sequences.
LARGE = Sizes(
    [(800, 2000)] * 63 + [(0, 0)], 256, 150, (170, 1, 4096, 333, 64, 900, 2), 64, 64, 8, 128
)


class Given(NamedTuple):
    """What an op gets besides its float inputs."""

    pack: Adjacency
    label: Tensor
    fact: Tensor  # int32 [B, 20], selected facts and -1
    seed: Tensor
    question_key: Tensor
    seq_pos: Tensor
    table: Tensor
    slot: Tensor
    groups: FactGroups
    by_relation: GroupedIndex
    by_graph: GroupedIndex
    by_head: GroupedIndex
    longest: int


Op = Callable[[list[Tensor], Given, str], tuple[Tensor, ...]]


def _draw(mode: str, estimator: str, num_draws: int | None = None) -> Op:
    def draw(x: list[Tensor], o: Given, backend: str) -> tuple[Tensor, ...]:
        drawn = gumbel_topk(
            *x, o.pack.fact_ptr, 20, seed=o.seed, question_key=o.question_key, mode=mode,
            estimator=estimator, temperature=0.7, max_facts=o.longest, num_draws=num_draws,
            backend=backend,
        )  # fmt: skip
        return drawn.gate, drawn.soft, drawn.index.double(), drawn.count.double()

    return draw


def _on_facts(op: Callable[..., Tensor], *names: str) -> Op:
    """An op of a fact index, and of other columns of the pack."""
    return lambda x, o, backend: (
        op(
            *x,
            fact_index=o.pack.fact_index,
            **{name: getattr(o.pack, name) for name in names},
            backend=backend,
        ),
    )


def _norm(x: list[Tensor], o: Given, backend: str) -> tuple[Tensor, ...]:
    y, weight, *gate = x
    gate = gate[0] if gate else None
    return (gated_rms_norm(y, gate, weight, groups=2, eps=1e-5, backend=backend),)


def _conv(x: list[Tensor], o: Given, backend: str) -> tuple[Tensor, ...]:
    x, weight, *bias = x
    return (causal_conv(x, weight, bias[0] if bias else None, o.seq_pos, backend=backend),)


def _gate(x: list[Tensor], o: Given, backend: str, **groupings: GroupedIndex) -> tuple[Tensor, ...]:
    pairs = o.pack.fact_index.pair_relation, o.pack.fact_index.pair_graph
    return (relation_gate(*x, *pairs, **groupings, backend=backend),)


SEQUENCE_OPS: dict[str, Op] = {
    "causal_conv": _conv,
    "causal_conv_no_bias": _conv,
    "gated_rms_norm": _norm,
    "gated_rms_norm_no_gate": _norm,
    "ssd_scan": lambda x, o, backend: (ssd_scan(*x, o.seq_pos, backend=backend),),
}
OPS: dict[str, Op] = {
    "message_passing": _on_facts(message_passing, "node_graph"),
    "relation_sum": _on_facts(relation_sum),
    "fact_scores": _on_facts(fact_scores),
    "fact_scores_groups": lambda x, o, backend: (
        fact_scores(*x, fact_index=o.pack.fact_index, groups=o.groups, backend=backend),
    ),
    "relation_gate": _gate,
    "relation_gate_grouped": lambda x, o, backend: _gate(
        x, o, backend, pairs_by_relation=o.by_relation, pairs_by_graph=o.by_graph
    ),
    "fact_rows": lambda x, o, backend: (
        fact_rows(*x, o.fact, fact_index=o.pack.fact_index, groups=o.groups, backend=backend),
    ),
    "gather_rows": lambda x, o, backend: (
        gather_rows(*x, o.pack.fact_index.head, backend=backend),
    ),
    "gather_rows_grouped": lambda x, o, backend: (
        gather_rows(*x, o.pack.fact_index.head, by_row=o.by_head, backend=backend),
    ),
    "segment_sum": lambda x, o, backend: (
        segment_sum(*x, o.pack.node_graph, len(o.question_key), backend=backend),
    ),
    "segment_softmax": lambda x, o, backend: (
        segment_softmax(*x, o.pack.node_ptr, backend=backend),
    ),
    "segment_softmax_counted": lambda x, o, backend: (
        segment_softmax(*x, o.pack.node_ptr, count=o.pack.node_count, backend=backend),
    ),
    "fact_loss": lambda x, o, backend: (
        fact_loss(*x, o.label, o.pack.fact_ptr, rho=0.7, margin=1.0),
    ),
    "prompt_embeddings": lambda x, o, backend: (
        prompt_embeddings(o.table.to(x[0]), o.label.int(), *x, o.slot, backend=backend),
    ),
    "bernoulli": _draw("bernoulli", "binary_concrete"),
    "bernoulli_straight": _draw("bernoulli", "straight_through"),
    "bernoulli_draws": _draw("bernoulli", "binary_concrete", num_draws=3),
    "exact_k": _draw("exact_k", "binary_concrete"),
    "exact_k_straight": _draw("exact_k", "straight_through"),
    "exact_k_draws": _draw("exact_k", "straight_through", num_draws=3),
    **SEQUENCE_OPS,
}


def given(sizes: Sizes, device: torch.device) -> Given:
    pack = to_device(random_adjacency(sizes.graphs, sizes.relations), device)
    facts, graphs = pack.fact_index.num_facts, len(sizes.graphs)
    fact = pack.fact_ptr[:-1, None] + torch.arange(20, device=device, dtype=torch.int32)
    # Every other fact takes a vector in place of a token.
    slot = torch.arange(facts, device=device, dtype=torch.int32)
    index = pack.fact_index
    # Facts in another order, each twice.
    row = torch.arange(2 * facts, device=device).flip(0).int() // 2
    perm, ptr = grouped_index(row, facts)
    return Given(
        pack,
        (random(facts, seed=3) > 1.3).float().to(device),
        torch.where(fact < pack.fact_ptr[1:, None], fact, -1).int(),
        torch.tensor(7, device=device),
        torch.arange(graphs, device=device),
        positions(sizes.lengths, device),
        random(2, sizes.width).to(device),
        torch.where(slot % 2 == 0, slot, -1),
        FactGroups(row, ptr, perm),
        grouped_index(index.pair_relation, sizes.relations),
        grouped_index(index.pair_graph, graphs),
        grouped_index(index.head, index.num_nodes),
        max(size for _, size in sizes.graphs),
    )


def inputs(name: str, sizes: Sizes, o: Given, dtype: torch.dtype) -> list[Tensor]:
    """Float inputs of an op. Scores, dt, A and D are at least float32, as in training."""
    nodes, pairs = o.pack.fact_index.num_nodes, o.pack.fact_index.num_pairs
    facts, graphs, width = o.pack.fact_index.num_facts, len(sizes.graphs), sizes.width
    rows, inner = sum(sizes.lengths), sizes.heads * sizes.head_width
    maps, channels = (rows, sizes.groups, sizes.states), inner + 2 * sizes.groups * sizes.states
    square = (width, width)
    base = name.removesuffix("_grouped").removesuffix("_groups").removesuffix("_counted")
    shapes = {
        "message_passing": [
            *((nodes, width), (nodes,), (pairs, width), (pairs, width)),
            *((graphs, width), square, (width,)),
        ],
        "relation_sum": [(pairs, width)],
        "fact_scores": [(nodes,), (pairs,), (nodes,), ()],
        "relation_gate": [(2, sizes.relations, width), (graphs, 3, width)],
        "fact_rows": [(nodes, width), (pairs, width)],
        "gather_rows": [(nodes, width)],
        "segment_sum": [(nodes, width)],
        "segment_softmax": [(nodes,)],
        "prompt_embeddings": [(facts, width)],
        "causal_conv": [(rows, channels), (channels, 4), (channels,)],
        "causal_conv_no_bias": [(rows, channels), (channels, 4)],
        "gated_rms_norm": [(rows, inner), (inner,), (rows, inner)],
        "gated_rms_norm_no_gate": [(rows, inner), (inner,)],
        "ssd_scan": [
            *((rows, sizes.heads, sizes.head_width), (rows, sizes.heads), (sizes.heads,)),
            *(maps, maps, (sizes.heads,)),
        ],
    }.get(base, [(facts,)])
    values = [random(*s, seed=i) for i, s in enumerate(shapes)]
    dtypes = [dtype] * len(values)
    full = torch.promote_types(dtype, torch.float32)
    if name == "ssd_scan":
        values[1] = values[1].sigmoid()
        values[2] = -torch.logspace(-3, 0, sizes.heads)
        values[3:5] = (0.2 * t for t in values[3:5])
        dtypes = [dtype, full, full, dtype, dtype, full]
    elif name == "message_passing":
        values = [width**-0.5 * x for x in values]
    elif name not in SEQUENCE_OPS and values[0].dim() < 2:
        dtypes = [full] * len(values)
    return [x.to(o.label.device, d) for x, d in zip(values, dtypes, strict=True)]


def ramp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of `x` from -1 to 2, rounded to `dtype`, whose sum is not zero."""
    return torch.linspace(-1, 2, x.numel()).view_as(x).to(dtype).to(x)


def run(
    name: str, values: list[Tensor], o: Given, backend: str, *, grad_dtype: torch.dtype
) -> list[Tensor]:
    """The outputs, and the gradients of all inputs for a gradient rounded to `grad_dtype`."""
    tried = leaves(values)
    out = OPS[name](tried, o, backend)
    trained = [x for x in out if x.requires_grad]
    ramps = [ramp(x, grad_dtype) for x in trained]
    grads = torch.autograd.grad(trained, tried, ramps, materialize_grads=True)
    return [*(x.detach() for x in out), *grads]
