"""The generator's part of a joint step over packs against the earlier formulation of it.

Earlier: prompts padded on the right in micro-batches of four, a cache built in training, logits of
the whole vocabulary at every token, a loop over experts, eager attention. Both run the same model
with random weights: the 30B's architecture, on a CPU with its widths divided by 21.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.data import (
    SMALL,
    bench_config,
    question_file,
    question_source,
    text_encoder,
    whole_batches,
)
from bench.measure import DEVICE, Contender, Tally, check_agreement
from bench.results import Comparison
from dragkit.config import GeneratorConfig, TrainConfig
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.nemotron_h.patches import patch_nemotron_h
from dragkit.generator.prompt import NeuralPrompt
from dragkit.generator.random_weights import ARCHITECTURES, PREFIX, Architecture, random_model
from dragkit.observe.flops import active_weights
from dragkit.trainer.build import build_joint
from dragkit.trainer.compile import compile_generator

pytestmark = pytest.mark.timeout(1800)
_WHOLE = "nemotron-3-nano-30b-a3b"
# On a CPU the same blocks and experts. Every width, the vocabulary's too, is divided by 21, and the
# heads and groups are as many as such widths allow.
_SMALL = Architecture(
    ARCHITECTURES[_WHOLE].pattern,
    {
        **ARCHITECTURES[_WHOLE].sizes,
        "vocab_size": 6240,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "head_dim": 24,
        "mamba_num_heads": 12,
        "mamba_head_dim": 16,
        "ssm_state_size": 32,
        "n_groups": 2,
        "moe_intermediate_size": 88,
        "moe_shared_expert_intermediate_size": 176,
        "intermediate_size": 88,
    },
)
_QUESTIONS, _MICROBATCH = 16, 4


@contextmanager
def _as_earlier(model: nn.Module) -> Iterator[None]:
    """transformers' eager attention and loop over experts, as in the earlier implementation."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    kept = config._attn_implementation, config._experts_implementation, config.use_cache
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    config.use_cache = True
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation, config.use_cache = kept


class _Step:
    """Loss and gradients of a batch of prompts, by packs or as earlier."""

    def __init__(self, generator: Generator, parts: list[NeuralPrompt], vectors: Tensor) -> None:
        self.generator, self.parts, self.vectors = generator, parts, vectors
        self.total = sum(len(part.target_id) for part in parts)

    def packed(self, whole: NeuralPrompt) -> Tensor:
        """Ours: one pass, with logits at supervised tokens only."""
        loss = self.generator(whole, self.vectors).loss_sum / self.total
        loss.backward()
        return loss.detach()

    def earlier(self) -> Tensor:
        """Padded micro-batches with logits at every token."""
        loss = torch.zeros((), device=self.vectors.device)
        with _as_earlier(self.generator.model):
            for part in self.parts:
                embeds = self.generator.embed(part, self.vectors)
                padded, mask = self.generator.pad(embeds, part, left=False)
                labels = torch.full(mask.shape, -100, device=mask.device)
                row, place = part.question[part.target_row], part.position[part.target_row]
                labels[row, place + 1] = part.target_id
                found = self.generator.model(
                    inputs_embeds=padded, attention_mask=mask, labels=labels
                ).loss
                share = found * (len(part.target_id) / self.total)
                share.backward()
                loss = loss + share.detach()
        return loss

    def gradients(self) -> list[Tensor]:
        """Gradients of the vectors and adapters, which are then cleared."""
        leaves = [self.vectors, *(p for p in self.generator.parameters() if p.requires_grad)]
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found


