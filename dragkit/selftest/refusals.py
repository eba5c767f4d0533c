"""Hostile files are refused by every command, and nothing in them runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dragkit.checkpoint.checkpoint import load_checkpoint
from dragkit.errors import CheckpointError
from dragkit.selftest.damages import rewrite_manifest
from dragkit.selftest.hostile import FALSE_TENSORS, payload_files, payload_models
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.saves import save
from dragkit.selftest.toy import Processes, toy

# Wrong values, bad data, unsuitable input.
_REFUSED = (2, 65, 66)
_LIMIT_S = 2.0


def _commands(file: Path, root: Path, run: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command and flag that takes a path, with `file` in its place: module, arguments."""
    data = str(root / "train.jsonl")
    new = ["--checkpoint_dir", str(root / "never"), "--device", "cpu"]
    train = ["--preset", "tiny", "--heuristics_path", data, *new]
    for arguments in (
        ["--phase", "1", "--heuristics_path", str(file), *new],
        ["--phase", "1", *train, "--val_heuristics_path", str(file)],
        ["--phase", "1", *train, "--config", str(file)],
        ["--phase", "2", *train, "--phase1_checkpoint", str(file)],
        ["--phase", "1", "--device", "cpu", "--resume", str(file)],
    ):
        yield "dragkit.train", arguments
    yield from _model_commands(file, root)
    yield "dragkit.evaluate", [str(file), "--device", "cpu"]
    yield "dragkit.evaluate", [str(run), "--device", "cpu", "--data", str(file)]
    yield "dragkit.plan", ["--config", str(file)]
    yield "dragkit.config", ["show", "--config", str(file)]
    yield "dragkit.experiment", [str(file), "--dry_run"]


def _model_commands(model: Path, root: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands that load a model by its folder."""
    train = ["--preset", "tiny", "--heuristics_path", str(root / "train.jsonl"), "--device", "cpu"]
    train += ["--checkpoint_dir", str(root / "never"), "--epochs", "1"]
    yield (
        "dragkit.train",
        [
            *("--phase", "2", *train, "--generator_model", str(model)),
            *("--phase1_checkpoint", str(root / "start")),
        ],
    )
    yield "dragkit.train", ["--phase", "1", *train, "--set", f"encoder.model={model}"]


def refusals(outcome: Outcome, root: Path) -> None:
    """Pickles and code offered to every command, and false tensors in checkpoints."""
    processes, sentinel, start = Processes(root), root / "sentinel", root / "start"
    if not start.exists():
        processes.finish(toy(root, 1, epochs=1, save_every=5).command(start))
    offered = [
        (file, module, arguments)
        for file in payload_files(root / "files", sentinel)
        for module, arguments in _commands(file, root, start)
    ]
    offered += [
        (model, module, arguments)
        for model in payload_models(root, sentinel)
        for module, arguments in _model_commands(model, root)
    ]
    codes = processes.run_all([(module, arguments) for _, module, arguments in offered])
    for (file, module, arguments), code in zip(offered, codes, strict=True):
        flag = next((a for a in arguments if str(file) in a), "")
        place = arguments[arguments.index(flag) - 1] if flag == str(file) else flag.split("=")[0]
        with outcome.case(f"{file.name} as {place} of {module}"):
            require(code in _REFUSED, f"exit code {code}")
    with outcome.case("code of the files"):
        require(not sentinel.exists(), "a planted program ran")
    outcome.notes.append(f"{len(offered)} files and folders offered to commands")
    false_tensors(outcome)


def false_tensors(outcome: Outcome) -> None:
    """Checkpoints with a manifest that is right and tensors whose header is false."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), 10, 1.0)
        intact, changed = Path(folder, "step-00000010"), Path(folder, "copy")
        for name, content in FALSE_TENSORS.items():
            with outcome.case(f"tensors with {name}"):
                shutil.rmtree(changed, ignore_errors=True)
                shutil.copytree(intact, changed)
                (changed / "heads.safetensors").write_bytes(content())
                rewrite_manifest(changed)
                _require_refused(changed)


def _require_refused(checkpoint: Path) -> None:
    """A checkpoint whose manifest is right is refused for its tensors, at once."""
    began = time.process_time()
    try:
        load_checkpoint(checkpoint)
    except CheckpointError as error:
        require("heads.safetensors" in str(error), f"the message is {error}")
    else:
        require(False, "loaded")
    seconds = time.process_time() - began
    require(seconds < _LIMIT_S, f"took {seconds:.1f} s")
