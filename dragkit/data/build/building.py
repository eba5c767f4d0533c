"""Builds files of questions: cuts in several processes and joins the parts."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from dragkit.data.arrays import remembered_digest
from dragkit.data.build.cut import CutOptions
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import map_graph, open_graph
from dragkit.data.build.layouts import HUB
from dragkit.data.build.linking import EntityLinker
from dragkit.data.build.parts import BuildFolder, Part
from dragkit.data.build.questions import Questions, SplitRule
from dragkit.data.build.relation_list import read_names, relation_rows
from dragkit.data.build.settings import BuildSettings
from dragkit.data.build.sources import Source, SourceQuestion, open_source_questions
from dragkit.data.build.subgraphs import SubgraphBuilder
from dragkit.data.build.summary import summary
from dragkit.data.cache import cache_root
from dragkit.errors import ConfigError, Interrupted, Stopped, WriteError

logger = logging.getLogger(__name__)

# A killed build loses at most one part a process.
PART_QUESTIONS = 128
_SHOWN = 10
_Sourced = Sequence[tuple[SourceQuestion, str]]
# A name in so many of the questions is a word, such as "film". A topic may be in a few percent.
_WORD_SHARE = 0.1


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
    # Ctrl-C reaches all processes of a terminal. The parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Ends the block in good order where SIGTERM or Ctrl-C comes.

    Raises:
        Interrupted: one has come. The parts that are made stay.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{folder}: stopped. Run the same command again: it goes on where it stopped."
        ) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


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
    record = settings.record() | {"inputs": _digests(settings, source)}
    folder.create(record)
    if folder.is_complete:
        return summary(settings.output, folder.join())
    excluded = [("--exclude-relation", name) for name in settings.exclude_relation]
    if settings.exclude_relations is not None:
        excluded += read_names(settings.exclude_relations)
    graph, options = _graph(settings, excluded)
    linker = None if graph is None else _linker(settings, graph, source)
    questions = Questions(source, SplitRule(settings.splits, settings.split_seed), linker)
    count = questions.survey(graph)
    cutting = Cutting(
        settings.output,
        None if graph is None else graph.folder,
        options,
        frozenset(name for _, name in excluded),
    )
    # A build that is refused leaves nothing that the next one would have to agree with.
    folder.begin(record, -(-count // PART_QUESTIONS))
    shard = Shard(*settings.shard)
    with _stoppable(settings.output):
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
        "questions": (*source.files, *source.side_files),
        "graph": settings.graph,
        "aliases": (settings.aliases,),
        "exclude_relations": (settings.exclude_relations,),
    }
    kept = cache_root() / "digests"
    return {
        # A data set of the hub is named by its revision.
        name: [
            str(path) if str(path).startswith(HUB) else remembered_digest(Path(path), kept)
            for path in paths
            if path is not None
        ]
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


def _linker(settings: BuildSettings, graph: Graph, source: Source) -> EntityLinker | None:
    """Finds topics in the questions that name none, None if all of them do."""
    texts = [item.question.text for item in source if not item.question.topics]
    if not texts:
        return None
    linker = EntityLinker.of_graph(graph, alias_file=settings.aliases)
    if words := linker.learn_stop_words(texts, _WORD_SHARE):
        names = ", ".join(map(repr, words[:_SHOWN]))
        more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
        logger.info("entities taken for words, since many questions name them: %s%s", names, more)
    return linker
