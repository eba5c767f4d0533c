"""The layers that get adapters."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from dragkit.config import GeneratorConfig, resolve_config
from dragkit.errors import ConfigError
from dragkit.generator.lora.adapters import add_adapters, lora_targets
from dragkit.generator.nemotron_h.patches import hidden_model_type
from tests.nemotron_cases import ALL_LINEAR, ROUTED_EXPERTS, adapted, toy_model


def trained_layers(model) -> set[str]:
    names = (n for n, p in model.named_parameters() if p.requires_grad)
    return {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in names}


# The first layer is dense, the second has routed experts.
SMALL_MOE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "num_experts_per_tok": 2,
}
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


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SMALL_MOE, head_dim=16, num_experts=4, mlp_only_layers=[0]),
        DeepseekV3Config(
            **SMALL_MOE,
            **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
            **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
            **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
            n_routed_experts=4,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_default_targets_fit_experts_beside_dense_layers(config):
    """PEFT would fuse these families' targets for the routed experts, and refuse half a pair."""
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = add_adapters(model, GeneratorConfig(lora_rank=2))
    dense = {f"layers.0.{name}_proj" for name in ("mlp.up", "mlp.down", "self_attn.o")}
    assert dense <= trained_layers(model)
    model(torch.arange(6).unsqueeze(0), labels=torch.arange(6).unsqueeze(0)).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


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
