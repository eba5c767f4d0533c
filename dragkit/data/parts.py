"""Parts of a packed file: each is packed alone, survives a kill, and is joined to the others."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dragkit.data.arrays import (
    CorruptCache,
    FolderWriter,
    Strings,
    open_sealed,
    read_array,
    seal_folder,
)
from dragkit.data.labels import LabelRule
from dragkit.data.lines import Block
from dragkit.data.packing import ARRAYS, RAGGED, STRINGS, Packer
from dragkit.data.question_file import Problem, QuestionReader

# Change this name when parts hold other things.
PARTS_FOLDER = "parts-1"

RelationRows = Callable[[Sequence[str]], Sequence[int]]


class PackingJob(NamedTuple):
    """What all parts of a file have in common.

    Attributes:
        path: the file.
        folder: folder of the finished parts.
        label_rule, merge: see `Packer`.
        strict: whether one unusable row refuses the file.
    """

    path: str
    folder: str
    label_rule: LabelRule
    merge: bool
    strict: bool


class Part(NamedTuple):
    """A finished part.

    Attributes:
        relations: names in the order of their first occurrence in the part.
        meta: counts and problems, see `pack_part`.
    """

    relations: list[str]
    meta: dict


def part_folder(job: PackingJob, number: int) -> Path:
    """Folder of a finished part."""
    return Path(job.folder) / f"{number:06d}"


def open_part(job: PackingJob, number: int) -> Part | None:
    """Returns a finished part. One that is damaged is removed."""
    folder = part_folder(job, number)
    if not folder.is_dir():
        return None
    try:
        meta = open_sealed(folder)
    except CorruptCache:
        shutil.rmtree(folder)
        return None
    names = Strings(folder, "relations")
    return Part(names.slice(0, len(names)), meta)


def pack_part(
    job: PackingJob,
    block: Block,
    ids: dict[str, int],
    relation_rows: RelationRows,
    *,
    check_only: bool,
) -> dict:
    """Packs a block into the folder of its part, which appears when it is finished.

    Args:
        job: the file and the options.
        block: lines of the file.
        ids: those of its ids that earlier parts have, with their lines.
        relation_rows: returns the rows in the whole file. It waits for all earlier parts.
        check_only: only look for unusable rows.

    Returns:
        Counts and problems of its rows.
    """
    reader = QuestionReader(job.path, max_unread_keys=len(block.data))
    reader.line_of_id.update(ids)
    temporary = Path(tempfile.mkdtemp(prefix=f".{block.number}.", dir=job.folder))
    try:
        packer = Packer(temporary, job.label_rule, merge=job.merge)
        for question in reader.read(io.BytesIO(block.data), block.first_line):
            # Read on after the first fault, so that a refusal lists all faults.
            if not check_only and not (job.strict and reader.rejects):
                packer.add(question, has_id=question.line not in reader.unnamed)
        packer.close(relation_rows)
        own_ids = {name: line for name, line in reader.line_of_id.items() if name not in ids}
        meta = {
            "rows": reader.rows,
            "rejects": reader.rejects,
            "notes": dict(reader.notes),
            "ids": own_ids,
            "unread": [(key, field, count) for (key, field), count in reader.unread.items()],
            "summary": dict(packer.summary),
            "label_gaps": {"counts": packer.gaps.counts, "examples": packer.gaps.examples},
        }
        seal_folder(temporary, meta)
        finished = part_folder(job, block.number)
        try:
            temporary.rename(finished)
        except OSError:
            # Another builder may have finished the same part.
            if not finished.is_dir():
                raise
        return meta
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def add_reading(reader: QuestionReader, meta: dict) -> None:
    """Adds what was read in a part to what was read before it."""
    reader.rows += meta["rows"]
    reader.rejects += (Problem(*problem) for problem in meta["rejects"])
    reader.notes.update(meta["notes"])
    for key, field, count in meta["unread"]:
        if (key, field) in reader.unread or len(reader.unread) < reader.max_unread_keys:
            reader.unread[key, field] += count


def join_parts(folders: Sequence[Path], relations: Sequence[str], folder: Path) -> None:
    """Writes the arrays and strings of parts end to end into a folder."""
    writer = FolderWriter(folder)
    for part in folders:
        for name, dtype in ARRAYS.items():
            writer.array(name, dtype).append(read_array(part, name))
        for name in RAGGED:
            ptr = read_array(part, f"{name}_ptr")
            writer.offsets(f"{name}_ptr").extend(np.diff(ptr))
        for name in STRINGS:
            writer.strings(name).append_folder(part, name)
    writer.strings("relations").append(relations)
    writer.close()
