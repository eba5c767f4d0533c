"""The op benchmarks' gate: every contender agrees with float64, and a wrong one is not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data  # noqa: E402

from bench.bench_kernels import PROBLEMS, in_small_set  # noqa: E402
from bench.measure import Contender  # noqa: E402
from bench.packs import Pack, Shape, random_pack, real_pack  # noqa: E402
from bench.problems import Case, Problem, checked, compute_expected  # noqa: E402

CPU = torch.device("cpu")


def random_graphs() -> Pack:
    return random_pack(Shape("tiny", 3, 20, 230, 5), CPU)


def uneven_graphs() -> Pack:
    """Graphs of 1, 7 and 12 nodes, with relations that are not numbered from 0."""
    questions = []
    for nodes, facts in ((1, 2), (7, 30), (12, 5)):
        fact = torch.arange(facts)
        index = torch.stack([fact * 3 % nodes, fact * 5 % nodes])
        questions.append(Data(edge_index=index, edge_type=10 + fact % 4 * 7, num_nodes=nodes))
    return real_pack("uneven", questions, CPU)


def tiny_problem(name: str, dtype: torch.dtype = torch.float32, width: int = 16) -> Problem:
    return PROBLEMS[name](Case(random_graphs(), dtype, width, 3))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("graphs", [random_graphs, uneven_graphs])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_contender_agrees_with_float64(
    name: str, backward: bool, graphs: Callable[[], Pack]
) -> None:
    problem = PROBLEMS[name](Case(graphs(), torch.float32, 16, 3))
    for contender in checked(problem, problem.contenders(compile_=False), backward=backward):
        if contender.obstacle:  # whether these run depends on the machine
            words = ("Triton", "torch_scatter", "compiled")
            assert any(word in contender.name for word in words), contender.obstacle
        else:
            assert contender.error < 1e-5


@pytest.mark.parametrize("name", ["layer", "message_passing", "relation_sum", "relation_gate"])
def test_bfloat16_agrees(name: str) -> None:
    """Ours as closely as the op tests ask for, peers at least roughly."""
    problem = tiny_problem(name, torch.bfloat16, 32)
    contenders = checked(problem, problem.contenders(compile_=False), backward=True)
    timed = [contender for contender in contenders if not contender.obstacle]
    assert {contender.peer for contender in timed} == {False, True}
    assert all(contender.error < 8e-3 for contender in timed if not contender.peer)


def fails(*leaves: Tensor) -> tuple[Tensor, ...]:
    raise RuntimeError("not implemented for this\nand more")


WRONG = {
    "result": lambda out: out * 1.00003,
    "gradient": lambda out: out.detach() + 1.00003 * (out - out.detach()),
    "sign": lambda out: -out,
    "nothing": lambda out: out * float("nan"),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_wrong_contender_is_not_timed(part: str) -> None:
    problem = tiny_problem("relation_sum")

    def wrong(table: Tensor) -> tuple[Tensor, ...]:
        (out,) = problem.call(table)
        return (WRONG[part](out),)

    (peer,) = checked(problem, [Contender("wrong", wrong)], backward=True)
    assert "differs from float64" in peer.obstacle and peer.error is None
    with pytest.raises(ValueError, match="differs from float64"):
        checked(problem, [Contender("wrong", wrong, peer=False)], backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", [False, True])
def test_a_backward_without_the_mask_of_the_relu_is_refused(dtype: torch.dtype, peer: bool) -> None:
    """The incoming gradient is not zero where the ReLU's output is."""
    problem = tiny_problem("message_passing", dtype)

    def unmasked(*leaves: Tensor) -> tuple[Tensor, ...]:
        # All leaves but h and p are negated, and with them the argument of the ReLU.
        negated = [*leaves[:2], *(-leaf for leaf in leaves[2:])]
        (out,), (mirrored,) = problem.call(*leaves), problem.call(*negated)
        return (out.detach() - (mirrored - out) + (mirrored - out).detach(),)

    wrong = Contender("wrong", unmasked, peer=peer)
    if peer:
        checked(problem, [wrong], backward=True)
        assert "gradient 0 differs from float64" in wrong.obstacle
    else:
        with pytest.raises(ValueError, match="gradient 0 differs from float64"):
            checked(problem, [wrong], backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer", "message_passing"])
def test_arguments_of_relus_are_not_near_zero(name: str, dtype: torch.dtype) -> None:
    """No rounding then decides which elements the ReLU passes."""
    result = compute_expected(tiny_problem(name, dtype), backward=False).results[0]
    positive = result[result > 0]
    assert 0.3 < len(positive) / result.numel() < 0.7
    assert positive.min() > 0.05 * positive.square().mean().sqrt()


def test_peers_may_round_more_than_ours() -> None:
    problem = tiny_problem("relation_sum", torch.bfloat16)

    def rough(table: Tensor) -> tuple[Tensor, ...]:
        return (problem.call(table)[0] * 1.02,)

    (peer,) = checked(problem, [Contender("rough", rough)], backward=True)
    assert not peer.obstacle and peer.error == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ValueError, match="result 0 differs from float64"):
        checked(problem, [Contender("rough", rough, peer=False)], backward=True)


