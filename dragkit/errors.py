"""Errors that a user can cause, with their exit codes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

# The help of each command prints this table.
EXIT_CODES = {
    0: "done",
    2: "wrong flag, key or value",
    65: "bad data",
    66: "missing or unsuitable input",
    70: "internal error",
    73: "cannot create, or another process writes to this run",
    74: "cannot write",
    75: "interrupted, state saved: run again with --resume",
    130: "interrupted, nothing saved",
}


class DragkitError(Exception):
    """Base class. The message says what is wrong, where, why, and what to do."""

    exit_code = 70


class ConfigError(DragkitError):
    """A flag, a key or a value is wrong."""

    exit_code = 2


class DataError(DragkitError):
    """A data file holds unusable content. The message has one line per problem."""

    exit_code = 65


class MissingInputError(DragkitError):
    """A file, a folder or a set of weights is missing."""

    exit_code = 66


class CheckpointError(DragkitError):
    """A checkpoint is damaged or does not fit the model."""

    exit_code = 66


class WriteError(DragkitError):
    """A file cannot be written. The last checkpoint is intact."""

    exit_code = 74


class CreateError(WriteError):
    """A folder or a file cannot be created, or another process holds it. Nothing was done."""

    exit_code = 73


class Interrupted(DragkitError):
    """A signal stopped training after it saved its state."""

    exit_code = 75


class Stopped(KeyboardInterrupt):
    """A signal came where nothing has to be saved. Python raises the base class for SIGINT."""


def similar_names(path: Path) -> str:
    """A sentence, after a space, with the names in the folder of a missing file that are like it.

    It is empty where there are none, or where the file exists.
    """
    folder = path.parent
    if os.path.exists(path) or (os.path.isdir(folder) and not os.access(folder, os.R_OK)):
        return ""
    if not os.path.isdir(folder):
        return f" The folder {folder} does not exist either."
    names = sorted(entry.name for entry in folder.iterdir())
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f" Similar names in {folder}: {', '.join(similar)}." if similar else ""
