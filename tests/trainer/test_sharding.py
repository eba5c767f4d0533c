"""Frozen weights cut between two ranks: the numbers of whole ones, half of the memory, no hang.

All that two ranks do is done by one pair of processes, since starting them costs more.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError, MissingInputError
from dragkit.model import load
from dragkit.model.sharding import decoder_blocks
from dragkit.trainer.agreement import frozen_facts
from dragkit.trainer.checkpoint import find_checkpoint, load_checkpoint
from dragkit.trainer.ranks import Ranks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIRECT = ("nemotron", "recomputed", "text", "compiled", "llama")


def _load_worker() -> object:
    spec = importlib.util.spec_from_file_location("ranks_worker", HERE / "ranks_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


class Pair:
    """What one rank with all weights and two ranks with half of them did with the same cases."""

    def __init__(self, folder: Path) -> None:
        self.one, self.two = folder / "one", folder / "two"
        for part in (self.one, self.two):
            part.mkdir()
        # Batches of 7 and 1: in every second one, rank 1 has no question. A pass per prompt: where
        # both have some, rank 0 has one more.
        self.settings = {
            "run.phase": 2,
            "run.phase1_checkpoint": str(self.one / "start"),
            "run.sharding": "full",
            "optim.batch_size": 7,
            "loss.use_grad_norm_balance": True,
            "generator.generator_microbatch": 1,
            "generator.checkpointing": "mamba",
        }
        # When validating, too: ranks that have other prompts, or none, need as many passes.
        self.scored = {
            "data.val_heuristics_path": str(worker.FIXTURE),
            "generator.tokens_per_pass": 1,
        }

    def case(self, name: str, **more: object) -> dict:
        settings = self.settings | {"run.checkpoint_dir": str(self.two / name)}
        return {"name": name, "settings": settings | more.pop("settings", {})} | more

    def run_one(self, name: str, settings: dict, **more: object) -> dict:
        settings = {"run.checkpoint_dir": str(self.one / name)} | settings
        return worker.run_case({"name": name, "settings": settings} | more, Ranks())

    def run_two(self, cases: list[dict]) -> subprocess.CompletedProcess:
        plan = self.two / "plan.json"
        plan.write_text(json.dumps(cases))
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run(
            [*command, "--nproc-per-node", "2", str(HERE / "sharding_worker.py"), str(plan)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    def outcome(self, name: str, rank: int) -> dict:
        path = self.two / f"{name}.{rank}.json"
        assert path.is_file(), self.process.stderr[-3000:]
        return json.loads(path.read_text())


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
    os.environ.setdefault("DRAGKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    start = {"run.phase": 1, "optim.batch_size": 7, "optim.epochs": 1}
    assert pair.run_one("start", start)["code"] == 0
    told = _Told()
    logging.getLogger("dragkit").addHandler(told)
    assert pair.run_one("joint", pair.settings | pair.scored)["code"] == 0
    logging.getLogger("dragkit").removeHandler(told)
    pair.warnings = told.messages
    stop = {"steps": 1, "do": "stop"}
    assert pair.run_one("stopped", pair.settings, after=stop | {"rank": 0})["code"] == 75
    cases = [
        pair.case("joint", settings=pair.scored),
        pair.case("stopped", after=stop | {"rank": 1}),
        pair.case("resumed", settings={"run.resume": str(pair.one / "stopped")}),
        # The last one: it ends both processes.
        pair.case("failed", fails=1),
    ]
    pair.process = pair.run_two(cases)
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


def _lines(folder: Path, kind: str) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [entry for line in text.splitlines() if kind in (entry := json.loads(line))]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_checkpoint(find_checkpoint(folder))
    adapter = load_file(loaded.folder / "adapter" / "adapter_model.safetensors")
    assert adapter
    return loaded.tensors["heads"] | adapter | loaded.tensors["optim"]


def _assert_close(first: Path, second: Path) -> None:
    ours, theirs = _weights(first), _weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_two_ranks_train_as_one(pair: Pair) -> None:
    assert pair.outcome("joint", 0)["code"] == pair.outcome("joint", 1)["code"] == 0
    one, two = pair.one / "joint", pair.two / "joint"
    ours, theirs = _lines(one, "train"), _lines(two, "train")
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-5, abs=1e-6)
    ours, theirs = _lines(one, "validation"), _lines(two, "validation")
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-12)
    _assert_close(one, two)
    assert pair.outcome("joint", 1)["saves"] == []


def test_one_rank_goes_on_where_two_were_stopped(pair: Pair) -> None:
    for rank in (0, 1):
        assert pair.outcome("stopped", rank)["code"] == 75
    outcome = pair.run_one("unused", pair.settings | {"run.resume": str(pair.two / "stopped")})
    assert outcome["code"] == 0 and outcome["saves"] == [2, 4]
    _assert_close(pair.one / "joint", pair.two / "stopped")


def test_two_ranks_go_on_where_one_was_stopped(pair: Pair) -> None:
    assert pair.outcome("resumed", 0)["code"] == pair.outcome("resumed", 1)["code"] == 0
    _assert_close(pair.one / "joint", pair.one / "stopped")


def test_a_failure_inside_a_pass_ends_the_other_rank_with_its_message(pair: Pair) -> None:
    pair.outcome("resumed", 1)
    assert pair.process.returncode != 0
    assert "ValueError: planted failure" in pair.process.stderr
    assert "stopped at step 0: rank 1: planted failure" in pair.process.stderr


def test_no_more_ranks_load_at_a_time_than_the_machine_holds(pair: Pair) -> None:
    assert pair.outcome("waves", 0) == [1, 2]


def test_one_rank_is_told_that_it_has_nobody_to_share_with(pair: Pair) -> None:
    (told,) = (text for text in pair.warnings if "run.sharding" in text)
    assert "torchrun" in told


class _Bare(torch.nn.Module):
    """A model that does not name its blocks."""


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="run.sharding: the blocks of a _Bare are not known"):
        decoder_blocks(_Bare())


def test_a_card_needs_room_for_its_part_and_the_host_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, card = "random:nemotron-3-nano-30b-a3b", torch.device("cuda")  # 59 GiB
    monkeypatch.setattr(load, "host_memory", lambda: 64 << 30)
    properties = SimpleNamespace(total_memory=40 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert load.check_generator(GeneratorConfig(), card, name=name, shards=2)
    with pytest.raises(MissingInputError, match="needs 59 GiB .* a card has 40 GiB"):
        load.check_generator(GeneratorConfig(), card, name=name)
    monkeypatch.setattr(load, "host_memory", lambda: 50 << 30)
    with pytest.raises(MissingInputError, match="needs 59 GiB .* this machine .* has 50 GiB"):
        load.check_generator(GeneratorConfig(), card, name=name, shards=2)


def test_weights_that_are_cut_are_not_compared_again() -> None:
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    whole = frozen_facts(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_facts(model) != whole
    model.weight.device_mesh = None  # as a DTensor has
    cut = frozen_facts(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert frozen_facts(model) == cut
    with torch.no_grad():
        model.bias += 1
    assert frozen_facts(model) != cut
