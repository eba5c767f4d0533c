"""How much of a language model its adapters reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


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


def _path(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part != "base_layer")


def _label(path: tuple[str, ...]) -> str:
    return ".".join([part for part in path if not part.isdigit()][-2:])


def _multiplications(base: nn.Module) -> dict[tuple[str, ...], float]:
    """Path of every matrix in the blocks -> multiplications per token.

    Of routed experts a token visits `num_experts_per_tok`. Embeddings are read, not multiplied, and
    the output layer sees supervised tokens alone, so neither counts.
    """
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    outside = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= set() if head is None else {id(p) for p in head.parameters()}
    active = getattr(getattr(base, "config", None), "num_experts_per_tok", None)
    found = {}
    for name, parameter in base.named_parameters():
        path = _path(name)
        if id(parameter) in outside or any(part.startswith("lora_") for part in path):
            continue
        if parameter.dim() == 2 and path[-1] == "weight":
            found[path[:-1]] = float(parameter.numel())
        elif parameter.dim() == 3 and path[-2:-1] == ("experts",):
            visited = 1.0 if active is None else active / parameter.shape[0]
            found[path] = parameter.numel() * visited
    return found


def _adapters(base: nn.Module) -> dict[tuple[str, ...], int]:
    """Path of every adapted matrix -> parameters of its adapters that are trained."""
    found = {}
    for name, module in base.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        path = _path(name)
        if hasattr(module, "parameter_name"):
            path = (*path, module.parameter_name)
        own = [p for n, p in module.named_parameters() if n.startswith("lora_")]
        found[path] = sum(p.numel() for p in own if p.requires_grad)
    return found


def coverage(model: nn.Module) -> list[Coverage]:
    """What the adapters of a model cover, one row per kind of matrix, in the model's order.

    Args:
        model: a causal language model, with PEFT adapters or without.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    work, adapters = _multiplications(base), _adapters(base)
    total = sum(work.values())
    rows = []
    for label in dict.fromkeys(map(_label, work)):
        paths = [path for path in work if _label(path) == label]
        adapted = [path for path in paths if path in adapters]
        rows.append(
            Coverage(
                label,
                len(paths),
                len(adapted),
                sum(adapters[path] for path in adapted),
                sum(work[path] for path in paths) / total,
                sum(work[path] for path in adapted) / total,
            )
        )
    return rows


def coverage_table(rows: Sequence[Coverage]) -> str:
    """The rows as text, with their sums below."""
    total = Coverage(
        "all",
        sum(row.modules for row in rows),
        sum(row.adapted for row in rows),
        sum(row.trainable for row in rows),
        sum(row.share for row in rows),
        sum(row.covered for row in rows),
    )
    cells = [("target", "adapted", "trainable", "FLOPs", "covered")]
    for row in (*rows, total):
        cells.append(
            (
                row.target,
                f"{row.adapted} of {row.modules}",
                f"{row.trainable:,}",
                f"{row.share:.1%}",
                f"{row.covered:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in cells
    )
