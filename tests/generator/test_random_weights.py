"""Published architectures with random weights: sizes, values, errors, and no claim of accuracy."""

from __future__ import annotations

import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dragkit import evaluate as evaluate_command
from dragkit.config import GeneratorConfig, resolve_config
from dragkit.errors import ConfigError
from dragkit.generator.load import (
    check_generator,
    check_grouped_mm,
    load_generator,
)
from dragkit.generator.random_weights import (
    ARCHITECTURES,
    Architecture,
    meta_model,
    random_config,
    random_model,
)
from dragkit.trainer.run import TrainingRun
from tests.nemotron_cases import adapted, toy_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "heuristics_tiny.jsonl"
PUBLIC = "random:nemotron-3-nano-30b-a3b"
CPU = torch.device("cpu")
SMALL = Architecture(
    "MEM*ME",
    ARCHITECTURES["nemotron-3-nano-30b-a3b"].sizes
    | {
        "vocab_size": 1024,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
    },
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a small architecture with the block types of the 30B."""
    monkeypatch.setitem(ARCHITECTURES, "small", SMALL)
    return "random:small"


def test_the_published_architecture_has_its_published_size() -> None:
    model = meta_model(random_config(PUBLIC), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 31_577_937_344
    types = model.config.layers_block_type
    assert [types.count(t) for t in ("linear_attention", "moe", "full_attention")] == [23, 23, 6]
    assert [i for i, t in enumerate(types) if t == "full_attention"] == [5, 12, 19, 26, 33, 42]
    assert model.config._experts_implementation == "grouped_mm"
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in model.parameters())


def test_the_first_blocks_equal_those_of_the_whole_model(small: str) -> None:
    whole, again, part = (
        random_model(name, CPU, torch.float32).state_dict()
        for name in (small, small, f"{small}:layers=3")
    )
    assert len(part) < len(whole) and not any(".layers.3." in name for name in part)
    for state in (again, part):
        assert all(torch.equal(t, whole[n]) and torch.isfinite(t).all() for n, t in state.items())


def test_the_distribution_of_the_weights(small: str) -> None:
    model = random_model(small, CPU, torch.float32)
    mixer, experts = model.model.layers[0].mixer, model.model.layers[1].mixer
    assert torch.equal(mixer.A_log, torch.arange(1, 9).float().log())
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert (model.model.norm_f.weight == 1).all() and (model.model.layers[0].norm.weight == 1).all()
    assert (mixer.conv1d.bias == 0).all()
    dt = F.softplus(mixer.dt_bias)
    assert ((dt > 0.9e-3) & (dt < 1.1e-1)).all() and dt.max() / dt.min() > 2
    residual = 0.02 / math.sqrt(2 * 6)
    for tensor, std in (
        (mixer.in_proj.weight, 0.02),
        (mixer.out_proj.weight, residual),
        (model.model.layers[3].mixer.o_proj.weight, residual),
        (experts.experts.up_proj, 0.02),
        (experts.experts.down_proj, residual),
        (experts.shared_experts.down_proj.weight, residual),
        (model.lm_head.weight, 0.02),
    ):
        assert abs(tensor.std().item() / std - 1) < 0.05
    assert not torch.equal(mixer.in_proj.weight, model.model.layers[2].mixer.in_proj.weight)


def test_buffers_are_filled_and_stay_in_float32(small: str) -> None:
    model = random_model(small, CPU, torch.bfloat16)
    for name, buffer in model.named_buffers():
        assert not buffer.is_meta and (buffer == 0).all(), name
        assert buffer.dtype == torch.float32, name
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert "model.layers.1.mixer.gate.e_score_correction_bias" in dict(model.named_buffers())


def test_logits_are_finite_and_loss_is_that_of_chance(
    small: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        generator = load_generator(GeneratorConfig(lora_rank=2), CPU, name=small)
    assert "random weights" in caplog.text and "tokenizer" in caplog.text
    ids = torch.tensor([generator.tokenize(["who is it?"])[0]])
    logits = generator.model(input_ids=ids, use_cache=False).logits
    assert torch.isfinite(logits).all()
    loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert abs(loss.item() - math.log(1024)) < 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:nemotron", "nemotron-3-nano-30b-a3b"),
        ("random:", "nemotron-3-nano-30b-a3b"),
        (f"{PUBLIC}:layers=0", "from 1 to 52"),
        (f"{PUBLIC}:layers=53", "from 1 to 52"),
        (f"{PUBLIC}:layers=x", "'layers=x'"),
        (f"{PUBLIC}:6", "'6'"),
    ],
)
def test_wrong_names_are_errors(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_generator(GeneratorConfig(), CPU, name=name)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    ("inner", "dtype", "refused"),
    [
        (24, torch.bfloat16, False),
        (12, torch.float32, False),
        (12, torch.bfloat16, True),
        (24, torch.float64, True),
    ],
)
def test_a_gpu_refuses_experts_that_grouped_mm_does_not_support(
    inner: int, dtype: torch.dtype, refused: bool, routed: bool
) -> None:
    targets = ("in_proj", "experts.up_proj") if routed else ("in_proj",)
    model = adapted(targets, 2, toy_model("ME", dtype, moe_intermediate_size=inner))
    check_grouped_mm(model, CPU)
    with pytest.raises(ConfigError, match="one by one") if refused else nullcontext():
        check_grouped_mm(model, torch.device("cuda"))


def test_training_logs_loss_and_speed_and_claims_no_accuracy(
    small: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    values = {
        "run.phase": 2,
        "run.device": "cpu",
        "run.num_threads": 1,
        "run.checkpoint_dir": str(tmp_path / "run"),
        "run.log_every_steps": 1,
        "data.heuristics_path": str(FIXTURE),
        "data.val_heuristics_path": str(FIXTURE),
        "data.test_heuristics_path": str(FIXTURE),
        "generator.model": small,
        "retriever.hidden_dim": 16,
        "optim.batch_size": 4,
        "optim.epochs": 1,
    }
    config, origins = resolve_config("tiny", None, values)
    phase1, _ = resolve_config("tiny", None, values | {"run.phase": 1})
    with caplog.at_level(logging.WARNING):
        summary = TrainingRun(config, origins, phase1).execute()
    assert "random weights" in summary and "evaluate" not in summary
    assert caplog.text.count("no validation") == 1
    assert not (tmp_path / "run" / "results.json").exists()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and not any("validation" in line for line in lines)
    assert all(math.isfinite(line["generator"]) for line in lines if "generator" in line)
    assert evaluate_command.main([str(tmp_path / "run")]) == ConfigError.exit_code
    assert "its answers mean nothing" in capsys.readouterr().err
