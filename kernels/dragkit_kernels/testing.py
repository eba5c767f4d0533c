"""Helpers of tests and benchmarks: comparison, poisoned memory, random packs, strided tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from .orders import FactIndex, build_fact_index

# Largest RMS error relative to the RMS of the expected values, by dtype of the result.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}


def assert_close(
    actual: Tensor, expected: Tensor, *, name: str = "tensor", tolerance: float | None = None
) -> None:
    """Raises AssertionError unless rms(actual - expected) <= tolerance * rms(expected).

    One ratio for the whole tensor tolerates elements near zero and still shows a wrong row.
    Non-finite values must be equal at the same places.

    Args:
        actual: any dtype and shape. Its dtype selects the tolerance.
        expected: same shape, usually float64.
        name: name of the tensor in the message.
        tolerance: replaces the value of TOLERANCE.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = torch.isfinite(want)
    same_kind = torch.allclose(got[~finite], want[~finite], equal_nan=True)
    if not same_kind or not bool(torch.isfinite(got[finite]).all()):
        raise AssertionError(f"{name}: non-finite values differ from the expected ones")
    if not bool(finite.any()):
        return
    error = (got[finite] - want[finite]).square().mean().sqrt()
    scale = want[finite].square().mean().sqrt()
    if error > limit * scale.clamp(min=1e-12):
        worst = int((got - want).abs().nan_to_num().argmax())
        raise AssertionError(
            f"{name}: RMS error ratio {float(error / scale.clamp(min=1e-12)):.2e} > {limit:.0e}. "
            f"Worst at flat index {worst}: got {float(got.flatten()[worst]):.6g}, "
            f"expected {float(want.flatten()[worst]):.6g}"
        )


# Guard elements before and after an allocation: a multiple that keeps its alignment.
_FENCE = 64


@contextmanager
def fenced_allocations() -> Iterator[None]:
    """Fills every `Tensor.new_empty` in the block, and guards around it, with NaN or the least int.

    A result that a kernel does not write stays NaN. A write outside of a buffer changes a guard and
    raises AssertionError at the end of the block. Launchers allocate with new_empty for this.
    """
    new_empty, padded_tensors = torch.Tensor.new_empty, []

    def fenced(self: Tensor, *size: int | tuple[int, ...], **options: object) -> Tensor:
        shape = size if all(isinstance(n, int) for n in size) else tuple(size[0])
        count = math.prod(shape)
        padded = new_empty(self, count + 2 * _FENCE, **options)
        padded.fill_(_poison(padded))
        padded_tensors.append(padded)
        return padded[_FENCE : _FENCE + count].view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", fenced):
        yield
    for padded in padded_tensors:
        fences = torch.cat([padded[:_FENCE], padded[-_FENCE:]])
        intact = fences.isnan() if fences.is_floating_point() else fences == _poison(fences)
        if not bool(intact.all()):
            raise AssertionError(
                f"a kernel wrote outside of a buffer of {padded.numel() - 2 * _FENCE} elements"
            )


def _poison(tensor: Tensor) -> float | int:
    return math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min


class Adjacency(NamedTuple):
    """A pack of graphs: its index, int32 node_graph [N], node_ptr [B+1], fact_graph [E],
    fact_ptr [B+1], node_count [N], and int64 relation [E]."""

    fact_index: FactIndex
    node_graph: Tensor
    node_ptr: Tensor
    fact_graph: Tensor
    fact_ptr: Tensor
    relation: Tensor
    node_count: Tensor


def adjacency(
    sizes: list[tuple[int, int]],
    head: Tensor,
    tail: Tensor,
    relation: Tensor,
    *,
    head_count: Tensor | None = None,
    tail_count: Tensor | None = None,
    node_count: Tensor | None = None,
) -> Adjacency:
    """The pack of given facts.

    Args:
        sizes: (nodes, facts) of each graph.
        head, tail: int64 [E] node rows of the pack.
        relation: int64 [E].
        head_count, tail_count: int [E] see FactIndex, or None for ones.
        node_count: int [N], or None for ones.
    """
    nodes = torch.tensor([n for n, _ in sizes])
    facts = torch.tensor([e for _, e in sizes])
    graphs = torch.arange(len(sizes))
    fact_graph = graphs.repeat_interleave(facts)
    zero = torch.zeros(1, dtype=torch.int64)
    return Adjacency(
        fact_index=build_fact_index(
            head,
            tail,
            relation,
            int(nodes.sum()),
            fact_graph,
            head_count=head_count,
            tail_count=tail_count,
        ),
        node_graph=graphs.repeat_interleave(nodes).int(),
        node_ptr=torch.cat([zero, nodes.cumsum(0)]).int(),
        fact_graph=fact_graph.int(),
        fact_ptr=torch.cat([zero, facts.cumsum(0)]).int(),
        relation=relation,
        node_count=torch.ones(int(nodes.sum()), dtype=torch.int32)
        if node_count is None
        else node_count.int(),
    )


