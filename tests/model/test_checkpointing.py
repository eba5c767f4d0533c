"""Blocks that are computed again in the backward pass: the same numbers bit for bit, less kept."""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronHForCausalLM

from dragkit.config import GeneratorConfig
from dragkit.model.adapters import add_adapters
from dragkit.model.nemotron_h import RECOMPUTED, hidden_at_rows, make_pack, mamba_ops
from tests.nemotron_cases import toy_config

LENGTHS = (40, 9, 23)
ROWS = (39, 38, 48, 60, 71)
OPS = mamba_ops("dragkit")


def make_model(pattern: str, dtype: torch.dtype, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = toy_config(pattern)
    model = NemotronHForCausalLM(config).to(dtype).requires_grad_(False)
    lora = GeneratorConfig(lora_rank=3, lora_dropout=dropout)
    model = add_adapters(model, lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: torch.nn.Module, policy: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    embeds = torch.randn(sum(LENGTHS), 32).to(dtype).requires_grad_()
    pack = make_pack(torch.tensor(LENGTHS), sum(LENGTHS), max(LENGTHS))
    rows = torch.tensor(ROWS)
    decoder = model.get_base_model().model
    out = hidden_at_rows(decoder, embeds, pack, rows, OPS, RECOMPUTED[policy])
    model.zero_grad()
    out.float().square().sum().backward()
    grads = [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return [out.detach(), embeds.grad, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["MEM*-ME", "ME*"])  # the last attention has a way of its own
@pytest.mark.parametrize("policy", ["mamba", "all"])
def test_gradients_are_equal_bit_for_bit(policy: str, pattern: str, dtype: torch.dtype) -> None:
    model = make_model(pattern, dtype)
    kept, again = run(model, "none", dtype), run(model, policy, dtype)
    assert len(kept) == len(again) > 10
    for a, b in zip(kept, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and torch.isfinite(a).all())
    assert any(a is not None and a.any() for a in kept[2:])


def test_dropout_is_drawn_the_same_both_times() -> None:
    model = make_model("ME*M", torch.float32, dropout=0.5)
    for a, b in zip(
        run(model, "none", torch.float32), run(model, "all", torch.float32), strict=True
    ):
        assert torch.equal(a, b)


KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


@pytest.mark.parametrize("pattern", ["ME*-M", "ME-*"])
@pytest.mark.parametrize(("policy", "letters"), [("none", ""), ("mamba", "M"), ("all", "ME*-")])
def test_blocks_of_the_policy_run_twice_and_others_once(
    policy: str, letters: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dragkit.model.nemotron_h import decoder

    seen = []
    change = decoder._change

    def spy(norm, mixer, kind, *args):
        seen.append(kind)
        return change(norm, mixer, kind, *args)

    monkeypatch.setattr(decoder, "_change", spy)
    model = make_model(pattern, torch.float32)
    run(model, policy, torch.float32)
    kinds = [KINDS[letter] for letter in pattern]
    again = [KINDS[letter] for letter in reversed(pattern) if letter in letters]
    assert seen == kinds + again
    seen.clear()
    with torch.no_grad():
        embeds, pack = torch.randn(5, 32), make_pack(torch.tensor([5]), 5, 5)
        hidden_at_rows(
            model.get_base_model().model,
            embeds,
            pack,
            torch.tensor([4]),
            OPS,
            RECOMPUTED[policy],
        )
    assert seen == kinds
