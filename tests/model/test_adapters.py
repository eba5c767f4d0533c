"""Adapters: what they are put on, what that covers, and that none of them is dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.config import GeneratorConfig, load_config
from dragkit.errors import ConfigError
from dragkit.model.adapter_watch import LAST_STEP, AdapterWatch, DeadAdapterError
from dragkit.model.adapters import add_adapters, guard_lifted, load_adapter, lora_targets
from dragkit.model.coverage import coverage, coverage_table
from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.trainer.checkpoint import load_tensors_into

ROUTED = ("experts.up_proj", "experts.down_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj")


def make_model(pattern="ME*-M*", **settings) -> NemotronHForCausalLM:
    """Every block kind of the 30B at toy widths, frozen."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "time_step_min": 1e-9,
    }
    config = NemotronHConfig(hybrid_override_pattern=pattern, use_cache=False, **shape | settings)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def adapted(targets=None, rank=4, model=None, **settings) -> torch.nn.Module:
    config = GeneratorConfig(lora_targets=targets, lora_rank=rank, **settings)
    torch.manual_seed(1)
    return add_adapters(make_model() if model is None else model, config)


def stir(model) -> None:
    """Every adapter at work: B is zero in a fresh one."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


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
    model = make_model()
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
        lora_targets(make_model(), ["q_proj", wanted])
    assert near in str(e.value).partition("Nearest: ")[2]


def test_routed_names_exist_only_with_experts():
    with pytest.raises(ConfigError, match=r"experts\.up_proj"):
        lora_targets(make_model("M*-"), ["experts.up_proj"])


def test_dropout_and_routed_experts_exclude_each_other():
    chosen = {"generator.lora_targets": ROUTED, "generator.lora_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"generator\.lora_targets.*generator\.lora_dropout"):
        load_config(overrides=chosen)
    load_config(overrides=chosen | {"generator.lora_dropout": 0.0})
    load_config(overrides=chosen | {"generator.lora_targets": ("q_proj",)})


def side_by_side(dtype, *, adapters=torch.float32, targets=("a", "b", "c"), rank=8):
    """Three frozen layers of width 64, those of `targets` under LoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    layers = {
        n: torch.nn.Linear(64, w, bias=n != "b") for n, w in zip("abc", (96, 64, 7), strict=True)
    }
    inner = torch.nn.ModuleDict(layers).to(dtype).requires_grad_(False)
    ranks = {"c": 3} if "c" in targets else {}
    lora = LoraConfig(r=rank, target_modules=list(targets), rank_pattern=ranks)
    model = get_peft_model(inner, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(adapters)
    return model, [model.base_model.model[n] for n in "abc"]


def definition(x, layers):
    """x W^T + b + s x A^T B^T of each layer in float64, from whatever its tensors hold."""
    outputs = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        y = x @ base.weight.double().T
        y = y if base.bias is None else y + base.bias.double()
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            y = y + layer.scaling["default"] * (x @ down.double().T @ up.double().T)
        outputs.append(y)
    return outputs


def rms_ratio(got, wanted):
    return float(
        (got.detach().double() - wanted.detach()).pow(2).mean().sqrt()
        / wanted.detach().pow(2).mean().sqrt()
    )


@pytest.mark.parametrize("targets", [("a", "b", "c"), ("a", "c"), ("b",)])
@pytest.mark.parametrize(
    ("dtype", "adapters", "limits"),
    [
        (torch.float32, torch.float32, (2e-6, 1e-5)),
        (torch.bfloat16, torch.float32, (4e-3, 8e-3)),
        (torch.bfloat16, torch.bfloat16, (4e-3, 8e-3)),
        (torch.float16, torch.float32, (1e-3, 2e-3)),
    ],
)
def test_layers_side_by_side_in_every_type_and_mixture(dtype, adapters, limits, targets):
    model, layers = side_by_side(dtype, adapters=adapters, targets=targets)
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    exact = x.detach().double().requires_grad_()
    wanted = definition(exact, layers)
    weight = [torch.randn_like(y) for y in wanted]
    got = adapted_linear(x, layers)
    assert all(y.dtype == dtype for y in got)
    assert all(rms_ratio(y, z) <= limits[0] for y, z in zip(got, wanted, strict=True))
    loss = sum((y * w.to(dtype)).sum() for y, w in zip(got, weight, strict=True))
    ours = torch.autograd.grad(loss, leaves)
    true = sum((y * w.to(dtype).double()).sum() for y, w in zip(wanted, weight, strict=True))
    theirs = torch.autograd.grad(true, [exact, *leaves[1:]])
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        assert a.dtype == leaf.dtype and rms_ratio(a, b.double()) <= limits[1]
    joined = adapted_linear(x, layers, [100, 67])
    assert [y.shape for y in joined] == [(2, 40, 100), (2, 40, 67)]
    assert torch.equal(torch.cat(joined, -1), torch.cat(got, -1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_half_precision_makes_no_adapted_weight_and_casts_no_rows(adapters, count, made):
    _, layers = side_by_side(torch.bfloat16, adapters=adapters)
    x = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    with made:
        sum(y.sum() for y in adapted_linear(x, layers[:count])).backward()
    assert ((300, 96), torch.bfloat16) in made.tensors
    assert not any(shape in ((96, 64), (167, 64)) for shape, _ in made.tensors)
    assert not any(shape[:1] == (300,) and kind == torch.float32 for shape, kind in made.tensors)


# The 30B's shape, as its published configuration has it.
LARGE = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "ssm_state_size": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}
LARGE_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def large_model() -> NemotronHForCausalLM:
    """The 30B without its weights."""
    config = NemotronHConfig(hybrid_override_pattern=LARGE_PATTERN, **LARGE)
    with torch.device("meta"):
        return NemotronHForCausalLM(config).requires_grad_(False)


def test_coverage_of_the_30b():
    model = adapted(rank=16, model=large_model())
    rows = {row.target: row for row in coverage(model)}
    assert rows["mixer.in_proj"][:3] == (("mixer.in_proj"), 23, 23)
    assert rows["mixer.out_proj"][1:4] == (23, 0, 0)
    assert rows["experts.up_proj"][1:4] == (23, 0, 0) and rows["mixer.q_proj"][1:3] == (6, 6)
    assert sum(row.trainable for row in rows.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert round(sum(row.trainable for row in rows.values()) / 1e6, 1) == 11.4
    active = 23 * (2688 * 10304 + 4096 * 2688) + 6 * 2688 * (2 * 4096 + 2 * 256)
    active += 23 * (2 * 2688 * 3712 + 6 * 2 * 2688 * 1856 + 128 * 2688)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert rows["mixer.in_proj"].share == pytest.approx(23 * 2688 * 10304 / active)
    assert rows["experts.up_proj"].share == pytest.approx(23 * 6 * 2688 * 1856 / active)
    assert rows["mixer.gate"].share == pytest.approx(23 * 128 * 2688 / active)
    assert sum(row.covered for row in rows.values()) == pytest.approx(0.430, abs=5e-4)


def test_coverage_of_routed_experts_out_proj_and_a_part():
    everything = coverage(adapted((*EVERY, *ROUTED)))
    assert all(row.adapted == row.modules for row in everything if row.target != "mixer.gate")
    assert all(row.covered == row.share for row in everything if row.target != "mixer.gate")
    nothing = coverage(make_model())
    assert [row[:2] + row[4:5] for row in nothing] == [row[:2] + row[4:5] for row in everything]
    assert not any(row.adapted or row.trainable or row.covered for row in nothing)
    (up,) = [row for row in coverage(adapted(("experts.up_proj",))) if row.adapted]
    assert up.target == "experts.up_proj" and up.trainable == 4 * (4 * 32 + 4 * 16)


def test_the_table_is_logged_when_adapters_are_added(caplog):
    with caplog.at_level("INFO"):
        model = adapted()
    table = coverage_table(coverage(model))
    assert table in caplog.text and "mixer.out_proj" in table
    *lines, total = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and total.startswith("all")


def train(model, watch, steps, *, forward=None, supervised=7, lr=1e-2, tokens=12):
    """Optimizer steps on random tokens, watched as the training loop does it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    forward = forward or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    for step in range(steps):
        torch.manual_seed(step)
        (forward(torch.randint(64, (1, tokens))) ** 2).mean().backward()
        watch.check(supervised)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("dragkit")]


def test_every_adapter_is_alive_after_two_steps(caplog):
    model = adapted((*EVERY, *ROUTED))
    watch = AdapterWatch(model)
    assert len(watch._open) == 18
    train(model, watch, 1)
    assert len(watch._open) == 16, "routed experts are settled, A waits for B"
    train(model, watch, 1)
    assert watch._open == [] and watch.step == 2 and not warnings_of(caplog)


SMALL = ("q_proj", *ROUTED)


def test_the_device_is_waited_for_at_three_steps_only(monkeypatch):
    from dragkit.model import adapter_watch

    waits, watch = [], AdapterWatch(model := adapted(SMALL, model=make_model("*E")))
    read = adapter_watch._largest
    monkeypatch.setattr(
        adapter_watch, "_largest", lambda tensors: waits.append(watch.step) or read(tensors)
    )
    train(model, watch, LAST_STEP + 2)
    assert set(waits) == {1, 2} and watch.step == LAST_STEP


@pytest.mark.parametrize("layer", ["layers.0.mixer.out_proj", "layers.2.mixer.k_proj"])
def test_an_adapter_that_the_forward_passes_by_is_an_error(layer):
    model = adapted(EVERY)
    wrapper = model.get_submodule(f"base_model.model.model.{layer}")
    wrapper.forward = wrapper.base_layer.forward
    with pytest.raises(DeadAdapterError, match=rf"step 1: .*2 adapter.*{layer} \(lora_A\)"):
        train(model, AdapterWatch(model), 1)


def test_zero_gradients_are_as_dead_as_missing_ones():
    model = adapted(("q_proj", "in_proj"))
    wrapper = model.get_submodule("base_model.model.model.layers.2.mixer.q_proj")
    down, up = (side["default"].weight for side in (wrapper.lora_A, wrapper.lora_B))
    up.register_hook(torch.zeros_like)
    with pytest.raises(DeadAdapterError, match=r"step 1: .*1 adapter.*q_proj \(lora_B\)"):
        train(model, AdapterWatch(model), 1)
    model = adapted(("q_proj", "in_proj"))
    wrapper = model.get_submodule("base_model.model.model.layers.2.mixer.q_proj")
    wrapper.lora_A["default"].weight.register_hook(torch.zeros_like)
    with pytest.raises(DeadAdapterError, match=r"step 2: .*1 adapter.*q_proj \(lora_A\)"):
        train(model, AdapterWatch(model), 2)
    assert down.grad is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(bad):
    model = adapted((*EVERY, *ROUTED))
    wrapper = model.get_submodule("base_model.model.model.layers.1.mixer.experts.base_layer")

    def spoil(grad):
        return grad.index_fill(0, torch.tensor([1]), bad)

    wrapper.lora_A["default"].weight.register_hook(spoil)
    name = f"experts.{wrapper.parameter_name}"
    with pytest.raises(DeadAdapterError, match=rf"step 1: .*not finite.*{name}"):
        train(model, AdapterWatch(model), 1)


def test_steps_without_answer_tokens_do_not_count():
    model = adapted(EVERY)
    watch = AdapterWatch(model)
    train(model, watch, 3, supervised=0, forward=lambda ids: model(input_ids=ids).logits * 0)
    assert watch.step == 0
    train(model, watch, 2)
    assert watch.step == 2 and watch._open == []


def test_a_step_that_moves_nothing_is_waited_out(caplog):
    model = adapted(("q_proj",))
    watch = AdapterWatch(model)
    train(model, watch, 2, lr=0.0)
    assert len(watch._open) == 2
    train(model, watch, 2)
    assert watch._open == []
    model = adapted(("q_proj",))
    train(model, AdapterWatch(model), LAST_STEP, lr=0.0)
    assert "lora_B is still zero" in caplog.text


def test_a_resumed_run_sees_both_factors_at_once():
    model = adapted(EVERY)
    stir(model)
    watch = AdapterWatch(model)
    train(model, watch, 1)
    assert watch._open == []


def test_routed_experts_without_a_token_are_named_after_fifty_steps(caplog):
    model = adapted(SMALL, model=make_model("*E"))
    gate = model.get_submodule("base_model.model.model.layers.1.mixer.gate")
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, -9.0, 0.0, -9.0]))
    train(model, watch := AdapterWatch(model), LAST_STEP, tokens=2)
    (message,) = warnings_of(caplog)
    assert "2 routed experts" in message and "layers.1.mixer.experts: 1, 3" in message
    caplog.clear()
    train(model, watch, 2)
    model = adapted(SMALL, model=make_model("*E"))
    train(model, AdapterWatch(model), LAST_STEP, tokens=2)
    assert not warnings_of(caplog)


def test_a_model_without_adapters_has_nothing_to_watch():
    watch = AdapterWatch(make_model())
    for _ in range(LAST_STEP):
        watch.check(3)


# With PEFT and transformers alone, unless the adapter is on `out_proj`.
FRESH = """
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "expected.safetensors")["ids"]
found = {}
for name in ("default", "routed", "out_proj"):
    stock = NemotronHForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    if name == "out_proj":
        assert "dragkit" not in sys.modules
        try:
            PeftModel.from_pretrained(stock, root / name)
        except ValueError as error:
            assert "out_proj" in str(error)
        else:
            raise AssertionError("peft takes out_proj now: load_adapter is not needed any more")
        from dragkit.model.adapters import load_adapter as load
    else:
        load = PeftModel.from_pretrained
    model = load(stock, root / name).eval()
    with torch.no_grad():
        found[name] = model(input_ids=ids, use_cache=False).logits
save_file(found, root / "found.safetensors")
"""


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.contiguous()


IDS = torch.randint(2, 64, (2, 21), generator=torch.Generator().manual_seed(3))


def test_saved_adapters_load_in_a_fresh_process(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    wanted = {"ids": IDS, "bare": logits_of(make_model(), IDS)}
    for name, targets in (
        ("default", None),
        ("routed", ("in_proj", *ROUTED)),
        ("out_proj", (*EVERY, *ROUTED)),
    ):
        model = adapted(targets)
        stir(model)
        wanted[name] = logits_of(model, IDS)
        model.save_pretrained(tmp_path / name)
    save_file(wanted, tmp_path / "expected.safetensors")
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert len(found) == 3
    for name, logits in found.items():
        scale = wanted[name].abs().max()
        assert (logits - wanted[name]).abs().max() <= 1e-5 * scale, name
        assert (logits - wanted["bare"]).abs().max() > 1e-2 * scale, "the adapter has to matter"


@pytest.mark.parametrize("targets", [None, (*EVERY, *ROUTED)])
def test_merged_and_saved_models_equal_the_adapted_one(targets, tmp_path):
    model = adapted(targets)
    stir(model)
    wanted = logits_of(model, IDS)
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    scale = wanted.abs().max()
    assert (logits_of(merged, IDS) - wanted).abs().max() <= 1e-5 * scale
    assert (logits_of(make_model(), IDS) - wanted).abs().max() > 1e-2 * scale
    merged.save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits_of(again, IDS), logits_of(merged, IDS))


def test_a_loaded_adapter_computes_by_groups_and_generates(tmp_path):
    model = adapted((*EVERY, *ROUTED))
    stir(model)
    model.save_pretrained(tmp_path)
    again = load_adapter(make_model(), tmp_path).eval()
    experts = again.base_model.model.model.layers[1].mixer.experts
    assert "forward" in vars(experts)
    assert again.get_base_model().config.model_type == "nemotron_h"
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    rows = [m.generate(input_ids=IDS, **settings) for m in (model, again)]
    assert torch.equal(*rows)
    for name, parameter in again.named_parameters():
        assert not parameter.requires_grad, name


def test_a_checkpoint_loads_into_a_model_with_fresh_adapters(tmp_path):
    """The way a resumed run goes: the file's tensors into the live ones."""
    from peft import get_peft_model_state_dict

    model = adapted((*EVERY, *ROUTED))
    stir(model)
    model.save_pretrained(tmp_path, safe_serialization=True)
    again = adapted((*EVERY, *ROUTED))
    live = get_peft_model_state_dict(again)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(live) == 36
    load_tensors_into(live, saved, what="adapter")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
