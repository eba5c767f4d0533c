"""Trains a run: `python -m dragkit.train --phase {1,2} [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dragkit.console import run_main, setup_console, show
from dragkit.errors import Interrupted, Stopped

if TYPE_CHECKING:
    from dragkit.config.arguments import TrainArguments
    from dragkit.trainer.signals import StopSignal


def _train(argv: list[str]) -> int:
    from dragkit.trainer.signals import StopSignal

    with StopSignal() as stop:
        # Even the imports of the settings take long enough for a signal to come.
        with stop.deferred():
            from dragkit.config.arguments import parse_train_args

            args = parse_train_args(argv)
            setup_console(debug=args.debug)
        try:
            stop.check()
            with stop.translated():
                _run(args, stop)
        except Stopped as signal:
            run = args.config.run
            if run.checkpoint_dir is None and not run.resume:
                # Nothing names the run that --resume would mean.
                raise
            raise Interrupted(
                f"stopped by {signal} before training. Nothing is lost. Continue with the same "
                "command and --resume"
            ) from signal
    return 0


def _run(args: TrainArguments, stop: StopSignal) -> None:
    # torch is imported only now, so that --help and mistakes answer at once.
    from dragkit.distributed.torchrun import init_ranks
    from dragkit.trainer.run import TrainingRun

    with init_ranks(args.config.run) as ranks:
        run = TrainingRun(args.config, args.origins, args.config_for_phase(1), ranks, stop)
        summary = run.execute()
        if ranks.is_main:
            show(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
