"""Builds files of questions: cuts in several processes and joins the parts."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dragkit.data.build.cut import CutOptions
from dragkit.data.build.graph_store import map_graph
from dragkit.data.build.parts import BuildFolder, Part
from dragkit.data.build.questions import Questions
from dragkit.data.build.sources import SourceQuestion
from dragkit.data.build.subgraphs import SubgraphBuilder
from dragkit.errors import WriteError

# A killed build loses at most one part a process.
PART_QUESTIONS = 128


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
        options, exclude, limit_triples: see `SubgraphBuilder`.
    """

    folder: Path
    graph: Path | None
    options: CutOptions | None
    exclude: frozenset[str] = frozenset()
    limit_triples: int | None = None


class _Worker:
    """Makes parts. There is one in each process."""

    def __init__(self, cutting: Cutting) -> None:
        graph = None if cutting.graph is None else map_graph(cutting.graph)
        self.folder = BuildFolder(cutting.folder)
        self.builder = SubgraphBuilder(
            graph, cutting.options, cutting.exclude, limit_triples=cutting.limit_triples
        )

    def make(self, number: int, questions: Sequence[tuple[SourceQuestion, str]]) -> int:
        """Makes one part and returns its number of questions."""
        part = Part()
        lines = self.builder.lines(questions, part)
        self.folder.write_part(number, lines, part)
        return len(lines)


_worker: _Worker


def _start_worker(cutting: Cutting) -> None:
    global _worker
    _worker = _Worker(cutting)
    # A process whose parent was killed would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make(number: int, questions: Sequence[tuple[SourceQuestion, str]]) -> int:
    return _worker.make(number, questions)


def _parts(questions: Questions) -> Iterator[tuple[int, list[tuple[SourceQuestion, str]]]]:
    iterator = iter(questions)
    number = 0
    while part := list(islice(iterator, PART_QUESTIONS)):
        yield number, part
        number += 1


def make_parts(
    questions: Questions, count: int, cutting: Cutting, *, shard: Shard, workers: int
) -> None:
    """Makes the parts of a shard that the folder does not hold.

    Args:
        questions: all questions of the build.
        count: their number.
        cutting: what to make.
        shard: which parts.
        workers: number of processes.

    Raises:
        WriteError: the folder cannot be written, or a process was killed.
    """
    folder = BuildFolder(cutting.folder)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(cutting,),
    )
    bar = tqdm(total=count, unit="questions", disable=None)
    pending: set[Future[int]] = set()
    try:
        for number, part in _parts(questions):
            if number % shard.count != shard.index or folder.has_part(number):
                bar.update(len(part))
                continue
            pending.add(pool.submit(_make, number, part))
            # The source is read no faster than the processes cut.
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                bar.update(sum(future.result() for future in done))
        for future in pending:
            bar.update(future.result())
    except BrokenProcessPool as error:
        raise WriteError(
            f"{cutting.folder}: a process was killed, perhaps because the memory was full. Run the "
            "same command again: it goes on where it stopped. Fewer --workers need less memory."
        ) from error
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    folder.set_num_parts(-(-count // PART_QUESTIONS))


def build(settings: BuildSettings) -> str:
    """Builds the files of questions, or one shard of their parts.

    A build that was stopped goes on with the parts that its folder does not hold. Whoever makes
    them, with whatever number of processes and shards, the files are the same byte for byte.

    Returns:
        What was found, or which shards are to be merged.

    Raises:
        ConfigError: settings do not fit each other or the graph.
        DataError: lines cannot be used, or no question can get a subgraph.
        MissingInputError: a file is missing.
        CreateError: the folder holds something else.
        WriteError: the folder or the cache cannot be written.
    """
    graph = _graph(settings)
    source = open_source_questions(
        settings.questions, layout=settings.layout, columns=settings.question_columns
    )
    logger.info("questions: %s", source.layout)
    folder = BuildFolder(settings.output)
    folder.begin(settings.record() | {"inputs": _digests(settings, source)})
    if not folder.is_complete:
        linker = None if graph is None else _linker(settings, graph)
        rule = SplitRule(settings.splits or DEFAULT_SPLITS, settings.split_seed)
        questions = Questions(source, rule, linker)
        count = questions.survey(graph)
        cutting = Cutting(
            settings.output,
            graph.folder if graph is not None else None,
            _cut_options(settings, graph),
            frozenset(settings.exclude_relations),
            settings.limit_triples,
        )
        make_parts(questions, count, cutting, shard=settings.shard, workers=settings.num_workers)
        if settings.shard[1] > 1:
            missing = len(folder.missing_parts())
            return f"{settings.output}: " + (
                f"{missing} parts are left to other shards." if missing else
                f"all parts are made. Join them: python -m dragkit.data merge {settings.output}"
            )
        folder.join()
    return summary(folder)
