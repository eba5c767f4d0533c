"""What adapters are put on."""

from __future__ import annotations

import pytest
import torch

from dragkit.config import load_config
from dragkit.errors import ConfigError
from dragkit.model.adapters import guard_lifted, lora_targets
from tests.nemotron_cases import EVERY, ROUTED, adapted, toy_model


def trained_layers(model) -> set[str]:
    names = (n for n, p in model.named_parameters() if p.requires_grad)
    return {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in names}


def test_default_targets():
    found = trained_layers(adapted())
    assert "layers.0.mixer.in_proj" in found and "layers.3.mixer.up_proj" in found
    assert {f"layers.2.mixer.{n}_proj" for n in "qkvo"} <= found
    assert "layers.1.mixer.shared_experts.down_proj" in found
    assert not any("out_proj" in name or ".experts" in name for name in found)


def test_out_proj_and_routed_experts_by_choice():
    found = trained_layers(adapted(("out_proj",)))
    assert found == {"layers.0.mixer.out_proj", "layers.4.mixer.out_proj"}
    found = trained_layers(adapted(ROUTED))
    assert found == {"layers.1.mixer.experts", "layers.1.mixer.experts.base_layer"}
    model = adapted((*EVERY, *ROUTED))
    assert len(trained_layers(model)) == 2 * 4 + 2 * 2 + 2 + 2 + 2
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_guard_comes_back_whatever_happens():
    model = toy_model(std=0.2)
    with pytest.raises(RuntimeError), guard_lifted(model):
        assert model.config.model_type != "nemotron_h"
        raise RuntimeError
    assert model.config.model_type == "nemotron_h" and "model_type" not in vars(model.config)
    model.config.model_type = "nemotron_h"
    with guard_lifted(model):
        pass
    assert vars(model.config)["model_type"] == "nemotron_h"
    with guard_lifted(torch.nn.Linear(2, 2)):
        pass
    model = adapted(("out_proj", "q_proj"))
    assert model.get_base_model().config.model_type == "nemotron_h"


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("gate_proj", "out_proj"),
        ("experts.gate_proj", "experts.up_proj"),
        ("expert.down_proj", "experts.down_proj"),
        ("outproj", "out_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_named_with_its_neighbours(wanted, near):
    with pytest.raises(ConfigError, match=rf"generator\.lora_targets: '{wanted}'.*Nearest: ") as e:
        lora_targets(toy_model(std=0.2), ["q_proj", wanted])
    assert near in str(e.value).partition("Nearest: ")[2]


def test_routed_names_exist_only_with_experts():
    with pytest.raises(ConfigError, match=r"experts\.up_proj"):
        lora_targets(toy_model("M*-"), ["experts.up_proj"])


def test_dropout_and_routed_experts_exclude_each_other():
    chosen = {"generator.lora_targets": ROUTED, "generator.lora_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"generator\.lora_targets.*generator\.lora_dropout"):
        load_config(overrides=chosen)
    load_config(overrides=chosen | {"generator.lora_dropout": 0.0})
    load_config(overrides=chosen | {"generator.lora_targets": ("q_proj",)})
