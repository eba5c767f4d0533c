"""Toy runs of the training command, in processes that can be stopped and killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from dragkit.checkpoint.checkpoint import find_checkpoint
from dragkit.checkpoint.manifest import MANIFEST_NAME
from dragkit.errors import MissingInputError
from dragkit.selftest.outcome import Loss, require

# Imported once, by the server that starts all processes. Importing takes longer than a toy run.
_PRELOAD = ["dragkit.trainer.run", "dragkit.trainer.evaluate_run", "transformers", "peft"]
_LIMIT_S = 300.0
# Of a process. It travels there, so it is a function of a module, or a partial one.
Surroundings = Callable[[], AbstractContextManager[object]]
# Of a process that runs several programs. It takes the folder of the logs.
Around = Callable[[Path], AbstractContextManager[None]]
STEPS_IN_EPOCH = 10
# What a second run of the same questions repeats. The others are rates.
_REPEATED = ("step", "epoch", "train", "lr", "validation")


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Writes `count` questions with graphs of invented names."""
    draw = random.Random(seed)
    names = [f"{a}{b}" for a in ("Or", "Mel", "Tav", "Quin", "Bez") for b in ("ia", "on", "ard")]
    relations = [f"place.place.{word}" for word in ("north_of", "part_of", "named_after", "twin")]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            nodes = draw.sample(names, draw.randint(4, 8))
            triples = [
                [draw.choice(nodes), draw.choice(relations), draw.choice(nodes)]
                for _ in range(draw.randint(5, 12))
            ]
            head, relation, tail = triples[0]
            words = relation.rpartition(".")[2].replace("_", " ")
            row = {"id": f"{seed}-{number}", "question": f"What is {head} {words}?"}
            row |= {"topic_entities": [head], "answer": [tail], "paths": [[head, tail]]}
            file.write(json.dumps(row | {"triples": triples}) + "\n")
    return path


@dataclass(frozen=True, slots=True)
class Toy:
    """A toy run: the arguments of its command, without its folder.

    Attributes:
        name: of the phase and of what differs from the other runs.
        arguments: flags of `python -m dragkit.train`.
        save_every: optimizer steps between two checkpoints.
    """

    name: str
    arguments: tuple[str, ...]
    save_every: int

    def command(self, folder: Path, *, resume: bool = False) -> list[str]:
        """The arguments of a new run in `folder`, or of one that is resumed."""
        where = ["--resume" if resume else "--checkpoint_dir", str(folder)]
        return [*self.arguments, *where]

    def command_of_either(self, folder: Path) -> list[str]:
        """The arguments that begin a run in `folder`, or resume the one that is there."""
        return [*self.command(folder), "--resume"]

    def having(self, name: str, **settings: object) -> Toy:
        """The toy with other settings. Two underscores in a name stand for the dot of its key."""
        pairs = ((key.replace("__", "."), value) for key, value in settings.items())
        words = (word for key, value in pairs for word in ("--set", f"{key}={value}"))
        return replace(self, name=f"{self.name}-{name}", arguments=(*self.arguments, *words))


