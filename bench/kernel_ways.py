"""Problems, who solves them, and the other libraries' ways to write their parts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing

from bench.kernel_packs import Pack
from dragkit_kernels import force_backend, resolve_backend

# The first result takes part in the backward, the others (integers) are only compared.
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation, on the problem's own leaves.

    Attributes:
        name: as printed; run: the forward.
        peer: written with other libraries; otherwise ours, whose failure is an error.
        replay: recorded as a CUDA graph.
        obstacle: why it cannot run here; then it is named in the table and not run.
    """

    name: str
    run: Run
    peer: bool = True
    replay: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """Least bytes to move and floating-point operations, of the forward and of the backward.

    One operation each is a sum, a product, a comparison, a quotient, an exponential and a
    logarithm. Where there are matrix products, they alone are counted.
    """

    bytes: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Leaves, their implementations, and the truth in float64.

    Attributes:
        name: as printed; about: sizes, for the table.
        leaves: inputs that need gradients.
        truth: the results from the leaves in float64.
        contenders: ours first.
        dtype: of the leaves; cost: see `Cost`.
        kink: the first result is before a last ReLU that the contenders apply. Where it is next to
            zero no gradient comes in, since rounding decides which side it is on.
        tolerance: of results and of gradients; None stands for the dtype's. Peers get no less than
            the dtype's.
    """

    name: str
    about: dict[str, object]
    leaves: Sequence[Tensor]
    truth: Callable[..., tuple[Tensor, ...]]
    contenders: Sequence[Contender]
    dtype: torch.dtype
    cost: Cost = field(default_factory=Cost)
    kink: bool = False
    tolerance: tuple[float, float] | None = None


def ours(op: str, leaf: Tensor, call: Callable[[], tuple[Tensor, ...]]) -> list[Contender]:
    """Our implementation: Triton, the same as a CUDA graph, and on PyTorch's kernels.

    Args:
        op: decides whether Triton can run; leaf: a tensor of the problem.
        call: takes its ops' backends from outside.
    """

    def on(backend: str) -> Run:
        def run() -> tuple[Tensor, ...]:
            with force_backend(backend):
                return call()

        return run

    chosen = resolve_backend(op, leaf, "auto")
    obstacle = "" if chosen == "triton" else f"no Triton kernel runs on a {leaf.device.type}"
    return [
        Contender("dragkit, Triton", on("auto"), peer=False, obstacle=obstacle),
        Contender(
            "dragkit, Triton, CUDA graph", on("auto"), peer=False, replay=True, obstacle=obstacle
        ),
        Contender("dragkit, PyTorch", on("torch"), peer=False),
    ]


def compiled(name: str, run: Run, allowed: bool) -> Contender:
    """The same under torch.compile, for these sizes only."""
    obstacle = "" if allowed else "compilation is asked for by --bench-compiled"
    return Contender(f"{name}, compiled", torch.compile(run, dynamic=False), obstacle=obstacle)


def scattered(run: Run) -> Contender:
    """A way of torch_scatter."""
    found = importlib.util.find_spec("torch_scatter") is not None
    return Contender(
        "torch_scatter", run, obstacle="" if found else "torch_scatter is not installed"
    )


def random_leaf(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> Tensor:
    """Gaussian numbers, the same on every device, that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator)
    return values.to(device=device, dtype=dtype).requires_grad_()


class TableMessage(MessagePassing):
    """o_v = sum_{e: target=v} p[source_e] table[pair_e] with PyG."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)

    def forward(self, p: Tensor, edge_index: Tensor, rows: Tensor) -> Tensor:
        """float [N, 1], int64 [2, E], float [E, C] to float [N, C]."""
        return self.propagate(edge_index, p=p, rows=rows, size=(p.shape[0], p.shape[0]))

    def message(self, p_j: Tensor, rows: Tensor) -> Tensor:
        """float [E, C]."""
        return p_j * rows


# How a library sums rows over facts: weights by fact or None, and the table, for one direction.
RowSum = Callable[[Tensor | None, Tensor, bool], Tensor]


def _walk(pack: Pack, forward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets of the receiving nodes, their facts, and the pairs of these."""
    orders = pack.orders
    ptr, fact = (
        (orders.tail_ptr, orders.tail_fact) if forward else (orders.head_ptr, orders.head_fact)
    )
    return ptr, fact, orders.fact_pair[fact.long()]


def embedding_bag_sum(pack: Pack) -> RowSum:
    """`embedding_bag` with the gradient that PyTorch gives it."""
    walks = {way: _walk(pack, way) for way in (True, False)}

    def total(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        ptr, fact, pair = walks[forward]
        if weight is not None:
            weight = weight.index_select(0, fact)
        return F.embedding_bag(
            pair, table, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
        )

    return total


def csr_sum(pack: Pack) -> RowSum:
    """A sparse matrix of nodes by pairs, in CSR, times the table: cuSPARSE, on a CPU MKL."""
    walks = {way: _walk(pack, way) for way in (True, False)}
    size = (pack.orders.num_nodes, pack.orders.num_pairs)

    def total(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        ptr, fact, pair = walks[forward]
        values = table.new_ones(len(fact)) if weight is None else weight.index_select(0, fact)
        matrix = torch.sparse_csr_tensor(ptr, pair, values, size, check_invariants=False)
        return torch.sparse.mm(matrix, table)

    return total


def segment_csr_sum(pack: Pack) -> RowSum:
    """torch_scatter over sorted facts."""
    walks = {way: _walk(pack, way) for way in (True, False)}

    def total(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        from torch_scatter import segment_csr

        ptr, fact, pair = walks[forward]
        rows = table.index_select(0, pair)
        if weight is not None:
            rows = weight.index_select(0, fact).unsqueeze(1) * rows
        return segment_csr(rows, ptr.long(), reduce="sum")

    return total


def index_add_sum(pack: Pack) -> RowSum:
    """Gather, scale, `index_add`; sums in float32 like the kernels, if the weights are float32."""

    def total(weight: Tensor | None, table: Tensor, forward: bool) -> Tensor:
        rows = table.float().index_select(0, pack.pair)
        if weight is not None:
            rows = weight.float().unsqueeze(1) * rows
        zeros = rows.new_zeros(pack.orders.num_nodes, table.shape[1])
        summed = zeros.index_add(0, pack.edge_index[1 if forward else 0], rows)
        return summed.to(table.dtype)

    return total


def pyg_sum(pack: Pack) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """PyG's propagate; takes the weight of each node instead of each fact."""
    message = TableMessage()
    index = {True: pack.edge_index, False: pack.edge_index.flip(0)}

    def total(p: Tensor, table: Tensor, forward: bool) -> Tensor:
        return message(p.unsqueeze(1), index[forward], table[pack.pair])

    return total


def coo_matrices(edge_index: Tensor, num_nodes: int, dtype: torch.dtype) -> list[Tensor]:
    """ReaRev's sparse matrices: facts by heads, facts by tails, heads by facts, tails by facts.

    Args:
        edge_index: int64 [2, E].
    """
    fact = torch.arange(edge_index.shape[1], device=edge_index.device)
    ones = torch.ones(len(fact), dtype=dtype, device=edge_index.device)
    sizes = (len(fact), num_nodes), (num_nodes, len(fact))
    found = [torch.stack([fact, end]) for end in edge_index]
    found += [torch.stack([end, fact]) for end in edge_index]
    return [
        torch.sparse_coo_tensor(index, ones, sizes[i // 2], check_invariants=False).coalesce()
        for i, index in enumerate(found)
    ]
