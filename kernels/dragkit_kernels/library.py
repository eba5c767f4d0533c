"""The `dragkit::` operator library and the one way an op enters it."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
