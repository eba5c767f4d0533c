"""Builds files of questions: reads, surveys, cuts and joins the parts."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dragkit.console import STOP_SIGNALS
from dragkit.data.arrays import remembered_digest
from dragkit.data.build.cut import CutOptions
from dragkit.data.build.cutting import PART_QUESTIONS, Cutting, Shard, make_parts
from dragkit.data.build.graph import Graph
from dragkit.data.build.graph_store import open_graph
from dragkit.data.build.layouts import HUB
from dragkit.data.build.linking import EntityLinker
from dragkit.data.build.parts import BuildFolder
from dragkit.data.build.questions import Questions, SplitRule
from dragkit.data.build.relation_list import read_names, relation_rows
from dragkit.data.build.settings import BuildSettings
from dragkit.data.build.sources import Source, open_source_questions
from dragkit.data.build.summary import summary
from dragkit.data.cache import cache_root
from dragkit.data.lines import open_source
from dragkit.errors import ConfigError, Interrupted, MissingInputError, Stopped

logger = logging.getLogger(__name__)

_SHOWN = 10
# A name in so many of the questions is a word, such as "film". A topic may be in a few percent.
_WORD_SHARE = 0.1


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Ends the block in good order at the first stop signal.

    Raises:
        Interrupted: one has come. The parts that are made stay.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    # Python sets handlers in the main thread alone.
    numbers = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        # nohup ignores SIGHUP, and a shell SIGINT in a background job. They keep ignoring it.
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{folder}: stopped. Run the same command again: it goes on where it stopped."
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    _require_files(settings)
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


def _require_files(settings: BuildSettings) -> None:
    """Raises a MissingInputError with every file that cannot be opened."""
    missing = []
    for path in (*settings.graph, settings.aliases, settings.exclude_relations):
        try:
            if path is not None:
                open_source(path).close()
        except MissingInputError as error:
            missing.append(str(error))
    if missing:
        raise MissingInputError("\n".join(missing))


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
