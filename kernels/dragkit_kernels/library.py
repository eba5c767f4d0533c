"""The `dragkit::` operator library and the one way an op enters it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dragkit", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines an op that torch.compile treats as one opaque node.

    The implementation is plain PyTorch and serves every device it runs on.

    Args:
        schema: such as "segment_softmax_fwd(Tensor score, Tensor ptr) -> Tensor".
        implementation: called with gradients switched off.
        fake: same arguments; returns empty tensors of the right shapes, dtypes and devices.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"dragkit::{name}", fake, lib=_LIBRARY)


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attaches the gradient formula of `dragkit::name`."""
    torch.library.register_autograd(
        f"dragkit::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def forbid_gradient(name: str) -> None:
    """Makes a derivative through `dragkit::name` an error instead of a wrong number."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"dragkit::{name} has no derivative: the ops of dragkit_kernels give first "
            "derivatives only, so create_graph=True cannot be used through them"
        )

    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: object) -> None:
        """Nothing to keep."""

    register_gradient(name, backward, setup_context)
