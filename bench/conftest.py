"""Options, data and where the results go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.measure import Comparison, Reported, Way, compare, write_results

_COMPARISONS = pytest.StashKey[dict[str, list[Reported]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --results, --bench-threads and --bench-repeats."""
    group = parser.getgroup("dragkit benchmarks")
    group.addoption(
        "--results",
        default=os.environ.get("DRAGKIT_BENCH_RESULTS"),
        help="write JSON and Markdown tables under this folder, one folder per device",
    )
    group.addoption("--bench-threads", type=int, default=None, help="threads of PyTorch")
    group.addoption("--bench-repeats", type=int, default=9, help="repeats of every way")
    group.addoption(
        "--bench-compiled",
        action=argparse.BooleanOptionalAction,
        help="also time compiled opponents; if not said, only bench_kernels does, and on CUDA",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the store of comparisons and the number of threads."""
    config.stash[_COMPARISONS] = {}
    if (threads := config.getoption("--bench-threads", None)) is not None:
        torch.set_num_threads(threads)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was measured."""
    folder = session.config.getoption("--results", None)
    for theme, comparisons in session.config.stash[_COMPARISONS].items():
        if folder:
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
    """As training does: state-space decays underflow, and denormals are slow on some processors."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Reported], None]:
    """`keep(comparison)`: puts it into the tables of its module."""
    theme = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    return request.config.stash[_COMPARISONS].setdefault(theme, []).append


@pytest.fixture
def timed(
    benchmark: Callable, request: pytest.FixtureRequest, keep: Callable[[Reported], None]
) -> Callable[..., Comparison]:
    """`timed(name, ways, about)`: compares, and keeps the result for the tables."""

    def run(name: str, ways: list[Way], about: dict[str, object]) -> Comparison:
        repeats = request.config.getoption("--bench-repeats")
        comparison = compare(benchmark, name, ways, about, repeats=repeats)
        keep(comparison)
        return comparison

    return run


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data and token states live as long as the session."""
    named = os.environ.get("DRAGKIT_BENCH_CACHE")
    return Path(named) if named else tmp_path_factory.mktemp("cache")
