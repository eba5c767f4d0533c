"""How much of a language model its adapters reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from dragkit.observe.flops import block_weights


class Coverage(NamedTuple):
    """One kind of matrix in the blocks of a model.

    Attributes:
        target: its name with that of the module it stands in, such as `mixer.q_proj`.
        modules, adapted: how many there are, and how many of them have an adapter.
        trainable: parameters of these adapters.
        share: of the products of a token with all matrices, in multiplications.
        covered: the part of `share` that is under adapters.
    """

    target: str
    modules: int
    adapted: int
    trainable: int
    share: float
    covered: float


def coverage(model: nn.Module) -> list[Coverage]:
    """What the adapters of a model cover, one row per kind of matrix, in the model's order.

    Args:
        model: a causal language model, with PEFT adapters or without.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    counts = {name: count for name, count in block_weights(base) if count is not None}
    adapters: dict[str, int] = {}
    for name, module in base.named_modules():
        parts = [*name.split("."), getattr(module, "parameter_name", "base_layer")]
        path = ".".join(part for part in parts if part != "base_layer")
        if hasattr(module, "lora_A"):
            own = (p for n, p in module.named_parameters() if n.startswith("lora_"))
            adapters[path] = sum(p.numel() for p in own if p.requires_grad)
    rows: dict[str, list[str]] = {}
    for path in counts:
        label = ".".join([part for part in path.split(".") if not part.isdigit()][-2:])
        rows.setdefault(label, []).append(path)
    total = sum(counts.values())
    return [
        Coverage(
            label,
            len(paths),
            sum(path in adapters for path in paths),
            sum(adapters.get(path, 0) for path in paths),
            sum(counts[path] for path in paths) / total,
            sum(counts[path] for path in paths if path in adapters) / total,
        )
        for label, paths in rows.items()
    ]


def coverage_table(rows: Sequence[Coverage]) -> str:
    """The rows as text, with their sums below."""
    total = Coverage("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    lines = [f"{'target':<28}{'adapted':>12}{'trainable':>16}{'FLOPs':>9}{'covered':>9}"]
    for name, modules, adapted, trainable, share, covered in (*rows, total):
        counts = f"{f'{adapted} of {modules}':>12}{trainable:>16,}"
        lines.append(f"{name:<28}{counts}{share:>9.1%}{covered:>9.1%}")
    return "\n".join(lines)
