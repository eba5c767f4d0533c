"""Every op against the other ways to write it, on the same packs.

A CPU runs the small shapes in float32. Without --bench-full it runs only the ops on the smallest
pack and the layer on a larger one. CUDA runs everything in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import row_contenders, scalar_contenders
from bench.data import (
    LARGE,
    SMALL,
    bench_config,
    pyg_questions,
    question_file,
    question_source,
    whole_batches,
)
from bench.measure import DEVICE, copy_bandwidth
from bench.packs import CPU_SHAPES, SHAPES, Pack, random_pack, real_pack
from bench.problems import Case, Problem, checked, tolerances
from bench.results import Comparison

pytestmark = pytest.mark.timeout(1800)

WIDTH, NUM_INSTRUCTIONS = 256, 3
_ON_CUDA = DEVICE.type == "cuda"
_BATCH_SIZE, _CPU_SECONDS = 16, 12.0

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "layer": row_contenders.layer_problem,
    "message_passing": row_contenders.message_passing_problem,
    "relation_sum": row_contenders.relation_sum_problem,
    "segment_softmax": scalar_contenders.segment_softmax_problem,
    "relation_gate": row_contenders.relation_gate_problem,
    "fact_scores": scalar_contenders.fact_scores_problem,
    "fact_head": scalar_contenders.fact_head_problem,
    "gumbel_topk_bernoulli": partial(scalar_contenders.gumbel_topk_problem, mode="bernoulli"),
    "gumbel_topk_exact_k": partial(scalar_contenders.gumbel_topk_problem, mode="exact_k"),
}
# Logits are float32 whatever the precision of training.
_FLOAT32_ONLY = {"fact_scores", "gumbel_topk_bernoulli", "gumbel_topk_exact_k"}
_DTYPES = [torch.float32, torch.bfloat16] if _ON_CUDA else [torch.float32]
_RANDOM = {shape.name: shape for shape in (SHAPES if _ON_CUDA else CPU_SHAPES)}
_REAL = {"WebQSP": SMALL, "WebQSP and CWQ": LARGE} if _ON_CUDA else {"WebQSP": SMALL}
_SMALLEST, _LARGER = CPU_SHAPES[0].name, CPU_SHAPES[-1].name


def _is_larger_layer_step(params: Mapping[str, object]) -> bool:
    """Whether a CPU compares these parameters with compiled PyG without --bench-compiled."""
    return params["pack"] == _LARGER and params["name"] == "layer" and bool(params["backward"])


def in_small_set(params: Mapping[str, object]) -> bool:
    """Whether a CPU runs a benchmark with these parameters without --bench-full."""
    return params["pack"] == _SMALLEST or _is_larger_layer_step(params)


@pytest.fixture(scope="session")
def copy_gb_s() -> float:
    """GB/s of a copy, measured once in each run."""
    return copy_bandwidth(DEVICE)


@pytest.fixture(scope="module", params=[*_RANDOM, *_REAL])
def pack(request: pytest.FixtureRequest, cache_dir: Path) -> Pack:
    """The packs, one after the other, so that each is built once."""
    if request.param in _RANDOM:
        return random_pack(_RANDOM[request.param], DEVICE)
    file = question_file(_REAL[request.param], cache_dir)
    source = question_source(file, bench_config(1), cache_dir, None, _BATCH_SIZE)
    rows = whole_batches(source, _BATCH_SIZE, 1)[0]
    return real_pack(file.name, list(pyg_questions(source, rows).values()), DEVICE)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_op(
    name: str,
    dtype: torch.dtype,
    backward: bool,
    pack: Pack,
    copy_gb_s: float,
    request: pytest.FixtureRequest,
    timed: Callable[..., None],
) -> None:
    """One op, its forward alone or with all gradients."""
    if name in _FLOAT32_ONLY and dtype != torch.float32:
        pytest.skip("logits are float32 in any precision of training")
    compile_ = request.config.getoption("--bench-compiled")
    if compile_ is None:
        compile_ = _ON_CUDA or _is_larger_layer_step(request.node.callspec.params)
    # Graphs of earlier problems would count against the limit of recompilations.
    torch.compiler.reset()
    problem = PROBLEMS[name](Case(pack, dtype, WIDTH, NUM_INSTRUCTIONS))
    contenders = checked(problem, problem.contenders(compile_=compile_), backward=backward)
    result, gradient = tolerances(dtype, peer=False)
    about = problem.about | {
        "dtype": str(dtype).removeprefix("torch."),
        "copy": f"{copy_gb_s:.1f} GB/s",
        "tolerance of our results and gradients": f"{result:.0e} and {gradient:.0e}",
    }
    title = f"{pack.name}: {problem.name}, {'forward + backward' if backward else 'forward'}"
    comparison = Comparison(
        title,
        about,
        [],
        copy_gb_s=copy_gb_s,
        bytes=sum(problem.bytes[: 1 + backward]),
        flops=sum(problem.flops[: 1 + backward]),
    )
    timed(comparison, contenders, DEVICE, seconds=_CPU_SECONDS)
