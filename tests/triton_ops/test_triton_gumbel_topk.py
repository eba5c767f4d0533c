"""The kernels of gumbel_topk against the reference, by values and by every gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dragkit_kernels import GumbelTopK, gumbel_topk, gumbel_topk_ref, logistic_noise, top_facts
from dragkit_kernels.gumbel_topk import backward, forward
from dragkit_kernels.launch import TOPK_TILES, Tile
from dragkit_kernels.testing import assert_close, fenced_allocations, strided_like

# The interpreter computes masked elements too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
KINDS = list(itertools.product(("bernoulli", "budget"), ("concrete", "mean")))
SIZES = [0, 7, 0, 40, 0]
# Where sizes are of no account: a program takes an interpreter a tenth of a second.
FEW = [7, 0, 12]
EDGES = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 facts, so that questions of a few dozen are streamed."""
    monkeypatch.setattr(forward, "topk_tile", lambda n: (Tile(32, 1), n > 32))
    monkeypatch.setattr(backward, "walk_tile", lambda n: Tile(32, 1))


def offsets(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)


def with_gradient(drawn: GumbelTopK, logits: Tensor) -> tuple[GumbelTopK, Tensor]:
    generator = torch.Generator().manual_seed(1)
    d_gate = torch.randn(drawn.gate.shape, generator=generator).to(logits.device)
    d_soft = torch.randn(drawn.soft.shape, generator=generator).to(logits.device)
    loss = (drawn.gate * d_gate).sum() + (drawn.soft * d_soft).sum()
    return drawn, torch.autograd.grad(loss, logits)[0]


def check(
    values: Tensor,
    sizes: list[int],
    k: int,
    kind: tuple[str, str],
    *,
    noise: Tensor | None = None,
    temperature: float = 0.5,
    tolerance: float = 1e-5,
    drawn: bool = False,
) -> GumbelTopK:
    """Kernel and reference agree: choice exactly, soft choice and gradient within a tolerance."""
    device = values.device
    ptr, width = offsets(sizes, device), max(sizes, default=0)
    mode, estimator = kind
    options = {"temperature": temperature, "mode": mode, "estimator": estimator}
    source: dict[str, Tensor] = {}
    if drawn:
        source = {
            "seed": torch.tensor((7 << 32) + 3, device=device),
            "question_key": (torch.arange(len(sizes), device=device) << 31) + 11,
        }
        noise = logistic_noise(*source.values(), ptr, num_facts=values.shape[0], backend="triton")
    elif noise is None:
        noise = torch.zeros_like(values)
    source = source or {"noise": noise}
    logits = values.clone().requires_grad_()
    expected, want = with_gradient(
        gumbel_topk_ref(logits, ptr, k, noise=noise, max_facts=width, **options), logits
    )
    with fenced_allocations():
        got, grad = with_gradient(
            gumbel_topk(logits, ptr, k, max_facts=width, backend="triton", **source, **options),
            logits,
        )
    assert torch.equal(got.index, expected.index)
    assert torch.equal(got.count, expected.count)
    assert torch.equal(got.gate, expected.gate)
    assert_close(got.soft, expected.soft.double(), name="soft", tolerance=tolerance)
    # In a budget the parts of a gradient cancel, so what is left has no scale of its own.
    torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize(("k", "drawn"), [(5, False), (300, True)], ids=["given", "drawn"])
def test_sizes_around_powers_of_two(
    device: torch.device, kind: tuple[str, str], drawn: bool, k: int
) -> None:
    # Where noise comes from has no part in the tiles.
    sizes = EDGES[3::4] if drawn else EDGES
    values = 2 * torch.randn(sum(sizes))
    check(values.to(device), sizes, k, kind, noise=torch.randn(sum(sizes)).to(device), drawn=drawn)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize(("k", "drawn"), [(70, False), (5, True)], ids=["given", "drawn"])
def test_streamed_questions(
    device: torch.device, small_tiles: None, kind: tuple[str, str], drawn: bool, k: int
) -> None:
    sizes = [32, 0, 65] if drawn else [0, 33, 1, 32, 31, 64, 65, 97]
    values = (2 * torch.randn(sum(sizes))).round(decimals=1).to(device)
    check(values, sizes, k, kind, drawn=drawn)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_largest_tile_and_one_more(device: torch.device, kind: tuple[str, str]) -> None:
    for size in (TOPK_TILES[-1].block, TOPK_TILES[-1].block + 1):
        values = 3 * torch.randn(size + 2) - 2
        check(values.to(device), [size, 2], 100, kind, drawn=True, tolerance=3e-5)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_k_from_nothing_to_more_than_there_are(device: torch.device, kind: tuple[str, str]) -> None:
    for k in (0, 1, 32, 33, 34, 330):
        drawn = check(torch.randn(33).to(device) + 4, [33], k, kind, drawn=True)
        if kind[0] == "budget":
            assert drawn.count.tolist() == [min(k, 33)]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [0, 3, 0]], ids=str)
def test_empty_questions(device: torch.device, kind: tuple[str, str], sizes: list[int]) -> None:
    for k in (0, 3):
        check(torch.randn(sum(sizes)).to(device), sizes, k, kind, drawn=True)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_padding_rows_belong_to_nobody(device: torch.device, kind: tuple[str, str]) -> None:
    total = sum(SIZES)
    drawn = check(torch.randn(total + 600).to(device), SIZES, 3, kind, drawn=True)
    assert (drawn.soft[total:] == 0).all() and int(drawn.index.max()) < total


