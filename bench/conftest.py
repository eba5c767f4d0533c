"""Options and fixtures of the benchmarks, and their result files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.measure import CPU, Contender, compare
from bench.records import write_results
from bench.results import Comparison

# The small set is to end within two minutes.
_REPEATS, _SMALL_REPEATS, _SMALL_SECONDS = 9, 5, 12.0
# Comparisons by theme. They are printed and written when all modules have run.
_COMPARISONS = pytest.StashKey[dict[str, list[Comparison]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the benchmarks."""
    group = parser.getgroup("dragkit benchmarks")
    group.addoption(
        "--results",
        default=os.environ.get("DRAGKIT_BENCH_RESULTS"),
        help="write JSON and Markdown tables under this folder, one folder per device",
    )
    group.addoption("--bench-threads", type=int, default=None, help="number of PyTorch's threads")
    group.addoption(
        "--bench-repeats",
        type=int,
        help="repeats of every contender, by default 9, and 5 for the small set",
    )
    group.addoption(
        "--bench-full",
        action="store_true",
        help="run all benchmarks on a CPU, and not only the small set",
    )
    group.addoption(
        "--bench-generator", help="also time phase 2 with this generator: tiny, a folder or a name"
    )
    group.addoption("--bench-prompts", type=int, default=32, help="number of prompts to decode")
    group.addoption(
        "--bench-compiled",
        action=argparse.BooleanOptionalAction,
        help="also time compiled contenders; by default only those of bench_kernels are, all of "
        "them on CUDA and the layer's on a CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the numbers of threads and repeats."""
    config.addinivalue_line("markers", "full: on a CPU only with --bench-full")
    if config.getoption("--bench-repeats", None) is None:
        config.option.bench_repeats = _SMALL_REPEATS if is_small(config) else _REPEATS
    config.stash[_COMPARISONS] = {}
    if (threads := config.getoption("--bench-threads", None)) is not None:
        torch.set_num_threads(threads)


def is_small(config: pytest.Config) -> bool:
    """Whether only the small set runs: on a CPU without --bench-full."""
    return not (torch.cuda.is_available() or config.getoption("--bench-full", False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips benchmarks outside the small set, by marker or by the module's `in_small_set`."""
    if not is_small(config):
        return
    skip = pytest.mark.skip(reason="not in the small set; run it with --bench-full")
    for item in items:
        in_small_set = getattr(item.module, "in_small_set", None)
        excluded = in_small_set is not None and not in_small_set(item.callspec.params)
        if excluded or item.get_closest_marker("full"):
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the result files."""
    folder = session.config.getoption("--results", None)
    for theme, comparisons in session.config.stash[_COMPARISONS].items():
        if folder and comparisons:
            write_results(Path(folder), theme, comparisons)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the comparison tables."""
    for comparisons in config.stash[_COMPARISONS].values():
        for comparison in comparisons:
            terminalreporter.write_line("")
            terminalreporter.write(comparison.markdown())


@pytest.fixture(autouse=True)
def flush_denormals() -> Iterator[None]:
    """Flushes denormals as training does. Decays underflow, and some processors are slow there."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def timed(benchmark: Callable, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`timed(comparison, contenders, device, seconds)` times them and stores the comparison."""
    theme = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    config = request.config

    def run(
        comparison: Comparison,
        contenders: list[Contender],
        device: torch.device = CPU,
        seconds: float | None = None,
    ) -> None:
        small = is_small(config)
        compare(
            benchmark,
            comparison,
            contenders,
            repeats=config.getoption("--bench-repeats"),
            warmup=1 if small else 2,
            seconds=_SMALL_SECONDS if small else seconds,
            device=device,
        )
        config.stash[_COMPARISONS].setdefault(theme, []).append(comparison)

    return run


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of packed data and token states, by default for one session."""
    folder = os.environ.get("DRAGKIT_BENCH_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")
