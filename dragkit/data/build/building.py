"""Builds files of questions: cuts in several processes and joins the parts."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dragkit.data.arrays import file_digest
from dragkit.data.build.cut import CutOptions
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import map_graph, open_graph
from dragkit.data.build.linking import EntityLinker
from dragkit.data.build.parts import BuildFolder, Part
from dragkit.data.build.questions import Questions, SplitRule
from dragkit.data.build.relation_list import read_names, relation_rows
from dragkit.data.build.settings import BuildSettings
from dragkit.data.build.sources import Source, SourceQuestion, open_source_questions
from dragkit.data.build.subgraphs import SubgraphBuilder
from dragkit.data.build.summary import summary
from dragkit.errors import ConfigError, WriteError

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
    """Builds the files of questions, or the parts of one shard.

    A build that was stopped goes on with the parts that its folder does not hold. Whoever makes
    them, with whatever number of processes and shards, the files are the same byte for byte.

    Returns:
        What was found, or what is left to other shards.

    Raises:
        ConfigError: settings do not fit each other or the graph.
        DataError: lines cannot be used, or no question can get a subgraph.
        MissingInputError: a file is missing.
        CreateError: the folder cannot be created, or holds something else.
        WriteError: the folder or the cache cannot be written.
    """
    folder = BuildFolder(settings.output)
    source = _source(settings)
    folder.begin(settings.record() | {"inputs": _digests(settings, source)})
    if folder.is_complete:
        return summary(settings.output, folder.join())
    excluded = [("--exclude-relation", name) for name in settings.exclude_relation]
    if settings.exclude_relations is not None:
        excluded += read_names(settings.exclude_relations)
    graph, options = _graph(settings, excluded)
    linker = None if graph is None else _linker(settings, graph)
    questions = Questions(source, SplitRule(settings.splits, settings.split_seed), linker)
    count = questions.survey(graph)
    cutting = Cutting(
        settings.output,
        None if graph is None else graph.folder,
        options,
        frozenset(name for _, name in excluded),
    )
    shard = Shard(*settings.shard)
    make_parts(questions, count, cutting, shard=shard, workers=settings.num_workers)
    if shard.count == 1:
        return summary(settings.output, folder.join())
    if missing := len(folder.missing_parts()):
        return f"{settings.output}: {missing} parts are left to other shards."
    join = f"python -m dragkit.data merge {shlex.quote(str(settings.output))}"
    return f"{settings.output}: all parts are made. Join them: {join}"


def _source(settings: BuildSettings) -> Source:
    source = open_source_questions(
        settings.questions,
        layout=settings.layout,
        columns=settings.question_columns,
        separator=settings.answer_separator,
        limit_triples=settings.limit_triples,
        entity_ids=settings.entity_ids,
    )
    return source


def _digests(settings: BuildSettings, source: Source) -> dict[str, list[str]]:
    """Digests of all files that the lines depend on. Their names and places do not matter."""
    files = {
        "questions": source.files,
        "graph": settings.graph,
        "aliases": (settings.aliases,),
        "exclude_relations": (settings.exclude_relations,),
    }
    return {
        name: [file_digest(Path(path)) for path in paths if path is not None]
        for name, paths in files.items()
    }


def _graph(
    settings: BuildSettings, exclude: list[tuple[str, str]]
) -> tuple[Graph | None, CutOptions | None]:
    """The knowledge graph, and how to cut.

    Raises:
        ConfigError: an option of the cut is out of range.
        DataError: a relation to exclude is unknown.
    """
    if not settings.graph:
        if settings.aliases is not None:
            raise ConfigError("--aliases needs the --graph whose entities it names.")
        return None, _cut_options(settings.cut) if settings.cut else None
    graph = open_graph(
        settings.graph,
        columns=settings.graph_columns,
        separator=settings.separator,
        memory_limit=settings.memory_limit,
    )
    rows = tuple(relation_rows(graph, exclude).tolist())
    return graph, _cut_options(settings.cut | {"excluded_relations": rows})


def _cut_options(given: dict[str, object]) -> CutOptions:
    try:
        return CutOptions(**given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"the cut of subgraphs: {error}.") from error


def _linker(settings: BuildSettings, graph: Graph) -> EntityLinker:
    return EntityLinker.of_graph(graph, settings.aliases)
