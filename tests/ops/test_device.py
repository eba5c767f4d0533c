"""Checks at full size on a GPU: repeats, low precision, hubs, more than 2^31 elements.

With the interpreter the same tests run on small packs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dragkit_kernels import (
    FactIndex,
    fact_loss,
    fact_rows,
    fact_scores,
    gather_rows,
    gumbel_topk,
    message_passing,
    message_passing_ref,
    relation_gate,
    relation_sum,
    relation_sum_ref,
    segment_softmax,
    segment_softmax_ref,
    segment_sum,
)
from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.testing import (
    Adjacency,
    adjacency,
    assert_close,
    gradients,
    leaves,
    random_adjacency,
)
from tests.ops.cases import to_device

pytestmark = pytest.mark.triton

SIZES = [(9, 25), (0, 0), (4, 7)] if INTERPRETED else [(800, 2000)] * 63 + [(0, 0)]
WIDTH, RELATIONS = (6, 4) if INTERPRETED else (256, 150)
REPEATS = 2 if INTERPRETED else 20
# The interpreter computes bfloat16 products wrongly.
LOW = torch.float16 if INTERPRETED else torch.bfloat16

Case = Callable[[str], tuple[Tensor, ...]]


def layer_inputs(pack: Adjacency, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    nodes, pairs = pack.fact_index.num_nodes, pack.fact_index.num_pairs
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        *((nodes, WIDTH), (nodes,), (pairs, WIDTH), (pairs, WIDTH)),
        *((len(pack.node_ptr) - 1, WIDTH), (WIDTH, WIDTH), (WIDTH,)),
    ]
    device = pack.node_graph.device
    scale = WIDTH**-0.5
    return [(scale * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes]


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """For every op, a function from a backend to outputs and gradients of the float inputs."""
    pack = to_device(random_adjacency(SIZES, RELATIONS), device)
    layer = layer_inputs(pack, dtype)
    facts = pack.fact_index.num_facts
    longest = max(size for _, size in SIZES)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(facts, generator=generator).to(device)
    seed = torch.tensor(7, device=device)
    keys = torch.arange(len(SIZES), device=device)

    def run(function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
        inputs = leaves(list(values))
        out = function(*inputs)
        outputs = [x for x in out if x.requires_grad]
        # Rounded to the case's dtype, so that the float64 case has the same gradients.
        grads = [torch.linspace(-1, 1, x.numel()).view_as(x).to(dtype).to(x) for x in outputs]
        grads_in = torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)
        return (*(x.detach() for x in out), *grads_in)

    def layer_case(backend: str) -> tuple[Tensor, ...]:
        options = {"fact_index": pack.fact_index, "node_graph": pack.node_graph, "backend": backend}
        return run(lambda *x: (message_passing(*x, **options),), *layer)

    def relation_sum_case(backend: str) -> tuple[Tensor, ...]:
        return run(
            lambda x: (relation_sum(x, fact_index=pack.fact_index, backend=backend),), layer[2]
        )

    def softmax_case(backend: str) -> tuple[Tensor, ...]:
        counted = {"count": pack.node_count, "backend": backend}
        return run(lambda x: (segment_softmax(x, pack.node_ptr, **counted),), layer[0].sum(1))

    def scores_case(backend: str) -> tuple[Tensor, ...]:
        options = {"fact_index": pack.fact_index, "backend": backend}
        tables = [x.float() for x in (layer[0][:, 0], layer[2][:, 0], layer[0][:, 1], layer[6][0])]
        return run(lambda *x: (fact_scores(*x, **options),), *tables)

    def draw_case(backend: str) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for mode in ("bernoulli", "exact_k"):
            options = {"seed": seed, "question_key": keys, "mode": mode, "max_facts": longest}

            def draw(x: Tensor, options: dict = options) -> tuple[Tensor, ...]:
                drawn = gumbel_topk(x, pack.fact_ptr, 20, **options, backend=backend)
                return drawn.gate, drawn.soft, drawn.index.double(), drawn.count.double()

            results += run(draw, logits)
        return tuple(results)

    relations = int(pack.relation.max()) + 1
    table = torch.randn(2, relations, WIDTH, generator=generator).to(device, dtype)
    instruction = torch.randn(len(SIZES), 3, WIDTH, generator=generator).to(device, dtype)
    label = (torch.rand(facts, generator=generator) < 0.1).float().to(device)

    def gate_case(backend: str) -> tuple[Tensor, ...]:
        pairs = pack.fact_index.pair_relation, pack.fact_index.pair_graph
        return run(lambda *x: (relation_gate(*x, *pairs, backend=backend),), table, instruction)

    def loss_case(backend: str) -> tuple[Tensor, ...]:
        return run(lambda x: (fact_loss(x, label, pack.fact_ptr, rho=0.7, margin=1.0),), logits)

    def rows_case(backend: str) -> tuple[Tensor, ...]:
        index = pack.fact_ptr[:-1, None] + torch.arange(20, device=device, dtype=torch.int32)
        index = torch.where(index < pack.fact_ptr[1:, None], index, -1).int()

        def rows(h: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            chosen = fact_rows(h, x, index, fact_index=pack.fact_index, backend=backend)
            gathered = gather_rows(h, pack.fact_index.head, backend=backend)
            added = segment_sum(h, pack.node_graph, len(SIZES), backend=backend)
            return chosen, gathered, added

        return run(rows, layer[0], layer[2])

    return {
        "relation_gate": gate_case,
        "fact_loss": loss_case,
        "rows": rows_case,
        "message_passing": layer_case,
        "relation_sum": relation_sum_case,
        "segment_softmax": softmax_case,
        "fact_scores": scores_case,
        "gumbel_topk": draw_case,
    }


NAMES = (
    *("message_passing", "relation_sum", "relation_gate", "rows"),
    *("segment_softmax", "fact_scores", "fact_loss", "gumbel_topk"),
)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_bit_equal(device: torch.device, name: str) -> None:
    """A second stream is busy in every other repeat, which changes how programs are scheduled."""
    case = cases(device, LOW)[name]
    first = case("triton")
    noise = torch.randn(64 if INTERPRETED else 4096, 64, device=device)
    stream = None if INTERPRETED else torch.cuda.Stream()
    for repeat in range(1, REPEATS):
        if stream is not None and repeat % 2:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    noise = noise @ (noise.t() @ noise).tanh()
        assert all(torch.equal(x, y) for x, y in zip(case("triton"), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_at_most_twice_those_of_pytorch(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """The limit is on the largest error against float64, plus one unit in the last place."""
    torch.backends.cuda.matmul.allow_tf32 = False  # the shared fixture restores it
    inputs = cases(device, dtype)[name]
    ours, pytorch = inputs("triton"), inputs("torch")
    exact = exact_case(device, dtype, name)
    for number, (x, y, z) in enumerate(zip(ours, pytorch, exact, strict=True)):
        assert_close(x, z, name=f"{name} {number}")
        if z.numel():
            unit = float(z.abs().max()) * torch.finfo(x.dtype).eps
            limit = 2 * float((y.double() - z).abs().max()) + unit
            assert float((x.double() - z).abs().max()) <= limit, f"{name} {number}"


def exact_case(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Tensor, ...]:
    """The case computed in float64 from the same rounded inputs."""
    with torch.random.fork_rng(devices=[]), _as_double(dtype):
        return cases(device, dtype)[name]("torch")


class _as_double:  # noqa: N801
    """In the `with` block, `leaves` returns float64 tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        plain = leaves
        self.patch.setitem(globals(), "leaves", lambda xs: plain([x.double() for x in xs]))

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


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
    narrow = [x[..., :8] if x.dim() > 1 else x for x in layer_inputs(pack, torch.float32)]
    narrow[5], narrow[6] = narrow[5][:8], narrow[6][:8]
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
