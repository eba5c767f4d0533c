"""Frozen weights sharded between two ranks: equal numbers, half of the memory, no hang."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dragkit.config import GeneratorConfig
from dragkit.distributed.rank_consistency import frozen_fingerprint
from dragkit.distributed.sharding import decoder_blocks
from dragkit.errors import ConfigError, MissingInputError
from dragkit.generator import load
from tests.distributed.pair_cases import Pair, assert_close, worker

DIRECT = ("nemotron", "recomputed", "text", "compiled", "llama")


def _settings(one: Path) -> dict:
    # Batches of 7 and 1 questions: in every second batch rank 1 has none. With one prompt per pass
    # rank 0 has one pass more in the other batches.
    return {
        "run.phase": 2,
        "run.phase1_checkpoint": str(one / "start"),
        "run.generator_fsdp": True,
        "optim.batch_size": 7,
        "loss.use_grad_norm_balance": True,
        "generator.generator_microbatch": 1,
        "generator.activation_checkpointing": "mamba",
    }


class _Warnings(logging.Handler):
    """Collects the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Runs the cases as one rank here, then all of them in two processes."""
    pair = Pair(tmp_path_factory.mktemp("sharding"))
    settings = _settings(pair.one)
    # Validation too needs equal numbers of passes on ranks with other prompts or none.
    scored = settings | {
        "data.val_heuristics_path": str(worker.FIXTURE),
        "generator.max_tokens_per_microbatch": 1,
    }
    start = {"run.phase": 1, "optim.batch_size": 7, "optim.epochs": 1}
    assert pair.run_one("start", start)["code"] == 0
    warnings = _Warnings()
    logging.getLogger("dragkit").addHandler(warnings)
    assert pair.run_one("joint", scored)["code"] == 0
    logging.getLogger("dragkit").removeHandler(warnings)
    pair.warnings = warnings.messages
    stop = {"steps": 1, "do": "stop"}
    assert pair.run_one("stopped", settings, after=stop | {"rank": 0})["code"] == 75
    cases = [
        pair.case("joint", scored),
        pair.case("stopped", settings, after=stop | {"rank": 1}),
        pair.case("resumed", settings | {"run.resume": str(pair.one / "stopped")}),
        # The last case, because it ends both processes.
        pair.case("failed", settings, fails=1),
    ]
    pair.run_two("sharding_worker.py", cases)
    return pair


@pytest.mark.parametrize("name", DIRECT)
def test_a_sharded_generator_equals_an_unsharded_one(pair: Pair, name: str) -> None:
    for rank in (0, 1):
        outcome = pair.outcome("direct", rank)[name]
        ours, theirs = outcome["losses"]
        assert ours == theirs and ours
        assert len(outcome["differences"]) > 20 and max(outcome["differences"]) == 0.0
        ours, theirs = outcome["tokens"]
        assert ours == theirs


def test_sharded_blocks_of_a_type_share_a_graph(pair: Pair) -> None:
    for rank in (0, 1):
        outcome = pair.outcome("direct", rank)
        ours, theirs = outcome["compiled"]["graphs"]
        # The recomputed block type may compile one graph more: FSDP's hook makes the first
        # forward's input a view, and the recomputed input is none.
        assert 4 <= theirs <= ours <= theirs + 1
        assert outcome["nemotron"]["graphs"] == [0, 0]


def test_continuations_of_the_ranks_differ_in_length(pair: Pair) -> None:
    for name in DIRECT:
        ends = [
            [max(map(len, batch)) for batch in pair.outcome("direct", rank)[name]["tokens"][0]]
            for rank in (0, 1)
        ]
        assert len(ends[0]) != len(ends[1]) and ends[0][0] != ends[1][0], ends


@pytest.mark.parametrize("name", DIRECT)
def test_a_rank_holds_half_of_the_weights_and_gathers_one_block_at_a_time(
    pair: Pair, name: str
) -> None:
    for rank in (0, 1):
        outcome = pair.outcome("direct", rank)[name]
        # Odd sizes are rounded up.
        assert 0.5 <= outcome["share"] < 0.51
        assert 0 < outcome["most"] <= 2 * outcome["largest"]
        assert outcome["left"] == outcome["left after decoding"] == 0


def test_two_ranks_train_as_one(pair: Pair) -> None:
    assert pair.codes("joint") == [0, 0]
    pair.assert_equal_logs("joint")
    assert_close(pair.one / "joint", pair.two / "joint")
    assert pair.outcome("joint", 1)["saves"] == []


def test_any_number_of_ranks_resumes_a_stopped_run(pair: Pair) -> None:
    assert pair.codes("stopped") == [75, 75] and pair.codes("resumed") == [0, 0]
    settings = _settings(pair.one) | {"run.resume": str(pair.two / "stopped")}
    outcome = pair.run_one("unused", settings)
    assert outcome["code"] == 0 and outcome["saves"] == [2, 4]
    for resumed in (pair.one, pair.two):
        assert_close(pair.one / "joint", resumed / "stopped")


def test_a_failure_inside_a_pass_ends_the_other_rank_with_its_message(pair: Pair) -> None:
    pair.outcome("resumed", 1)
    assert pair.process.returncode != 0
    assert "ValueError: planted failure" in pair.process.stderr
    assert "stopped at step 0: rank 1: planted failure" in pair.process.stderr


def test_limited_concurrency_admits_size_ranks_at_a_time(pair: Pair) -> None:
    assert pair.outcome("waves", 0) == [1, 2]


def test_a_single_rank_warns_that_it_cannot_shard(pair: Pair) -> None:
    (warning,) = (text for text in pair.warnings if "run.generator_fsdp" in text)
    assert "torchrun" in warning


class _Bare(torch.nn.Module):
    """A model whose class names no blocks."""


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="run.generator_fsdp: the blocks of a _Bare are not known"
    ):
        decoder_blocks(_Bare())


def test_a_card_must_hold_its_shard_and_the_host_all_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, card = "random:nemotron-3-nano-30b-a3b", torch.device("cuda")  # 59 GiB
    monkeypatch.setattr(load, "host_memory_bytes", lambda: 64 << 30)
    properties = SimpleNamespace(total_memory=40 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert load.check_generator(GeneratorConfig(), card, name=name, num_shards=2)
    with pytest.raises(MissingInputError, match="needs 59 GiB .* a card has 40 GiB"):
        load.check_generator(GeneratorConfig(), card, name=name)
    monkeypatch.setattr(load, "host_memory_bytes", lambda: 50 << 30)
    with pytest.raises(MissingInputError, match="needs 59 GiB .* the host has 50 GiB"):
        load.check_generator(GeneratorConfig(), card, name=name, num_shards=2)


def test_the_fingerprint_leaves_sharded_weights_out() -> None:
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    unsharded = frozen_fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_fingerprint(model) != unsharded
    model.weight.device_mesh = None  # as a DTensor has
    sharded = frozen_fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_fingerprint(model) == sharded
    with torch.no_grad():
        model.bias += 1
    assert frozen_fingerprint(model) != sharded
