"""Trains the runs of an experiment in processes of their own, several at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from dragkit.checkpoint.atomic import make_dirs, write_text_atomically
from dragkit.checkpoint.retention import last_intact
from dragkit.config import differing_settings, read_saved_config
from dragkit.errors import ConfigError, DragkitError
from dragkit.experiment.plan import Run, expand, question_files

logger = logging.getLogger(__name__)

TRAIN = (sys.executable, "-m", "dragkit.train")
RECORD, LOG, SCORES = "experiment.json", "train.log", "test_predictions.jsonl"


def command(run: Run, root: Path, threads: int, *, gpu: bool, resume: bool = False) -> list[str]:
    """The arguments of `python -m dragkit.train`, with `${VARIABLE}` as in the file.

    Args:
        run: the run.
        root: folder of all runs.
        threads: CPU threads.
        gpu: False trains on the CPU, whatever the machine has.
        resume: continue from the newest checkpoint.
    """
    arguments = [*run.arguments, "--set", f"run.num_threads={threads}"]
    arguments += ["--checkpoint_dir", str(root / run.folder)]
    if run.first is not None:
        arguments += ["--phase1_checkpoint", str(root / run.first.folder)]
    arguments += [] if gpu else ["--device", "cpu"]
    return [*arguments, *(["--resume"] if resume else [])]


def read_record(run: Run, root: Path) -> dict | None:
    """The settings, fingerprints of questions, commit and seconds of a run, and if it finished."""
    path = root / run.folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_record(run: Run, root: Path, record: Mapping[str, object]) -> None:
    make_dirs(root / run.folder)
    write_text_atomically(root / run.folder / RECORD, json.dumps(record, indent=1) + "\n")


def _settings(run: Run) -> dict[str, dict]:
    """The configurations that a run depends on, by phase."""
    configs = [run.config, *([run.first.config] if run.first else [])]
    return {f"phase{c.run.phase}": c.model_dump(mode="json") for c in configs}


def _fingerprints(run: Run) -> dict[str, str]:
    """SHA-256 of the content of each question file. The bundled demo has none."""
    return {key: _sha256(path) for key, path in question_files(run.config).items()}


@cache
def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(run: Run, root: Path) -> str:
    """Whether a run is "new", to "resume", or "finished".

    Raises:
        ConfigError: the folder holds a run with other settings or questions.
    """
    folder, record = root / run.folder, read_record(run, root)
    begun = last_intact(folder) is not None
    if not begun and not (record and record["finished"]):
        return "new"
    remedy = "Remove the folder to train again, or name another one with --runs."
    if record is None:
        raise ConfigError(f"{folder}: holds a run that is not of an experiment. {remedy}")
    for phase, planned in _settings(run).items():
        saved = record["settings"].get(phase, {})
        ours, theirs = (read_saved_config(x, str(folder)) for x in (planned, saved))
        if other := differing_settings(theirs, ours):
            shown = ", ".join(f"{key}={value}" for key, value in other.items())
            raise ConfigError(f"{folder}: its run has other settings in {phase}: {shown}. {remedy}")
    if record["fingerprints"] != _fingerprints(run):
        raise ConfigError(f"{folder}: the question files have changed since its run. {remedy}")
    return "finished" if record["finished"] else "resume"


def states(runs: Iterable[Run], root: Path) -> dict[Run, str]:
    """The state of each run.

    Raises:
        ConfigError: lists every folder that holds a run with other settings.
    """
    found, problems = {}, []
    for run in runs:
        try:
            found[run] = state(run, root)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


@dataclass
class Launcher:
    """Trains runs in processes of their own.

    Attributes:
        root: folder of all runs.
        threads: CPU threads of a run.
        gpus: numbers of the GPUs with one run at a time each. Empty for runs on the CPU.
        commit: of the code, for the records.
        program: the command that trains.
    """

    root: Path
    threads: int
    gpus: Sequence[str] = ()
    commit: str = ""
    program: Sequence[str] = TRAIN
    _processes: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __post_init__(self) -> None:
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in self.gpus:
            self._free.put(gpu)

    def train(self, run: Run, resume: bool) -> int:
        """Trains a run and returns the exit code of its process. Its output goes to its log."""
        folder = self.root / run.folder
        record = read_record(run, self.root) if resume else None
        record = {"seconds": 0.0} | (record or {})
        record |= {"settings": _settings(run), "fingerprints": _fingerprints(run)}
        record |= {"commit": self.commit, "finished": False}
        _write_record(run, self.root, record)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        gpu = self._free.get() if self.gpus else None
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        words = command(run, self.root, self.threads, gpu=gpu is not None, resume=resume)
        start = time.monotonic()
        with (folder / LOG).open("a", encoding="utf-8") as log:
            code = self._run([*self.program, *map(expand, words)], environment, log.fileno())
        if gpu is not None:
            self._free.put(gpu)
        seconds = time.monotonic() - start
        record["seconds"] += seconds
        if code == 0 and not (folder / SCORES).is_file():
            logger.error("%s: ended well but wrote no %s", run, SCORES)
            code = DragkitError.exit_code
        record["finished"] = code == 0
        _write_record(run, self.root, record)
        logger.info("%s: exit %d after %.0f s", run, code, seconds)
        return code

    def _run(self, words: list[str], environment: dict[str, str], log: int) -> int:
        with self._lock:
            if self._stopped:
                return 130
            # A session of its own: Ctrl-C reaches this process alone, which then stops the runs
            # once. A second signal would make them end without saving.
            process = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            self._processes.add(process)
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        return code

    def stop(self) -> None:
        """Makes the running processes save and end, and starts no others."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


def train_all(
    runs: Mapping[Run, str], jobs: int, train: Callable[[Run, bool], int], stop: Callable[[], None]
) -> dict[Run, int]:
    """Trains all runs that are not finished, every phase 1 before the runs that start from it.

    Args:
        runs: the runs with their states.
        jobs: number of runs at a time.
        train: trains a run, resumed or not, and returns its exit code.
        stop: ends the runs in progress. It is called before an exception leaves this function.

    Returns:
        The exit codes of the runs that failed. A run whose phase 1 failed is not started and not
        among them.
    """
    failed: dict[Run, int] = {}
    order = TopologicalSorter({run: [run.first] if run.first else [] for run in runs})
    order.prepare()
    pending: dict[Future[int], Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while order.is_active():
                for run in order.get_ready():
                    if runs[run] == "finished" or run.first in failed:
                        order.done(run)
                    else:
                        pending[pool.submit(train, run, runs[run] == "resume")] = run
                done = wait(pending, return_when=FIRST_COMPLETED).done if pending else ()
                for future in done:
                    run = pending.pop(future)
                    if code := future.result():
                        failed[run] = code
                    order.done(run)
        except BaseException:
            stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failed
