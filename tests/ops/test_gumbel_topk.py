"""The selection of facts against sorting in Python, and its gradients against formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit_kernels import (
    FactSelection,
    gumbel_topk,
    gumbel_topk_ref,
    logistic_noise,
    top_facts,
)
from dragkit_kernels.launch import TOPK_STREAM, Tile
from dragkit_kernels.testing import assert_close, fenced_allocations, strided_like
from tests.ops.cases import kernels
from tests.ops.exact_k_cases import SIZES, draw, offsets

# The interpreter also computes masked elements, which overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EDGES = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]
INF, CPU = math.inf, torch.device("cpu")
SAMPLERS = list(
    itertools.product(("bernoulli", "exact_k"), ("binary_concrete", "straight_through"))
)
EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS, ids="-".join)
SOURCES = pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])


@pytest.fixture
def small_tiles(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 facts, so that the kernel streams questions of a few dozen facts."""
    if backend == "triton":
        forward = kernels("gumbel_topk.forward")
        monkeypatch.setattr(forward, "topk_tile", lambda n: (Tile(32, 1), n > 32))


def with_gradient(drawn: FactSelection, logits: Tensor) -> tuple[FactSelection, Tensor]:
    generator = torch.Generator().manual_seed(1)
    d_gate = torch.randn(drawn.gate.shape, generator=generator).to(logits.device)
    d_soft = torch.randn(drawn.soft.shape, generator=generator).to(logits.device)
    loss = (drawn.gate * d_gate).sum() + (drawn.soft * d_soft).sum()
    return drawn, torch.autograd.grad(loss, logits)[0]


def check(
    values: Tensor,
    sizes: list[int],
    k: int,
    sampler: tuple[str, str],
    backend: str,
    *,
    noise: Tensor | None = None,
    temperature: float = 0.5,
    tolerance: float = 1e-5,
    drawn: bool = False,
) -> FactSelection:
    """Compares op and definition: the selection exactly, soft and gradient with a tolerance."""
    device = values.device
    ptr, width = offsets(sizes, device), max(sizes, default=0)
    mode, estimator = sampler
    options = {"temperature": temperature, "mode": mode, "estimator": estimator}
    source: dict[str, Tensor] = {}
    if drawn:
        source = {
            "seed": torch.tensor((7 << 32) + 3, device=device),
            "question_key": (torch.arange(len(sizes), device=device) << 31) + 11,
        }
        noise = logistic_noise(*source.values(), ptr, num_facts=len(values), backend=backend)
    elif noise is None:
        noise = torch.zeros_like(values)
    logits = values.clone().requires_grad_()
    expected, want = with_gradient(
        gumbel_topk_ref(logits, ptr, k, noise=noise, max_facts=width, **options), logits
    )
    source = source or {"noise": noise}
    with fenced_allocations():
        got, grad = with_gradient(
            gumbel_topk(logits, ptr, k, max_facts=width, backend=backend, **source, **options),
            logits,
        )
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert_close(got.soft, expected.soft.double(), name="soft", tolerance=tolerance)
    # With exact_k the terms of a gradient cancel, so the sum needs an absolute tolerance.
    torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)
    return got


def by_sorting(keys: list[float], sizes: list[int], k: int, threshold: float) -> list[list[int]]:
    rows, first = [], 0
    for size in sizes:
        # sorted() is stable, so equal keys stay in the order of facts.
        ranked = sorted(range(first, first + size), key=lambda e: -keys[e])
        kept = [e for place, e in enumerate(ranked) if place == 0 or keys[e] > threshold][:k]
        rows.append(kept + [-1] * (k - len(kept)))
        first += size
    return rows


def check_selection(drawn: FactSelection, rows: list[list[int]]) -> None:
    assert drawn.index.dtype == torch.int32 and drawn.count.dtype == torch.int32
    assert drawn.index.tolist() == rows
    assert drawn.gate.tolist() == [[float(e >= 0) for e in row] for row in rows]
    assert drawn.count.tolist() == [sum(e >= 0 for e in row) for row in rows]


