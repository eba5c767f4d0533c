"""Two ranks train like one: the same losses, weights and scores, one writer, and no hang."""

from __future__ import annotations

import json
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint
from dragkit.data.store import PackedStore
from dragkit.distributed.ranks import Ranks
from dragkit.distributed.torchrun import init_ranks
from dragkit.errors import ConfigError
from dragkit.eval.evaluate import evaluate
from dragkit.eval.types import Prediction
from tests.distributed.pair_cases import HERE, Pair, assert_close, environment, lines, worker

FIXTURE = str(worker.FIXTURE)
# Batches of 7 and 1 questions: in every second batch rank 1 has none.
RETRIEVER = {
    "run.phase": 1,
    "optim.batch_size": 7,
    "data.val_heuristics_path": FIXTURE,
    "data.test_heuristics_path": FIXTURE,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Runs the cases as one rank here, then all of them in two processes."""
    pair = Pair(tmp_path_factory.mktemp("ranks"))
    joint = {
        "run.phase": 2,
        "run.phase1_checkpoint": str(pair.one / "retriever"),
        "data.val_heuristics_path": FIXTURE,
    }
    same = {
        "retriever": RETRIEVER,
        "joint": joint | {"optim.batch_size": 7, "loss.use_grad_norm_balance": True},
        # Steps of (3, 3) and of (2,) questions.
        # The draws of a question stay on the rank that has the question.
        "accumulated": joint
        | {"optim.batch_size": 3, "optim.accumulation_steps": 2}
        | {"sampler.estimator": "leave_one_out", "sampler.num_draws": 2},
    }
    for name, settings in same.items():
        assert pair.run_one(name, settings)["code"] == 0
    stop = {"rank": 0, "steps": 1, "do": "stop"}
    assert pair.run_one("stopped", RETRIEVER, after=stop)["code"] == 75
    other = pair.two / "other.jsonl"
    # With the same texts, so that the text encoder has nothing to do.
    other.write_text(
        worker.FIXTURE.read_text().replace('"answer": ["Lantern Guild"]', '"answer": []')
    )
    short = {"run.phase": 1, "optim.batch_size": 4, "optim.epochs": 1}
    settings = {"1": {"data.heuristics_path": str(other)}}
    cases = [pair.case(name, settings) for name, settings in same.items()]
    cases += [
        pair.case("other_data", short, rank_settings=settings),
        pair.case("other_rate", short, rank_settings={"1": {"optim.lr": 0.5}}),
        pair.case("small_batch", short | {"optim.batch_size": 1}),
        pair.case("drift", short, after={"rank": 1, "steps": 1, "do": "drift"}),
        pair.case("stopped", RETRIEVER, after=stop | {"rank": 1}),
        pair.case("resumed", RETRIEVER | {"run.resume": str(pair.one / "stopped")}),
        # The last case, because it ends both processes.
        pair.case("failed", short, after={"rank": 1, "steps": 1, "do": "fail"}),
    ]
    pair.run_two("ranks_worker.py", cases)
    return pair


@pytest.mark.parametrize("name", ["retriever", "joint", "accumulated"])
def test_two_ranks_train_and_score_as_one(pair: Pair, name: str) -> None:
    assert pair.codes(name) == [0, 0]
    pair.assert_equal_logs(name)
    one, two = pair.one / name, pair.two / name
    # The differences of draws have entries whose gradient is rounding alone.
    assert_close(one, two, few=0.005 if name == "accumulated" else 0.0)
    states = [load_checkpoint(find_checkpoint(folder)).state for folder in (one, two)]
    assert states[0].questions_seen == states[1].questions_seen == 16
    assert (states[0].step, states[0].batch) == (states[1].step, states[1].batch)


def test_the_results_table_equals_that_of_one_rank(pair: Pair) -> None:
    ours, theirs = (
        json.loads((folder / "retriever" / "results.json").read_text())
        for folder in (pair.one, pair.two)
    )
    assert ours.keys() == theirs.keys() and "after phase 1" in ours
    for stage in ours:
        assert ours[stage]["counts"] == theirs[stage]["counts"]
        for metric, value in ours[stage]["metrics"].items():
            assert value == pytest.approx(theirs[stage]["metrics"][metric], rel=1e-12)


def test_only_rank_0_writes(pair: Pair) -> None:
    assert pair.outcome("retriever", 0)["saves"] == [2, 4]
    assert pair.outcome("retriever", 1)["saves"] == []
    assert len(lines(pair.two / "retriever", "train")) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_data", "rank 1: the content of the questions is"),
        ("other_rate", "rank 1: optim.lr is 0.5, rank 0 has 0.0001"),
        ("small_batch", "Set --batch_size to 2 or more"),
        ("drift", "at step 2, the ranks do not agree:\n  rank 1: trained weights is"),
    ],
)
def test_ranks_that_differ_are_refused(pair: Pair, name: str, message: str) -> None:
    for rank in (0, 1):
        outcome = pair.outcome(name, rank)
        assert outcome["code"] == ConfigError.exit_code
        assert message in outcome["message"]
        assert outcome["saves"] == []


def test_a_signal_to_one_rank_saves_once_and_any_number_of_ranks_resumes(pair: Pair) -> None:
    assert pair.codes("stopped") == [75, 75]
    assert [pair.outcome("stopped", rank)["saves"] for rank in (0, 1)] == [[1], []]
    outcome = pair.run_one("unused", RETRIEVER | {"run.resume": str(pair.two / "stopped")})
    assert outcome["code"] == 0 and outcome["saves"] == [2, 4]
    assert pair.codes("resumed") == [0, 0] and pair.outcome("resumed", 0)["saves"] == [2, 4]
    assert len(lines(pair.two / "stopped", "train")) == 4
    for resumed in (pair.one, pair.two):
        assert_close(pair.one / "retriever", resumed / "stopped")


def test_a_failure_of_one_rank_ends_the_others_with_its_message(pair: Pair) -> None:
    pair.outcome("resumed", 1)
    assert pair.process.returncode != 0
    assert "ValueError: planted failure" in pair.process.stderr
    # Rank 0 may still be in the last all-reduce of the step before.
    shown = re.search(r"stopped at step [01]: rank 1: planted failure", pair.process.stderr)
    assert shown, pair.process.stderr[-3000:]


def test_a_rank_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_worker.py"), "--silence", str(tmp_path)],
            env=environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank)
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, shown = ranks[0].communicate(timeout=60)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 70
    assert "lost the others at step 7" in shown and "within 3 s (run.rank_timeout)" in shown


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starting a process group fails the test."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a single process needs no process group")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    return


@pytest.mark.parametrize("size", [None, "1"])
def test_a_single_process_starts_no_group(
    no_group: None, monkeypatch: pytest.MonkeyPatch, size: str | None
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with init_ranks(worker.RunConfig()) as ranks:
        assert ranks.is_single and ranks.is_main and ranks.all_reduce_sum([3, 4]) == [3, 4]
        assert ranks.all_gather_object({"a": 1}) == [{"a": 1}]
        assert ranks.local_slices([[3, 1, 2], []]) == [[3, 1, 2], []]


def test_an_incomplete_environment_is_an_error(
    no_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"), init_ranks(worker.RunConfig()):
        pass


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_slices_partition_the_batch(count: int) -> None:
    batches = [list(range(size)) for size in (0, 1, 2, 5, 8, 17)]
    parts = []
    for rank in range(count):
        ranks = Ranks()
        ranks.rank, ranks.world_size = rank, count
        parts.append(ranks.local_slices(batches))
    for index, rows in enumerate(batches):
        slices = [part[index] for part in parts]
        assert [row for part in slices for row in part] == rows
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


class _Phase:
    """Ranks every fact of a question, the last one first."""

    model = torch.nn.Identity()

    def __init__(self, store: PackedStore) -> None:
        self.store = store

    def run_dummy_passes(self) -> None:
        """There are no other ranks."""

    def predict(
        self, batch: SimpleNamespace, relations: object, *, generate: bool
    ) -> list[Prediction]:
        """One prediction per question."""
        predictions = []
        for row in batch.rows:
            ranked = tuple(reversed(range(self.store.num_facts(row))))
            p = tuple(1 / (3 + row + index) for index in ranked)
            predictions.append(Prediction(row, ranked, ranked[:2], p, f"answer {row}"))
        return predictions


class _Sent(Exception):
    """Rank 1 has sent its scores."""


class _OneOfTwo(Ranks):
    """One of two ranks in the same process; rank 1 stops after it has sent its scores."""

    world_size = 2

    def __init__(self, rank: int, sent: list) -> None:
        self.rank, self.sent = rank, sent

    def all_gather_object(self, value: object) -> list:
        """Pickles the value, as between processes."""
        self.sent.insert(0, pickle.loads(pickle.dumps(value)))
        if not self.is_main:
            raise _Sent
        return self.sent


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_gathers_in_file_order(tmp_path: Path, size: int) -> None:
    store = PackedStore.build_or_open(worker.FIXTURE, cache_dir=tmp_path)
    batches = [list(range(8))[start : start + size] for start in range(0, 8, size)]

    def load(rows: list[list[int]], device: torch.device) -> Iterator[SimpleNamespace]:
        for batch_rows in rows:
            batch = SimpleNamespace(rows=batch_rows)
            batch.to = lambda device, batch=batch: batch
            yield batch

    source = SimpleNamespace(
        store=store,
        relations=torch.zeros(1),
        batch_sampler=SimpleNamespace(in_file_order=lambda limit: batches),
        load=load,
    )
    phase, device, sent = _Phase(store), torch.device("cpu"), []
    expected = evaluate(phase, source, device)
    with pytest.raises(_Sent):
        evaluate(phase, source, device, ranks=_OneOfTwo(1, sent))
    assert evaluate(phase, source, device, ranks=_OneOfTwo(0, sent)) == expected
    assert [p["text"] for p in expected.predictions] == [f"answer {row}" for row in range(8)]
