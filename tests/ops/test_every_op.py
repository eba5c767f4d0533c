"""What holds for every op: repeats, gradients, compiled graphs, second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS
from torch.utils._python_dispatch import TorchDispatchMode

from dragkit_kernels.backend import INTERPRETED
from dragkit_kernels.op_cases import (
    LARGE,
    OPS,
    SEQUENCE_OPS,
    SMALL,
    Given,
    Sizes,
    given,
    inputs,
    ramp,
    run,
)
from dragkit_kernels.testing import assert_close, fenced_allocations, leaves, strided_like

# The interpreter also computes masked elements, which overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EACH = pytest.mark.parametrize("name", OPS)
FEW = Sizes([(4, 9), (0, 0), (3, 4)], 4, 3, (5, 1, 7), 4, 2, 2, 3)
# A GPU is checked at full size.
SIZES = LARGE if torch.cuda.is_available() and not INTERPRETED else SMALL
# The interpreter computes bfloat16 products wrongly.
LOW = torch.float16 if INTERPRETED else torch.bfloat16


@EACH
def test_repeats_are_bit_equal_and_a_zero_gradient_gives_zeros(
    backend: str, device: torch.device, name: str
) -> None:
    """A second stream is busy in every other repeat, which changes how programs are scheduled."""
    on_gpu = device.type == "cuda"
    sizes = SIZES if on_gpu else SMALL
    o = given(sizes, device)
    values = inputs(name, sizes, o, LOW)
    first = run(name, values, o, backend, grad_dtype=LOW)
    noise = torch.randn(4096 if on_gpu else 64, 64, device=device)
    stream = torch.cuda.Stream() if on_gpu else None
    for repeat in range(1, 20 if on_gpu else 2):
        if stream is not None and repeat % 2:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    noise = noise @ (noise.t() @ noise).tanh()
        again = run(name, values, o, backend, grad_dtype=LOW)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    tried = leaves(values)
    out = [x for x in OPS[name](tried, o, backend) if x.requires_grad]
    zeros = [torch.zeros_like(x) for x in out]
    assert not any(g.any() for g in torch.autograd.grad(out, tried, zeros, materialize_grads=True))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@EACH
def test_errors_are_at_most_twice_those_of_pytorch(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Compares largest errors against float64, with a margin of one unit in the last place.

    Sequences are compared by RMS errors. The scan's kernels multiply float16 or bfloat16 operands,
    while the PyTorch path multiplies in float32, so its margin is that of the other tests.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # the shared fixture restores it
    o = given(SIZES, device)
    values = inputs(name, SIZES, o, dtype)
    tried = [run(name, values, o, b, grad_dtype=dtype) for b in ("triton", "torch")]
    exact = run(name, [x.double() for x in values], o, "torch", grad_dtype=dtype)
    for number, (x, y, z) in enumerate(zip(*tried, exact, strict=True)):
        if not z.numel():
            continue
        if name not in SEQUENCE_OPS:
            assert_close(x, z, name=f"{name} {number}")
        measure = _rms if name in SEQUENCE_OPS else _largest
        unit = torch.finfo(x.dtype).eps
        if name == "ssd_scan" and dtype == LOW:
            unit = 8e-3 if number else 4e-3
        limit = 2 * measure(y.double() - z) + unit * measure(z)
        assert measure(x.double() - z) <= limit, f"{name} {number}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# A drawn gate is 1, so its gradient is no derivative. Its formula is tested in test_gumbel_topk.
@pytest.mark.parametrize("name", [n for n in OPS if n.split("_")[0] not in ("bernoulli", "exact")])
def test_gradcheck(name: str) -> None:
    o = given(FEW, torch.device("cpu"))
    values = leaves(inputs(name, FEW, o, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: OPS[name](list(x), o, "torch"), values)


class OpCalls(TorchDispatchMode):
    """Records the calls of registered ops, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, object]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = op(*args, **(kwargs or {}))
        if op.namespace == "dragkit":
            self.calls.append((op, args, result))
        return result


