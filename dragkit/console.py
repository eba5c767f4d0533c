"""Logging and warnings of the commands: what appears on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from dragkit.errors import DragkitError, Interrupted

_QUIET = ("httpx", "sentence_transformers", "transformers", "dragkit_kernels")


def setup_console(*, debug: bool) -> None:
    """Logs plain messages to stderr; libraries log warnings only, or everything with `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # peft reads a property that transformers has renamed. A user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def run_main(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call a command and turn what it raises into one message on stderr and an exit code.

    Args:
        function: takes the arguments, returns the exit code or None for 0.
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code; tracebacks are shown only with --debug or DRAGKIT_DEBUG=1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("DRAGKIT_DEBUG", "0") not in ("", "0")
    try:
        return function(argv) or 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        code, message = _explain(error)
    if code == DragkitError.exit_code and not debug:
        message += "\n  run again with --debug for the traceback"
    sys.stderr.write(f"dragkit: {message}\n")
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message for whatever ended a command."""
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, DragkitError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = " ".join(str(error).split())
    return DragkitError.exit_code, f"internal error: {type(error).__name__}: {text:.300}"
