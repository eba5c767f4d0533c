"""Options, data and where the results go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.measure import Way, compare
from bench.records import write_results
from bench.tables import Comparison, Reported

_REPEATS, _SMALL_REPEATS, _SMALL_SECONDS = 9, 5, 12.0
_COMPARISONS = pytest.StashKey[dict[str, list[Reported]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the benchmarks."""
    group = parser.getgroup("dragkit benchmarks")
    group.addoption(
        "--results",
        default=os.environ.get("DRAGKIT_BENCH_RESULTS"),
        help="write JSON and Markdown tables under this folder, one folder per device",
    )
    group.addoption("--bench-threads", type=int, default=None, help="threads of PyTorch")
    group.addoption(
        "--bench-repeats", type=int, help="repeats of every way: 9 if not said, 5 of the small set"
    )
    group.addoption(
        "--bench-full",
        action="store_true",
        help="on a CPU all of it instead of the small set",
    )
    group.addoption(
        "--bench-generator", help="also time phase 2 with this generator: tiny, a folder, a name"
    )
    group.addoption("--bench-prompts", type=int, default=32, help="prompts that are decoded")
    group.addoption(
        "--bench-compiled",
        action=argparse.BooleanOptionalAction,
        help="also time compiled opponents; if not said, only bench_kernels does: all of them on "
        "CUDA, on a CPU the layer's",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the store of comparisons, the number of threads and of repeats."""
    config.addinivalue_line("markers", "full: on a CPU only with --bench-full")
    if config.getoption("--bench-repeats", None) is None:
        config.option.bench_repeats = _SMALL_REPEATS if is_small(config) else _REPEATS
    config.stash[_COMPARISONS] = {}
    if (threads := config.getoption("--bench-threads", None)) is not None:
        torch.set_num_threads(threads)


def is_small(config: pytest.Config) -> bool:
    """Whether a run takes the small set: on a CPU, unless all of it is asked for."""
    return not (torch.cuda.is_available() or config.getoption("--bench-full", False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is not in the small set, by marker or by its module's word, and says so."""
    if not is_small(config):
        return
    skip = pytest.mark.skip(reason="not in the small set: --bench-full")
    for item in items:
        chosen = getattr(item.module, "in_small_set", None)
        left_out = chosen is not None and not chosen(item.callspec.params)
        if left_out or item.get_closest_marker("full"):
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was measured."""
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
    """`timed(name, ways, about, device)`: compares, and keeps the result for the tables."""

    def run(
        name: str, ways: list[Way], about: dict[str, object], device: torch.device | None = None
    ) -> Comparison:
        repeats = request.config.getoption("--bench-repeats")
        small = {"warmup": 1, "seconds": _SMALL_SECONDS} if is_small(request.config) else {}
        comparison = compare(benchmark, name, ways, about, repeats=repeats, device=device, **small)
        keep(comparison)
        return comparison

    return run


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data and token states live as long as the session."""
    named = os.environ.get("DRAGKIT_BENCH_CACHE")
    return Path(named) if named else tmp_path_factory.mktemp("cache")
