"""`AdapterWatch` finds adapters that get no gradient."""

from __future__ import annotations

import pytest
import torch

from dragkit.generator.lora.gradient_watch import AdapterNotTrainedError, AdapterWatch
from tests.nemotron_cases import ALL_LINEAR, ROUTED_EXPERTS, adapted, toy_model


def train(model, watch, steps, *, forward=None, supervised=7, lr=1e-2, tokens=12):
    """Optimizer steps on random tokens, with a check before each as in the training loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    forward = forward or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    for step in range(steps):
        torch.manual_seed(step)
        (forward(torch.randint(64, (1, tokens))) ** 2).mean().backward()
        watch.check(supervised)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_every_adapter_is_checked_after_two_steps():
    model = adapted((*ALL_LINEAR, *ROUTED_EXPERTS))
    watch = AdapterWatch(model)
    assert len(watch._open) == 18
    train(model, watch, 1)
    assert len(watch._open) == 16, "routed experts need one step, and A waits for B"
    train(model, watch, 1)
    assert watch._open == [] and watch.step == 2


def test_the_host_waits_in_two_steps_only(monkeypatch):
    watch = AdapterWatch(
        model := adapted(("q_proj", *ROUTED_EXPERTS), model=toy_model("*E", std=0.2))
    )
    waits, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda t: waits.append(watch.step) or stack(t))
    for _ in range(2):
        train(model, watch, 2)
    assert waits == [1, 2]


@pytest.mark.parametrize("layer", ["layers.0.mixer.out_proj", "layers.2.mixer.k_proj"])
def test_an_adapter_that_the_forward_does_not_use_is_an_error(layer):
    model = adapted(ALL_LINEAR)
    wrapper = model.get_submodule(f"base_model.model.model.{layer}")
    wrapper.forward = wrapper.base_layer.forward
    with pytest.raises(AdapterNotTrainedError, match=rf"step 1: .*2 adapter.*{layer} \(lora_A\)"):
        train(model, AdapterWatch(model), 1)


@pytest.mark.parametrize(("factor", "step"), [("lora_B", 1), ("lora_A", 2)])
def test_a_zero_gradient_is_an_error(factor, step):
    model = adapted(("q_proj", "in_proj"))
    wrapper = model.get_submodule("base_model.model.model.layers.2.mixer.q_proj")
    getattr(wrapper, factor)["default"].weight.register_hook(torch.zeros_like)
    with pytest.raises(
        AdapterNotTrainedError, match=rf"step {step}: .*1 adapter.*q_proj \({factor}\)"
    ):
        train(model, AdapterWatch(model), step)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_an_error(bad):
    model = adapted((*ALL_LINEAR, *ROUTED_EXPERTS))
    wrapper = model.get_submodule("base_model.model.model.layers.1.mixer.experts.base_layer")

    def spoil(grad):
        return grad.index_fill(0, torch.tensor([1]), bad)

    wrapper.lora_A["default"].weight.register_hook(spoil)
    name = f"experts.{wrapper.parameter_name}"
    with pytest.raises(AdapterNotTrainedError, match=rf"step 1: .*not finite.*{name}"):
        train(model, AdapterWatch(model), 1)


def test_steps_without_answers_do_not_count_and_a_learning_rate_of_zero_delays_the_check():
    model = adapted(ALL_LINEAR)
    watch = AdapterWatch(model)
    train(model, watch, 3, supervised=0, forward=lambda ids: model(input_ids=ids).logits * 0)
    assert watch.step == 0
    train(model, watch, 2, lr=0.0)
    assert watch.step == 2 and len(watch._open) == 16
    train(model, watch, 2)
    assert watch._open == []


def test_a_resumed_run_needs_one_step_and_a_bare_model_none():
    model = adapted(ALL_LINEAR, std=0.2)
    watch = AdapterWatch(model)
    train(model, watch, 1)
    assert watch._open == []
    watch = AdapterWatch(toy_model(std=0.2))
    watch.check(3)
    assert watch._open == []
