"""The `dragkit::` operator library and the one way an op enters it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backend import TRITON_OPS

_LIBRARY = torch.library.Library("dragkit", "FRAGMENT")


def register(
    schema: str, implementation: Callable, fake: Callable, *, triton: Callable | None = None
) -> None:
    """Defines an op that torch.compile treats as one opaque node.

    `implementation` is plain PyTorch and serves every device it runs on. An op that may have a
    Triton launcher too ends its arguments with "bool triton": the public function passes
    `resolve_backend(...) == "triton"` there, the gradient formula passes the same to the backward
    op, and the flag alone picks the path, on any device. Neither path receives the flag.

    Args:
        schema: such as "segment_softmax_fwd(Tensor score, Tensor ptr, bool triton) -> Tensor";
            the first argument is a tensor.
        implementation: called with gradients switched off.
        fake: the arguments of the schema; returns empty tensors of the right shapes, dtypes and
            devices.
        triton: launcher with the arguments of `implementation`; None where Triton is not installed.
    """
    name = schema.partition("(")[0]
    if "bool triton)" in schema:
        implementation = _by_flag(implementation, triton)
    if triton is not None:
        TRITON_OPS.add(name.removesuffix("_fwd").removesuffix("_bwd"))
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"dragkit::{name}", fake, lib=_LIBRARY)


def _by_flag(torch_path: Callable, triton_path: Callable | None) -> Callable:
    """Calls one of two paths by the last argument."""

    def run(*arguments: object) -> object:
        *rest, use_triton = arguments
        if not use_triton:
            return torch_path(*rest)
        # A launch goes to the current device, which need not be the tensors'.
        with torch.cuda.device_of(rest[0]):
            return triton_path(*rest)

    return run


def empty_gradients(
    inputs: Sequence[Tensor | None], output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a backward op returns, unfilled: like each input of the mask, [0] for the others.

    Args:
        inputs: the differentiable inputs of the forward op, None for an optional one left out.
        output_mask: which gradients are wanted.
    """
    like = next(x for x in inputs if x is not None)
    return tuple(
        x.new_empty(x.shape) if x is not None and wanted else like.new_empty(0)
        for x, wanted in zip(inputs, output_mask, strict=True)
    )


def wanted_gradients(
    grads: Sequence[Tensor], output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The results of a backward op as autograd takes them: None where no gradient is wanted."""
    return tuple(g if wanted else None for g, wanted in zip(grads, output_mask, strict=True))


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attaches the gradient formula of `dragkit::name`.

    Args:
        name: of the forward op.
        backward: gradients of the op's first inputs, from (ctx, *gradients of the outputs). Those
            that nobody needs are dropped, and the inputs after them have none.
        setup_context: saves what `backward` needs, from (ctx, inputs, output).
    """

    def every_gradient(ctx: object, *grads: Tensor) -> tuple[object, ...]:
        found = backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        # One answer for each input, in a list for a list of tensors.
        needed = ctx.needs_input_grad
        first = (g if need else None for g, need in zip(found, needed, strict=False))
        rest = ([None] * len(n) if isinstance(n, list) else None for n in needed[len(found) :])
        return (*first, *rest)

    torch.library.register_autograd(
        f"dragkit::{name}", every_gradient, setup_context=setup_context, lib=_LIBRARY
    )


def forbid_double_backward(name: str) -> None:
    """Makes a derivative through `dragkit::name` an error instead of a wrong number."""

    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            f"dragkit::{name} has no derivative: the ops of dragkit_kernels give first "
            "derivatives only, so create_graph=True cannot be used through them"
        )

    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: object) -> None:
        """Nothing to keep."""

    register_gradient(name, backward, setup_context)
