"""The kernel benchmarks' gate: every way agrees with float64 on tiny packs, a wrong one is refused.

Nothing is timed here but one call, for the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torch_geometric")

from bench.bench_kernels import PROBLEMS  # noqa: E402
from bench.kernel_checks import agreement, find_truth, make_step  # noqa: E402
from bench.kernel_packs import Pack, Shape, random_pack, random_questions, real_pack  # noqa: E402
from bench.kernel_problems import layer, messages, starts  # noqa: E402
from bench.kernel_scalars import choice  # noqa: E402
from bench.kernel_step import retriever_step  # noqa: E402
from bench.kernel_timing import check_contenders, compare_kernels  # noqa: E402
from bench.kernel_ways import Contender  # noqa: E402
from bench.pyg_rearev import pyg_question  # noqa: E402

CPU = torch.device("cpu")
TINY = Shape("tiny", 3, 20, 230, 5)
EVERY = PROBLEMS | {"retriever_step": retriever_step}
# Whether these run depends on the machine.
SOMEWHERE = ("Triton", "torch_scatter", "compiled")
# Its matrix holds a pair twice, and its gradient once.
NO_BACKWARD = {("message_passing", "torch.sparse.mm, CSR")}


def uneven_pack() -> Pack:
    """Graphs of 1, 7 and 12 nodes, as those of real questions come."""
    questions = []
    for nodes, facts in ((1, 2), (7, 30), (12, 5)):
        questions.append(
            pyg_question(
                head=torch.arange(facts) * 3 % nodes,
                tail=torch.arange(facts) * 5 % nodes,
                relation=10 + torch.arange(facts) % 4 * 7,
                topic=torch.ones(nodes) / nodes,
                label=torch.zeros(facts),
                states=torch.zeros(2, 4),
            )
        )
    return real_pack("uneven", questions, CPU)


@pytest.fixture(scope="module", params=["random", "uneven"])
def pack(request: pytest.FixtureRequest) -> Pack:
    return random_pack(TINY, CPU) if request.param == "random" else uneven_pack()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_every_way_agrees_with_float64(name: str, backward: bool, pack: Pack) -> None:
    problem = EVERY[name](pack, torch.float32, 16, 3, False)
    for contender, timing, step in check_contenders(problem, backward=backward):
        if contender.obstacle:
            assert any(word in contender.name for word in SOMEWHERE)
        elif backward and (problem.name, contender.name) in NO_BACKWARD and step is None:
            assert timing.note
        else:
            assert step is not None, f"{contender.name}: {timing.note}"
            assert timing.error < 1e-4


@pytest.mark.parametrize("name", ["layer", "message_passing", "relation_sum", "relation_gate"])
def test_bfloat16_agrees(name: str) -> None:
    problem = EVERY[name](random_pack(TINY, CPU), torch.bfloat16, 32, 3, False)
    checked = check_contenders(problem, backward=True)
    assert sum(step is not None for _, _, step in checked) >= 2


def test_layer_of_bfloat16_weights_is_judged_by_the_same_truth() -> None:
    """The truth starts from the rounded leaves, so that only the ways' own rounding is judged."""
    problem = layer(random_pack(TINY, CPU), torch.bfloat16, 16, 2, False)
    wide = [leaf.detach().double() for leaf in problem.leaves]
    truth = find_truth(problem, backward=False)
    assert torch.equal(truth.results[0], problem.truth(*wide)[0].relu())


@pytest.mark.parametrize("part", ["result", "gradient", "sign", "nothing"])
def test_a_wrong_way_is_not_timed(part: str) -> None:
    problem = starts(random_pack(TINY, CPU), torch.float32, 16, 1, False)
    right = problem.contenders[2]
    assert right.name == "dragkit, PyTorch"

    def wrong() -> tuple[torch.Tensor, ...]:
        (out,) = right.run()
        if part == "result":
            return (out * 1.00003,)
        if part == "gradient":
            return (out.detach() + 1.00003 * (out - out.detach()),)
        return (-out,) if part == "sign" else (out * float("nan"),)

    for peer in (True, False):
        changed = replace(problem, contenders=[Contender("wrong", wrong, peer=peer)])
        if peer:
            ((_, timing, step),) = check_contenders(changed, backward=True)
            assert step is None and "differs from float64" in timing.note
        else:
            with pytest.raises(ValueError, match="differs from float64"):
                check_contenders(changed, backward=True)


