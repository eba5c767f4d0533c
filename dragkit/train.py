"""Trains a run: `python -m dragkit.train --phase {1,2} [flags]`."""

from __future__ import annotations

from collections.abc import Sequence

from dragkit.config.arguments import parse_train_args
from dragkit.console import run_main, setup_console, show


def _train(argv: list[str]) -> int:
    args = parse_train_args(argv)
    setup_console(debug=args.debug)
    from dragkit.trainer.signals import StopSignal

    with StopSignal() as stop, stop.translated():
        # torch is imported only now, so that --help and mistakes answer at once.
        from dragkit.distributed.torchrun import init_ranks
        from dragkit.trainer.run import TrainingRun

        with init_ranks(args.config.run) as ranks:
            run = TrainingRun(args.config, args.origins, args.config_for_phase(1), ranks, stop)
            summary = run.execute()
            if ranks.is_main:
                show(summary)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
