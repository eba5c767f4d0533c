"""The part of a language model's products that its adapters cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from dragkit.observe.flops import block_weights


class Coverage(NamedTuple):
    """All matrices of one name in the blocks of a model.

    Attributes:
        target: name after that of the module around it, such as `mixer.q_proj`.
        num_modules, num_adapted: number of matrices, and of matrices with an adapter.
        trainable: number of parameters of these adapters.
        flops: fraction of the multiplications of one token.
        covered: fraction of the multiplications of one token that have an adapter.
    """

    target: str
    num_modules: int
    num_adapted: int
    trainable: int
    flops: float
    covered: float


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's layers with an adapter, each with the path of its weight in the bare model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in base.named_modules():
        if hasattr(module, "lora_A"):
            # PEFT calls a wrapped layer `base_layer`, and wraps stacked experts per parameter.
            parts = [*path.split("."), getattr(module, "parameter_name", "base_layer")]
            yield ".".join(part for part in parts if part != "base_layer"), module


def coverage(model: nn.Module) -> list[Coverage]:
    """Coverage of a causal language model, one row per name, in the model's order."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flops = {name: count for name, count in block_weights(base) if count is not None}
    trainable: dict[str, int] = {}
    for path, module in adapted_layers(model):
        factors = (p for n, p in module.named_parameters() if n.startswith("lora_"))
        trainable[path] = sum(p.numel() for p in factors if p.requires_grad)
    by_target: dict[str, list[str]] = {}
    for path in flops:
        target = ".".join([part for part in path.split(".") if not part.isdigit()][-2:])
        by_target.setdefault(target, []).append(path)
    total = sum(flops.values())
    return [
        Coverage(
            target,
            len(paths),
            sum(path in trainable for path in paths),
            sum(trainable.get(path, 0) for path in paths),
            sum(flops[path] for path in paths) / total,
            sum(flops[path] for path in paths if path in trainable) / total,
        )
        for target, paths in by_target.items()
    ]


def coverage_table(rows: Sequence[Coverage]) -> str:
    """The rows as text, and their sums in a last row."""
    total = Coverage("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    lines = [f"{'target':<28}{'adapted':>12}{'trainable':>16}{'FLOPs':>9}{'covered':>9}"]
    for target, num_modules, num_adapted, trainable, flops, covered in (*rows, total):
        counts = f"{f'{num_adapted} of {num_modules}':>12}{trainable:>16,}"
        lines.append(f"{target:<28}{counts}{flops:>9.1%}{covered:>9.1%}")
    return "\n".join(lines)
