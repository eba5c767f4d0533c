"""Tensors on their way into and out of a checkpoint: finite check, strict copy, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from dragkit.errors import CheckpointError

logger = logging.getLogger(__name__)


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Refuses NaN and infinity.

    Args:
        tensors: any dtypes; what: file or part that they go to, for the message.

    Raises:
        CheckpointError: naming every tensor with a value that is not finite.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"{what}: not saved, values are NaN or infinite in {', '.join(bad)}; earlier "
            "checkpoints are untouched"
        )


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file; the format has no tensors that share memory."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _describe(tensor: Tensor) -> str:
    kind = "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"
    return f"{kind} {list(tensor.shape)}"


def _require_same(own: Mapping[str, str], saved: Mapping[str, str], message: str) -> None:
    """Raises CheckpointError with one line for each name whose form differs or is missing."""
    lines = [
        f"  {name}: {own.get(name, 'nothing')} here, {saved.get(name, 'nothing')} in the checkpoint"
        for name in sorted(own.keys() | saved.keys())
        if own.get(name) != saved.get(name)
    ]
    if lines:
        raise CheckpointError("\n".join([message, *lines]))


def load_tensors_into(
    module_state: dict[str, Tensor], loaded: dict[str, Tensor], *, what: str
) -> None:
    """Copy loaded tensors into a module's own, strictly; nothing is copied if anything is wrong.

    Args:
        module_state: the module's tensors by name (`state_dict()`), changed in place.
        loaded: the checkpoint's tensors, any device. A change between float precisions is logged.
        what: part of the model, for the message.

    Raises:
        CheckpointError: every missing name, unexpected name and differing shape (or a float where
            integers belong), one a line, with both shapes.
    """
    _require_same(
        {name: _describe(tensor) for name, tensor in module_state.items()},
        {name: _describe(tensor) for name, tensor in loaded.items()},
        f"{what}: the checkpoint does not fit the model; use the config it was made with",
    )
    for name, own in module_state.items():
        if own.dtype != loaded[name].dtype:
            logger.warning("%s: %s goes from %s to %s", what, name, loaded[name].dtype, own.dtype)
    with torch.no_grad():
        for name, tensor in module_state.items():
            tensor.copy_(loaded[name])


def _named_parameters(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> list[tuple[str, Tensor, dict[str, object]]]:
    """(name, parameter, its group) in the order of the optimizer's groups."""
    rows = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if len(rows) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"the optimizer has {len(rows)} parameters, but {len(names)} names were given, "
            f"{len(set(names))} of them different"
        )
    return [(name, p, group) for name, (p, group) in zip(names, rows, strict=True)]


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> dict[str, Tensor]:
    """The state of an AdamW-like optimizer as named tensors, not copied.

    Learning rates and the other settings of the groups are not part of it; they come from the
    config and the scheduler.

    Args:
        optimizer: its per-parameter state holds tensors only.
        names: one stable name per parameter, in the order of the parameter groups.

    Returns:
        `<name>/exp_avg`, `<name>/exp_avg_sq`, `<name>/step`; for a parameter that has had no
        gradient yet, one empty tensor `<name>/fresh`, so that its absence is on record.

    Raises:
        ValueError: the names do not fit the optimizer, or its state is not made of tensors.
    """
    flat: dict[str, Tensor] = {}
    for name, parameter, _ in _named_parameters(optimizer, names):
        state = optimizer.state.get(parameter, {})
        if not state:
            flat[f"{name}/fresh"] = torch.empty(0)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {key!r} of {name} is not a tensor")
            flat[f"{name}/{key}"] = value.detach()
    return flat


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `flatten_optimizer_state` gave, bit for bit; on an error nothing changes.

    Args:
        optimizer: same groups as the saved one; its present state is dropped.
        names: as for `flatten_optimizer_state`; the order of parameters may have changed.
        tensors: saved tensors, any device; dtypes are kept as saved.

    Raises:
        CheckpointError: every missing, unexpected or wrongly shaped entry, one a line.
        ValueError: the names do not fit the optimizer.
    """
    state: dict[int, dict[str, Tensor]] = {}
    expected: dict[str, str] = {}
    for index, (name, parameter, group) in enumerate(_named_parameters(optimizer, names)):
        if f"{name}/fresh" in tensors:
            expected[f"{name}/fresh"] = "float [0]"
            continue
        keys = ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for key in keys:
            expected[f"{name}/{key}"] = "float []" if key == "step" else _describe(parameter)
        # Cloned, or training would go on in the caller's tensors.
        saved = {key: tensors[f"{name}/{key}"] for key in keys if f"{name}/{key}" in tensors}
        state[index] = {key: tensor.clone() for key, tensor in saved.items()}
    found = {name: _describe(tensor) for name, tensor in tensors.items()}
    _require_same(expected, found, "optimizer: the saved state does not fit")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