@pytest.mark.parametrize("k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("width", [None, 20])
def test_selection_matches_sorting(
    backend: str, device: torch.device, k: int, width: int | None
) -> None:
    """The logits are bfloat16, the keys float32."""
    logits, noise = torch.randn(sum(SIZES)).bfloat16(), torch.randn(sum(SIZES))
    keys = (logits.float() + noise).tolist()
    leaf, noise = logits.to(device).requires_grad_(), noise.to(device)
    for mode, threshold in (("bernoulli", 0.0), ("exact_k", -INF)):
        options = {"noise": noise, "mode": mode, "max_facts": width, "backend": backend}
        drawn = draw(leaf, SIZES, k, **options)
        rows = by_sorting(keys, SIZES, k, threshold)
        check_selection(drawn, rows)
        assert drawn.gate.dtype == drawn.soft.dtype == torch.float32
        (grad,) = torch.autograd.grad(drawn.soft.sum() + drawn.gate.sum(), leaf)
        assert grad.dtype == torch.bfloat16
    assert drawn.count.tolist() == [min(k, size) for size in SIZES]


KEYS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 2.5000002, -7.0, INF, -INF, 1e-40, 3e38])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    k=st.integers(0, 7),
    data=st.data(),
)
def test_ties_and_infinities_match_sorting(sizes: list[int], k: int, data: st.DataObject) -> None:
    total = sum(sizes)
    values = data.draw(st.lists(KEYS, min_size=total, max_size=total))
    logits = torch.tensor(values, dtype=torch.float32).requires_grad_()
    for mode, estimator in SAMPLERS:
        drawn = draw(logits, sizes, k, mode=mode, estimator=estimator)
        # exact_k also selects -inf, which exceeds no threshold.
        keys = values if mode == "bernoulli" else torch.tensor(values).clamp(min=-3e38).tolist()
        check_selection(drawn, by_sorting(keys, sizes, k, 0.0 if mode == "bernoulli" else -INF))
        (grad,) = torch.autograd.grad(drawn.gate.sum() + drawn.soft.sum(), logits)
        assert torch.isfinite(drawn.soft).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "sampler", [("bernoulli", "binary_concrete"), ("exact_k", "straight_through")], ids="-".join
)
@pytest.mark.parametrize(
    "pool",
    [[0.0], [-3.0], [0.0, -0.0, 1e-40, -1e-40], [INF, -INF, 0.5], [-INF], [1e4, -1e4]],
    ids=str,
)
@pytest.mark.usefixtures("small_tiles")
def test_ties_zeros_and_infinities(
    backend: str, device: torch.device, sampler: tuple[str, str], pool: list[float]
) -> None:
    sizes = [7, 40]
    values = torch.tensor(pool)[torch.randint(len(pool), (sum(sizes),))].to(device)
    # float32 values near nu = 10^4 are 10^-3 apart.
    tolerance = 1e-3 if max(map(abs, pool)) > 10 else 1e-5
    for k in (2, 39):
        check(values, sizes, k, sampler, backend, tolerance=tolerance)


@EACH_SAMPLER
@SOURCES
def test_sizes_around_powers_of_two(
    backend: str, device: torch.device, sampler: tuple[str, str], drawn: bool
) -> None:
    # Tiles do not depend on the source of the noise, so drawn noise takes fewer sizes.
    sizes, k = (EDGES[3::4], 300) if drawn else (EDGES, 5)
    values, noise = (2 * torch.randn(sum(sizes)).to(device) for _ in range(2))
    check(values, sizes, k, sampler, backend, noise=noise, drawn=drawn)


@EACH_SAMPLER
@SOURCES
@pytest.mark.usefixtures("small_tiles")
def test_streamed_questions(
    backend: str, device: torch.device, sampler: tuple[str, str], drawn: bool
) -> None:
    sizes, k = ([32, 0, 65], 5) if drawn else ([0, 33, 1, 32, 31, 64, 65, 97], 70)
    values = (2 * torch.randn(sum(sizes))).round(decimals=1).to(device)
    check(values, sizes, k, sampler, backend, drawn=drawn)


