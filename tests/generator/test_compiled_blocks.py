"""Compiled blocks of a Nemotron-H: the eager numbers, and one graph for each kind of block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dragkit.generator.nemotron_h import (
    ACTIVATION_CHECKPOINTING,
    CompiledBlocks,
    attention,
    block_forward,
    hidden_at_rows,
    make_pack,
    mamba_ops,
    pad_to_multiple,
)
from dragkit.generator.nemotron_h.decoder import PackedMixing
from tests.nemotron_cases import (
    ALL_LINEAR,
    BLOCK_TYPES,
    ROUTED_EXPERTS,
    adapted,
    decoder_of,
    toy_model,
)

# The first 13 blocks of the 30B and a dense one, which it has not.
PATTERN = "MEMEM*EMEMEM*-E"
WIDTH = 32
OPS = mamba_ops("dragkit")
# Packs with what they are padded to, of ever other sizes; in the first, longest is all tokens.
PACKS = (((40, 2), 1), ((150,), 64), ((20, 33, 64, 3), 1), ((5, 300), 128))


def make_model(
    pattern: str, dtype: torch.dtype, routed: bool = False, dropout: float = 0.0
) -> nn.Module:
    """Random weights with adapters at work, as PEFT makes them: in float32."""
    targets = ALL_LINEAR[:-1] + (ROUTED_EXPERTS if routed else ())
    model = toy_model(pattern, dtype, std=0.1)
    return adapted(targets, 3, model, 0.1, lora_dropout=dropout).train()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Compiles a model's blocks by a backend, as a run does; settings end with the test."""
    from dragkit.trainer.compile import use_dynamic_shapes

    def compile_with(model: nn.Module, backend: object, **options: object) -> CompiledBlocks:
        torch._dynamo.reset()
        use_dynamic_shapes()
        stock = torch.compile
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda *a, **k: stock(*a, **k, backend=backend))
            return CompiledBlocks(decoder_of(model), **options)

    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=True),
    ):
        yield compile_with
    torch._dynamo.reset()


def run(
    model: nn.Module,
    lengths: Sequence[int],
    block_fn: Callable = block_forward,
    policy: str = "none",
    multiple: int = 1,
    fresh: bool = True,
) -> list[Tensor]:
    """States at some tokens, and gradients of embeddings and adapters, `fresh` or added."""
    dtype = model.get_base_model().dtype
    if fresh:
        model.zero_grad()
    torch.manual_seed(1)
    embeds = torch.randn(sum(lengths), WIDTH).to(dtype).requires_grad_()
    pack = make_pack(torch.tensor(lengths), sum(lengths), max(lengths) + 2)
    rows = torch.cat([pack.ptr[1:].long() - 1, pack.ptr[1:].long() - 3])
    buffer, pack = pad_to_multiple(embeds, pack, multiple)
    again = ACTIVATION_CHECKPOINTING[policy]
    out = hidden_at_rows(decoder_of(model), buffer, pack, rows, OPS, again, block_fn)
    weight = torch.randn(out.shape)
    (out.float() * weight).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [out.detach(), embeds.grad, *(p.grad for p in trained)]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest root mean square of a difference, as a share of the values' own."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize(("routed", "policy"), [(False, "none"), (True, "all")])
def test_a_graph_for_each_kind_whatever_the_pack(
    routed: bool, policy: str, compiled: Callable
) -> None:
    model = make_model(PATTERN, torch.bfloat16, routed)
    counter = CompileCounterWithBackend("aot_eager")
    block_fn = compiled(model, counter)
    assert set(block_fn.block_types) == set(BLOCK_TYPES.values())
    truth = make_model(PATTERN, torch.float32, routed)
    for lengths, multiple in PACKS:
        ours = run(model, lengths, block_fn, policy, multiple)
        assert counter.frame_count == len(BLOCK_TYPES), lengths
        # The library's attention rounds elsewhere than ours, so both are held against float32.
        wanted = run(truth, lengths, multiple=multiple)
        eager = run(model, lengths, multiple=multiple)
        assert worst(ours, wanted) <= 1.5 * worst(eager, wanted) + 1e-3, lengths


def test_states_and_gradients_are_the_eager_ones(compiled: Callable) -> None:
    model = make_model("E*M-*E", torch.float32, routed=True)
    counter = CompileCounterWithBackend("aot_eager")
    block_fn = compiled(model, counter)
    for lengths, multiple in PACKS[:3]:
        for policy in ("none", "all"):
            ours = run(model, lengths, block_fn, policy, multiple)
            assert worst(ours, run(model, lengths, multiple=multiple)) < 1e-5
    assert counter.frame_count == 4
    # Attention in rows has another graph for a single row.
    assert worst(run(model, (40,), block_fn), run(model, (40,))) < 1e-5
    assert counter.frame_count == 5


