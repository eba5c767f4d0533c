"""Two ranks for test_sharding.py: they compare unsharded and sharded generators, then train.

`torchrun sharding_worker.py plan.json` writes `waves.<rank>.json`, `direct.<rank>.json`, and
`<name>.<rank>.json` for each case of the plan, as ranks_worker.py does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import ranks_worker
import torch
import torch._dynamo.utils
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from dragkit.config import GeneratorConfig, RunConfig
from dragkit.console import run_main
from dragkit.distributed.ranks import Ranks
from dragkit.distributed.sharding import decoder_blocks, shard_generator
from dragkit.distributed.torchrun import init_ranks
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.nemotron_h.patches import patch_nemotron_h
from dragkit.generator.prompt import NeuralPrompt
from dragkit.trainer.compile import compile_generator

WIDTH, VOCAB = 32, 64
# End tokens that some of the continuations reach.
END = {"nemotron": 53, "llama": 19}
# Prompt lengths of every pass, by rank and round. A rank without prompts runs dummy passes only.
PASSES = {0: [[(5, 9), (3,)], [(12,)]], 1: [[], [(7, 2), (3,), (20, 4)]]}
DECODED = {0: [(4,)], 1: [(3,), (9, 2, 6)]}
# Model, activation checkpointing, whether structural vectors are given, dtype, whether compiled.
CASES = {
    "nemotron": ("nemotron", "none", True, "float32", False),
    "recomputed": ("nemotron", "all", True, "float32", False),
    "text": ("nemotron", "none", False, "bfloat16", False),
    "compiled": ("nemotron", "mamba", True, "bfloat16", True),
    "llama": ("llama", "none", True, "float32", False),
}


def make_model(kind: str) -> torch.nn.Module:
    """A Nemotron-H with every block type, or a Llama with tied embeddings."""
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)
    config = NemotronHConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        hybrid_override_pattern="ME*-ME*",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        ssm_state_size=8,
        mamba_num_heads=3,  # does not divide by two
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
    )
    return NemotronHForCausalLM(config)


def make_generator(kind: str, policy: str, dtype: str) -> Generator:
    """A generator with the same weights on every call."""
    torch.manual_seed(0)
    model = make_model(kind).to(getattr(torch, dtype)).requires_grad_(False)
    patch_nemotron_h(model)
    # The first block has no adapter: only structural vectors bring gradients to it.
    targets = ["q_proj", "down_proj"] + (["experts.up_proj"] if kind == "nemotron" else [])
    model = add_adapters(model, GeneratorConfig(lora_rank=3, lora_targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = SimpleNamespace(eos_token_id=END[kind])
    # So few tokens in a micro-batch that some prompts need two prefill passes and others one.
    return Generator(
        model, tokenizer, activation_checkpointing=policy, max_tokens_per_microbatch=12
    ).train()


def prompts(lengths: tuple[int, ...], *, target: bool) -> NeuralPrompt:
    """Random prompts with a vector at the first token; `target` supervises the last one."""
    total = sum(lengths)
    draw = torch.Generator().manual_seed(total)
    length = torch.tensor(lengths)
    question = torch.repeat_interleave(length)
    position = torch.cat([torch.arange(n) for n in lengths])
    rows = length.cumsum(0) - 1 if target else torch.empty(0, dtype=torch.int64)
    return NeuralPrompt(
        input_ids=torch.randint(2, VOCAB, (total,), generator=draw),
        slot=torch.where(position == 0, question, -1),
        position=position,
        question=question,
        ptr=torch.tensor([0, *length.cumsum(0)]).int(),
        target_row=rows,
        target_id=torch.randint(2, VOCAB, (len(rows),), generator=draw),
        longest=max(lengths),
    )


class GatheredBytes:
    """Bytes of all-gathered frozen weights, measured inside the blocks' forward and backward."""

    def __init__(self, blocks: list[torch.nn.Module]) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.alive: list[int] = []
        self.largest = 0
        for block in blocks:
            self._watch(block)

    def _watch(self, block: torch.nn.Module) -> None:
        inner = block.forward

        def forward(*args: object, **options: object) -> object:
            frozen = [p for p in block.parameters() if not p.requires_grad]
            gathered = {id(p): p.untyped_storage() for p in frozen}
            self.storages |= gathered
            self.largest = max(self.largest, sum(s.size() for s in gathered.values()))
            self.alive.append(self.now())
            output = inner(*args, **options)
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda grad: self.alive.append(self.now()))
            return output

        block.forward = forward

    def now(self) -> int:
        """Bytes that are gathered now."""
        return sum(storage.size() for storage in self.storages.values())


