"""Problems for ops, and the gate that compares every contender with float64 before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import Contender
from bench.packs import Pack
from dragkit.trainer.replay import CudaCapture
from dragkit_kernels import force_backend, resolve_backend
from dragkit_kernels.testing import TOLERANCE

# Maps the leaves to the results. The first result takes part in the backward. The others are
# integers.
Op = Callable[..., tuple[Tensor, ...]]

# Arguments of a ReLU are kept this far from zero, as a fraction of their RMS. Rounding to bfloat16
# moves them by less, so every contender agrees with float64 on which side of zero they are.
_KINK_MARGIN = 1e-1
# A gradient's error is divided by at least this fraction of the largest gradient's norm, because
# the terms of some gradients nearly cancel, as those of a softmax's scores do.
_NORM_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


class Case(NamedTuple):
    """The graphs of a problem, the dtype of its leaves, C and K."""

    pack: Pack
    dtype: torch.dtype
    width: int
    num_instructions: int

    def leaf(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Gaussian numbers, the same on every device, that require a gradient."""
        generator = torch.Generator().manual_seed(seed)
        values = scale * torch.randn(shape, generator=generator)
        return values.to(device=self.pack.device, dtype=self.dtype).requires_grad_()


def tolerances(dtype: torch.dtype, *, peer: bool) -> tuple[float, float]:
    """Largest norm of an error over the norm of the float64 value, of a result and of a gradient.

    Ours is held to the table of the op tests. Peers in bfloat16 are held to less, because their
    backward adds the gradients of thousands of facts in bfloat16.
    """
    if peer and dtype == torch.bfloat16:
        return 5e-2, 2e-1
    return TOLERANCE[dtype], TOLERANCE[dtype]


