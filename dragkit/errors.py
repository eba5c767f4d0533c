"""Errors that a user can cause. Each carries the exit code of the command line."""

from __future__ import annotations

# The help of the commands prints this table, and the README lists the same codes.
EXIT_CODES = {
    0: "done",
    2: "wrong flag, key or value",
    65: "bad data",
    66: "missing or unfit input",
    70: "internal error",
    73: "another process writes to this run",
    74: "cannot write",
    75: "interrupted; the state is saved, run again",
    130: "interrupted; nothing is saved",
}


class DragkitError(Exception):
    """Base class. The message says what, where, why and what to do. No traceback is shown."""

    exit_code = 70


class ConfigError(DragkitError):
    """A wrong flag, key or value."""

    exit_code = 2


class DataError(DragkitError):
    """A data file whose content cannot be used. The message may list many problems, one a line."""

    exit_code = 65


class MissingInputError(DragkitError):
    """A file, folder or set of weights that is not there."""

    exit_code = 66


class CheckpointError(DragkitError):
    """A checkpoint that is damaged, or does not fit the model."""

    exit_code = 66


class WriteError(DragkitError):
    """A file could not be written. The last good state is untouched."""

    exit_code = 74


class Interrupted(DragkitError):
    """Training was asked to stop and has saved its state."""

    exit_code = 75