def random_adjacency(
    sizes: list[tuple[int, int]], num_relations: int, *, seed: int = 0, skew: float = 2.0
) -> Adjacency:
    """A pack of random graphs with hubs, duplicate facts, self-loops and counts of 1 to 3.

    Args:
        sizes: (nodes, facts) of each graph. A graph without nodes must have no facts.
        num_relations: R.
        seed: seed of the random numbers.
        skew: exponent of the endpoint distribution. 1 is uniform, larger values make hubs.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.tensor([n for n, _ in sizes])
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor([e for _, e in sizes]))
    first_node, num_nodes = (nodes.cumsum(0) - nodes)[graph], nodes[graph]
    head, tail = (
        first_node + (torch.rand(len(graph), generator=generator) ** skew * num_nodes).long()
        for _ in range(2)
    )
    relation = torch.randint(0, num_relations, (len(graph),), generator=generator)
    counts = {
        name: torch.randint(1, 4, (size,), generator=generator)
        for name, size in (
            ("head_count", len(graph)),
            ("tail_count", len(graph)),
            ("node_count", int(nodes.sum())),
        )
    }
    return adjacency(sizes, head, tail, relation, **counts)


def padded_facts(pack: Adjacency, rows: int) -> Adjacency:
    """The pack with `rows` padding facts of one padding pair, all with count 0."""
    fact_index = pack.fact_index
    fact, node = fact_index.num_facts + rows - 1, fact_index.num_nodes - 1
    graph = len(pack.node_ptr) - 2
    fill = {
        **dict.fromkeys(("head", "tail"), (rows, node)),
        **dict.fromkeys(("tail_perm", "head_perm", "pair_perm"), (rows, fact)),
        **dict.fromkeys(("head_count", "tail_count"), (rows, 0)),
        "fact_pair": (rows, fact_index.num_pairs),
        "pair_ptr": (1, fact_index.num_facts),
        "pair_relation": (1, 0),
        "pair_graph": (1, graph),
    }
    columns = {
        name: torch.cat(
            [getattr(fact_index, name), getattr(fact_index, name).new_full((size,), value)]
        )
        for name, (size, value) in fill.items()
    }
    return pack._replace(fact_index=fact_index._replace(**columns))


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 numbers, the same for equal seeds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 positions of the tokens of packed sequences."""
    return torch.cat([torch.arange(n) for n in (0, *lengths)]).int().to(device)


def to_device(pack: Adjacency, device: torch.device) -> Adjacency:
    """The pack on a device."""
    fact_index, *rest = pack
    return Adjacency(FactIndex(*(x.to(device) for x in fact_index)), *(x.to(device) for x in rest))


def strided_like(tensor: Tensor) -> Tensor:
    """The same values in a view whose every dimension is strided."""
    if tensor.dim() == 0:
        return tensor
    padded = tensor.new_empty([2 * size + 1 for size in tensor.shape])
    view = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """The same values as new leaves that require gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def gradients(
    out: Tensor, inputs: list[Tensor], grad: Tensor, *, retain_graph: bool = False
) -> list[Tensor]:
    """Gradients of `out` with respect to every input, zeros for an unused input."""
    grads = torch.autograd.grad(
        out,
        inputs,
        grad.to(out.dtype),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(grads)


class PromptPieces(NamedTuple):
    """Arguments of `prompt_tokens`, and the length of each prompt, int32 [B]."""

    source: Tensor
    start: Tensor
    end: Tensor
    slot: Tensor
    length: Tensor


def random_prompt_pieces(
    prompts: int, pieces: int, *, longest: int = 5, seed: int = 0
) -> PromptPieces:
    """Random pieces: some are empty, about half of the others have a slot. Slots are distinct."""
    generator = torch.Generator().manual_seed(seed)
    size = (prompts, pieces)
    text = torch.randint(-1, longest + 1, size, generator=generator).clamp(min=0)
    source = torch.randint(1, 1000, (int(text.sum()),), generator=generator).int()
    start = (text.flatten().cumsum(0) - text.flatten()).view(size)
    vectors = torch.randperm(prompts * pieces, generator=generator).view(size)
    slot = torch.where(torch.rand(size, generator=generator) < 0.5, vectors, -1)
    lengths = torch.where(torch.rand(size, generator=generator) < 0.2, 0, text + (slot >= 0))
    end = lengths.cumsum(1)
    # Dropped pieces keep their start and slot, as the facts of a truncated prompt do.
    total = lengths.sum(1)
    return PromptPieces(source, *(x.int() for x in (start, end, slot, total)))
