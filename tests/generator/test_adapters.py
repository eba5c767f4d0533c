"""The layers that get adapters."""

from __future__ import annotations

import pytest
import torch

from dragkit.config import resolve_config
from dragkit.errors import ConfigError
from dragkit.generator.lora.adapters import lora_targets
from dragkit.generator.nemotron_h.patches import hidden_model_type
from tests.nemotron_cases import ALL_LINEAR, ROUTED_EXPERTS, adapted, toy_model


def trained_layers(model) -> set[str]:
    names = (n for n, p in model.named_parameters() if p.requires_grad)
    return {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in names}


DEFAULT = {"0": "in", "1.shared_experts": "up down", "2": "q k v o", "3": "up down"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, DEFAULT | {"4": "in", "5": "q k v o"}),
        (("out_proj",), {"0": "out", "4": "out"}),
        (ALL_LINEAR, DEFAULT | {"0": "in out", "4": "in out", "5": "q k v o"}),
    ],
    ids=str,
)
def test_trained_layers(targets, expected):
    wanted = {
        ".".join(["layers", number, "mixer", *rest, f"{name}_proj"])
        for block, names in expected.items()
        for number, *rest in [block.split(".")]
        for name in names.split()
    }
    assert trained_layers(adapted(targets)) == wanted
    routed = {"layers.1.mixer.experts", "layers.1.mixer.experts.base_layer"}
    if targets:
        assert trained_layers(adapted((*targets, *ROUTED_EXPERTS))) == wanted | routed


def test_the_model_type_is_restored_also_after_an_error():
    model = toy_model(std=0.2)
    with pytest.raises(RuntimeError), hidden_model_type(model):
        assert model.config.model_type != "nemotron_h"
        raise RuntimeError
    assert model.config.model_type == "nemotron_h" and "model_type" not in vars(model.config)
    model.config.model_type = "nemotron_h"
    with hidden_model_type(model):
        pass
    assert vars(model.config)["model_type"] == "nemotron_h"
    with hidden_model_type(torch.nn.Linear(2, 2)):
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
def test_a_target_that_matches_nothing_is_an_error_with_the_nearest_names(wanted, near):
    with pytest.raises(ConfigError, match=rf"generator\.lora_targets: '{wanted}'.*Nearest: ") as e:
        lora_targets(toy_model(), ["q_proj", wanted])
    assert near in str(e.value).partition("Nearest: ")[2]
    with pytest.raises(ConfigError, match=r"experts\.up_proj"):
        lora_targets(toy_model("M*-"), ["experts.up_proj"])


def test_dropout_and_routed_experts_exclude_each_other():
    chosen = {"generator.lora_targets": ROUTED_EXPERTS, "generator.lora_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"generator\.lora_targets.*generator\.lora_dropout"):
        resolve_config(overrides=chosen)
    resolve_config(overrides=chosen | {"generator.lora_dropout": 0.0})
    resolve_config(overrides=chosen | {"generator.lora_targets": ("q_proj",)})
