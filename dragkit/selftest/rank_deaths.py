"""Two ranks on one machine: one is killed, and the other ends soon and says where."""

from __future__ import annotations

import random
import shutil
import socket
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from dragkit.selftest.faulty_runs import logged_step
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.surroundings import variables
from dragkit.selftest.toy import STEPS_IN_EPOCH, Processes, Toy, require_same, toy, trace

_LIMIT_S = 60.0
_EPOCHS = 4


class _Pair:
    """Two ranks of a run, each with a log of its own."""

    def __init__(self, root: Path, run: Toy, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[Processes] = []
        self.ranks: list[BaseProcess] = []
        for rank in ("0", "1"):
            values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            place = root / f"rank-{rank}"
            place.mkdir(exist_ok=True)
            self.processes.append(Processes(place, partial(variables, values)))
            self.ranks.append(self.processes[-1].start(run.command_of_either(folder)))

    def wait(self, rank: int) -> int:
        return self.processes[rank].wait(self.ranks[rank], _LIMIT_S)

    def finish(self) -> None:
        """Waits for the end of both ranks."""
        for rank in (0, 1):
            code = self.wait(rank)
            require(code == 0, f"rank {rank}: exit code {code}: {self.processes[rank].tail()}")


def rank_deaths(outcome: Outcome, root: Path, *, count: int) -> None:
    """Kills one of two ranks at random steps. Started again, both end bit for bit the same.

    Args:
        outcome: counts the cases.
        root: folder of the runs.
        count: number of kills.
    """
    run = toy(root, 1, epochs=_EPOCHS, save_every=4).having("2-ranks", run__rank_timeout=30)
    whole = root / "whole-2-ranks"
    _Pair(root, run, whole).finish()
    expected, draw, longest = trace(whole), random.Random(count), 0.0
    for attempt in range(count):
        killed, folder = attempt % 2, root / f"rank-killed-{attempt}"
        step = draw.randrange(0, _EPOCHS * STEPS_IN_EPOCH - 1)
        with outcome.case(f"rank {killed} killed at about step {step}"):
            pair = _Pair(root, run, folder)
            while pair.ranks[0].is_alive() and logged_step(folder) < step:
                time.sleep(0.005)
            pair.ranks[killed].kill()
            began, other = time.monotonic(), 1 - killed
            code = pair.wait(other)
            longest = max(longest, time.monotonic() - began)
            pair.wait(killed)
            said = pair.processes[other].tail()
            if code:
                require(f"rank {other}" in said, f"no rank is named: {said}")
                require(step == 0 or "at step" in said, f"no step is named: {said}")
            _Pair(root, run, folder).finish()
            require_same(folder, expected)
        shutil.rmtree(folder, ignore_errors=True)
    outcome.notes.append(f"the other rank ended within {longest:.1f} s")