def test_other_facts_are_refused() -> None:
    """Integer results are compared too, because the gates alone are always ones."""
    problem = tiny_problem("gumbel_topk_bernoulli", width=1)

    def other(logits: Tensor) -> tuple[Tensor, ...]:
        gate, index = problem.call(logits)
        return gate, index.flip(1)

    with pytest.raises(ValueError, match="result 1"):
        checked(problem, [Contender("other", other, peer=False)], backward=False)


def test_a_failing_peer_is_named_and_a_failure_of_ours_is_raised() -> None:
    problem = tiny_problem("relation_sum")
    (peer,) = checked(problem, [Contender("peer", fails)], backward=False)
    assert peer.obstacle == "not implemented for this"
    with pytest.raises(RuntimeError, match="not implemented"):
        checked(problem, [Contender("ours", fails, peer=False)], backward=False)


@pytest.mark.parametrize("backward", [False, True])
def test_replayed_contenders_are_judged_by_what_the_replay_leaves(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the recorded step runs again instead of a replay."""
    recorded = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return work

    monkeypatch.setattr("bench.problems.CudaCapture", lambda device: capture)
    problem = tiny_problem("message_passing")
    graph = Contender("graph", problem.call, peer=False, replay=True)
    (contender,) = checked(problem, [graph], backward=backward)
    assert len(recorded) == 1 and contender.error < 1e-5
    assert len(contender.run()) == 1 + backward * len(problem.leaves)


def test_least_bytes_are_those_of_the_readme() -> None:
    """`message_passing` in float32: 8NC + 4C(2P+B+C) + 24E and 16NC + 8C(2P+B+C) + 40E."""
    pack, c = random_graphs(), 16
    n, e, p = pack.fact_index.num_nodes, pack.fact_index.num_facts, pack.fact_index.num_pairs
    tables = c * (2 * p + pack.num_graphs + c)
    forward, backward = 8 * n * c + 4 * tables + 24 * e, 16 * n * c + 8 * tables + 40 * e
    assert tiny_problem("message_passing").bytes == (forward, backward)


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        ({"pack": "S", "name": "segment_softmax", "backward": False}, True),
        ({"pack": "C, 2 graphs", "name": "layer", "backward": True}, True),
        ({"pack": "C, 2 graphs", "name": "layer", "backward": False}, False),
        ({"pack": "C, 2 graphs", "name": "fact_head", "backward": True}, False),
        ({"pack": "C, reduced", "name": "layer", "backward": True}, False),
        ({"pack": "WebQSP", "name": "layer", "backward": True}, False),
    ],
)
def test_the_small_set(params: dict[str, object], chosen: bool) -> None:
    assert in_small_set(params) == chosen
