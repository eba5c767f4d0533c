"""Every op and a six-layer retriever against the other ways to write them, on the same packs.

A CPU takes the small shapes in float32, and unless --bench-full is given only the ops on the
smallest pack and the layer on a larger one. CUDA takes all, in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from bench.data import (
    LARGE,
    SMALL,
    bench_config,
    pyg_questions,
    question_file,
    question_source,
    whole_batches,
)
from bench.kernel_packs import CPU_SHAPES, SHAPES, Pack, random_pack, real_pack
from bench.kernel_problems import gates, layer, messages, starts
from bench.kernel_scalars import choice, fact_head, node_softmax, scores
from bench.kernel_step import retriever_step
from bench.kernel_timing import compare_kernels, copy_bandwidth
from bench.kernel_ways import Problem
from bench.tables import KernelComparison

pytestmark = pytest.mark.timeout(1800)

WIDTH, INSTRUCTIONS = 256, 3
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ON_CUDA = _DEVICE.type == "cuda"
_BATCH = 16

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "layer": layer,
    "message_passing": messages,
    "relation_sum": starts,
    "segment_softmax": node_softmax,
    "relation_gate": gates,
    "fact_scores": scores,
    "fact_head": fact_head,
    "gumbel_topk_bernoulli": choice("bernoulli"),
    "gumbel_topk_budget": choice("budget"),
}
# Logits are float32 whatever the precision of training.
_FLOAT32_ONLY = {"fact_scores", "gumbel_topk_bernoulli", "gumbel_topk_budget"}
_DTYPES = [torch.float32, torch.bfloat16] if _ON_CUDA else [torch.float32]
_RANDOM = {shape.name: shape for shape in (SHAPES if _ON_CUDA else CPU_SHAPES)}
_REAL = {"WebQSP": SMALL, "WebQSP and CWQ": LARGE} if _ON_CUDA else {"WebQSP": SMALL}
_SMALLEST, _LARGER = CPU_SHAPES[0].name, CPU_SHAPES[-1].name


def _is_layer_step(params: Mapping[str, object]) -> bool:
    """The row that a CPU compares with compiled PyG without being asked."""
    return params.get("name") == "layer" and bool(params.get("backward"))


def in_small_set(params: Mapping[str, object]) -> bool:
    """Whether a CPU runs a benchmark by these parameters without --bench-full."""
    if params["pack"] == _LARGER:
        return _is_layer_step(params)
    return params["pack"] == _SMALLEST and "name" in params


@pytest.fixture(scope="session")
def copy_gb_s() -> float:
    """GB/s of a copy, measured once in each run."""
    return copy_bandwidth(_DEVICE)


@pytest.fixture(scope="module", params=[*_RANDOM, *_REAL])
def pack(request: pytest.FixtureRequest, cache_dir: Path) -> Pack:
    """One pack after the other, each made once."""
    if request.param in _RANDOM:
        return random_pack(_RANDOM[request.param], _DEVICE)
    file = question_file(_REAL[request.param], cache_dir)
    source = question_source(file, bench_config(1), cache_dir, None, _BATCH)
    rows = whole_batches(source, _BATCH, 1)[0]
    return real_pack(file.name, list(pyg_questions(source, rows).values()), _DEVICE)


@pytest.fixture
def compared(
    pack: Pack,
    copy_gb_s: float,
    benchmark: Callable,
    request: pytest.FixtureRequest,
    keep: Callable[[KernelComparison], None],
) -> Callable[..., None]:
    """`compared(build, dtype, backward)`: checks and times a problem on the pack."""
    params = request.node.callspec.params
    default = _ON_CUDA or (params["pack"] == _LARGER and _is_layer_step(params))

    def run(build: Callable[..., Problem], dtype: torch.dtype, backward: bool) -> None:
        option = request.config.getoption
        compile_ = option("--bench-compiled")
        torch.compiler.reset()
        problem = build(pack, dtype, WIDTH, INSTRUCTIONS, default if compile_ is None else compile_)
        comparison = compare_kernels(
            benchmark, problem, backward=backward, copy=copy_gb_s, repeats=option("--bench-repeats")
        )
        comparison.name = f"{pack.name}: {comparison.name}"
        keep(comparison)

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_op(name: str, dtype: torch.dtype, backward: bool, compared: Callable[..., None]) -> None:
    """One op, forward alone and with all gradients."""
    if name in _FLOAT32_ONLY and dtype != torch.float32:
        pytest.skip("float32 in any precision of training")
    compared(PROBLEMS[name], dtype, backward)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_retriever_step(dtype: torch.dtype, compared: Callable[..., None]) -> None:
    """Six layers, loss and gradients."""
    compared(retriever_step, dtype, backward=True)
