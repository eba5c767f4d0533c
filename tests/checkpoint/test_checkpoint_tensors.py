"""Strict loading of tensors and optimizer state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dragkit.checkpoint.checkpoint import (
    Snapshot,
    flatten_optimizer_state,
    load_checkpoint,
    load_tensors_into,
    restore_optimizer_state,
    save_checkpoint,
)
from dragkit.errors import CheckpointError
from tests.checkpoint.checkpoint_cases import bits, state_at


def test_a_module_loads_only_matching_tensors() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    module_state = model.state_dict()
    new = {
        name: torch.randn_like(t) if t.is_floating_point() else t + 5
        for name, t in module_state.items()
    }
    load_tensors_into(module_state, new, what="heads")
    assert all(torch.equal(model.state_dict()[name], new[name]) for name in new)

    wrong = {**new, "0.weight": torch.zeros(3, 4), "extra.x": torch.zeros(7)}
    wrong["1.num_batches_tracked"] = torch.tensor(1.5)
    del wrong["0.bias"]
    before = {name: tensor.clone() for name, tensor in module_state.items()}
    with pytest.raises(CheckpointError) as caught:
        load_tensors_into(module_state, wrong, what="heads")
    for line in (
        "heads: the checkpoint does not fit",
        "0.bias: float [3] here, nothing in the checkpoint",
        "extra.x: nothing here, float [7] in the checkpoint",
        "0.weight: float [3, 2] here, float [3, 4] in the checkpoint",
        "1.num_batches_tracked: int [] here, float [] in the checkpoint",
    ):
        assert line in str(caught.value)
    assert all(torch.equal(module_state[name], before[name]) for name in module_state)


def _model_and_optimizer(amsgrad: bool) -> tuple[list[str], list[Tensor], torch.optim.AdamW]:
    torch.manual_seed(1)
    named = {
        "a.w": torch.randn(3, 2),
        "unused": torch.randn(2),
        "scale": torch.randn(()),
        "half": torch.randn(2, 2).bfloat16(),
    }
    parameters = [tensor.requires_grad_() for tensor in named.values()]
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}]
    return list(named), parameters, torch.optim.AdamW(groups, amsgrad=amsgrad)


def _train(parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    w, _, scale, half = parameters
    for step in steps:
        optimizer.zero_grad()
        ((w * scale * (step + 1)).square().sum() + half.float().pow(3).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_restored_optimizer_continues_bit_for_bit(tmp_path: Path, amsgrad: bool) -> None:
    names, straight, optimizer = _model_and_optimizer(amsgrad)
    _train(straight, optimizer, range(6))

    names, parameters, optimizer = _model_and_optimizer(amsgrad)
    _train(parameters, optimizer, range(3))
    snapshot = Snapshot(
        {
            "heads": dict(zip(names, parameters, strict=True)),
            "optim": flatten_optimizer_state(optimizer, names),
        }
    )
    loaded = load_checkpoint(save_checkpoint(tmp_path, 3, snapshot, state_at(3))).tensors
    keys = {"a.w/exp_avg", "a.w/exp_avg_sq", "a.w/step", "unused/fresh"}
    assert keys <= loaded["optim"].keys()

    names, resumed, optimizer = _model_and_optimizer(amsgrad)
    _train(resumed, optimizer, range(1))
    module_state = dict(zip(names, (p.detach() for p in resumed), strict=True))
    load_tensors_into(module_state, loaded["heads"], what="heads")
    restore_optimizer_state(optimizer, names, loaded["optim"])
    restored = flatten_optimizer_state(optimizer, names)
    assert restored.keys() == snapshot.tensors["optim"].keys()
    assert all(bits(restored[name]) == bits(snapshot.tensors["optim"][name]) for name in restored)
    _train(resumed, optimizer, range(3, 6))
    # Further training has not changed the loaded tensors.
    assert loaded["optim"]["a.w/step"].item() == 3.0
    for one, other in zip(straight, resumed, strict=True):
        assert bits(one.detach()) == bits(other.detach())


def test_an_optimizer_state_that_does_not_fit_is_refused() -> None:
    names, parameters, optimizer = _model_and_optimizer(False)
    _train(parameters, optimizer, range(2))
    good = flatten_optimizer_state(optimizer, names)
    before = {name: tensor.clone() for name, tensor in good.items()}
    bad = {**good, "a.w/exp_avg": torch.zeros(2, 3), "gone/step": torch.tensor(1.0)}
    del bad["scale/step"], bad["unused/fresh"]
    with pytest.raises(CheckpointError) as caught:
        restore_optimizer_state(optimizer, names, bad)
    for text in ("a.w/exp_avg", "[2, 3]", "[3, 2]", "gone/step", "scale/step", "unused/exp_avg_sq"):
        assert text in str(caught.value)
    restored = flatten_optimizer_state(optimizer, names)
    assert all(torch.equal(restored[name], before[name]) for name in before)
    for wrong in (names[:-1], ["a.w"] * 4):
        with pytest.raises(ValueError):
            flatten_optimizer_state(optimizer, wrong)
        with pytest.raises(ValueError):
            restore_optimizer_state(optimizer, wrong, good)