@EACH_SAMPLER
def test_the_largest_tile_and_one_more(
    backend: str, device: torch.device, sampler: tuple[str, str]
) -> None:
    for size in (TOPK_STREAM.block, TOPK_STREAM.block + 1):
        values = (3 * torch.randn(size + 2) - 2).to(device)
        check(values, [size, 2], 100, sampler, backend, drawn=True, tolerance=3e-5)


@EACH_SAMPLER
def test_values_of_k_empty_questions_and_padding(
    backend: str, device: torch.device, sampler: tuple[str, str]
) -> None:
    for k in (0, 1, 32, 33, 34, 330):
        drawn = check(torch.randn(33).to(device) + 4, [33], k, sampler, backend, drawn=True)
        if sampler[0] == "exact_k":
            assert drawn.count.tolist() == [min(k, 33)]
    for sizes in ([], [0], [0, 0, 0], [0, 3, 0]):
        for k in (0, 3):
            check(torch.randn(sum(sizes)).to(device), sizes, k, sampler, backend, drawn=True)
    total = sum(SIZES)
    drawn = check(torch.randn(total + 600).to(device), SIZES, 3, sampler, backend, drawn=True)
    assert (drawn.soft[total:] == 0).all() and int(drawn.index.max()) < total


@EACH_SAMPLER
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0])
def test_temperatures(
    backend: str, device: torch.device, sampler: tuple[str, str], temperature: float
) -> None:
    values = 2 * torch.randn(sum(SIZES)).to(device)
    # Rounding x = key / T and nu to float32 changes s by up to 2^-22 / T for |x| = 4 / T.
    limit = max(1e-5, 1e-6 / temperature)
    options = {"drawn": True, "temperature": temperature, "tolerance": limit}
    check(values, SIZES, 4, sampler, backend, **options)


