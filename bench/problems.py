"""Problems for ops, and the gate that compares every contender with float64 before it is timed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import Contender
from dragkit.trainer.replay import CudaCapture
from dragkit_kernels import force_backend, resolve_backend

# From the leaves to results. The first takes part in the backward, the others (integers) do not.
Op = Callable[..., tuple[Tensor, ...]]

# Largest norm of an error over the norm of the truth, of results and of gradients. bfloat16 lets
# peers pass that sum in it.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-2, 2e-1)}
# The incoming gradient is zero where the truth after a ReLU is smaller than this part of its RMS,
# because rounding decides on which side of the ReLU such an element is.
_KINK = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# A gradient's error is divided by at least this part of the largest gradient's norm: the terms of
# some gradients, as of a softmax's scores, nearly cancel.
_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


@dataclass(slots=True)
class Problem:
    """An op's inputs, our implementation and its peers.

    Attributes:
        name: as printed; about: sizes, for the table.
        op: of dragkit_kernels, which decides whether Triton runs; leaves: that need gradients.
        call: ours. On float64 leaves and PyTorch's backend it gives the truth.
        peers: other libraries' ways; compiled: those that also run under torch.compile.
        bytes, flops: least to move and to compute, of the forward and of the backward. One
            operation each is a sum, a product, a comparison, a quotient, an exponential and a
            logarithm. Where there are matrix products, they alone are counted.
        relu: whether the first result comes out of a ReLU.
        variants: further calls of ours, by what is appended to the names.
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
    relu: bool = False
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
        found = []
        for suffix, call in {"": self.call, **(self.variants or {})}.items():
            triton, plain = _on("auto", call), _on("torch", call)
            found += [
                Contender(f"dragkit, Triton{suffix}", triton, False, obstacle=no_triton),
                Contender(
                    f"dragkit, Triton, CUDA graph{suffix}",
                    triton,
                    False,
                    replay=True,
                    obstacle=no_triton,
                ),
                Contender(f"dragkit, PyTorch{suffix}", plain, False),
            ]
        absent = "" if importlib.util.find_spec("torch_scatter") else "torch_scatter is missing"
        for name, peer in self.peers.items():
            obstacle = absent if name == "torch_scatter" else ""
            found.append(Contender(name, peer, obstacle=obstacle))
        obstacle = "" if compile_ else "compilation is asked for by --bench-compiled"
        for name in self.compiled:
            # For these sizes only.
            run = torch.compile(self.peers[name], dynamic=False)
            found.append(Contender(f"{name}, compiled", run, obstacle=obstacle))
        return found


def _on(backend: str, call: Op) -> Op:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        with force_backend(backend):
            return call(*leaves)

    return run


def random_leaf(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> Tensor:
    """Gaussian numbers, the same on every device, that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(shape, generator=generator)
    return values.to(device=device, dtype=dtype).requires_grad_()


class Truth(NamedTuple):
    """The incoming gradient, and the results and gradients in float64 (integers as they are)."""

    grad: Tensor
    results: list[Tensor]
    gradients: list[Tensor]


def find_truth(problem: Problem, *, backward: bool) -> Truth:
    """The results in float64, and the gradients if `backward`."""
    leaves = [leaf.detach().double().requires_grad_(backward) for leaf in problem.leaves]
    first, *others = _on("torch", problem.call)(*leaves)
    generator = torch.Generator().manual_seed(11)
    grad = torch.randn(first.shape, generator=generator).to(problem.dtype).to(first.device)
    if problem.relu:
        rms = first.detach().square().mean().sqrt()
        grad = grad.masked_fill(first.detach() < _KINK[problem.dtype] * rms, 0.0)
    gradients = list(torch.autograd.grad(first, leaves, grad.double())) if backward else []
    return Truth(grad, [first.detach(), *others], gradients)


def make_step(
    problem: Problem, contender: Contender, truth: Truth, *, backward: bool
) -> Callable[[], list[Tensor]]:
    """What is timed: the forward alone, or the forward and the gradients of all leaves."""
    leaves, run = list(problem.leaves), contender.run

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(run(*leaves))

    def both() -> list[Tensor]:
        first, *others = run(*leaves)
        found = torch.autograd.grad(first, leaves, truth.grad.to(first.dtype))
        return [first.detach(), *others, *found]

    step = both if backward else forward
    if not contender.replay:
        return step
    results: list[Tensor] = []

    def work() -> None:
        results[:] = step()

    replay = CudaCapture(truth.grad.device)(work)

    def again() -> list[Tensor]:
        replay()
        return results

    return again


def _error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Norm of the difference over that of the expected, at least `floor`; infinity for NaN."""
    if found.shape != expected.shape:
        return math.inf
    expected = expected.double()
    error = float((found.double() - expected).norm()) / max(float(expected.norm()), floor)
    return error if math.isfinite(error) else math.inf


def agreement(dtype: torch.dtype, found: Sequence[Tensor], truth: Truth) -> float:
    """The largest error of results and gradients.

    Raises:
        ValueError: an error exceeds its tolerance.
    """
    tolerances = TOLERANCES[dtype]
    norms = (float(gradient.norm()) for gradient in truth.gradients)
    floor = _FLOOR[dtype] * max(norms, default=0.0)
    wanted = [(f"result {i}", t, tolerances[0], 0.0) for i, t in enumerate(truth.results)]
    wanted += [(f"gradient {i}", t, tolerances[1], floor) for i, t in enumerate(truth.gradients)]
    largest = 0.0
    for got, (what, expected, limit, least) in zip(found, wanted, strict=True):
        error = _error(got, expected, max(least, 1e-12))
        if not error <= limit:
            raise ValueError(f"{what} differs from float64 by {error:.1e}, {limit:.0e} is allowed")
        largest = max(largest, error)
    return largest


def checked(
    problem: Problem, contenders: Sequence[Contender], *, backward: bool
) -> list[Contender]:
    """The contenders, to be timed if they run and agree.

    Their `run` becomes the whole step. One that cannot run or does not agree gets an obstacle.

    Raises:
        ValueError: one of ours does not agree.
        RuntimeError: one of ours cannot run, though nothing forbids it.
    """
    truth = find_truth(problem, backward=backward)
    for contender in (contender for contender in contenders if not contender.obstacle):
        try:
            step = make_step(problem, contender, truth, backward=backward)
            contender.error = agreement(problem.dtype, step(), truth)
            contender.run, contender.calls = step, None
        except torch.OutOfMemoryError:
            contender.obstacle = "out of memory"
            torch.cuda.empty_cache()
        except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
            if not contender.peer:
                error.add_note(f"{problem.name}: {contender.name}")
                raise
            contender.obstacle = str(error).strip().splitlines()[0][:160]
    return list(contenders)
