"""Plants faults around real runs: `python -m dragkit.selftest [--tier full] [--report FILE]`."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dragkit.config.flags import EXIT_CODE_HELP, Parser, with_underscores
from dragkit.console import run_main
from dragkit.errors import WriteError

_EPILOG = f"""\
It kills and stops training at any time, fills and breaks the disk under it, damages checkpoints,
resumes from every step and in other surroundings, offers hostile files and bombs, looks for secrets
in what runs write and for use of the network, and compares training and every op with float64.
quick takes about five minutes on two cores, full about twenty. The page lists what was
lost, and the exit code is 1 if anything was.

examples:
  python -m dragkit.selftest
  python -m dragkit.selftest --report quick.md
  python -m dragkit.selftest --tier full --report selftest.md

{EXIT_CODE_HELP}"""


@dataclass(frozen=True)
class SelftestArguments:
    """A parsed command. Without `report` the page goes to stdout."""

    tier: Literal["quick", "full"]
    report: Path | None
    debug: bool


def selftest_parser() -> Parser:
    """Builds the parser."""
    prog = "python -m dragkit.selftest"
    parser = Parser(prog, "Test this installation against faults.", _EPILOG)
    add = parser.add_argument
    add("--tier", choices=("quick", "full"), default="quick", help="how many (default: quick)")
    add("--report", type=Path, metavar="FILE", help="Markdown file to write (default: stdout)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_selftest_args(argv: Sequence[str]) -> SelftestArguments:
    """Parses the command line.

    Raises:
        ConfigError: a flag is unknown or has a wrong value.
    """
    return SelftestArguments(**vars(selftest_parser().parse_args(with_underscores(argv))))


def _write(report: Path | None, text: str) -> None:
    """Writes the page so far, so that an interrupted test leaves what it found."""
    if report is None:
        return
    from dragkit.checkpoint.atomic import make_dirs, write_text_atomically

    try:
        make_dirs(report.parent)
        write_text_atomically(report, text)
    except OSError as error:
        raise WriteError(
            f"{report}: the page cannot be written ({error}). Name another file with --report."
        ) from error


def _selftest(argv: list[str]) -> int:
    args = parse_selftest_args(argv)
    # What the checks provoke is not worth a warning here. Without a handler Python prints it.
    logging.getLogger("dragkit").addHandler(logging.NullHandler())
    # Before the model hub's client is imported, here and in the processes of the runs.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported after the arguments are parsed, so that --help and mistakes answer at once.
    from dragkit.selftest.checks import checks, run_check, skipped
    from dragkit.selftest.outcome import Outcome
    from dragkit.selftest.page import page

    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="dragkit-selftest-") as folder:
        todo = checks(args.tier, Path(folder))
        _write(args.report, page(args.tier, outcomes, skipped=skipped(), missing=len(todo)))
        for done, (name, check) in enumerate(todo.items(), 1):
            outcome = run_check(name, check)
            outcomes.append(outcome)
            sys.stderr.write(
                f"{outcome.name}: {outcome.held} / {outcome.tried}, {outcome.seconds:.0f} s\n"
            )
            text = page(args.tier, outcomes, skipped=skipped(), missing=len(todo) - done)
            _write(args.report, text)
    if args.report is None:
        sys.stdout.write(text)
    return int(any(outcome.losses for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_selftest, argv)


if __name__ == "__main__":
    raise SystemExit(main())