@dataclass(slots=True)
class Problem:
    """An op's inputs, our implementation and its peers.

    Attributes:
        name: as printed.
        about: sizes for the table.
        op: its name in dragkit_kernels.
        leaves: inputs that need gradients.
        call: our implementation. Float64 leaves and PyTorch's backend give the expected values.
        peers: implementations with other libraries.
        compiled: names of the peers that also run under torch.compile.
        bytes, flops: the fewest to move and to compute, of the forward and of the backward. A sum,
            product, comparison, quotient, exponential or logarithm is one operation. Where an op
            has matrix products, only they are counted.
        variants: further calls of ours, by the suffix of their names.
    """

    name: str
    about: dict[str, object]
    op: str
    leaves: Sequence[Tensor]
    call: Op
    peers: dict[str, Op]
    compiled: Sequence[str]
    bytes: tuple[float, float]
    flops: tuple[float, float]
    variants: dict[str, Op] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the leaves."""
        return self.leaves[0].dtype

    def contenders(self, *, compile_: bool) -> list[Contender]:
        """Ours, then the peers. `run` takes the leaves.

        Args:
            compile_: whether compiled peers run.
        """
        device = self.leaves[0].device.type
        runs = resolve_backend(self.op, self.leaves[0].float()) == "triton"
        no_triton = "" if runs else f"no Triton kernel runs on a {device}"
        contenders = []
        for suffix, call in {"": self.call, **(self.variants or {})}.items():
            triton, plain = _with_backend("auto", call), _with_backend("torch", call)
            contenders += [
                Contender(f"dragkit, {words}{suffix}", run, False, replay=replay, obstacle=obstacle)
                for words, run, replay, obstacle in (
                    ("Triton", triton, False, no_triton),
                    ("Triton, CUDA graph", triton, True, no_triton),
                    ("PyTorch", plain, False, ""),
                )
            ]
        absent = "" if find_spec("torch_scatter") else "torch_scatter is not installed"
        for name, peer in self.peers.items():
            obstacle = absent if name == "torch_scatter" else ""
            contenders.append(Contender(name, peer, obstacle=obstacle))
        obstacle = "" if compile_ else "compiled contenders need --bench-compiled"
        for name in self.compiled:
            # A graph for these sizes alone is the fastest that the compiler makes.
            run = torch.compile(self.peers[name], dynamic=False)
            contenders.append(Contender(f"{name}, compiled", run, obstacle=obstacle))
        return contenders


def _with_backend(backend: str, call: Op) -> Op:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        with force_backend(backend):
            return call(*leaves)

    return run


@torch.no_grad()
def keep_off_zero(leaf: Tensor, weight: Tensor, values: Tensor) -> None:
    """Moves `leaf` in place such that no element of `values` is near zero, where a ReLU has a kink.

    Args:
        leaf: float [..., C]. The values change by the change of `leaf @ weight`.
        weight: float [C, C], orthogonal.
        values: float [..., C], the arguments of the ReLU.
    """
    values = values.double()
    margin = _KINK_MARGIN * values.square().mean().sqrt()
    shift = torch.where(values.abs() < margin, margin.copysign(values) - values, 0.0)
    leaf += (shift @ weight.double().t()).to(leaf.dtype)


@torch.no_grad()
def relu_argument(call: Op, leaves: Sequence[Tensor], odd: Sequence[int]) -> Tensor:
    """x of a `call` whose first result is relu(x), in float64.

    Args:
        odd: indices of the leaves that negate x when all of them are negated.
    """
    leaves = [leaf.double() for leaf in leaves]
    negated = [-leaf if i in odd else leaf for i, leaf in enumerate(leaves)]
    # One of relu(x) and relu(-x) is zero.
    run = _with_backend("torch", call)
    return run(*leaves)[0] - run(*negated)[0]


class Expected(NamedTuple):
    """The incoming gradient, and the results and gradients in float64 (integers as they are)."""

    grad: Tensor
    results: list[Tensor]
    gradients: list[Tensor]


def compute_expected(problem: Problem, *, backward: bool) -> Expected:
    """The results in float64, and the gradients if `backward`."""
    leaves = [leaf.detach().double().requires_grad_(backward) for leaf in problem.leaves]
    first, *others = _with_backend("torch", problem.call)(*leaves)
    generator = torch.Generator().manual_seed(11)
    # Rounded to the dtype of the problem, so that all contenders get the same gradient.
    grad = torch.randn(first.shape, generator=generator).to(problem.dtype).to(first.device)
    gradients = list(torch.autograd.grad(first, leaves, grad.double())) if backward else []
    return Expected(grad, [first.detach(), *others], gradients)


def make_step(
    problem: Problem, contender: Contender, grad: Tensor, *, backward: bool
) -> Callable[[], list[Tensor]]:
    """What is timed: the forward alone, or the forward and the gradients of all leaves."""
    leaves, run = list(problem.leaves), contender.run

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(run(*leaves))

    def both() -> list[Tensor]:
        first, *others = run(*leaves)
        # Some contenders return float32 for bfloat16 leaves.
        gradients = torch.autograd.grad(first, leaves, grad.to(first.dtype))
        return [first.detach(), *others, *gradients]

    step = both if backward else forward
    if not contender.replay:
        return step
    results: list[Tensor] = []

    def record() -> None:
        # A replay writes to the tensors of the recording, so they are kept.
        results[:] = step()

    replay = CudaCapture(grad.device)(record)

    def replayed() -> list[Tensor]:
        replay()
        return results

    return replayed


def _relative_error(actual: Tensor, expected: Tensor, floor: float) -> float:
    """Norm of the difference over that of `expected`, at least `floor`. Infinity for NaN."""
    if actual.shape != expected.shape:
        return math.inf
    expected = expected.double()
    error = float((actual.double() - expected).norm()) / max(float(expected.norm()), floor)
    return error if math.isfinite(error) else math.inf


def check_against_float64(
    actual: Sequence[Tensor], expected: Expected, limits: tuple[float, float], norm_floor: float
) -> float:
    """The largest error of results and gradients.

    Raises:
        ValueError: an error exceeds its tolerance.
    """
    norms = (float(gradient.norm()) for gradient in expected.gradients)
    floor = max(norm_floor * max(norms, default=0.0), 1e-12)
    wanted = [(f"result {i}", t, limits[0], 1e-12) for i, t in enumerate(expected.results)]
    wanted += [(f"gradient {i}", t, limits[1], floor) for i, t in enumerate(expected.gradients)]
    largest = 0.0
    for tensor, (name, value, limit, least) in zip(actual, wanted, strict=True):
        error = _relative_error(tensor, value, least)
        if not error <= limit:
            raise ValueError(f"{name} differs from float64 by {error:.1e}, {limit:.0e} is allowed")
        largest = max(largest, error)
    return largest


def checked(
    problem: Problem, contenders: Sequence[Contender], *, backward: bool
) -> list[Contender]:
    """The contenders, to be timed if they run and agree.

    Their `run` becomes the whole step. A peer that cannot run or does not agree gets an obstacle.

    Raises:
        ValueError: one of ours does not agree.
        RuntimeError: one of ours cannot run, although it has no obstacle.
    """
    expected = compute_expected(problem, backward=backward)
    for contender in (contender for contender in contenders if not contender.obstacle):
        limits = tolerances(problem.dtype, peer=contender.peer)
        try:
            step = make_step(problem, contender, expected.grad, backward=backward)
            contender.error = check_against_float64(
                step(), expected, limits, _NORM_FLOOR[problem.dtype]
            )
            # Ops are short, so the timing chooses the number of calls in a round.
            contender.run, contender.calls = step, None
        except torch.OutOfMemoryError:
            # The [E, C] temporaries of peers do not fit every device at the largest shapes.
            contender.obstacle = "out of memory"
            torch.cuda.empty_cache()
        except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
            if not contender.peer:
                error.add_note(f"{problem.name}: {contender.name}")
                raise
            contender.obstacle = str(error).strip().splitlines()[0][:160]
    return list(contenders)
