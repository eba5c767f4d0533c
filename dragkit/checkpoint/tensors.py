"""Tensors of a checkpoint: finite check, strict loading, optimizer state."""

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
        tensors: tensors of any dtype, by name.
        what: name of their file, for the message.

    Raises:
        CheckpointError: names every tensor with a NaN or infinite value.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"{what}: not saved. NaN or infinity in {', '.join(bad)}. Earlier checkpoints are "
            "unchanged."
        )


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    # The format refuses tensors that are views or share memory.
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _describe(tensor: Tensor) -> str:
    """Kind of dtype and shape. Precision is left out, because it may change."""
    kind = "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"
    return f"{kind} {list(tensor.shape)}"


def _require_same(expected: Mapping[str, str], saved: Mapping[str, str], message: str) -> None:
    """Raises CheckpointError with one line per name that differs or is missing on one side."""
    lines = [
        f"  {name}: {expected.get(name, 'nothing')} here, "
        f"{saved.get(name, 'nothing')} in the checkpoint"
        for name in sorted(expected.keys() | saved.keys())
        if expected.get(name) != saved.get(name)
    ]
    if lines:
        raise CheckpointError("\n".join([message, *lines]))


def load_tensors_into(
    module_state: dict[str, Tensor], loaded: dict[str, Tensor], *, what: str
) -> None:
    """Copies loaded tensors into a module's tensors. On an error it copies nothing.

    Args:
        module_state: the module's tensors by name (`state_dict()`), changed in place.
        loaded: the checkpoint's tensors on any device. A change of precision is logged.
        what: part of the model, for the message.

    Raises:
        CheckpointError: lists every missing name, unexpected name and differing shape or kind.
    """
    # All checks come before the first copy, so that an error changes nothing.
    _require_same(
        {name: _describe(tensor) for name, tensor in module_state.items()},
        {name: _describe(tensor) for name, tensor in loaded.items()},
        f"{what}: the checkpoint does not fit the model. Use the configuration of its run.",
    )
    with torch.no_grad():
        for name, tensor in module_state.items():
            saved = loaded[name]
            if tensor.dtype != saved.dtype:
                logger.warning("%s: %s is cast %s -> %s", what, name, saved.dtype, tensor.dtype)
            tensor.copy_(saved)


def _named_parameters(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> list[tuple[str, Tensor, dict[str, object]]]:
    """(name, parameter, its group), in the order of the optimizer's groups."""
    rows = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if len(rows) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"the optimizer has {len(rows)} parameters, but {len(names)} names were given, "
            f"of which {len(set(names))} differ"
        )
    return [(name, p, group) for name, (p, group) in zip(names, rows, strict=True)]


def flatten_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> dict[str, Tensor]:
    """The state of an AdamW-like optimizer as named tensors, without copies.

    It leaves out the settings of the groups, such as learning rates. They come from the
    configuration and the scheduler.

    Args:
        optimizer: its per-parameter state holds tensors only.
        names: one stable name per parameter, in the order of the parameter groups.

    Returns:
        `<name>/exp_avg`, `<name>/exp_avg_sq` and `<name>/step`, or one empty tensor `<name>/fresh`
        for a parameter that has had no gradient yet.

    Raises:
        ValueError: the names do not fit the optimizer, or a state value is not a tensor.
    """
    flat: dict[str, Tensor] = {}
    for name, parameter, _ in _named_parameters(optimizer, names):
        state = optimizer.state.get(parameter, {})
        if not state:
            # A missing state is an error when the optimizer is restored, so it is recorded.
            flat[f"{name}/fresh"] = torch.empty(0)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {key!r} of {name} is not a tensor")
            flat[f"{name}/{key}"] = value.detach()
    return flat


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]
) -> None:
    """Restores the tensors of `flatten_optimizer_state` bit for bit. On an error nothing changes.

    Args:
        optimizer: has the groups of the saved one. Its present state is replaced.
        names: one per parameter. The saved parameters may have had another order.
        tensors: saved tensors on any device. Their dtypes stay.

    Raises:
        CheckpointError: lists every missing, unexpected or wrongly shaped entry.
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
        # The optimizer updates its state in place. The caller's tensors must not change.
        saved = {key: tensors[f"{name}/{key}"] for key in keys if f"{name}/{key}" in tensors}
        state[index] = {key: tensor.clone() for key, tensor in saved.items()}
    actual = {name: _describe(tensor) for name, tensor in tensors.items()}
    _require_same(expected, actual, "optimizer: the saved state does not fit the parameters")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