def toy(
    root: Path,
    phase: int,
    *,
    epochs: int,
    save_every: int,
    accumulation: int = 1,
    keep: int = 3,
    start: Path | None = None,
    tests: bool = False,
) -> Toy:
    """A run with `STEPS_IN_EPOCH` optimizer steps in an epoch, each of four questions.

    Args:
        root: folder of the questions and of the cache, which are made there.
        phase: 1 or 2.
        epochs: number of epochs.
        save_every: optimizer steps between two checkpoints.
        accumulation: micro-batches of an optimizer step.
        keep: number of newest checkpoints that stay.
        start: run of phase 1 that phase 2 starts from. Without it phase 2 trains phase 1 first.
        tests: evaluate on test questions, also before training.
    """
    train, val = root / "train.jsonl", root / "val.jsonl"
    if not train.exists():
        write_questions(train, 4 * STEPS_IN_EPOCH)
        write_questions(val, 4, seed=1)
    settings = {
        "run.num_threads": 1,
        "run.log_every_steps": 1,
        "run.save_every_steps": save_every,
        "run.keep_checkpoints": keep,
        "data.cache_dir": root / "cache",
        "optim.accumulation_steps": accumulation,
        "retriever.hidden_dim": 8,
        "generator.max_new_tokens": 4,
        "generator.max_prompt_tokens": 200,
        **({"data.test_heuristics_path": val} if tests else {}),
    }
    flags = {
        "phase": phase,
        "preset": "tiny",
        "device": "cpu",
        "epochs": epochs,
        "batch_size": 4 // accumulation,
        "heuristics_path": train,
        "val_heuristics_path": val,
        **({"phase1_checkpoint": start} if start is not None else {}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    name = f"phase{phase}" + (f"-{accumulation}" if accumulation > 1 else "")
    name += "-after-phase1" if phase == 2 and start is None else ""
    return Toy(name, tuple(words), save_every)


def _to_log(log: Path) -> None:
    """Appends stdout and stderr of this process to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def as_on_a_terminal() -> None:
    """Lets signals end this process. A background job of a shell ignores SIGINT, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _run_program(
    module: str, arguments: Sequence[str], log: Path, surroundings: Surroundings, own_group: bool
) -> None:
    """Body of a process: `python -m module arguments`, with stdout and stderr in `log`."""
    _to_log(log)
    if own_group:
        os.setpgid(0, 0)
    as_on_a_terminal()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Loader processes start as from a command line, not from the server that started this process.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [module, *arguments]
    with surroundings():
        runpy.run_module(module, run_name="__main__")


def _run_programs(
    commands: Sequence[tuple[str, list[str]]], log: Path, codes: Path, around: Around
) -> None:
    """Body of a process: `python -m` of each command in turn, with the exit codes in `codes`."""
    _to_log(log)
    found: list[object] = []
    with around(log.parent):
        for module, arguments in commands:
            sys.argv = [module, *arguments]
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as error:
                found.append(error.code)
            except BaseException as error:
                found.append(repr(error))
            codes.write_text(json.dumps(found))


def forkserver() -> ForkServerContext:
    """Starts processes of the self-test, from the one server that has imported the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


class Processes:
    """Starts the programs of the package in processes of their own.

    Args:
        folder: folder of the log.
        surroundings: enters what a process runs in, such as a disk that is slow.
        own_group: each process leads a process group, to which signals are sent.
    """

    def __init__(
        self, folder: Path, surroundings: Surroundings = nullcontext, *, own_group: bool = False
    ) -> None:
        self.log, self.surroundings, self.own_group = folder / "log.txt", surroundings, own_group
        self._context = forkserver()

    def start(self, arguments: Sequence[str], module: str = "dragkit.train") -> BaseProcess:
        """Starts `python -m module arguments`."""
        args = (module, list(arguments), self.log, self.surroundings, self.own_group)
        process = self._context.Process(target=_run_program, args=args)
        process.start()
        return process

    def run(self, arguments: Sequence[str], module: str = "dragkit.train") -> int:
        """Runs a program to its end and returns its exit code, negative for a signal."""
        process = self.start(arguments, module)
        return self.wait(process)

    def run_all(
        self, commands: Sequence[tuple[str, list[str]]], around: Around = nullcontext
    ) -> list[object]:
        """Runs commands, each as module and arguments, in one process. Returns their exit codes.

        Args:
            commands: module and arguments of each.
            around: context of all of them in their process. It takes the folder of the logs.

        Raises:
            Loss: the process did not reach its end.
        """
        codes = self.log.with_name("codes.json")
        process = self._context.Process(
            target=_run_programs, args=(list(commands), self.log, codes, around)
        )
        process.start()
        code = self.wait(process)
        found = json.loads(codes.read_text()) if codes.exists() else []
        if code or len(found) < len(commands):
            raise Loss(f"exit code {code} at {' '.join(commands[len(found)][1])}: {self.tail()}")
        return found

    def wait(self, process: BaseProcess, seconds: float = _LIMIT_S) -> int:
        """The exit code of a process.

        Raises:
            Loss: it takes longer than `seconds`. It is killed.
        """
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise Loss(f"still running after {seconds:.0f} s")
        return process.exitcode

    def signal(self, process: BaseProcess, number: int) -> None:
        """Sends a signal to a process that may have ended."""
        if process.is_alive() and process.pid is not None:
            (os.killpg if self.own_group else os.kill)(process.pid, number)

    def finish(self, arguments: Sequence[str]) -> None:
        """Runs the training command.

        Raises:
            Loss: its exit code is not 0. The message ends with the last lines of its log.
        """
        code = self.run(arguments)
        require(code == 0, f"exit code {code}: {self.tail()}")

    def tail(self) -> str:
        """The last two lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-2:])


def logged_steps(folder: Path) -> list[dict]:
    """The whole lines of a run's log."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def saved_step(folder: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    if not folder.exists():
        return 0
    try:
        return int(find_checkpoint(folder).name.partition("-")[2])
    except MissingInputError:
        return 0


def trace(folder: Path) -> dict[str, object]:
    """What two equal runs share: hashes of the last checkpoint's files, and each logged value."""
    checkpoint = find_checkpoint(folder)
    files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    lines = enumerate(logged_steps(folder), 1)
    return {
        # The configuration names the folder of the run.
        **{row["name"]: row["sha256"] for row in files if row["name"] != "config.json"},
        **{f"metrics.jsonl:{n}": {k: line.get(k) for k in _REPEATED} for n, line in lines},
    }


def require_same(folder: Path, expected: dict[str, object]) -> None:
    """Raises Loss where a run differs from the trace of an uninterrupted one."""
    actual = trace(folder)
    differ = [name for name in expected | actual if expected.get(name) != actual.get(name)]
    if differ:
        first = differ[0]
        raise Loss(
            f"{len(differ)} files or lines differ from an uninterrupted run, first {first}: "
            f"{actual.get(first)}, expected {expected.get(first)}"
        )
