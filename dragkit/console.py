"""Logging, warnings and error messages of the command lines."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dragkit.errors import CreateError, DragkitError, Interrupted, Stopped, WriteError

# Slurm sends SIGUSR1 before a time limit if it is asked to (--signal=USR1@...). A terminal that is
# closed sends SIGHUP.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Reasons of the disk alone, whatever is being written.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_STDOUT_REMEDY = "Send it to a program that reads all of it, to a file, or to /dev/null."
# Control characters but tab and line end, and those that turn the direction of what follows.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_QUIET_LOGGERS = ("httpx", "sentence_transformers", "transformers", "dragkit_kernels")


def printable(text: str) -> str:
    """Escapes what would steer a terminal: names and answers of the data may hold anything."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _PrintableFormatter(logging.Formatter):
    """Formats plain messages for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _StderrHandler(logging.StreamHandler):
    """Logs to stderr. A reader that has ended, or a full disk, does not end the command."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _mute(sys.stderr)
        else:
            super().handleError(record)


def _mute(stream: TextIO) -> None:
    """Discards what is written from now on, and what Python flushes when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def setup_console(*, debug: bool) -> None:
    """Logs plain messages to stderr. Other packages log warnings, or everything with `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = _StderrHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def show(text: str) -> None:
    """Writes a command's result and a newline to standard output.

    Raises:
        WriteError: it is closed or full.
    """
    try:
        sys.stdout.write(f"{printable(text)}\n")
        sys.stdout.flush()
    except OSError as error:
        _mute(sys.stdout)
        raise WriteError(
            f"standard output: cannot be written: {error.strerror}. {_STDOUT_REMEDY}"
        ) from error


@contextmanager
def output_file(path: Path, remedy: str, *, head: str = "") -> Iterator[TextIO]:
    """Opens a text file for a block, as `output_bytes` does. Its encoding is UTF-8."""
    with output_bytes(path, remedy, head=head) as file:
        text = io.StringIO()
        yield text
        file.write(text.getvalue().encode())


@contextmanager
def output_bytes(path: Path, remedy: str, *, head: str = "") -> Iterator[io.BytesIO]:
    """Opens a file for a block, and replaces `path` at its end by what was written.

    An error in the block leaves `path` as it was, and so does one that writes nothing. What is no
    regular file, such as /dev/stdout, is written directly.

    Args:
        path: the file. Missing folders are made.
        remedy: what to do if it cannot be written.
        head: how a file of this kind begins. One that exists, is not empty and begins otherwise,
            such as an input of the command, is not replaced.

    Raises:
        CreateError: on entry, the file cannot be created, or must not be replaced.
        WriteError: the file cannot be written.
    """
    # A link stays a link: the file that it names is replaced.
    target = Path(os.path.realpath(path))
    # Of a pipe, such as /dev/stdout may be, the real path is no path.
    replaces = os.path.isfile(target) or not os.path.exists(path)
    target = target if replaces else path
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp") if replaces else target
    try:
        if os.path.isdir(target):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if replaces and os.path.exists(target) and not _begins(target, head):
            raise CreateError(
                f"{path}: already exists and holds something else, so it is not replaced. {remedy}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without O_NONBLOCK a named pipe that nobody reads would wait for ever.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK
        descriptor = os.open(temp, flags, 0o666)
        os.set_blocking(descriptor, True)
        file = open(descriptor, "wb")  # noqa: SIM115
    except OSError as error:
        raise CreateError(f"{path}: cannot be created: {error.strerror}. {remedy}") from error
    data = io.BytesIO()
    try:
        yield data
        try:
            file.write(data.getvalue())
            file.flush()
            if replaces and data.tell():
                os.fsync(file.fileno())
                os.replace(temp, target)
        except OSError as error:
            raise WriteError(f"{path}: cannot be written: {error.strerror}. {remedy}") from error
    finally:
        with suppress(OSError):
            file.close()
        if replaces:
            temp.unlink(missing_ok=True)


def _begins(file: Path, head: str) -> bool:
    with file.open("rb") as content:
        start = content.read(len(head.encode()))
    return start in (b"", head.encode())


def run_main(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns an exception into a message on stderr and an exit code.

    A traceback is printed with --debug or DRAGKIT_DEBUG=1 only.

    Args:
        function: takes the arguments and returns the exit code, or None for 0.
        argv: arguments after the program's name. None takes those of the process, which is about
            to end when this function returns. Then a stop signal comes too late.
    """
    is_program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("DRAGKIT_DEBUG", "0") not in ("", "0")
    if sys.stderr is None:
        # Python found it closed. The exit code still says what happened.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        if sys.stdout is None:
            raise WriteError(f"standard output is closed. {_STDOUT_REMEDY}")
        return function(argv) or 0
    except (Exception, KeyboardInterrupt) as error:
        code, message = _exit_code_and_message(error)
        trace = traceback.format_exc() if debug else ""
    finally:
        if is_program:
            # Python takes a while to exit. The exit code still says what the command did.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    if code == DragkitError.exit_code and not debug:
        message += "\n  Run again with --debug for the traceback."
    try:
        sys.stderr.write(f"{trace}dragkit: {printable(message)}\n")
        sys.stderr.flush()
    except OSError:
        _mute(sys.stderr)
    return code


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, DragkitError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, Stopped):
        return 130, f"interrupted by {error}. Nothing was saved. Run the same command again."
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        where = f"{error.filename}: " if error.filename else ""
        return WriteError.exit_code, f"error: {where}cannot be written: {error.strerror}."
    text = " ".join(str(error).split())
    return DragkitError.exit_code, f"internal error: {type(error).__name__}: {text:.300}"
