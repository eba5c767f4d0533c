"""The formulas against counted bytes of the tensors that our forward saves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo
from torch import Tensor
from transformers import NemotronHConfig

from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS
from dragkit.generator.nemotron_h import (
    ACTIVATION_CHECKPOINTING,
    CompiledBlocks,
    block_forward,
    decoder,
    hidden_at_rows,
    make_pack,
    mamba_ops,
)
from dragkit.generator.random_weights import random_config
from dragkit.memory_plan import memory
from dragkit.memory_plan.dims import (
    LoraDims,
    blocks_of_all_tokens,
    dims_of,
    num_active_parameters,
    num_lora_parameters,
    num_parameters,
)
from tests.memory_plan.memory_cases import build

PUBLIC = "random:nemotron-3-nano-30b-a3b"
TOKENS = 192
OPS = mamba_ops("dragkit")
EVERYTHING = (*DEFAULT_LORA_TARGETS, "out_proj", "experts.up_proj", "experts.down_proj")
# Layers that read a block's input, and layers that write its output.
INPUTS, OUTPUTS = ("q_proj", "in_proj", "up_proj"), ("o_proj", "out_proj", "down_proj")
# Two stacks that differ by one block of a type. Their last block mixes tokens, so every token
# passes all blocks.
STACKS = {
    "linear_attention": ("MM", "MMM"),
    "full_attention": ("*M", "**M"),
    "moe": ("EM", "EEM"),
    "mlp": ("-M", "--M"),
}
CASES = {
    "usual": DEFAULT_LORA_TARGETS,
    "inputs": INPUTS,
    "outputs": OUTPUTS,
    "everything": EVERYTHING,
}


class _SavedTensor:
    """Holds a saved tensor and dies with the graph node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _VarlenAttention(torch.autograd.Function):
    """Saves the tensors of torch's varlen attention on a GPU; the values are meaningless."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query).fill_(0.1)
        ctx.save_for_backward(query, key, value, out, query.new_zeros(query.shape[:2]).float())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decoder, "packed_attention", lambda q, k, v, *_: _VarlenAttention.apply(q, k, v)
    )


def saved_bytes_per_token(
    model: torch.nn.Module, policy: str, block_fn: Callable = block_forward
) -> float:
    """Counted bytes per token. The difference of two counts drops what does not grow."""
    counts = [saved_bytes(model, policy, tokens, block_fn) for tokens in (TOKENS, 2 * TOKENS)]
    return (counts[1] - counts[0]) / TOKENS


def saved_bytes(
    model: torch.nn.Module, policy: str, tokens: int, block_fn: Callable = block_forward
) -> int:
    """Bytes of storage that the graph of a forward holds, without parameters and the pack."""
    base = model.get_base_model()
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    holders: list[weakref.ref[_SavedTensor]] = []

    def pack(tensor: Tensor) -> _SavedTensor:
        holder = _SavedTensor(tensor)
        holders.append(weakref.ref(holder))
        return holder

    batch = make_pack(torch.tensor([tokens // 2] * 2), tokens, tokens // 2)
    given |= {t.untyped_storage().data_ptr() for t in batch[:3]}
    rows = torch.tensor([tokens - 1])
    embeds = torch.randn(tokens, base.config.hidden_size).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = hidden_at_rows(
            base.model, embeds, batch, rows, OPS, ACTIVATION_CHECKPOINTING[policy], block_fn
        )
    assert out.requires_grad
    alive = [holder.tensor.untyped_storage() for ref in holders if (holder := ref()) is not None]
    return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in given}.values())


def count_one_block(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    targets: tuple[str, ...],
    blocks: Callable = lambda decoder: block_forward,
) -> tuple[float, int]:
    """Bytes per token that one more block saves, counted and by the formula."""
    counts = []
    for pattern in STACKS[kind]:
        model, dims, adapters = build(monkeypatch, pattern, targets)
        counts.append(saved_bytes_per_token(model, "none", blocks(model.get_base_model().model)))
    # The formula leaves the block's input out.
    formula = memory.saved_bytes_per_token(dims, kind, adapters) + 2 * dims.hidden_size
    return counts[1] - counts[0], formula


@pytest.mark.parametrize("targets", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", STACKS)
def test_a_block_saves_the_bytes_of_the_formula(
    kind: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, formula = count_one_block(monkeypatch, kind, targets)
    assert counted == formula


@pytest.mark.parametrize("kind", ["linear_attention", "moe", "mlp"])
def test_a_compiled_block_saves_no_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partitioner splits forward and backward with the least saved memory, as on a GPU."""
    compiled = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        counted, formula = count_one_block(monkeypatch, kind, DEFAULT_LORA_TARGETS, CompiledBlocks)
    assert 0.95 * formula <= counted <= formula


@pytest.mark.parametrize("policy", list(ACTIVATION_CHECKPOINTING))
def test_a_policy_saves_the_bytes_of_the_plan(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dims, adapters = build(monkeypatch, "MEM*EMEME", DEFAULT_LORA_TARGETS)
    planned = memory.activation_bytes_per_token(dims, policy, adapters)
    planned.pop("block workspace")
    assert blocks_of_all_tokens(dims) == dims.block_types[:-1]
    assert saved_bytes_per_token(model, policy) == sum(planned.values())


def test_parameters_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    public = dims_of(random_config(PUBLIC))
    assert num_parameters(public) == 31_577_937_344
    model, dims, adapters = build(monkeypatch, "ME*-M", EVERYTHING)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_lora_parameters(dims, adapters) == trained
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert num_parameters(dims) == frozen
    assert dims_of(object()) is None and dims_of(NemotronHConfig(moe_latent_size=8)) is None


def test_the_published_model_has_its_published_active_parameters() -> None:
    dims = dims_of(random_config(PUBLIC))
    assert num_active_parameters(dims, dims.block_types) == pytest.approx(2.875e9, rel=0.005)
    flops = memory.flops_per_token(dims, "none", LoraDims(16, DEFAULT_LORA_TARGETS), 500, 0.03)
    assert sum(flops.values()) == pytest.approx(11.8e9, rel=0.06)
    assert flops["recomputation"] == 0
    recomputed = memory.flops_per_token(dims, "all", LoraDims(16, DEFAULT_LORA_TARGETS), 500, 0.03)
    assert sum(recomputed.values()) == pytest.approx(17.7e9, rel=0.06)
