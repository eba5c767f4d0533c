"""Active weights against counts by hand, PyTorch's FLOP counter and the published 30B."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHForCausalLM

from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS
from dragkit.memory_plan.dims import dims_of, num_active_parameters
from dragkit.observe.flops import ActiveWeights, active_weights, model_flops_utilisation
from dragkit.observe.gpu import card_spec
from tests.nemotron_cases import adapted, config_30b, toy_model

M, V = 32, 64


def tiny(pattern: str = "ME*-", rank: int | None = None, **settings: object) -> nn.Module:
    """A toy model, with adapters where a rank is given."""
    model = toy_model(pattern, **{"num_experts_per_tok": 3} | settings)
    return model if rank is None else adapted(DEFAULT_LORA_TARGETS, rank, model)


# Mamba: 4 heads of 16 give d_inner 64; B and C have 2 groups of 8 states; dt has one per head.
MAMBA = M * (64 + (64 + 2 * 2 * 8) + 4) + 64 * M
# A router over 4 experts, three active experts of width 16, a shared expert of width 24.
MOE = 4 * M + 3 * (2 * M * 16) + 2 * M * 24
ATTENTION = M * 4 * 8 + 2 * M * 2 * 8 + 4 * 8 * M
MLP = 2 * M * 48
BLOCKS = {"M": MAMBA, "E": MOE, "*": ATTENTION, "-": MLP}


@pytest.mark.parametrize("pattern", [*BLOCKS, "ME*-M"])
def test_counts_by_hand(pattern: str) -> None:
    blocks = sum(BLOCKS[kind] for kind in pattern)
    weights = active_weights(tiny(pattern))
    assert weights == ActiveWeights(blocks=blocks, head=M * V, lora=0)
    assert weights.active == blocks + M * V


def test_adapters_are_counted_separately() -> None:
    plain, model = active_weights(tiny()), tiny(rank=2)
    weights = active_weights(model)
    assert (weights.blocks, weights.head) == (plain.blocks, plain.head)
    assert weights.lora == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


def products(counter: FlopCounterMode) -> int:
    """FLOPs of the linear layers; scan and attention run as bmm and other operators."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_forward_has_the_counted_flops(rank: int | None) -> None:
    model = tiny(rank=rank, _attn_implementation="eager", experts_implementation="eager")
    weights = active_weights(model)
    rows, length = 2, 24
    ids = torch.arange(rows * length).view(rows, length) % V
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    tokens = rows * length
    assert products(counter) == 2 * (weights.active + weights.lora) * tokens


def test_a_step_has_the_flops_of_the_formula() -> None:
    """Gradients reach the embeddings and the adapters but no frozen weight."""
    model = tiny("M*-", 2).train()
    weights, length = active_weights(model), 40
    embeds = torch.randn(1, length, M, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeds).logits.sum().backward()
    assert products(counter) == weights.step_flops(length, length)


def test_the_head_runs_on_supervised_tokens_only() -> None:
    weights = ActiveWeights(blocks=1000, head=300, lora=10)
    assert weights.step_flops(50, 4) == 50 * (4 * 1000 + 6 * 10) + 4 * 4 * 300
    assert weights.step_flops(50, 50) == 50 * (4 * weights.active + 6 * weights.lora)


def test_the_30b_has_3_23_billion_active_weights() -> None:
    with torch.device("meta"):
        model = NemotronHForCausalLM(config_30b())
    assert sum(p.numel() for p in model.parameters()) == 31_577_937_344
    weights = active_weights(model)
    assert weights.head == 131072 * 2688
    dims = dims_of(model.config)
    assert weights.blocks == num_active_parameters(dims, dims.block_types), "as in the memory plan"
    assert weights.active / 1e9 == pytest.approx(3.23, abs=0.005)
    assert weights.blocks / 1e9 == pytest.approx(2.875, abs=0.001)
    # Scan and attention, not counted here, add 0.26 GFLOP per token.
    assert weights.step_flops(1, 0) / 1e9 == pytest.approx(11.5, abs=0.05)


class WithHead(nn.Module):
    """A model with a head and the given body."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_unknown_weights_are_refused() -> None:
    strange = nn.Module()
    strange.mixing = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"weights of inner\.mixing"):
        active_weights(WithHead(strange))
    experts = nn.Module()
    experts.up_proj = nn.Parameter(torch.zeros(4, 6, 2))
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        active_weights(WithHead(nn.ModuleDict({"experts": experts})))


def test_a_tied_head_counts_once() -> None:
    model = WithHead(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)))
    model.head.weight = model.inner[0].weight
    assert active_weights(model) == ActiveWeights(blocks=16, head=32, lora=0)


def test_utilisation_needs_a_known_peak() -> None:
    assert model_flops_utilisation(1e12, None) is None
    assert model_flops_utilisation(225e12, card_spec("NVIDIA B200")) == pytest.approx(0.1)
