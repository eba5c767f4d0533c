"""Runs an experiment: `python -m dragkit.experiment FILE.yaml`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dragkit.config.flags import EXIT_CODE_HELP, Parser, with_underscores
from dragkit.console import output_file, run_main, setup_console, show
from dragkit.errors import ConfigError, DragkitError, Interrupted, MissingInputError

_EPILOG = f"""\
Finished runs are not repeated, and interrupted ones are resumed. So the same command continues an
experiment. Without --gpus all runs train on the CPU.

examples:
  python -m dragkit.experiment experiments/arms.yaml
      trains all runs, one on each core, and writes the table and the plot
  python -m dragkit.experiment experiments/arms.yaml --dry_run
      prints the commands of the runs that are not finished
  python -m dragkit.experiment experiments/arms.yaml --gpus 0,1 --output docs/arms.md

{EXIT_CODE_HELP}"""


@dataclass(frozen=True)
class ExperimentArguments:
    """A parsed command.

    Attributes:
        file: the experiment's file.
        jobs: number of runs at a time.
        gpus: numbers of the GPUs, empty for the CPU.
        runs: folder of the runs. None takes runs/experiments/NAME.
        output: the document. None takes results.md in the folder of the runs.
        dry_run: print commands only.
        debug: show tracebacks.
    """

    file: Path
    jobs: int
    gpus: tuple[str, ...]
    runs: Path | None
    output: Path | None
    dry_run: bool
    debug: bool


def experiment_parser() -> Parser:
    """Builds the parser."""
    prog = "python -m dragkit.experiment"
    text = "Train data sets x arms x seeds, and write one table and one plot."
    parser = Parser(prog, text, _EPILOG)
    parser.usage = f"{prog} FILE [flags]"
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="YAML file of the experiment")
    add("--jobs", metavar="N", help="runs at a time on the CPU (default: the number of cores)")
    add("--gpus", metavar="LIST", help="numbers of GPUs such as 0,1, with one run at a time each")
    add("--runs", type=Path, metavar="DIR", help="folder (default: runs/experiments/NAME)")
    add(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="document, with its plot FILE.svg beside it (default: results.md among the runs)",
    )
    add("--dry_run", action="store_true", help="print the commands and train nothing")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_experiment_args(argv: Sequence[str]) -> ExperimentArguments:
    """Parses the command line.

    Raises:
        ConfigError: a flag is unknown or has a wrong value.
    """
    args = experiment_parser().parse_args(with_underscores(argv))
    problems = []
    gpus = tuple(args.gpus.split(",")) if args.gpus is not None else ()
    if not all(gpu.isdecimal() for gpu in gpus) or len(set(gpus)) < len(gpus):
        problems.append(f"--gpus must be different numbers such as 0,1, got {args.gpus!r}")
    if args.jobs is not None and not (args.jobs.isdecimal() and int(args.jobs)):
        problems.append(f"--jobs must be a whole number of at least 1, got {args.jobs!r}")
    if args.jobs is not None and gpus:
        problems.append("--jobs: every GPU has one run at a time. Omit it with --gpus.")
    if args.output is not None and args.output.suffix != ".md":
        problems.append(f"--output must end in .md, got {str(args.output)!r}")
    if problems:
        raise ConfigError("\n".join(problems))
    jobs = len(gpus) or int(args.jobs or os.cpu_count() or 1)
    return ExperimentArguments(**vars(args) | {"jobs": jobs, "gpus": gpus})


def _experiment(argv: list[str]) -> int:
    args = parse_experiment_args(argv)
    setup_console(debug=args.debug)
    # Imported after the arguments are parsed, so that --help and mistakes answer at once.
    from dragkit.experiment.document import command_line, commit, document
    from dragkit.experiment.execute import LOG, Launcher, command, states, train_all
    from dragkit.experiment.plan import read_experiment
    from dragkit.experiment.plot import draw
    from dragkit.experiment.results import gather

    experiment = read_experiment(args.file)
    root = args.runs or Path("runs", "experiments", experiment.file.name)
    # More threads than cores would slow down every run.
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    found = states(experiment.runs, root)
    if args.dry_run:
        for run, state in found.items():
            if state != "finished":
                words = command(run, root, threads, gpu=bool(args.gpus), resume=state == "resume")
                show(command_line(words))
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingInputError(
            "the plot needs matplotlib, which is not installed: pip install 'dragkit[experiment]'"
        )
    launcher = Launcher(root, threads, args.gpus, commit())
    # SIGTERM would end this process alone and leave its runs behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output = args.output or root / "results.md"
    plot = output.with_suffix(".svg")
    remedy = "Name another file with --output FILE.md."
    with output_file(output, remedy) as page, output_file(plot, remedy) as picture:
        try:
            failed = train_all(found, args.jobs, launcher.train, launcher.stop)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped. The runs in {root} saved their state. The same command continues them."
            ) from None
        results = gather(experiment, root)
        if has_results := any(row.runs for result in results for row in result.rows.values()):
            draw(experiment, results, picture)
            page.write(
                document(
                    experiment, results, file=args.file, plot=plot, threads=threads, gpus=args.gpus
                )
            )
    if has_results:
        show(f"written to {output} and {plot}")
    for run, code in failed.items():
        log = root / run.folder / LOG
        sys.stderr.write(f"dragkit: {run} failed with exit code {code}. Its log is {log}\n")
    # A negative code is the signal that ended the process.
    return next((code if code > 0 else DragkitError.exit_code for code in failed.values()), 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_experiment, argv)


if __name__ == "__main__":
    raise SystemExit(main())
