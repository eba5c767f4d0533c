"""Makes and examines files of questions: `python -m dragkit.data build|merge|check|stats|show`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dragkit.config.flags import EXIT_CODE_HELP
from dragkit.console import run_main, setup_console, show
from dragkit.data.build.command import BUILD, MERGE
from dragkit.data.build.earlier import GENERATE_CWQ, GENERATE_WEBQSP
from dragkit.data.build.inspection import CHECK, SHOW, STATS
from dragkit.data.build.released import DOWNLOAD
from dragkit.data.build.subcommand import PROG, Subcommand
from dragkit.errors import ConfigError

_COMMANDS = (BUILD, MERGE, CHECK, STATS, SHOW, GENERATE_WEBQSP, GENERATE_CWQ, DOWNLOAD)
SUBCOMMANDS = {command.name: command for command in _COMMANDS}


def data_help() -> str:
    """The help without a subcommand."""
    lines = [f"usage: {PROG} {command.name} {command.usage}" for command in SUBCOMMANDS.values()]
    lines[1:] = [line.replace("usage:", "      ", 1) for line in lines[1:]]
    summaries = [f"  {name}\n      {command.summary}" for name, command in SUBCOMMANDS.items()]
    pointer = f"`{PROG} NAME --help` lists the flags of one."
    return "\n".join([*lines, "", *summaries, "", pointer, "", EXIT_CODE_HELP])


def parse_data_args(argv: Sequence[str]) -> tuple[Subcommand, argparse.Namespace]:
    """Parses the command line: the subcommand and its arguments.

    Raises:
        ConfigError: the subcommand or a flag is unknown, or a flag has a wrong value.
    """
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        show(data_help())
        raise SystemExit(0)
    if name not in SUBCOMMANDS:
        got = f"got {name!r}" if name else "got none"
        raise ConfigError(
            f"expected one of the subcommands {', '.join(SUBCOMMANDS)}, {got}. "
            f"`{PROG} --help` describes them."
        )
    command = SUBCOMMANDS[name]
    return command, command.parse(argv[1:])


def _data(argv: list[str]) -> int | None:
    command, args = parse_data_args(argv)
    setup_console(debug=args.debug)
    return command.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_data, argv)


if __name__ == "__main__":
    raise SystemExit(main())
