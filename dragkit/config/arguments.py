"""The command lines: arguments in, typed values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dragkit.config.flags import (
    FLAGS,
    Parser,
    evaluate_parser,
    explain_unknown_flags,
    plan_parser,
    train_parser,
    with_underscores,
)
from dragkit.config.resolve import parse_text, resolve_config
from dragkit.config.schema import TrainConfig
from dragkit.errors import ConfigError


@dataclass(frozen=True)
class TrainArguments:
    """What a training command asks for, and the sources it was merged from."""

    config: TrainConfig
    origins: dict[str, str]
    debug: bool
    preset: str | None
    file: str | None
    overrides: dict[str, object]

    def config_for_phase(self, phase: int) -> TrainConfig:
        """The same sources merged for the other phase, with its own defaults and preset block."""
        overrides = self.overrides | {"run.phase": phase}
        return resolve_config(self.preset, self.file, overrides, demo_preset="tiny")[0]


@dataclass(frozen=True)
class EvaluateArguments:
    """What an evaluation command asks for. None and an empty list take what the run used."""

    run: Path
    data: list[str]
    checkpoint: Literal["best", "latest"] | int
    output: Path | None
    limit: int | None
    batch_size: int | None
    device: str
    max_new_tokens: int | None
    seed: int | None
    debug: bool


@dataclass(frozen=True)
class PlanArguments:
    """What a plan is wanted for, on which cards (None: the one here), and how it is written."""

    config: TrainConfig
    card: str | None
    ranks: int
    json: bool


def parse_plan_args(argv: Sequence[str]) -> PlanArguments:
    """Read the command line of the plan: the flags of training for phase 2, and three more.

    Raises:
        ConfigError, MissingInputError: as for training.
    """
    parser = plan_parser()
    args, _ = parser.parse_known_args(with_underscores(argv))
    train = parse_train_args(argv, parser=parser)
    return PlanArguments(train.config_for_phase(2), args.card, args.ranks, args.json)


def parse_train_args(
    argv: Sequence[str], prog: str = "python -m dragkit.train", parser: Parser | None = None
) -> TrainArguments:
    """Read the training command line.

    Args:
        argv: arguments after the program's name.
        prog: name of the program in the help; parser: instead of `train_parser(prog)`.

    Returns:
        Configuration, origins and sources.

    Raises:
        ConfigError: all unknown flags, keys and values at once.
        MissingInputError: the file of --config cannot be read.
    """
    args, extras = (parser or train_parser(prog)).parse_known_args(with_underscores(argv))
    overrides: dict[str, object] = {}
    labels: dict[str, str] = {}
    problems = explain_unknown_flags(extras, [*FLAGS, "preset", "config", "set", "debug", "help"])
    for key, value, label in args.settings:
        overrides[key] = parse_text(key, value) if isinstance(value, str) else value
        labels[key] = label
    try:
        config, origins = resolve_config(
            args.preset, args.config, overrides, labels=labels, demo_preset="tiny"
        )
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    return TrainArguments(config, origins, args.debug, args.preset, args.config, overrides)


def parse_evaluate_args(argv: Sequence[str]) -> EvaluateArguments:
    """Read the evaluation command line.

    Args:
        argv: arguments after the program's name.

    Returns:
        The arguments, checked for kind and range.

    Raises:
        ConfigError: a flag that is unknown or has a wrong value.
    """
    args, extras = evaluate_parser().parse_known_args(with_underscores(argv))
    known = [*(name for name in vars(args) if name != "run"), "help"]
    if problems := explain_unknown_flags(extras, known, training=False):
        raise ConfigError("\n".join(problems))
    return EvaluateArguments(**vars(args))
