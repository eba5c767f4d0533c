"""Runs keep secrets to themselves, and use no network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.toy import Processes, toy

SECRETS = {
    "HF_TOKEN": "hf_pQvTnRkZwYdLsMbX",
    "HUGGING_FACE_HUB_TOKEN": "hf_bGhJkLmNpQrStVwX",
    "WANDB_API_KEY": "0123456789wandb0123456789",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIsecret",
    "OPENAI_API_KEY": "sk-proj-abcdefsecret",
}
_LOOKUPS = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr")
_TOKEN = "hf_settingsTokenXyZ"
_EXPERIMENT = """\
name: toy
seeds: [0]
data:
  toy: {heuristics_path: TRAIN, test_heuristics_path: TRAIN}
settings: {preset: tiny, generator.model: tiny}
arms:
  plain: {}
metrics: [retrieval-recall]
"""


def _commands(root: Path, runs: Path) -> Iterator[tuple[str, list[str]]]:
    """Both phases, an evaluation, and the commands that only look."""
    one, two = runs / "phase1", runs / "phase2"
    yield "dragkit.train", toy(root, 1, epochs=1, save_every=6).command(one)
    yield "dragkit.train", toy(root, 2, epochs=1, save_every=6, start=one).command(two)
    yield "dragkit.evaluate", [str(two), "--device", "cpu", "--limit", "2"]
    yield "dragkit.plan", ["--preset", "h200"]
    yield "dragkit.config", ["show", "--preset", "tiny"]
    experiment = runs / "experiment.yaml"
    experiment.write_text(_EXPERIMENT.replace("TRAIN", str(root / "train.jsonl")))
    yield "dragkit.experiment", [str(experiment), "--dry_run"]


def secrets(outcome: Outcome, root: Path) -> None:
    """Secrets of the environment and of a settings file are in nothing that a run writes."""
    runs = _new_folder(root / "secrets")
    settings = runs / "settings.yaml"
    settings.write_text(f"run:\n  hf_token: {_TOKEN}\n")
    programs = [*_commands(root, runs), ("dragkit.train", ["--config", str(settings)])]
    processes = Processes(runs)
    codes = processes.run_all(programs, around=_with_secrets)
    expected = [0] * (len(programs) - 1) + [2]
    for (module, _), code, right in zip(programs, codes, expected, strict=True):
        with outcome.case(f"{module} with secrets"):
            require(code == right, f"exit code {code}: {processes.tail()}")
    settings.unlink()
    written = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    for name, secret in (SECRETS | {"hf_token of the settings": _TOKEN}).items():
        with outcome.case(f"{name} in {len(written)} files"):
            found = [str(path) for path, data in written.items() if secret.encode() in data]
            require(not found, f"it is in {', '.join(found)}")
    outcome.notes.append(f"{len(SECRETS) + 1} secrets, {len(written)} files of runs and logs")


def offline(outcome: Outcome, root: Path) -> None:
    """No command looks a name up or connects to another machine."""
    runs = _new_folder(root / "offline")
    programs, processes = list(_commands(root, runs)), Processes(runs)
    codes = processes.run_all(programs, around=_without_network)
    tried = json.loads((runs / "network.json").read_text())
    for (module, _), code in zip(programs, codes, strict=True):
        with outcome.case(f"{module} without a network"):
            require(code == 0, f"exit code {code}: {processes.tail()}")
    with outcome.case("names and connections"):
        require(not tried, f"{len(tried)} were asked for, first {tried[:1]}")


def _new_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@contextmanager
def _with_secrets(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, SECRETS):
        yield


@contextmanager
def _without_network(folder: Path) -> Iterator[None]:
    """Refuses and writes down every lookup and every connection but those of this machine."""
    asked: list[str] = []

    def refuse(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            if isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX:
                return original(*args, **options)
            asked.append(f"{name} {args[-1] if name.startswith('connect') else args[0]}")
            raise OSError("the network is blocked")

        return call

    hub = sys.modules["huggingface_hub.constants"]
    with (
        # The hub's client has read the variable already. A user may not have set it.
        mock.patch.multiple(
            socket, **{name: refuse(name, getattr(socket, name)) for name in _LOOKUPS}
        ),
        mock.patch.object(hub, "HF_HUB_OFFLINE", False),
        mock.patch.dict(os.environ),
        mock.patch.object(socket.socket, "connect", refuse("connect", socket.socket.connect)),
        mock.patch.object(
            socket.socket, "connect_ex", refuse("connect_ex", socket.socket.connect_ex)
        ),
    ):
        os.environ.pop("HF_HUB_OFFLINE", None)
        try:
            yield
        finally:
            (folder / "network.json").write_text(json.dumps(asked))
