"""Logging and warnings of the commands: what appears on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings

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
