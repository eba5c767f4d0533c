"""Trains a run: `python -m dragkit.train --phase {1,2} [flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dragkit.config.arguments import parse_train_args
from dragkit.console import run_main, setup_console


def _train(argv: list[str]) -> int:
    args = parse_train_args(argv)
    # torch is imported after the arguments are parsed, so that --help and mistakes answer at once.
    setup_console(debug=args.debug)
    from dragkit.distributed.torchrun import init_ranks
    from dragkit.trainer.run import TrainingRun

    with init_ranks(args.config.run) as ranks:
        summary = TrainingRun(args.config, args.origins, args.config_for_phase(1), ranks).execute()
        if ranks.is_main:
            sys.stdout.write(summary + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
