"""What a subcommand of `python -m dragkit.data` is made of. This module is light."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dragkit.config.flags import EXIT_CODE_HELP, Parser, with_underscores

PROG = "python -m dragkit.data"


@dataclass(frozen=True)
class Subcommand:
    """One subcommand.

    Attributes:
        name: its word on the command line.
        summary: one sentence for both helps.
        usage: the arguments after the name.
        details: what the help says below the flags, with examples.
        add_flags: adds the arguments to a parser. `--debug` is there already.
        run: does the work and returns the exit code, None for 0. It imports what it needs, so that
            --help answers at once.
    """

    name: str
    summary: str
    usage: str
    details: str
    add_flags: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int | None]

    def parser(self) -> Parser:
        """Builds the parser."""
        epilog = f"{textwrap.dedent(self.details).strip()}\n\n{EXIT_CODE_HELP}"
        parser = Parser(f"{PROG} {self.name}", self.summary, epilog)
        parser.usage = f"{parser.prog} {self.usage}"
        self.add_flags(parser)
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        return parser

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses the arguments after the name. Flags may be written with _ or -.

        Raises:
            ConfigError: a flag is unknown, missing, or has a wrong value.
        """
        return self.parser().parse_args(with_underscores(argv))
