"""What the headers of safetensors files say, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import nn


def integers_as_weights(files: Iterable[Path], model: nn.Module) -> dict[str, str]:
    """The tensors that are integers in the files and floating-point weights in the model.

    Without their scales, quantised weights are no weights. The libraries cast them.

    Args:
        files: the safetensors files that the model was loaded from.
        model: the model. Its names may have a prefix that those in the files lack.

    Returns:
        The type, such as "I8", by the tensor's name in the files.
    """
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        found |= {n: d for n, d in dtypes.items() if d.startswith(("I", "U", "BOOL"))}
    weights = [
        f".{name}" for name, weight in model.named_parameters() if weight.is_floating_point()
    ]
    return {
        name: dtype
        for name, dtype in sorted(found.items())
        if any(weight.endswith(f".{name}") for weight in weights)
    }