def test_other_facts_are_refused() -> None:
    """Integer results are compared too: the gates alone are ones in any case."""
    problem = choice("bernoulli")(random_pack(TINY, CPU), torch.float32, 1, 1, False)
    truth = find_truth(problem, backward=False)
    right = problem.contenders[2]

    def other() -> tuple[torch.Tensor, ...]:
        gate, index = right.run()
        return gate, index.flip(1)

    step = make_step(problem, Contender("other", other), truth, backward=False)
    with pytest.raises(ValueError, match="result 1"):
        agreement(problem, right, truth, step)


def test_a_failing_peer_is_named() -> None:
    problem = starts(random_pack(TINY, CPU), torch.float32, 8, 1, False)

    def fails() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("not implemented for this\nand more")

    changed = replace(problem, contenders=[Contender("peer", fails)])
    ((_, timing, step),) = check_contenders(changed, backward=False)
    assert step is None and timing.note == "not implemented for this"


@pytest.mark.parametrize("backward", [False, True])
def test_replayed_ways_are_judged_by_what_the_replay_leaves(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the recorded step is run again instead of replayed."""
    recorded = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return work

    monkeypatch.setattr("bench.kernel_checks.CudaCapture", lambda device: capture)
    problem = messages(random_pack(TINY, CPU), torch.float32, 16, 1, False)
    again = replace(problem.contenders[1], run=problem.contenders[2].run, obstacle="")
    assert again.replay
    changed = replace(problem, contenders=[again])
    ((_, timing, step),) = check_contenders(changed, backward=backward)
    assert len(recorded) == 1 and timing.error < 1e-5
    assert len(step()) == 1 + backward * len(problem.leaves)


def test_no_gradient_at_the_kink() -> None:
    problem = messages(random_pack(TINY, CPU), torch.float32, 16, 1, False)
    truth = find_truth(problem, backward=False)
    result, grad = truth.results[0], truth.grad
    assert (result >= 0).all() and (result == 0).any()
    assert (grad == 0).sum() < 0.01 * grad.numel()


def test_questions_have_the_packs_graphs() -> None:
    pack = uneven_pack()
    ours, pyg, relations = random_questions(pack)
    assert torch.equal(pyg.edge_index, pack.edge_index)
    assert torch.equal(pyg.edge_type, pack.relation)
    assert torch.equal(pyg.topic, ours.graph.topic)
    share = torch.zeros(3).index_add(0, pack.node_graph, ours.graph.topic)
    assert torch.allclose(share, torch.ones(3))
    assert relations.states.shape[0] == pack.num_relations == 4
    labels = torch.zeros(3).index_add(0, pack.fact_graph, ours.graph.label)
    assert (labels >= 1).all()
    start = ours.graph.start
    assert ((ours.graph.topic[start.head] > 0) | (ours.graph.topic[start.tail] > 0)).all()


class _Benchmark:
    """What `compare_kernels` asks of pytest-benchmark."""

    group: str | None = None

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(
        self, target: Callable[[], None], setup: Callable[[], None], rounds: int, **_: object
    ) -> None:
        for _ in range(rounds):
            setup()
            target()


def test_table() -> None:
    problem = messages(random_pack(TINY, CPU), torch.float32, 16, 1, False)
    benchmark = _Benchmark()
    found = compare_kernels(benchmark, problem, backward=True, copy=10.0, repeats=2)
    timed = {t.name: t for t in found.timings if t.ms is not None}
    peers = [t for t in timed.values() if t.peer]
    assert len(peers) >= 3 and "dragkit, PyTorch" in timed
    assert max(t.ratio for t in peers) == pytest.approx(1.0)
    ours = timed["dragkit, PyTorch"]
    assert ours.ratio == pytest.approx(min(t.ms[0] for t in peers) / ours.ms[0])
    assert ours.gb_s == pytest.approx(sum(problem.cost.bytes) / ours.ms[0] / 1e6)
    assert ours.copy_share == pytest.approx(ours.gb_s / 10.0)
    assert ours.launches > 0
    text = found.markdown()
    assert "| dragkit, PyTorch |" in text and "Not timed:" in text
    assert "- dragkit, Triton, CUDA graph: no Triton kernel runs on a cpu" in text
    assert benchmark.extra_info["name"] == found.name == "message_passing, forward + backward"


def test_least_bytes_are_those_of_the_readme() -> None:
    """`message_passing` in float32: 8NC + 4C(2P+B+C) + 24E and 16NC + 8C(2P+B+C) + 40E."""
    pack = random_pack(TINY, CPU)
    n, e, p = pack.orders.num_nodes, pack.orders.num_facts, pack.orders.num_pairs
    b, c = pack.num_graphs, 16
    forward = 8 * n * c + 4 * c * (2 * p + b + c) + 24 * e
    backward = 16 * n * c + 8 * c * (2 * p + b + c) + 40 * e
    assert messages(pack, torch.float32, c, 1, False).cost.bytes == (forward, backward)
