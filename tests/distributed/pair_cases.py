"""Runs the same cases with one rank and with two.

One pair of processes runs all cases of two ranks, because starting them costs more than the runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dragkit.checkpoint.checkpoint import find_checkpoint, load_checkpoint
from dragkit.distributed.ranks import Ranks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load_worker() -> object:
    spec = importlib.util.spec_from_file_location("ranks_worker", HERE / "ranks_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


class Pair:
    """The folders of the runs with one rank and with two, and their outcomes."""

    def __init__(self, folder: Path) -> None:
        self.one, self.two = folder / "one", folder / "two"
        self.one.mkdir()
        self.two.mkdir()
        os.environ.setdefault("DRAGKIT_CACHE", str(folder.parent / "cache"))

    def case(self, name: str, settings: dict, **more: object) -> dict:
        settings = {"run.checkpoint_dir": str(self.two / name)} | settings
        return {"name": name, "settings": settings} | more

    def run_one(self, name: str, settings: dict, **more: object) -> dict:
        settings = {"run.checkpoint_dir": str(self.one / name)} | settings
        return worker.run_case({"name": name, "settings": settings} | more, Ranks())

    def run_two(self, script: str, cases: list[dict]) -> None:
        plan = self.two / "plan.json"
        plan.write_text(json.dumps(cases))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.process = subprocess.run(
            [*command, "--nproc-per-node", "2", str(HERE / script), str(plan)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )

    def outcome(self, name: str, rank: int) -> dict:
        path = self.two / f"{name}.{rank}.json"
        assert path.is_file(), self.process.stderr[-3000:]
        return json.loads(path.read_text())

    def codes(self, name: str) -> list[int]:
        return [self.outcome(name, rank)["code"] for rank in (0, 1)]

    def assert_equal_logs(self, name: str) -> None:
        """The losses of every step and the scores of every validation equal those of one rank."""
        ours, theirs = (lines(folder / name, "train") for folder in (self.one, self.two))
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs, strict=True):
            assert a["train"].keys() == b["train"].keys()
            assert a["train"] == pytest.approx(b["train"], rel=1e-5, abs=1e-6)
            assert a["lr"] == b["lr"] and a["step"] == b["step"]
        ours, theirs = (lines(folder / name, "validation") for folder in (self.one, self.two))
        assert len(ours) == len(theirs) == 2
        for a, b in zip(ours, theirs, strict=True):
            assert a["validation"] == pytest.approx(b["validation"], rel=1e-12)


def lines(folder: Path, kind: str) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [entry for line in text.splitlines() if kind in (entry := json.loads(line))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_checkpoint(find_checkpoint(folder))
    adapter = loaded.folder / "adapter" / "adapter_model.safetensors"
    tensors = loaded.tensors["retriever_projector"] | loaded.tensors["optim"]
    return tensors | (load_file(adapter) if adapter.is_file() else {})


def assert_close(first: Path, second: Path, *, few: float = 0.0) -> None:
    """All weights and moments are within 1e-5, but for the fraction `few` of each tensor.

    Adam divides a gradient by its own size. Where the gradient is rounding alone, an entry moves by
    a part of the rate, 1e-4.
    """
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs()
        assert difference.max() <= (1e-4 if few else 1e-5), name
        assert (difference > 1e-5).double().mean() <= few, name
