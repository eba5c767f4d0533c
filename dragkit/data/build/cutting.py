"""Makes the parts of a build, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dragkit.console import STOP_SIGNALS
from dragkit.data.build.cut import CutOptions
from dragkit.data.build.graph_store import map_graph
from dragkit.data.build.parts import BuildFolder, Part
from dragkit.data.build.questions import Questions
from dragkit.data.build.sources import SourceQuestion
from dragkit.data.build.subgraphs import SubgraphBuilder
from dragkit.errors import WriteError

# A killed build loses at most one part a process.
PART_QUESTIONS = 128
_Sourced = Sequence[tuple[SourceQuestion, str]]


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` builds of the same files, from 0. It makes every `count`-th part."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Cutting:
    """What a process needs to cut.

    Attributes:
        folder: the output, see `BuildFolder`.
        graph: cache folder of the knowledge graph, None without one.
        options, exclude: see `SubgraphBuilder`.
    """

    folder: Path
    graph: Path | None
    options: CutOptions | None
    exclude: frozenset[str] = frozenset()


class _Worker:
    """Makes parts. There is one in each process."""

    def __init__(self, cutting: Cutting) -> None:
        graph = None if cutting.graph is None else map_graph(cutting.graph)
        self.folder = BuildFolder(cutting.folder)
        self.builder = SubgraphBuilder(graph, cutting.options, cutting.exclude)

    def make(self, number: int, questions: _Sourced) -> int:
        """Makes one part and returns its number of questions."""
        part = Part()
        lines = self.builder.lines(questions, part)
        self.folder.write_part(number, lines, part)
        return len(lines)


_cutting: Cutting


@cache
def _worker() -> _Worker:
    return _Worker(_cutting)


def _start_worker(cutting: Cutting) -> None:
    global _cutting
    _cutting = cutting
    # Signals may reach all processes of a terminal or a job. The parent decides.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A process whose parent was killed would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _make(number: int, questions: _Sourced) -> int:
    return _worker().make(number, questions)


def make_parts(
    questions: Questions, count: int, cutting: Cutting, *, shard: Shard, workers: int
) -> None:
    """Makes the parts of a shard that the folder does not hold.

    Args:
        questions: all questions of the build.
        count: their number.
        cutting: what to make.
        shard: which parts.
        workers: number of processes. One works in this process.

    Raises:
        WriteError: the folder cannot be written, or a process was killed.
    """
    with tqdm(total=count, unit="questions", disable=None) as bar:
        missing = _missing(questions, BuildFolder(cutting.folder), shard, bar)
        if workers > 1:
            _make_in_processes(missing, cutting, workers, bar)
            return
        worker = _Worker(cutting)
        for number, part in missing:
            bar.update(worker.make(number, part))


def _missing(
    questions: Questions, folder: BuildFolder, shard: Shard, bar: tqdm
) -> Iterator[tuple[int, _Sourced]]:
    """The parts to make. The bar moves over the others."""
    iterator, number = iter(questions), 0
    while part := list(islice(iterator, PART_QUESTIONS)):
        if number % shard.count == shard.index and not folder.has_part(number):
            yield number, part
        else:
            bar.update(len(part))
        number += 1


def _make_in_processes(
    missing: Iterator[tuple[int, _Sourced]], cutting: Cutting, workers: int, bar: tqdm
) -> None:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(cutting,),
    )
    pending: set[Future[int]] = set()
    try:
        for number, part in missing:
            pending.add(pool.submit(_make, number, part))
            # The source is read no faster than the processes cut.
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                bar.update(sum(future.result() for future in done))
        for future in pending:
            bar.update(future.result())
    except BrokenProcessPool as error:
        raise WriteError(
            f"{cutting.folder}: a process was killed, perhaps because the memory was full. Run "
            "the same command again: it goes on where it stopped. Fewer --workers need less memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
