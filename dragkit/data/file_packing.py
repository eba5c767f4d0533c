"""Packs a file of questions into a sealed folder: in parts, by several processes, continued."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from dragkit.data.arrays import seal_folder
from dragkit.data.gaps import LabelGaps
from dragkit.data.labels import LabelRule
from dragkit.data.lines import Block, Blocks
from dragkit.data.part_process import PartProcess
from dragkit.data.parts import (
    PARTS_FOLDER,
    PackingJob,
    add_reading,
    join_parts,
    open_part,
    pack_part,
    part_folder,
)
from dragkit.data.question_file import MAX_LINE_BYTES, QuestionReader
from dragkit.data.relations import RelationVocab

# Bytes of text in a part: half a second of work, so that a kill loses little.
_PART_BYTES = 16_000_000
# A process takes seconds to start. A file of fewer parts is packed sooner without one.
_MIN_PARTS = 8
# Each process needs about 280 MB of its own. So all of them stay below 2 GB.
_MAX_PROCESSES = 4
# A bar appears after this time.
_SILENT_S = 2.0


class _Stopped(Exception):
    """Another part has failed."""


class _Relations:
    """Relations in the order of their first occurrence in the file. Parts take turns to add them.

    Attributes:
        vocab: relations of the parts so far.
    """

    def __init__(self) -> None:
        self.vocab = RelationVocab()
        self._turn = 0
        self._finished: dict[int, Sequence[str]] = {}
        self._is_stopped = False
        self._changed = threading.Condition()

    def finished(self, number: int, names: Sequence[str]) -> None:
        """Adds the relations of a finished part as soon as all earlier parts have added theirs."""
        with self._changed:
            self._finished[number] = names
            self._advance()

    def rows(self, number: int, names: Sequence[str]) -> list[int]:
        """Returns the rows of the relations of a part. Waits for all earlier parts."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number or self._is_stopped)
            if self._is_stopped:
                raise _Stopped
            rows = [self.vocab.add(name) for name in names]
            self._turn += 1
            self._advance()
            return rows

    def _advance(self) -> None:
        while (names := self._finished.pop(self._turn, None)) is not None:
            for name in names:
                self.vocab.add(name)
            self._turn += 1
        self._changed.notify_all()

    def stop(self) -> None:
        """Lets the parts that wait fail."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


class _Parts:
    """The parts of a file. `pack` packs those that are not finished.

    Args:
        job: the file and the options.
        ids: by number of a part, those of its ids that earlier parts have, with their lines.

    Attributes:
        relations: relations of the file.
        meta: of each part, by its number, see `pack_part`.
        blocks: what the parts hold.
    """

    def __init__(self, job: PackingJob, ids: dict[int, dict[str, int]]) -> None:
        self.job, self.ids = job, ids
        self.relations = _Relations()
        self.meta: dict[int, dict] = {}
        self.blocks = Blocks(Path(job.path), _PART_BYTES, MAX_LINE_BYTES)
        self._bar = tqdm(
            total=os.path.getsize(job.path),
            desc="packing",
            unit="B",
            unit_scale=True,
            delay=_SILENT_S,
            disable=not sys.stderr.isatty(),
        )

    def pack(self, processes: int) -> None:
        """Packs in this process where one is allowed, or where there is little to do."""
        with self._bar:
            blocks = self._unfinished()
            first = deque(islice(blocks, _MIN_PARTS))
            is_small = len(first) < _MIN_PARTS
            # A block is let go as soon as it is packed.
            blocks = chain((first.popleft() for _ in range(len(first))), blocks)
            if processes == 1 or is_small:
                for block in blocks:
                    self._pack_block(block, partial(pack_part, self.job))
            else:
                self._pack_in_processes(blocks, processes)

    def _unfinished(self) -> Iterator[Block]:
        for block in self.blocks:
            part = open_part(self.job, block.number)
            if part is None:
                yield block
            else:
                self.relations.finished(block.number, part.relations)
                self._add(block, part.meta)

    def _add(self, block: Block, meta: dict) -> None:
        self.meta[block.number] = meta
        self._bar.update(block.source_bytes)

    def _pack_block(self, block: Block, pack: Callable[..., dict]) -> None:
        # The file is refused, so its other parts are only searched for further faults.
        check_only = self.job.strict and any(meta["rejects"] for meta in self.meta.values())
        rows = partial(self.relations.rows, block.number)
        ids = self.ids.get(block.number, {})
        self._add(block, pack(block, ids, rows, check_only=check_only))

    def _pack_in_processes(self, blocks: Iterator[Block], count: int) -> None:
        processes: list[PartProcess] = []
        idle: SimpleQueue[PartProcess] = SimpleQueue()

        def pack(block: Block) -> None:
            process = idle.get()
            try:
                self._pack_block(block, process.pack)
            finally:
                idle.put(process)

        running: deque[Future[None]] = deque()
        threads = ThreadPoolExecutor(count)
        try:
            for _ in range(count):
                processes.append(PartProcess(self.job))
                idle.put(processes[-1])
            for block in blocks:
                # One more block than processes, so that none of them waits for the file.
                if len(running) > count:
                    running.popleft().result()
                running.append(threads.submit(pack, block))
            while running:
                running.popleft().result()
        finally:
            self.relations.stop()
            for process in processes:
                process.kill()
            threads.shutdown(cancel_futures=True)


def _repeated_ids(parts: _Parts) -> dict[int, dict[str, int]]:
    """By number of a part, its ids that earlier parts have, with their lines there."""
    lines: dict[str, int] = {}
    repeated: dict[int, dict[str, int]] = {}
    for number, meta in sorted(parts.meta.items()):
        if clash := {name: lines[name] for name in meta["ids"] if name in lines}:
            repeated[number] = clash
        for name, line in meta["ids"].items():
            lines.setdefault(name, line)
    return repeated


def pack_file(
    path: Path,
    folder: Path,
    *,
    label_rule: LabelRule,
    max_bad_fraction: float,
    merge: bool,
    processes: int | None = None,
) -> None:
    """Reads, labels, merges, sorts and seals a file of questions.

    The arrays do not depend on the number of processes. Finished parts are kept beside the folder
    and are removed in the end. After a kill another call continues from them.

    Args:
        path: JSONL, plain or gzip.
        folder: an empty folder to fill, in a folder of the builder's own.
        label_rule: see `fact_labels`.
        max_bad_fraction: fraction of unusable rows that may be left out.
        merge: see `merge_nodes`.
        processes: number of processes. None takes one for each core. A small file is packed in this
            process.

    Raises:
        DataError, MissingInputError: see `read_questions`.
        OSError: a part cannot be written.
    """
    parts_folder = folder.with_name(f"{PARTS_FOLDER}-{_PART_BYTES}")
    parts_folder.mkdir(exist_ok=True)
    if processes is None:
        processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
    job = PackingJob(str(path), str(parts_folder), label_rule, merge, strict=max_bad_fraction == 0)
    parts = _Parts(job, {})
    parts.pack(processes)
    if repeated := _repeated_ids(parts):
        # These questions are left out, and the rows of the relations after them may change.
        for number in reversed(range(min(repeated), len(parts.meta))):
            shutil.rmtree(part_folder(job, number))
        parts = _Parts(job, repeated)
        parts.pack(processes)
    _seal(parts, folder, max_bad_fraction)
    shutil.rmtree(parts_folder)


def _seal(parts: _Parts, folder: Path, max_bad_fraction: float) -> None:
    """Checks the rows of all parts, joins the parts and seals the folder."""
    reader, gaps, packed = QuestionReader(parts.job.path), LabelGaps(), Counter()
    metas = [meta for _, meta in sorted(parts.meta.items())]
    for meta in metas:
        add_reading(reader, meta)
        gaps.update(LabelGaps(**meta["label_gaps"]))
        packed.update(meta["summary"])
    if parts.blocks.fault is not None:
        reader.truncate(parts.blocks.num_lines, parts.blocks.fault)
    reader.check(max_bad_fraction)
    names = parts.relations.vocab.names
    join_parts([part_folder(parts.job, number) for number in range(len(metas))], names, folder)
    rejects = reader.rejects
    if rejects:
        (folder / "rejects.txt").write_text("".join(f"{problem}\n" for problem in rejects))
    summary = {**reader.notes, **packed}
    summary |= {"relations": len(names), "rejects": len(rejects), "rows": reader.rows}
    unread = [(key, field, count) for (key, field), count in reader.unread.items()]
    label_gaps = {"counts": gaps.counts, "examples": gaps.examples}
    seal_folder(folder, {"summary": summary, "label_gaps": label_gaps, "unread": unread})
