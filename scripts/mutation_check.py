"""Plants the faults of scripts/mutations.toml one at a time, and sees whether the tests fail.

    python scripts/mutation_check.py [--only WORDS] [--output docs/mutation.md]

Each fault goes into a copy of the tree, where its tests run until the first failure. Before, all of
these tests must pass in the copy without a fault. Libraries are imported once, in a server from
which each run is forked. The exit code is 0 if at least 95 % of the faults are caught.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "scripts" / "mutations.toml"
WANTED = 0.95
_PRELOAD = ["pytest", "torch", "transformers", "peft", "hypothesis", "torch_geometric"]
_LIMIT_S = 900
# Exit codes of pytest.
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Fault:
    """A text of a file, what replaces it, and the tests that must see it."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def planted(self, root: Path) -> str:
        """The file's content with the fault.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        content = (root / self.file).read_text(encoding="utf-8")
        if (count := content.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has its text {count} times, not once")
        return content.replace(self.old, self.new)


def read_faults() -> list[Fault]:
    """The listed faults."""
    return [Fault(**row) for row in tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]]


def copy_tree(target: Path) -> None:
    """Copies every file of the tree that git does not ignore."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def _run_tests(root: Path, tests: list[str], log: Path) -> None:
    """Body of a process: runs tests in the copy, with their output in `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(root)
    # A file may change twice within the resolution of its time, and then bytecode would be stale.
    sys.dont_write_bytecode = True
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests])
    if not str(sys.modules["dragkit"].__file__).startswith(str(root)):
        raise SystemExit(f"{sys.modules['dragkit'].__file__} was tested, not {root}")
    raise SystemExit(int(code))


def run_tests(root: Path, tests: list[str], log: Path) -> int:
    """Exit code of pytest in a process of its own. It is negative where a signal ended that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=_run_tests, args=(root, tests, log))
    process.start()
    process.join(_LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def first_failure(log: Path) -> str:
    """The first failing test in pytest's output, without its parameters."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split()[1].partition("[")[0].rpartition("/")[2]
    return "the run ended early"


def table(rows: list[tuple[Fault, str]]) -> str:
    """The page: one row for each fault with the test that saw it."""
    caught = sum(bool(by) for _, by in rows)
    lines = [
        "# Planted faults",
        "",
        "`scripts/mutation_check.py` plants each fault of `scripts/mutations.toml` in a copy of",
        "the tree and runs its tests until the first failure.",
        "",
        f"**{caught} of {len(rows)} caught**, {time.strftime('%Y-%m-%d')}.",
        "",
        "| fault | file | caught by |",
        "| --- | --- | --- |",
        *(
            f"| {fault.name} | `{fault.file}` | {f'`{by}`' if by else '**not caught**'} |"
            for fault, by in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the check and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name has WORDS")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown page to write")
    args = parser.parse_args()
    faults = [fault for fault in read_faults() if args.only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder, "tree").resolve(), Path(folder, "log.txt")
        copy_tree(root)
        tests = sorted({test for fault in faults for test in fault.tests})
        if (code := run_tests(root, tests, log)) != _PASSED:
            sys.stderr.write(log.read_text(errors="replace"))
            sys.stderr.write(f"without a fault the tests end with {code}\n")
            return 1
        rows = []
        for number, fault in enumerate(faults, 1):
            path, began = root / fault.file, time.monotonic()
            whole = path.read_text(encoding="utf-8")
            path.write_text(fault.planted(root), encoding="utf-8")
            code = run_tests(root, fault.tests, log)
            path.write_text(whole, encoding="utf-8")
            by = "" if code == _PASSED else first_failure(log)
            rows.append((fault, by))
            took = f"{time.monotonic() - began:.0f} s"
            sys.stderr.write(f"{number}: {fault.name}: {by or 'NOT CAUGHT'}, {took}\n")
            if args.output is not None:
                args.output.write_text(table(rows), encoding="utf-8")
    caught = sum(bool(by) for _, by in rows)
    sys.stdout.write(f"{caught} of {len(rows)} faults caught\n")
    return int(caught < WANTED * len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
