"""Writing of result files: the measurements, the machine and the command."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from bench.results import Comparison, describe

_PACKAGES = ("torch", "triton", "torch_geometric", "transformers", "peft", "numpy")


def device_name() -> str:
    """The GPU, or the processor if there is no GPU, as the name of a folder."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = (line.partition(":")[2] for line in lines if line.startswith("model name"))
        name = next(models, name)
    return "-".join(name.lower().replace("(", " ").replace(")", " ").split())


def commit() -> str | None:
    """The commit of the working tree, with a plus sign if it has changes. None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10"]
    try:
        run = subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def command_line(arguments: Sequence[str]) -> str:
    """The command of a process, from its `sys.argv`, without the folder of the results."""
    path, *rest = Path(arguments[0]), *arguments[1:]
    words = ["python", path.name] if path.suffix == ".py" else [path.name]
    if path.name == "__main__.py":
        words = ["python", "-m", path.parent.name]
    # The folder is a path of this machine and no part of what was measured.
    is_folder = False
    for word in rest:
        if is_folder or word == "--results":
            is_folder = not is_folder
        elif not word.startswith("--results="):
            words.append(word)
    return shlex.join(words)


def machine_info(command: str | None = None) -> dict[str, object]:
    """What a time depends on besides the code. `command` replaces that of this process."""
    packages: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(),
        # Peak rates are looked up by the maker's spelling.
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command or command_line(sys.argv),
    }


def write_results(folder: Path, theme: str, comparisons: Sequence[Comparison]) -> Path:
    """Writes `<folder>/<device>/<theme>.json` and the same as a Markdown table.

    Args:
        folder: such as bench/results.
        theme: name of the file.
        comparisons: of one session.

    Returns:
        The path of the JSON file.
    """
    info = machine_info()
    target = folder / str(info["device"])
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{theme}.json"
    content = {"machine": info, "comparisons": [msgspec.to_builtins(c) for c in comparisons]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"# {theme}\n\n{describe(info)}\n" + "".join("\n" + c.markdown() for c in comparisons)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path
