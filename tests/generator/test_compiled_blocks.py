"""Compiled blocks of a Nemotron-H: eager values and gradients, and one graph per type of block."""

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
from dragkit.generator.nemotron_h.patches import unmark_fsdp_modules
from tests.nemotron_cases import (
    ALL_LINEAR,
    BLOCK_TYPES,
    ROUTED_EXPERTS,
    adapted,
    decoder_of,
    relative_rms,
    toy_model,
)

# The first 13 blocks of the 30B, and a dense block, of which the 30B has none.
PATTERN = "MEMEM*EMEMEM*-E"
WIDTH = 32
OPS = mamba_ops("dragkit")
# Lengths of a pack and the multiple to which it is padded, every time with other sizes.
PACKS = (((40, 2), 1), ((150,), 64), ((20, 33, 64, 3), 1), ((5, 300), 128))


def make_model(
    pattern: str, dtype: torch.dtype, routed: bool = False, dropout: float = 0.0
) -> nn.Module:
    """Random weights, and adapters with B != 0 in float32, as PEFT creates them."""
    targets = ALL_LINEAR[:-1] + (ROUTED_EXPERTS if routed else ())
    model = toy_model(pattern, dtype, std=0.1)
    return adapted(targets, 3, model, 0.1, lora_dropout=dropout).train()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Compiles a model's blocks with a backend, under the settings of a run."""
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
    """Hidden states at some tokens, and gradients of embeddings and adapters.

    `fresh` clears the adapters' gradients before.
    """
    dtype = model.get_base_model().dtype
    if fresh:
        model.zero_grad()
    torch.manual_seed(1)
    embeds = torch.randn(sum(lengths), WIDTH).to(dtype).requires_grad_()
    pack = make_pack(torch.tensor(lengths), sum(lengths), max(lengths) + 2)
    rows = torch.cat([pack.ptr[1:].long() - 1, pack.ptr[1:].long() - 3])
    buffer, pack = pad_to_multiple(embeds, pack, multiple)
    checkpointed = ACTIVATION_CHECKPOINTING[policy]
    out = hidden_at_rows(decoder_of(model), buffer, pack, rows, OPS, checkpointed, block_fn)
    weight = torch.randn(out.shape)
    (out.float() * weight).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [out.detach(), embeds.grad, *(p.grad for p in trained)]


def max_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative RMS error of the tensors."""
    return max(relative_rms(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("routed", "policy"), [(False, "none"), (True, "all")])
def test_one_graph_per_type_for_packs_of_all_sizes(
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
        # The attention of a trace rounds differently, so both are compared with float32.
        wanted = run(truth, lengths, multiple=multiple)
        eager = run(model, lengths, multiple=multiple)
        assert max_error(ours, wanted) <= 1.5 * max_error(eager, wanted) + 1e-3, lengths


def test_states_and_gradients_equal_eager_ones(compiled: Callable) -> None:
    model = make_model("E*M-*E", torch.float32, routed=True)
    counter = CompileCounterWithBackend("aot_eager")
    block_fn = compiled(model, counter)
    for lengths, multiple in PACKS[:3]:
        for policy in ("none", "all"):
            ours = run(model, lengths, block_fn, policy, multiple)
            assert max_error(ours, run(model, lengths, multiple=multiple)) < 1e-5
    assert counter.frame_count == 4
    # Attention over padded rows has another graph for a single sequence.
    assert max_error(run(model, (40,), block_fn), run(model, (40,))) < 1e-5
    assert counter.frame_count == 5


def test_blocks_without_attention_are_bit_equal(compiled: Callable) -> None:
    model = make_model("EM-ME", torch.bfloat16)
    block_fn = compiled(model, "aot_eager")
    for a, b in zip(run(model, (40, 9), block_fn), run(model, (40, 9)), strict=True):
        assert torch.equal(a, b)


def test_updated_weights_are_used_and_gradients_accumulate(compiled: Callable) -> None:
    model = make_model("MM-", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    block_fn = compiled(model, counter)
    first, other = run(model, (40, 9), block_fn), run(model, (31, 20, 7), block_fn)
    wanted = [a + b for a, b in zip(first[2:], other[2:], strict=True)]
    # The gradients of `other` remain.
    assert max_error(run(model, (40, 9), block_fn, fresh=False)[2:], wanted) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    second = run(model, (40, 9), block_fn)
    assert max_error(second, first) > 1e-2 and max_error(second, run(model, (40, 9))) < 1e-5
    assert counter.frame_count == 2


def test_a_recompute_draws_the_same_dropout(
    compiled: Callable,
) -> None:
    model = make_model("MM", torch.float32, dropout=0.5)
    block_fn = compiled(model, "aot_eager")
    stored, recomputed = run(model, (40, 9), block_fn), run(model, (40, 9), block_fn, "all")
    assert max_error(stored, recomputed) < 1e-6
    model.eval()
    assert max_error(stored, run(model, (40, 9), block_fn)) > 1e-3


def test_excluded_blocks_and_passes_without_gradients_run_eagerly(compiled: Callable) -> None:
    model = make_model("M*-", torch.float32)
    counter = CompileCounterWithBackend("eager")
    block_fn = compiled(model, counter, uncompiled=("linear_attention", "full_attention"))
    assert block_fn.block_types == ("mlp",)
    pack, embeds = make_pack(torch.tensor([9]), 9, 9), torch.randn(9, WIDTH)
    with torch.no_grad():
        rows = torch.tensor([8])
        hidden_at_rows(decoder_of(model), embeds, pack, rows, OPS, block_fn=block_fn)
    assert counter.frame_count == 0
    model = make_model("M-M", torch.float32)
    block_fn = compiled(model, counter, uncompiled=("linear_attention",))
    assert max_error(run(model, (40, 9), block_fn), run(model, (40, 9))) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("policy", ["none", "all"])
def test_sharded_blocks(policy: str, compiled: Callable) -> None:
    """FSDP gathers the weights of a block before its call, and the graph takes them as inputs."""
    model = make_model("ME*-*ME", torch.float32, routed=True)
    expected = run(model, (40, 9))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in decoder_of(model).layers:
            fully_shard(block, mesh=mesh)
        unmark_fsdp_modules(model)
        counter = CompileCounterWithBackend("aot_eager")
        block_fn = compiled(model, counter)
        for _ in range(3):
            ours = run(model, (40, 9), block_fn, policy)
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in ours]
            assert max_error(whole, expected) < 1e-5
        assert counter.frame_count == len(BLOCK_TYPES)
    finally:
        torch.distributed.destroy_process_group()


class _Traced(Exception):
    """Ends a test after forward and backward of a block have been traced."""


@pytest.mark.parametrize(
    ("letter", "routed"), [("M", False), ("*", False), ("-", False), ("E", False), ("E", True)]
)
def test_the_gpu_path_of_a_block_can_be_traced(
    letter: str, routed: bool, compiled: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces our kernels, `varlen_attn` and the grouped linear layers, and runs none of them."""
    monkeypatch.setattr(attention, "_takes_varlen", lambda query: True)
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
    for name, owner in (("dragkit.grouped_linear", "E"), ("torch_attn._varlen_attn", "*")):
        for graph in graphs:
            assert (letter == owner) == any(target.startswith(name) for target in graph), name