def train(generator: Generator, passes: list, vectors: bool) -> tuple[list[float], list]:
    """Losses of passes, and gradients of every adapter and of the vectors of each pass."""
    losses, leaves = [], []
    for lengths in passes:
        leaf = None
        if vectors:
            draw = torch.Generator().manual_seed(len(lengths))
            leaf = torch.randn(len(lengths), WIDTH, generator=draw).requires_grad_()
            leaves.append(leaf)
        loss = generator(prompts(lengths, target=True), leaf).loss_sum
        loss.backward()
        losses.append(float(loss.detach()))
    generator.run_dummy_passes(vectors=vectors)
    trained = {n: p.grad for n, p in generator.named_parameters() if p.requires_grad}
    return losses, [*(trained[name] for name in sorted(trained)), *(leaf.grad for leaf in leaves)]


def _graphs() -> int:
    """Number of compiled graphs."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compare(name: str, ranks: Ranks) -> dict:
    """Runs an unsharded and a sharded generator over the same prompts."""
    kind, policy, vectors, dtype, compiled = CASES[name]
    unsharded, sharded = (make_generator(kind, policy, dtype) for _ in range(2))
    frozen = [p for p in sharded.parameters() if not p.requires_grad]
    total = sum(p.nbytes for p in frozen)
    blocks = decoder_blocks(sharded.model)
    shard_generator(sharded, ranks.mesh(torch.device("cpu")), ranks.all_reduce_max)
    if compiled:
        for generator in (sharded, unsharded):
            compile_generator(generator)
    local = [p.to_local() for p in sharded.parameters() if not p.requires_grad]
    outcome = {"share": sum(t.untyped_storage().size() for t in local) / total, "differences": []}
    torch._dynamo.utils.counters.clear()
    outcome["graphs"] = [0, 0]
    gathered = None
    for passes in PASSES[ranks.rank]:
        before = _graphs()
        ours = train(sharded, passes, vectors)
        outcome["graphs"][0] += _graphs() - before
        theirs = train(unsharded, passes, vectors)
        outcome["graphs"][1] = _graphs() - outcome["graphs"][0]
        outcome["losses"] = [ours[0], theirs[0]]
        for a, b in zip(ours[1], theirs[1], strict=True):
            b = torch.zeros_like(a) if b is None else b  # only dummy passes
            scale = float(b.abs().max()) or 1.0
            outcome["differences"].append(float((a - b).abs().max()) / scale)
        # Only from the second round on: the first one puts our own forward into the blocks.
        gathered = gathered or GatheredBytes(blocks)
    outcome |= {"most": max(gathered.alive), "largest": gathered.largest, "left": gathered.now()}
    outcome["tokens"] = []
    for generator in (sharded, unsharded):
        generator.eval()
        with torch.no_grad():
            batches = [prompts(lengths, target=False) for lengths in DECODED[ranks.rank]]
            outcome["tokens"].append([generator.greedy_tokens(b, None, 6) for b in batches])
            generator.run_dummy_passes()
    outcome["left after decoding"] = gathered.now()
    return outcome


def max_concurrency(folder: Path, ranks: Ranks, size: int) -> int:
    """The most ranks that ran the block of `limited_concurrency` at the same time."""
    folder.mkdir(exist_ok=True)
    seen = 0
    with ranks.limited_concurrency(size):
        (folder / str(ranks.rank)).touch()
        for _ in range(20):
            time.sleep(0.01)
            seen = max(seen, len(list(folder.iterdir())))
        (folder / str(ranks.rank)).unlink()
    ranks.barrier()
    return ranks.all_reduce_max(seen)


def _main(argv: list[str]) -> int:
    plan = Path(argv[0])
    # Traces as usual but calls no C++ compiler.
    torch.compile = partial(torch.compile, backend="aot_eager")
    with init_ranks(RunConfig(rank_timeout=60)) as ranks:
        waves = [max_concurrency(plan.with_name(f"wave{size}"), ranks, size) for size in (1, 2)]
        plan.with_name(f"waves.{ranks.rank}.json").write_text(json.dumps(waves))
        direct = {name: compare(name, ranks) for name in CASES}
        plan.with_name(f"direct.{ranks.rank}.json").write_text(json.dumps(direct))
        for case in json.loads(plan.read_text()):
            if case.get("fails") == ranks.rank:
                Generator.embed = partialmethod(_fail, Generator.embed)
            outcome = ranks_worker.run_case(case, ranks)
            plan.with_name(f"{case['name']}.{ranks.rank}.json").write_text(json.dumps(outcome))
    return 0


def _fail(self: Generator, embed: Callable, *passed: object) -> object:
    # The check at load is no training pass.
    if self.training:
        raise ValueError("planted failure")
    return embed(self, *passed)


if __name__ == "__main__":
    raise SystemExit(run_main(_main, sys.argv[1:]))