@EACH
def test_registered_ops_under_opcheck(backend: str, device: torch.device, name: str) -> None:
    """Checks every call of a forward and a backward, for all gradients and for each alone.

    Kernels are checked for all gradients in float32. The interpreter is slow.
    """
    o = given(FEW, device)
    for dtype in (torch.float32, LOW) if backend == "torch" else (torch.float32,):
        # Compiled sums in low precision may round otherwise.
        is_full = dtype == torch.float32 and backend == "torch"
        utils = DEFAULT_TEST_UTILS if is_full else ("test_schema", "test_faketensor")
        values = [strided_like(x) for x in inputs(name, FEW, o, dtype)]
        everything = range(len(values))
        alone = [[i] for i in everything if backend == "torch" and len(values) > 1]
        for trained in (everything, *alone):
            tried = [x.detach().requires_grad_(i in trained) for i, x in enumerate(values)]
            with OpCalls() as recorded:
                out = [x for x in OPS[name](tried, o, backend) if x.requires_grad]
                leaf = [tried[i] for i in trained]
                torch.autograd.grad(out, leaf, [strided_like(x.detach()) for x in out])
            names = [op._opname for op, *_ in recorded.calls]
            assert names[0].endswith("_fwd") and names[-1].endswith("_bwd")
            for op, args, _ in recorded.calls:
                with torch.set_grad_enabled(op._opname.endswith("_fwd")):
                    torch.library.opcheck(op, args, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@EACH
def test_each_gradient_alone(
    backend: str, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Needing one gradient alone does not change it, and the others are not computed."""
    o = given(FEW, device)
    values = inputs(name, FEW, o, dtype)
    whole = run(name, values, o, backend, grad_dtype=dtype)[-len(values) :]
    for index, want in enumerate(whole):
        tried = [x.detach().requires_grad_(i == index) for i, x in enumerate(values)]
        with fenced_allocations(), OpCalls() as recorded:
            out = [x for x in OPS[name](tried, o, backend) if x.requires_grad]
            (got,) = torch.autograd.grad(out, tried[index], [ramp(x, dtype) for x in out])
        assert torch.equal(got, want)
        _, args, result = recorded.calls[-1]
        masks = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], bool)]
        for mask in masks:
            assert sum(mask) == 1 and [x.numel() > 0 for x in result] == list(mask)


@EACH
def test_second_derivatives_raise(name: str) -> None:
    o = given(FEW, torch.device("cpu"))
    values = leaves(inputs(name, FEW, o, torch.float32))
    loss = sum(x.square().sum() for x in OPS[name](values, o, "torch") if x.requires_grad)
    grads = torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="_bwd has no derivative"):
        sum(g.sum() for g in grads).backward()


# Otherwise sizes that are equal in the first pack must be equal in all others.
@torch.fx.experimental._config.patch(use_duck_shape=False)
@EACH
def test_compiled_equals_eager_for_any_size(backend: str, device: torch.device, name: str) -> None:
    """One graph serves packs of every size."""

    def function(values: list[Tensor], o: Given) -> tuple[Tensor, ...]:
        return OPS[name](values, o, backend)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for graphs, lengths in (
        ([(6, 9), (13, 20)], (33, 17)),
        ([(4, 7), (0, 0), (9, 30)], (5, 40, 31)),
        ([(3, 2)] * 5, (11,)),
    ):
        sizes = FEW._replace(graphs=graphs, lengths=lengths)
        o = given(sizes, device)
        values = inputs(name, sizes, o, torch.float32)
        results = []
        for f in (function, compiled):
            tried = leaves(values)
            out = f(tried, o)
            loss = sum((i + 1) * x.square().sum() for i, x in enumerate(out))
            results.append((*out, *torch.autograd.grad(loss, tried)))
        for number, (want, got) in enumerate(zip(*results, strict=True)):
            assert torch.equal(got, want), f"output {number} of {graphs}"
    assert counter.frame_count == 1
