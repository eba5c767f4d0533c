"""Tensors on their way into and out of a checkpoint: finite check, strict copy, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

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
    problems = [
        f"missing in the checkpoint: {name} {list(module_state[name].shape)}"
        for name in module_state
        if name not in loaded
    ]
    problems += [
        f"not in the model: {name} {list(loaded[name].shape)}"
        for name in loaded
        if name not in module_state
    ]
    for name in module_state.keys() & loaded.keys():
        own, new = module_state[name], loaded[name]
        if own.shape != new.shape or own.is_floating_point() != new.is_floating_point():
            problems.append(
                f"differs: {name} is {own.dtype} {list(own.shape)} in the model, "
                f"{new.dtype} {list(new.shape)} in the checkpoint"
            )
        elif own.dtype != new.dtype:
            logger.warning("%s: %s goes from %s to %s", what, name, new.dtype, own.dtype)
    if problems:
        raise CheckpointError(
            f"{what}: the checkpoint does not fit the model; use the config it was made with\n  "
            + "\n  ".join(sorted(problems))
        )
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
    problems: list[str] = []
    restored: list[tuple[Tensor, dict[str, Tensor]]] = []
    used: set[str] = set()
    for name, parameter, group in _named_parameters(optimizer, names):
        if f"{name}/fresh" in tensors:
            used.add(f"{name}/fresh")
            continue
        keys = ["step", "exp_avg", "exp_avg_sq"]
        keys += ["max_exp_avg_sq"] if group.get("amsgrad") else []
        state: dict[str, Tensor] = {}
        for key in keys:
            value = tensors.get(f"{name}/{key}")
            expected = torch.Size() if key == "step" else parameter.shape
            if value is None:
                problems.append(f"missing: {name}/{key} {list(expected)}")
            elif value.shape != expected:
                problems.append(
                    f"differs: {name}/{key} is {list(expected)} in the optimizer, "
                    f"{list(value.shape)} in the checkpoint"
                )
            else:
                # Plain AdamW counts steps on the CPU; its fused and capturable forms on the device.
                on_device = key != "step" or group.get("fused") or group.get("capturable")
                device = parameter.device if on_device else torch.device("cpu")
                state[key] = value.detach().to(device, copy=True)
            used.add(f"{name}/{key}")
        restored.append((parameter, state))
    problems += [f"not in the optimizer: {name}" for name in tensors if name not in used]
    if problems:
        raise CheckpointError(
            "optimizer: the saved state does not fit\n  " + "\n  ".join(sorted(problems))
        )
    optimizer.state.clear()
    for parameter, state in restored:
        optimizer.state[parameter] = state
