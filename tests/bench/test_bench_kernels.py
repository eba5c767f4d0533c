"""The op benchmarks' gate: every contender agrees with float64, a wrong one is not timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data  # noqa: E402

from bench.bench_kernels import PROBLEMS, in_small_set  # noqa: E402
from bench.measure import Contender  # noqa: E402
from bench.packs import Pack, Shape, random_pack, real_pack  # noqa: E402
from bench.problems import checked, find_truth  # noqa: E402
from bench.row_contenders import messages, starts  # noqa: E402
from bench.scalar_contenders import bernoulli  # noqa: E402

CPU = torch.device("cpu")
TINY = Shape("tiny", 3, 20, 230, 5)


def uneven_pack() -> Pack:
    """Graphs of 1, 7 and 12 nodes, with relations that are not numbered from 0."""
    questions = []
    for nodes, facts in ((1, 2), (7, 30), (12, 5)):
        fact = torch.arange(facts)
        index = torch.stack([fact * 3 % nodes, fact * 5 % nodes])
        questions.append(Data(edge_index=index, edge_type=10 + fact % 4 * 7, num_nodes=nodes))
    return real_pack("uneven", questions, CPU)


@pytest.fixture(scope="module", params=["random", "uneven"])
def pack(request: pytest.FixtureRequest) -> Pack:
    return random_pack(TINY, CPU) if request.param == "random" else uneven_pack()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_contender_agrees_with_float64(name: str, backward: bool, pack: Pack) -> None:
    problem = PROBLEMS[name](pack, torch.float32, 16, 3)
    for contender in checked(problem, problem.contenders(compile_=False), backward=backward):
        if contender.obstacle:  # whether these run depends on the machine
            words = ("Triton", "torch_scatter", "compiled")
            assert any(word in contender.name for word in words), contender.obstacle
        else:
            assert contender.error < 1e-5


@pytest.mark.parametrize("name", ["layer", "message_passing", "relation_sum", "relation_gate"])
def test_bfloat16_agrees(name: str) -> None:
    problem = PROBLEMS[name](random_pack(TINY, CPU), torch.bfloat16, 32, 3)
    found = checked(problem, problem.contenders(compile_=False), backward=True)
    assert sum(not contender.obstacle for contender in found) >= 2


def fails(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    raise RuntimeError("not implemented for this\nand more")


WRONG = {
    "result": lambda out: out * 1.00003,
    "gradient": lambda out: out.detach() + 1.00003 * (out - out.detach()),
    "sign": lambda out: -out,
    "nothing": lambda out: out * float("nan"),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_wrong_contender_is_not_timed(part: str) -> None:
    problem = starts(random_pack(TINY, CPU), torch.float32, 16, 1)

    def wrong(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (out,) = problem.call(table)
        return (WRONG[part](out),)

    (peer,) = checked(problem, [Contender("wrong", wrong)], backward=True)
    assert "differs from float64" in peer.obstacle and peer.error is None
    with pytest.raises(ValueError, match="differs from float64"):
        checked(problem, [Contender("wrong", wrong, peer=False)], backward=True)


def test_other_facts_are_refused() -> None:
    """Integer results are compared too: the gates alone are ones in any case."""
    problem = bernoulli(random_pack(TINY, CPU), torch.float32, 1, 1)

    def other(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, index = problem.call(logits)
        return gate, index.flip(1)

    with pytest.raises(ValueError, match="result 1"):
        checked(problem, [Contender("other", other, peer=False)], backward=False)


def test_a_failing_peer_is_named_and_a_failure_of_ours_is_raised() -> None:
    problem = starts(random_pack(TINY, CPU), torch.float32, 8, 1)
    (peer,) = checked(problem, [Contender("peer", fails)], backward=False)
    assert peer.obstacle == "not implemented for this"
    with pytest.raises(RuntimeError, match="not implemented"):
        checked(problem, [Contender("ours", fails, peer=False)], backward=False)


@pytest.mark.parametrize("backward", [False, True])
def test_replayed_contenders_are_judged_by_what_the_replay_leaves(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the recorded step is run again instead of replayed."""
    recorded = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return work

    monkeypatch.setattr("bench.problems.CudaCapture", lambda device: capture)
    problem = messages(random_pack(TINY, CPU), torch.float32, 16, 1)
    graph = Contender("graph", problem.call, peer=False, replay=True)
    (found,) = checked(problem, [graph], backward=backward)
    assert len(recorded) == 1 and found.error < 1e-5
    assert len(found.run()) == 1 + backward * len(problem.leaves)


def test_no_gradient_at_the_kink() -> None:
    problem = messages(random_pack(TINY, CPU), torch.float32, 16, 1)
    truth = find_truth(problem, backward=False)
    result = truth.results[0]
    assert (result == 0).any() and (truth.grad[result == 0] == 0).all()
    assert (truth.grad[result > 0] == 0).float().mean() < 0.01


def test_least_bytes_are_those_of_the_readme() -> None:
    """`message_passing` in float32: 8NC + 4C(2P+B+C) + 24E and 16NC + 8C(2P+B+C) + 40E."""
    pack = random_pack(TINY, CPU)
    n, e, p = pack.fact_index.num_nodes, pack.fact_index.num_facts, pack.fact_index.num_pairs
    b, c = pack.num_graphs, 16
    forward = 8 * n * c + 4 * c * (2 * p + b + c) + 24 * e
    backward = 16 * n * c + 8 * c * (2 * p + b + c) + 40 * e
    assert messages(pack, torch.float32, c, 1).bytes == (forward, backward)


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