@EACH_SAMPLER
@pytest.mark.parametrize("k", [0, 3, 50])
def test_the_op_equals_its_definition_under_autograd(sampler: tuple[str, str], k: int) -> None:
    """Compares the hand-written backward with autograd, with certain facts and padding."""
    total, (mode, estimator) = sum(SIZES), sampler
    logits = torch.randn(total + 2, dtype=torch.float64)
    logits[:2] = torch.tensor([INF, -INF])
    logits.requires_grad_()
    noise = torch.randn(total + 2, dtype=torch.float64)
    options = {"noise": noise, "mode": mode, "estimator": estimator, "temperature": 0.7}
    results = [
        with_gradient(function(logits, offsets(SIZES), k, max_facts=12, **options), logits)
        for function in (gumbel_topk, gumbel_topk_ref)
    ]
    (got, grad), (want, wanted) = results
    for a, b in zip((*got, grad), (*want, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert got.soft[total:].tolist() == [0.0, 0.0]
    assert grad[[0, 1, total, total + 1]].tolist() == [0.0] * 4


def test_a_draw_does_not_depend_on_the_batch(backend: str, device: torch.device) -> None:
    logits, ptr = torch.randn(sum(SIZES)).to(device), offsets(SIZES, device)
    keys, seed = torch.arange(7, device=device) * 31, torch.tensor(8, device=device)
    for mode in ("bernoulli", "exact_k"):
        options = {"seed": seed, "mode": mode, "backend": backend}
        together = gumbel_topk(logits, ptr, 4, question_key=keys, **options)
        for g, size in enumerate(SIZES):
            part, own = slice(int(ptr[g]), int(ptr[g + 1])), offsets([size], device)
            alone = gumbel_topk(logits[part], own, 4, question_key=keys[g : g + 1], **options)
            shifted = torch.where(alone.index >= 0, alone.index + ptr[g], -1)
            assert torch.equal(shifted[0], together.index[g])
            assert_close(alone.soft, together.soft[part].double())


def test_two_runs_and_strided_inputs_are_bit_equal(backend: str, device: torch.device) -> None:
    values, noise = (torch.randn(sum(SIZES)).to(device) for _ in range(2))
    for mode, estimator in SAMPLERS:
        results = []
        for x, n in ((values, noise), (values, noise), (strided_like(values), strided_like(noise))):
            logits = x.requires_grad_()
            options = {"mode": mode, "estimator": estimator, "backend": backend}
            drawn = draw(logits, SIZES, 4, noise=n, **options)
            # The gradient of a sum is an expanded tensor with strides of 0.
            (grad,) = torch.autograd.grad(drawn.gate.sum() + drawn.soft.sum(), logits)
            results.append((*drawn, grad))
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("k", [0, 1, 4, 50])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_top_facts(backend: str, device: torch.device, k: int, threshold: float) -> None:
    """Selects strictly above the threshold, at least one. 0.0 and -0.0 are equal."""
    logits = torch.randn(sum(SIZES)).round(decimals=1)
    logits[:7], logits[8:11] = -9.0, torch.tensor([-0.0, 0.0, -0.0])
    bound = {0.0: -INF, 1.0: INF}.get(threshold, math.log(0.4 / 0.6))
    with fenced_allocations():
        drawn = top_facts(
            logits.to(device).requires_grad_(),
            offsets(SIZES, device),
            k,
            threshold,
            backend=backend,
        )
    check_selection(drawn, by_sorting(logits.tolist(), SIZES, k, bound))
    assert_close(drawn.soft, torch.sigmoid(logits.double()), tolerance=1e-6)
    assert not drawn.gate.requires_grad


def test_a_logit_at_the_threshold_is_not_above_it(backend: str, device: torch.device) -> None:
    logits = torch.tensor([0.0, 1.0, -0.0, 1e-6, -1e-6]).to(device)
    drawn = top_facts(logits, offsets([5], device), 4, 0.5, backend=backend)
    assert drawn.index.tolist() == [[1, 3, -1, -1]]
    drawn = draw(logits, [5], 4, backend=backend)
    assert drawn.index.tolist() == [[1, 3, -1, -1]]


def test_nan_stays_in_the_values_and_out_of_the_index(backend: str, device: torch.device) -> None:
    sizes = [0, 7, 0, 40, 0]
    values, ptr = torch.randn(sum(sizes)).to(device), offsets(sizes, device).long()
    values[3], values[30] = math.nan, -math.nan
    for mode, estimator in SAMPLERS:
        drawn = draw(values, sizes, 4, mode=mode, estimator=estimator, backend=backend)
        assert drawn.soft[3].isnan() and drawn.soft[30].isnan()
        kept = drawn.index >= 0
        assert torch.equal(kept.sum(1).int(), drawn.count)
        inside = (drawn.index >= ptr[:-1, None]) & (drawn.index < ptr[1:, None])
        assert bool((inside | ~kept).all()) and int(drawn.index.min()) >= -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"estimator": "ste"}, "estimator one of"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"noise": None}, "give either noise, or both seed and question_key"),
        (
            {"noise": None, "seed": torch.tensor(1)},
            "give either noise, or both seed and question_key",
        ),
        ({"seed": torch.tensor(1)}, "give either noise, or both seed and question_key"),
        ({"question_key": torch.tensor([1])}, "give either noise, or both seed and question_key"),
        ({"noise": torch.zeros(4)}, r"noise must have shape \[3\], got \[4\]"),
        ({"k": -1}, "k must be 0 or more, got -1"),
        ({"logits": torch.zeros(3, 1)}, r"logits must have shape \[\*\], got \[3, 1\]"),
        ({"fact_ptr": torch.tensor([0, 3])}, "fact_ptr must be int32"),
    ],
)
def test_wrong_arguments_raise(changes: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(3), "fact_ptr": offsets([3]), "k": 2}
    with pytest.raises(ValueError, match=message):
        gumbel_topk(**{**arguments, "noise": torch.zeros(3), **changes})
