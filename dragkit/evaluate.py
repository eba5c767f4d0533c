"""Evaluation: `python -m dragkit.evaluate RUN [--data FILE ...]`, from a run folder alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dragkit.config.arguments import parse_evaluate_args
from dragkit.console import run_main, setup_console


def _evaluate(argv: list[str]) -> int:
    args = parse_evaluate_args(argv)
    setup_console(debug=args.debug)
    from dragkit.trainer.evaluate_run import evaluate_run
    from dragkit.trainer.resume import run_dir_of

    content = evaluate_run(args)
    for name, result in content["files"].items():
        sys.stdout.write(f"{name}\n{result.pop('table')}\n")
    output = args.output or run_dir_of(args.run) / "evaluation.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"written to {output}\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run_main(_evaluate, argv)


if __name__ == "__main__":
    raise SystemExit(main())
