"""Evaluates a trained run: `python -m dragkit.evaluate RUN [--data FILE ...]`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dragkit.config.flags import EXIT_CODE_HELP, Parser, explain_unknown_flags, with_underscores
from dragkit.config.training_sections import DEVICE_PATTERN
from dragkit.console import output_file, run_main, setup_console, show
from dragkit.errors import ConfigError

_EPILOG = f"""\
Architecture and data settings come from the checkpoint and have no flags here.

examples:
  python -m dragkit.evaluate runs/demo
  python -m dragkit.evaluate runs/demo --data test.jsonl other.jsonl --output results.json
  python -m dragkit.evaluate runs/demo --checkpoint latest --limit 100
  python -m dragkit.evaluate runs/demo --facts gold --output ceiling.json

{EXIT_CODE_HELP}"""
# How an evaluation begins, see `evaluation_document`.
_HEAD = '{\n "dragkit": '


@dataclass(frozen=True)
class EvaluateArguments:
    """A parsed evaluation command. None and an empty list stand for the run's own value."""

    run: Path
    data: list[str]
    checkpoint: str | int
    output: Path | None
    limit: int | None
    batch_size: int | None
    device: str
    max_new_tokens: int | None
    seed: int | None
    facts: Literal["retrieved", "gold"]
    debug: bool


def evaluate_parser() -> Parser:
    """Builds the parser. Settings that the checkpoint holds have no flag."""
    parser = Parser("python -m dragkit.evaluate", "Evaluate a trained run.", _EPILOG)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="question files, JSONL or JSONL.gz (default: the run's test, else validation file)",
    )
    add(
        "--checkpoint",
        type=_checkpoint,
        default="best",
        metavar="{best,latest,STEP}",
        help="checkpoint of the run (default: best)",
    )
    add("--output", type=Path, metavar="FILE", help="JSON file to write (default: in the run)")
    add("--limit", type=_positive, metavar="N", help="evaluate the first N questions of each file")
    add(
        "--batch_size",
        type=_positive,
        metavar="N",
        help="questions per batch (default: as many as fit)",
    )
    add(
        "--device",
        type=_device,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto)",
    )
    add(
        "--max_new_tokens",
        type=_positive,
        metavar="N",
        help="longest answer, in tokens (default: the run's)",
    )
    add("--seed", type=_seed, metavar="N", help="seed (default: the run's)")
    add(
        "--facts",
        choices=("retrieved", "gold"),
        default="retrieved",
        help="facts of the prompts: retrieved, or gold to see what answers perfect retrieval "
        "would give (default: retrieved)",
    )
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_evaluate_args(argv: Sequence[str]) -> EvaluateArguments:
    """Parses the command line of an evaluation.

    Raises:
        ConfigError: a flag is unknown or has a wrong value.
    """
    args, extras = evaluate_parser().parse_known_args(with_underscores(argv))
    known = [*(name for name in vars(args) if name != "run"), "help"]
    if problems := explain_unknown_flags(extras, known, training=False):
        raise ConfigError("\n".join(problems))
    return EvaluateArguments(**vars(args))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most {2**32 - 1}, got {text!r}"
        )
    return int(text)


def _checkpoint(text: str) -> str | int:
    if text in ("best", "latest"):
        return text
    step = text.removeprefix("step-")
    if not step.isdecimal():
        raise argparse.ArgumentTypeError(f"must be best, latest or a step, got {text!r}")
    return int(step)


def _device(text: str) -> str:
    if not re.fullmatch(DEVICE_PATTERN, text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _evaluate(argv: list[str]) -> int:
    args = parse_evaluate_args(argv)
    setup_console(debug=args.debug)
    from dragkit.trainer.signals import StopSignal

    with StopSignal() as stop, stop.translated():
        # torch is imported only now, so that --help and mistakes answer at once.
        from dragkit.trainer.evaluate_run import Run, evaluation_document
        from dragkit.trainer.inputs import check_readable
        from dragkit.trainer.run_folder import require_run, run_dir_of

        require_run(args.run)
        check_readable(args.data)
        output = args.output or run_dir_of(args.run) / "evaluation.json"
        remedy = "Name another file with --output FILE."
        with output_file(output, remedy, head=_HEAD) as file:
            run = Run(
                args.run,
                args.checkpoint,
                args.device,
                seed=args.seed,
                max_new_tokens=args.max_new_tokens,
            )
            document = evaluation_document(
                run, args.data, limit=args.limit, batch_size=args.batch_size, facts=args.facts
            )
            for name, result in document["files"].items():
                show(f"{name}\n{result.pop('table')}")
            file.write(json.dumps(document, indent=1) + "\n")
        show(f"written to {output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_evaluate, argv)


if __name__ == "__main__":
    raise SystemExit(main())
