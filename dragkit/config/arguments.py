"""Parses the command line of training, which `config show` and the plan share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dragkit.config.flags import (
    FLAGS,
    Parser,
    explain_unknown_flags,
    train_parser,
    with_underscores,
)
from dragkit.config.resolve import current_setting, parse_text, resolve_config
from dragkit.config.schema import TrainConfig
from dragkit.errors import ConfigError


@dataclass(frozen=True)
class TrainArguments:
    """A parsed training command.

    Attributes:
        config: the merged configuration.
        origins: origin of each value, by dotted key.
        debug: show tracebacks.
        preset: --preset.
        file: --config.
        overrides: values of all other flags, by dotted key.
    """

    config: TrainConfig
    origins: dict[str, str]
    debug: bool
    preset: str | None
    file: str | None
    overrides: dict[str, object]

    def config_for_phase(self, phase: int) -> TrainConfig:
        """Merges the same sources for a phase, with its defaults and its block of the preset."""
        overrides = self.overrides | {"run.phase": phase}
        return resolve_config(self.preset, self.file, overrides, demo_preset="tiny")[0]


def parse_train_args(argv: Sequence[str], parser: Parser | None = None) -> TrainArguments:
    """Parses the command line of training.

    Args:
        argv: arguments after the program's name.
        parser: parser of another program with the flags of training. None takes that of training.

    Raises:
        ConfigError: lists all unknown flags, wrong keys and wrong values.
        MissingInputError: the file of --config cannot be read.
    """
    parser = parser or train_parser("python -m dragkit.train")
    args, extras = parser.parse_known_args(with_underscores(argv))
    overrides: dict[str, object] = {}
    spellings: dict[str, str] = {}
    problems = explain_unknown_flags(extras, [*FLAGS, "preset", "config", "set", "debug", "help"])
    for written, text, spelling in args.settings:
        # Earlier names become today's here, so that of two spellings the last one wins.
        key, value = current_setting(written, text)
        overrides[key] = parse_text(key, value) if isinstance(value, str) else value
        spellings[key] = spelling
    # Unknown flags are raised after the merge, together with wrong keys and values.
    try:
        config, origins = resolve_config(
            args.preset, args.config, overrides, spellings=spellings, demo_preset="tiny"
        )
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    return TrainArguments(config, origins, args.debug, args.preset, args.config, overrides)
