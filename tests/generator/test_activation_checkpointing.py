"""Activation checkpointing: bit-equal results, and only the blocks of the policy run twice."""

from __future__ import annotations

import pytest
import torch

from dragkit.generator.nemotron_h import (
    ACTIVATION_CHECKPOINTING,
    decoder,
    hidden_at_rows,
    make_pack,
    mamba_ops,
)
from tests.nemotron_cases import BLOCK_TYPES, adapted, decoder_of, toy_model

LENGTHS = (40, 9, 23)
ROWS = torch.tensor([39, 38, 48, 60, 71])
OPS = mamba_ops("dragkit")


def make_model(pattern: str, dtype: torch.dtype, dropout: float = 0.0) -> torch.nn.Module:
    model = toy_model(pattern, dtype, std=0.1)
    return adapted(None, 3, model, 0.3, lora_dropout=dropout).train()


def run(model: torch.nn.Module, policy: str, grad: bool = True) -> list[torch.Tensor | None]:
    """Hidden states at some tokens, and gradients of embeddings and adapters."""
    torch.manual_seed(1)
    dtype = model.get_base_model().dtype
    embeds = torch.randn(sum(LENGTHS), 32).to(dtype).requires_grad_(grad)
    pack = make_pack(torch.tensor(LENGTHS), sum(LENGTHS), max(LENGTHS))
    with torch.set_grad_enabled(grad):
        out = hidden_at_rows(
            decoder_of(model), embeds, pack, ROWS, OPS, ACTIVATION_CHECKPOINTING[policy]
        )
    model.zero_grad()
    if grad:
        out.float().square().sum().backward()
    return [out.detach(), embeds.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.5)]
)
# On a CPU, an attention block after which no token reads another computes wanted rows only.
@pytest.mark.parametrize("pattern", ["MEM*-ME", "ME*"])
@pytest.mark.parametrize("policy", ["mamba", "all"])
def test_gradients_are_equal_bit_for_bit(
    policy: str, pattern: str, dtype: torch.dtype, dropout: float
) -> None:
    model = make_model(pattern, dtype, dropout)
    stored, recomputed = run(model, "none"), run(model, policy)
    assert len(stored) == len(recomputed) > 10
    for a, b in zip(stored, recomputed, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and torch.isfinite(a).all())
    assert any(a is not None and a.any() for a in stored[2:])


@pytest.mark.parametrize("pattern", ["ME*-M", "ME-*"])
@pytest.mark.parametrize(("policy", "letters"), [("none", ""), ("mamba", "M"), ("all", "ME*-")])
def test_blocks_of_the_policy_run_twice_and_others_once(
    policy: str, letters: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, mix = [], decoder._mix
    monkeypatch.setattr(decoder, "_mix", lambda *args: mixed.append(args[2]) or mix(*args))
    model = make_model(pattern, torch.float32)
    run(model, policy)
    block_types = [BLOCK_TYPES[letter] for letter in pattern]
    assert mixed == block_types + [BLOCK_TYPES[x] for x in reversed(pattern) if x in letters]
    mixed.clear()
    run(model, policy, grad=False)
    assert mixed == block_types
