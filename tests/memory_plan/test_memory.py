"""The plan's figures against the tensors that our forward keeps, counted."""

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
INPUTS, OUTPUTS = ("q_proj", "in_proj", "up_proj"), ("o_proj", "out_proj", "down_proj")
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


class _Held:
    """A saved tensor; gone with the node of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Varlen(torch.autograd.Function):
    """Keeps what the library's attention of ragged sequences does on a GPU; the values are none."""

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
    monkeypatch.setattr(decoder, "packed_attention", lambda q, k, v, *_: _Varlen.apply(q, k, v))


def saved_bytes_per_token(
    model: torch.nn.Module, policy: str, block_fn: Callable = block_forward
) -> float:
    """The same for every token; what does not grow with them is small and left out."""
    counts = [kept(model, policy, tokens, block_fn) for tokens in (TOKENS, 2 * TOKENS)]
    return (counts[1] - counts[0]) / TOKENS


def kept(
    model: torch.nn.Module, policy: str, tokens: int, block_fn: Callable = block_forward
) -> int:
    """Bytes of distinct memory that the graph of a pass holds, beside parameters and the pack."""
    base = model.get_base_model()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        holder = _Held(tensor)
        held.append(weakref.ref(holder))
        return holder

    batch = make_pack(torch.tensor([tokens // 2] * 2), tokens, tokens // 2)
    own |= {t.untyped_storage().data_ptr() for t in batch[:3]}
    rows = torch.tensor([tokens - 1])
    embeds = torch.randn(tokens, base.config.hidden_size).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = hidden_at_rows(
            base.model, embeds, batch, rows, OPS, ACTIVATION_CHECKPOINTING[policy], block_fn
        )
    assert out.requires_grad
    alive = [holder.tensor.untyped_storage() for ref in held if (holder := ref()) is not None]
    return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in own}.values())


def a_block_more(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    targets: tuple[str, ...],
    blocks: Callable = lambda decoder: block_forward,
) -> tuple[float, int]:
    """What one block more keeps, and what the plan says of it; all tokens pass all blocks."""
    counts = []
    for pattern in STACKS[kind]:
        model, dims, adapters = build(monkeypatch, pattern, targets)
        counts.append(saved_bytes_per_token(model, "none", blocks(model.get_base_model().model)))
    said = memory.saved_bytes_per_token(dims, kind, adapters) + 2 * dims.hidden_size
    return counts[1] - counts[0], said


@pytest.mark.parametrize("targets", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", STACKS)
def test_a_block_keeps_what_the_formula_says(
    kind: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, said = a_block_more(monkeypatch, kind, targets)
    assert kept == said


@pytest.mark.parametrize("kind", ["linear_attention", "moe", "mlp"])
def test_a_compiled_block_keeps_no_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is cut in two where least has to be kept, as it is for a GPU."""
    compiled = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        kept, said = a_block_more(monkeypatch, kind, DEFAULT_LORA_TARGETS, CompiledBlocks)
    assert 0.95 * said <= kept <= said


@pytest.mark.parametrize("policy", list(ACTIVATION_CHECKPOINTING))
def test_a_policy_keeps_what_the_plan_says(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dims, adapters = build(monkeypatch, "MEM*EMEME", DEFAULT_LORA_TARGETS)
    said = memory.activation_bytes_per_token(dims, policy, adapters)
    said.pop("while a block runs")
    assert blocks_of_all_tokens(dims) == dims.block_types[:-1]
    assert saved_bytes_per_token(model, policy) == sum(said.values())


def test_parameters_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    public = dims_of(random_config(PUBLIC))
    assert num_parameters(public) == 31_577_937_344
    model, dims, adapters = build(monkeypatch, "ME*-M", EVERYTHING)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_lora_parameters(dims, adapters) == trained
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert num_parameters(dims) == frozen
    assert dims_of(object()) is None and dims_of(NemotronHConfig(moe_latent_size=8)) is None


def test_matrices_of_the_published_model_have_their_published_count() -> None:
    dims = dims_of(random_config(PUBLIC))
    assert num_active_parameters(dims, dims.block_types) == pytest.approx(2.875e9, rel=0.005)
    flops = memory.flops_per_token(dims, "none", LoraDims(16, DEFAULT_LORA_TARGETS), 500, 0.03)
    assert sum(flops.values()) == pytest.approx(11.8e9, rel=0.06)
    assert flops["computed again"] == 0
    again = memory.flops_per_token(dims, "all", LoraDims(16, DEFAULT_LORA_TARGETS), 500, 0.03)
    assert sum(again.values()) == pytest.approx(17.7e9, rel=0.06)
