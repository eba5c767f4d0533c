"""Writes the demo as files: `python -m dragkit.demo.build --out DIR [--source]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dragkit.console import run_main, show
from dragkit.demo.dataset import build_demo, write_source


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_build, argv)


def _build(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dragkit.demo.build",
        description="Write the bundled demo questions as train.jsonl, dev.jsonl and test.jsonl.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--source",
        action="store_true",
        help="write kg.tsv and qa.jsonl instead: all facts, and the questions without subgraphs",
    )
    args = parser.parse_args(argv)
    files = write_source(args.out) if args.source else build_demo(args.out)
    show("\n".join(str(path) for path in files))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
