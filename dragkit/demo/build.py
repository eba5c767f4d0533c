"""Command line of the demo set: `python -m dragkit.demo.build --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dragkit.demo.dataset import build_demo
from dragkit.errors import DragkitError


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the three files into a folder and prints where; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dragkit.demo.build",
        description="Write the bundled demo questions as train.jsonl, dev.jsonl and test.jsonl.",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the three files")
    try:
        files = build_demo(parser.parse_args(argv).out)
    except DragkitError as error:
        sys.stderr.write(f"dragkit: error: {error}\n")
        return error.exit_code
    sys.stdout.write("\n".join(str(path) for path in files) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
