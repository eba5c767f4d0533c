"""What the two commands show on the terminal, and what their libraries do not."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_QUIET = ("httpx", "sentence_transformers", "transformers", "dragkit_kernels")


def setup_console(*, debug: bool) -> None:
    """Plain messages on stderr; libraries speak up from warnings on, or about all with `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # peft asks transformers for a property that has been renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