def _prompts(config: TrainConfig, cache_dir: Path) -> tuple[NeuralPrompt, list[NeuralPrompt], str]:
    """Questions with ten facts each as one pack, the same in micro-batches, and the data's name."""
    joint = build_joint(config, text_encoder(cache_dir), DEVICE).model.eval()
    file = question_file(SMALL, cache_dir)
    source = question_source(file, config, cache_dir, joint.generator, _QUESTIONS)

    def prompt(rows: list[int]) -> NeuralPrompt:
        batch = source.collator(rows).to(DEVICE)
        with torch.no_grad():
            output = joint.retriever(batch, source.relations.to(DEVICE))
            chosen = joint.fact_sampler.best(output.fact_logits, batch.graph)
            return joint.prompt(batch, chosen.index, with_target=True)

    (rows,) = whole_batches(source, _QUESTIONS, 1)
    parts = [prompt(rows[i : i + _MICROBATCH]) for i in range(0, _QUESTIONS, _MICROBATCH)]
    return prompt(rows), parts, file.name


def _check(step: _Step, whole: NeuralPrompt, dtype: torch.dtype) -> None:
    """Both formulations agree in the loss and, by its norm, in every gradient.

    In half precision rounding sends some tokens to other experts, which no tolerance for single
    numbers covers.

    Raises:
        ValueError: they do not.
    """
    loss, gradient = (1e-2, 0.15) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    ours = step.packed(whole)
    mine = step.gradients()
    check_agreement("loss", ours, step.earlier(), loss)
    for place, (a, b) in enumerate(zip(mine, step.gradients(), strict=True)):
        off = float((a.float() - b.float()).norm() / b.float().norm())
        if not off <= gradient:
            raise ValueError(f"gradient {place}: differs from ours by {off:.1e} of it; not timed")


@pytest.mark.full
def test_joint_step(
    timed: Callable[..., Comparison], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward through the frozen model into adapters and fact vectors."""
    config = bench_config(2, run__device=DEVICE.type)
    facts = config.sampler.k_facts
    whole, parts, data = _prompts(config, cache_dir)
    name = _WHOLE
    if DEVICE.type != "cuda":
        name = "small"
        monkeypatch.setitem(ARCHITECTURES, name, _SMALL)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = random_model(PREFIX + name, DEVICE, dtype).requires_grad_(False)
    patch_nemotron_h(model)
    model = add_adapters(model, GeneratorConfig()).train()
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:  # B at zero would leave A without a gradient to compare
            nn.init.normal_(parameter, std=0.02)
    tokenizer = build_joint(bench_config(2), text_encoder(cache_dir), torch.device("cpu"))
    generator = Generator(model, tokenizer.model.generator.tokenizer)
    # Slots count up through the batch, so each micro-batch has those of its own questions.
    slots = _QUESTIONS * facts
    for number, part in enumerate(parts):
        part.slot[part.slot >= 0] += number * _MICROBATCH * facts
    draw = torch.Generator().manual_seed(0)
    vectors = 0.02 * torch.randn(slots, generator.dim, generator=draw)
    step = _Step(generator, parts, vectors.to(DEVICE, dtype).requires_grad_())

    _check(step, whole, dtype)

    def contender(label: str, run: Callable[[], object], peer: bool = False) -> Contender:
        tally = Tally(weights=active_weights(model))

        def call() -> None:
            tally.tokens += len(whole.input_ids)
            tally.supervised += len(whole.target_id)
            run()

        return Contender(label, call, peer=peer, tally=tally)

    contenders = [
        contender("packs", lambda: step.packed(whole)),
        contender("earlier formulation", step.earlier, peer=True),
    ]
    if DEVICE.type == "cuda":  # what training does there
        compiled = Generator(model, generator.tokenizer)
        compile_generator(compiled)
        again = _Step(compiled, parts, step.vectors)
        contenders.insert(0, contender("packs, compiled", lambda: again.packed(whole)))
    about = {
        "model": name,
        "questions from": data,
        "blocks": len(generator._decoder[0].layers),
        "tokens": len(whole.input_ids),
        "padded tokens": sum(len(p.length) * int(p.length.max()) for p in parts),
        "supervised": len(whole.target_id),
    }
    title = "generator's part of a joint step"
    timed(Comparison(title, about, [], questions=_QUESTIONS), contenders, DEVICE)
