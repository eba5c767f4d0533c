"""Logging, warnings and error messages of the command lines."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from dragkit.errors import DragkitError, Interrupted

_QUIET_LOGGERS = ("httpx", "sentence_transformers", "transformers", "dragkit_kernels")


def setup_console(*, debug: bool) -> None:
    """Logs plain messages to stderr. Other packages log warnings, or everything with `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def run_main(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns an exception into a message on stderr and an exit code.

    A traceback is printed with --debug or DRAGKIT_DEBUG=1 only.

    Args:
        function: takes the arguments and returns the exit code, or None for 0.
        argv: arguments after the program's name. None takes those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("DRAGKIT_DEBUG", "0") not in ("", "0")
    try:
        return function(argv) or 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        code, message = _exit_code_and_message(error)
    if code == DragkitError.exit_code and not debug:
        message += "\n  Run again with --debug for the traceback."
    sys.stderr.write(f"dragkit: {message}\n")
    return code


def _exit_code_and_message(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, DragkitError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = " ".join(str(error).split())
    return DragkitError.exit_code, f"internal error: {type(error).__name__}: {text:.300}"