@pytest.mark.parametrize("kind", [("bernoulli", "concrete"), ("budget", "mean")], ids="-".join)
@pytest.mark.parametrize(
    "pool",
    [[0.0], [-3.0], [0.0, -0.0], [0.0, -0.0, 1e-40, -1e-40], [INF, -INF, 0.5], [-INF], [1e4, -1e4]],
    ids=str,
)
def test_ties_zeros_and_infinities(
    device: torch.device, small_tiles: None, kind: tuple[str, str], pool: list[float]
) -> None:
    sizes = [7, 40]
    values = torch.tensor(pool)[torch.randint(len(pool), (sum(sizes),))].to(device)
    # nu may stand near 10^4, where float32 has steps of 10^-3.
    tolerance = 1e-3 if max(map(abs, pool)) > 10 else 1e-5
    for k in (2, 39):
        check(values, sizes, k, kind, tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0])
def test_temperatures(device: torch.device, kind: tuple[str, str], temperature: float) -> None:
    values = 2 * torch.randn(sum(FEW)).to(device)
    # x = key / T and nu are rounded to float32: with |x| = 4 / T that moves s by 2^-22 / T.
    limit = max(1e-5, 1e-6 / temperature)
    check(values, FEW, 4, kind, drawn=True, temperature=temperature, tolerance=limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(device: torch.device, dtype: torch.dtype) -> None:
    values = torch.randn(sum(FEW)).to(device, dtype)
    noise = torch.randn(sum(FEW)).to(device)
    for kind in KINDS:
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
        drawn = check(values, FEW, 4, kind, noise=noise, tolerance=tolerance)
        assert drawn.gate.dtype == torch.float32 and drawn.soft.dtype == torch.float32


def test_strided_inputs_and_gradients_and_a_second_run_are_bit_equal(
    device: torch.device,
) -> None:
    values, noise = torch.randn(sum(FEW)).to(device), torch.randn(sum(FEW)).to(device)
    for mode, estimator in KINDS:
        results = []
        for x, n in ((values, noise), (values, noise), (strided_like(values), strided_like(noise))):
            logits = x.requires_grad_()
            drawn = gumbel_topk(
                logits,
                offsets(FEW, device),
                4,
                noise=n,
                mode=mode,
                estimator=estimator,
                backend="triton",
            )
            # The gradient of a sum has zero strides.
            (grad,) = torch.autograd.grad(drawn.gate.sum() + drawn.soft.sum(), logits)
            results.append((*drawn, grad))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("k", [0, 1, 4, 50])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_top_facts(device: torch.device, k: int, threshold: float) -> None:
    values = torch.randn(sum(SIZES)).round(decimals=1)
    values[:7] = -9.0
    values, ptr = values.to(device), offsets(SIZES, device)
    want = top_facts(values, ptr, k, threshold, backend="torch")
    with fenced_allocations():
        got = top_facts(values, ptr, k, threshold, backend="triton")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    assert_close(got.soft, want.soft.double())


def test_nan_stays_in_the_values_and_out_of_the_index(device: torch.device) -> None:
    values = torch.randn(sum(SIZES)).to(device)
    values[3], values[30] = math.nan, -math.nan
    for mode, estimator in KINDS:
        drawn = gumbel_topk(
            values,
            offsets(SIZES, device),
            4,
            noise=torch.zeros_like(values),
            mode=mode,
            estimator=estimator,
            backend="triton",
        )
        assert drawn.soft[3].isnan() and drawn.soft[30].isnan()
        kept = drawn.index >= 0
        assert torch.equal(kept.sum(1).int(), drawn.count)
        ptr = offsets(SIZES, device).long()
        inside = (drawn.index >= ptr[:-1, None]) & (drawn.index < ptr[1:, None])
        assert bool((inside | ~kept).all()) and int(drawn.index.min()) >= -1


def test_opcheck(device: torch.device) -> None:
    sizes = [3, 2]
    logits = torch.randn(sum(sizes), device=device, requires_grad=True)
    ptr, ops = offsets(sizes, device), torch.ops.dragkit
    seed, keys = torch.tensor(3, device=device), torch.arange(len(sizes), device=device)
    fixed = (2, 3, 0.0, 0.5)
    for budget in (True, False):
        arguments = (logits, ptr, None, seed, keys, *fixed, budget, True, True)
        torch.library.opcheck(ops.gumbel_topk_fwd.default, arguments)
        out = ops.gumbel_topk_fwd(logits.detach(), *arguments[1:])
        torch.library.opcheck(
            ops.gumbel_topk_bwd.default,
            (
                *(torch.randn_like(t) for t in out[:2]),
                *(logits.detach(), ptr, None, seed, keys, out[5], out[2]),
                *(3, 0.5, budget, True),
            ),
        )
    torch.library.opcheck(ops.logistic_noise_fwd.default, (seed, keys, ptr, 5, True))


def test_compiled_equals_eager(device: torch.device) -> None:
    def choose(logits: Tensor, ptr: Tensor, seed: Tensor, keys: Tensor, width: int) -> GumbelTopK:
        return gumbel_topk(
            logits,
            ptr,
            3,
            seed=seed,
            question_key=keys,
            mode="budget",
            max_facts=width,
            backend="triton",
        )

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ([5, 9], [4, 0, 7]):
        logits = torch.randn(sum(sizes), device=device, requires_grad=True)
        keys = torch.arange(len(sizes), device=device)
        arguments = (
            *(logits, offsets(sizes, device), torch.tensor(3, device=device), keys),
            max(sizes),
        )
        (want, d_want), (got, d_got) = (
            with_gradient(f(*arguments), logits) for f in (choose, compiled)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(d_got, d_want)