def test_without_attention_bit_for_bit(compiled: Callable) -> None:
    model = make_model("EM-ME", torch.bfloat16)
    block_fn = compiled(model, "aot_eager")
    for a, b in zip(run(model, (40, 9), block_fn), run(model, (40, 9)), strict=True):
        assert torch.equal(a, b)


def test_weights_that_change_are_seen_and_gradients_add_up(compiled: Callable) -> None:
    model = make_model("MM-", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    block_fn = compiled(model, counter)
    first, other = run(model, (40, 9), block_fn), run(model, (31, 20, 7), block_fn)
    wanted = [a + b for a, b in zip(first[2:], other[2:], strict=True)]
    # The gradients of `other` are still there.
    assert worst(run(model, (40, 9), block_fn, fresh=False)[2:], wanted) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    second = run(model, (40, 9), block_fn)
    assert worst(second, first) > 1e-2 and worst(second, run(model, (40, 9))) < 1e-5
    assert counter.frame_count == 2


def test_dropout_of_adapters_is_drawn_anew_and_the_same_when_computed_again(
    compiled: Callable,
) -> None:
    model = make_model("MM", torch.float32, dropout=0.5)
    block_fn = compiled(model, "aot_eager")
    kept, again = run(model, (40, 9), block_fn), run(model, (40, 9), block_fn, "all")
    assert worst(kept, again) < 1e-6
    model.eval()
    assert worst(kept, run(model, (40, 9), block_fn)) > 1e-3


def test_foreign_blocks_and_passes_without_gradients_are_not_compiled(compiled: Callable) -> None:
    model = make_model("M*-", torch.float32)
    counter = CompileCounterWithBackend("eager")
    block_fn = compiled(model, counter, foreign=("linear_attention", "full_attention"))
    assert block_fn.block_types == ("mlp",)
    pack, embeds = make_pack(torch.tensor([9]), 9, 9), torch.randn(9, WIDTH)
    with torch.no_grad():
        rows = torch.tensor([8])
        hidden_at_rows(decoder_of(model), embeds, pack, rows, OPS, block_fn=block_fn)
    assert counter.frame_count == 0
    model = make_model("M-M", torch.float32)
    block_fn = compiled(model, counter, foreign=("linear_attention",))
    assert worst(run(model, (40, 9), block_fn), run(model, (40, 9))) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("policy", ["none", "all"])
def test_sharded_blocks(policy: str, compiled: Callable) -> None:
    """FSDP gathers a block's weights before its call; the graph takes them as they then are."""
    model = make_model("ME*-*ME", torch.float32, routed=True)
    wanted = run(model, (40, 9))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in decoder_of(model).layers:
            fully_shard(block, mesh=mesh)
        for module in model.modules():
            module._is_fsdp_managed_module = False  # as `dragkit.distributed.sharding` does
        counter = CompileCounterWithBackend("aot_eager")
        block_fn = compiled(model, counter)
        for _ in range(3):
            ours = run(model, (40, 9), block_fn, policy)
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in ours]
            assert worst(whole, wanted) < 1e-5
        assert counter.frame_count == len(BLOCK_TYPES)
    finally:
        torch.distributed.destroy_process_group()


class _Traced(Exception):
    """Forward and backward of a block have been traced."""


@pytest.mark.parametrize(
    ("letter", "routed"), [("M", False), ("*", False), ("-", False), ("E", False), ("E", True)]
)
def test_a_gpus_way_through_a_block_can_be_traced(
    letter: str, routed: bool, compiled: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our kernels, ragged attention and the grouped product, forward and backward, never run."""
    monkeypatch.setattr(attention, "_takes_ragged", lambda query: True)
    for name, module in list(sys.modules.items()):
        if name.startswith("dragkit_kernels") and hasattr(module, "resolve_backend"):
            monkeypatch.setattr(module, "resolve_backend", lambda op, tensor, backend: "triton")
    graphs: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        aot_module_simplified(graph, inputs, fw_compiler=record, bw_compiler=record)
        raise _Traced

    model = make_model("ME*-", torch.bfloat16, routed)
    block_fn = compiled(model, backend)
    block = decoder_of(model).layers["ME*-".index(letter)]
    hidden = torch.randn(60, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    mixing = PackedMixing(make_pack(torch.tensor([20, 30, 10]), 60, 33), OPS)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="_Traced"):
        block_fn(block, hidden, mixing)
    forward, backward = graphs
    for stem in ("gated_rms_norm", *(("causal_conv", "ssd_scan") if letter == "M" else ())):
        assert f"dragkit.{stem}_fwd.default" in forward, stem
        assert f"dragkit.{stem}_bwd.default" in backward, stem
    for name, kind in (("dragkit.grouped_linear", "E"), ("torch_attn._varlen_attn", "*")):
        for graph in graphs:
            assert (letter == kind) == any(target.startswith(name) for target in graph), name
