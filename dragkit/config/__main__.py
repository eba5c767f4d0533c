"""Prints settings with their origins, or the schema: `python -m dragkit.config show|schema`."""

from __future__ import annotations

from collections.abc import Sequence

from dragkit.config.arguments import parse_train_args
from dragkit.config.flags import train_parser
from dragkit.config.resolve import config_schema, show_config
from dragkit.console import run_main, show
from dragkit.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_config_command, argv)


def _config_command(argv: list[str]) -> int:
    prog = "python -m dragkit.config"
    command = argv[0] if argv else ""
    if command == "show":
        parser = train_parser(f"{prog} show", "Print every setting with its value and origin.", "")
        args = parse_train_args(argv[1:], parser=parser)
        text = show_config(args.config, args.origins)
    elif command == "schema" and len(argv) == 1:
        text = config_schema()
    elif command in ("-h", "--help"):
        text = (
            f"usage: {prog} show [flags of dragkit.train]   print every value and its origin\n"
            f"       {prog} schema                         print the JSON Schema of --config files"
        )
    else:
        raise ConfigError(f"expected `{prog} show [flags]` or `{prog} schema`, got {argv}.")
    show(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
