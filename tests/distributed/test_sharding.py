"""Frozen weights cut between two ranks: the numbers of whole ones, half of the memory, no hang."""

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
    # Batches of 7 and 1: in every second one, rank 1 has no question. A pass per prompt: where both
    # have some, rank 0 has one more.
    return {
        "run.phase": 2,
        "run.phase1_checkpoint": str(one / "start"),
        "run.generator_fsdp": True,
        "optim.batch_size": 7,
        "loss.use_grad_norm_balance": True,
        "generator.generator_microbatch": 1,
        "generator.activation_checkpointing": "mamba",
    }


class _Told(logging.Handler):
    """Messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Runs everything: as one rank here, then all cases in two processes."""
    pair = Pair(tmp_path_factory.mktemp("sharding"))
    settings = _settings(pair.one)
    # When validating, too: ranks that have other prompts, or none, need as many passes.
    scored = settings | {
        "data.val_heuristics_path": str(worker.FIXTURE),
        "generator.max_tokens_per_microbatch": 1,
    }
    start = {"run.phase": 1, "optim.batch_size": 7, "optim.epochs": 1}
    assert pair.run_one("start", start)["code"] == 0
    told = _Told()
    logging.getLogger("dragkit").addHandler(told)
    assert pair.run_one("joint", scored)["code"] == 0
    logging.getLogger("dragkit").removeHandler(told)
    pair.warnings = told.messages
    stop = {"steps": 1, "do": "stop"}
    assert pair.run_one("stopped", settings, after=stop | {"rank": 0})["code"] == 75
    cases = [
        pair.case("joint", scored),
        pair.case("stopped", settings, after=stop | {"rank": 1}),
        pair.case("resumed", settings | {"run.resume": str(pair.one / "stopped")}),
        # The last one: it ends both processes.
        pair.case("failed", settings, fails=1),
    ]
    pair.run_two("sharding_worker.py", cases)
    return pair


@pytest.mark.parametrize("name", DIRECT)
def test_a_cut_generator_computes_what_a_whole_one_does(pair: Pair, name: str) -> None:
    for rank in (0, 1):
        found = pair.outcome("direct", rank)[name]
        ours, theirs = found["losses"]
        assert ours == theirs and ours
        assert len(found["differences"]) > 20 and max(found["differences"]) == 0.0
        ours, theirs = found["tokens"]
        assert ours == theirs


def test_cut_blocks_of_a_kind_share_a_graph_as_whole_ones_do(pair: Pair) -> None:
    for rank in (0, 1):
        found = pair.outcome("direct", rank)
        ours, theirs = found["compiled"]["graphs"]
        # One more for the kind that is computed again: there its input is no view, as the hook of
        # the first time makes it.
        assert 4 <= theirs <= ours <= theirs + 1
        assert found["nemotron"]["graphs"] == [0, 0]


def test_continuations_end_at_different_steps(pair: Pair) -> None:
    for name in DIRECT:
        ends = [
            [max(map(len, batch)) for batch in pair.outcome("direct", rank)[name]["tokens"][0]]
            for rank in (0, 1)
        ]
        assert len(ends[0]) != len(ends[1]) and ends[0][0] != ends[1][0], ends


@pytest.mark.parametrize("name", DIRECT)
def test_a_rank_has_half_of_the_weights_and_gathers_a_block_at_a_time(
    pair: Pair, name: str
) -> None:
    for rank in (0, 1):
        found = pair.outcome("direct", rank)[name]
        # What two does not divide is rounded up.
        assert 0.5 <= found["share"] < 0.51
        assert 0 < found["most"] <= 2 * found["largest"]
        assert found["left"] == found["left after decoding"] == 0


def test_two_ranks_train_as_one(pair: Pair) -> None:
    assert pair.codes("joint") == [0, 0]
    pair.assert_equal_logs("joint")
    assert_close(pair.one / "joint", pair.two / "joint")
    assert pair.outcome("joint", 1)["saves"] == []


def test_any_number_of_ranks_goes_on_where_others_were_stopped(pair: Pair) -> None:
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


def test_no_more_ranks_load_at_a_time_than_the_machine_holds(pair: Pair) -> None:
    assert pair.outcome("waves", 0) == [1, 2]


def test_one_rank_is_told_that_it_has_nobody_to_share_with(pair: Pair) -> None:
    (told,) = (text for text in pair.warnings if "run.generator_fsdp" in text)
    assert "torchrun" in told


class _Bare(torch.nn.Module):
    """A model that does not name its blocks."""


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="run.generator_fsdp: the blocks of a _Bare are not known"
    ):
        decoder_blocks(_Bare())


def test_a_card_needs_room_for_its_part_and_the_host_for_all(
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


def test_weights_that_are_cut_are_not_compared_again() -> None:
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    whole = frozen_fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_fingerprint(model) != whole
    model.weight.device_mesh = None  # as a DTensor has
    cut = frozen_fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_fingerprint(model) == cut
    with torch.no_grad():
        model.bias += 1
    assert frozen_fingerprint(model) != cut
