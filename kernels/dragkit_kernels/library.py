"""Registration of ops in the `dragkit::` operator library."""

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

    The last argument of an op with kernels is "bool triton". Public functions pass
    `resolve_backend(...) == "triton"`, and gradient formulas pass the same value to the backward
    op. The flag alone chooses the path, on any device. Neither path receives it.

    Args:
        schema: such as "segment_softmax_fwd(Tensor score, Tensor ptr, bool triton) -> Tensor". The
            first argument is a tensor.
        implementation: plain PyTorch for every device, called without gradients.
        fake: takes the arguments of the schema, returns empty tensors of the right shapes, dtypes
            and devices.
        triton: launcher with the arguments of `implementation`. None without Triton.
    """
    name = schema.partition("(")[0]
    if "bool triton)" in schema:
        implementation = _dispatch_by_flag(implementation, triton)
    if triton is not None:
        TRITON_OPS.add(name.removesuffix("_fwd").removesuffix("_bwd"))
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"dragkit::{name}", fake, lib=_LIBRARY)


def _dispatch_by_flag(torch_path: Callable, triton_path: Callable | None) -> Callable:
    """A function that calls one of the two paths, chosen by its last argument."""

    def run(*arguments: object) -> object:
        *inputs, use_triton = arguments
        if not use_triton:
            return torch_path(*inputs)
        # Triton launches on the current device, which may not be the tensors' device.
        with torch.cuda.device_of(inputs[0]):
            return triton_path(*inputs)

    return run


def empty_gradients(
    inputs: Sequence[Tensor | None], output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Uninitialised results of a backward op: like each input in the mask, [0] for the others.

    Args:
        inputs: the differentiable inputs of the forward op. An optional input may be None.
        output_mask: True where a gradient is needed.
    """
    like = next(x for x in inputs if x is not None)
    return tuple(
        x.new_empty(x.shape) if x is not None and needed else like.new_empty(0)
        for x, needed in zip(inputs, output_mask, strict=True)
    )


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attaches the gradient formula of `dragkit::name`.

    Args:
        name: name of the forward op.
        backward: takes (ctx, *gradients of the outputs), returns the gradients of the op's first
            inputs. Gradients that autograd does not need are dropped. Later inputs get none.
        setup_context: takes (ctx, inputs, output), saves what `backward` reads.
    """

    def full_backward(ctx: object, *grads: Tensor) -> tuple[object, ...]:
        results = backward(ctx, *grads)
        results = results if isinstance(results, tuple) else (results,)
        # Autograd takes one value for each input, and a list for a list of tensors.
        needed = ctx.needs_input_grad
        first = (g if need else None for g, need in zip(results, needed, strict=False))
        rest = ([None] * len(n) if isinstance(n, list) else None for n in needed[len(results) :])
        return (*first, *rest)

    torch.library.register_autograd(
        f"dragkit::{name}", full_backward, setup_context=setup_context, lib=_LIBRARY
    )


def forbid_double_backward(name: str) -> None:
    """Makes autograd through the backward op `dragkit::name` an error, not a wrong number."""

    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            f"dragkit::{name} has no derivative: the ops of dragkit_kernels compute first "
            "derivatives only. Call backward without create_graph=True."
        )

    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: object) -> None:
        """`backward` reads nothing."""

    register_gradient(name, backward, setup_context)
