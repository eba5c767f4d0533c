"""Writing result files: what was measured, and on which machine, with what, and how."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.tables import Reported, describe

_PACKAGES = ("torch", "triton", "torch_geometric", "transformers", "peft", "numpy")
# Where a result was written to says nothing about it.
_UNTOLD = "--results"


def device_name() -> str:
    """The GPU, or the processor where there is none, as a folder name."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2]
                break
    return "-".join(name.lower().replace("(", " ").replace(")", " ").split())


def _commit() -> str | None:
    """The commit of the working tree, with a plus sign where it has changes."""
    here = Path(__file__).parent
    try:
        head = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(arguments: Sequence[str]) -> str:
    """How this process was started, from `sys.argv`, without the folder of the results."""
    program, *rest = arguments
    path, words = Path(program), []
    if path.name == "__main__.py":
        words = ["python", "-m", path.parent.name]
    else:
        words = ["python", path.name] if path.suffix == ".py" else [path.name]
    skip = False
    for word in rest:
        if skip or word == _UNTOLD:
            skip = not skip
        elif not word.startswith(f"{_UNTOLD}="):
            words.append(word)
    return shlex.join(words)


def machine_info(command: str | None = None) -> dict[str, object]:
    """What a figure depends on besides the code; `command` stands for this process's own."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": device_name(),
        # The maker's spelling, by which peak rates are looked up; None where a CPU was timed.
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": command or command_line(sys.argv),
    }


def write_results(folder: Path, theme: str, comparisons: Sequence[Reported]) -> Path:
    """Writes `<folder>/<device>/<theme>.json` and the same as a Markdown table.

    Args:
        folder: such as bench/results; theme: file name; comparisons: of one session.

    Returns:
        The path of the JSON file.
    """
    info = machine_info()
    target = folder / str(info["device"])
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{theme}.json"
    content = {"machine": info, "comparisons": [asdict(c) for c in comparisons]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"# {theme}\n\n{describe(info)}\n" + "".join("\n" + c.markdown() for c in comparisons)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path
