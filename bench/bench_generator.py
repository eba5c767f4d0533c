"""The generator's part of a joint step over packs against the earlier formulation of it.

The earlier formulation pads prompts on the right in micro-batches of four, builds a cache in
training, computes logits of the whole vocabulary at every token, loops over experts and uses eager
attention. Both run one model with random weights: the 30B's architecture, on a CPU with its widths
divided by 21.
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
    best_facts_prompt,
    question_file,
    question_source,
    text_encoder,
    whole_batches,
)
from bench.measure import DEVICE, Contender, Tally, check_agreement
from bench.results import Comparison
from dragkit.config import GeneratorConfig
from dragkit.generator.causal_lm import pad
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.nemotron_h.patches import patch_nemotron_h
from dragkit.generator.prompt import NeuralPrompt
from dragkit.generator.random_weights import ARCHITECTURES, PREFIX, Architecture, random_model
from dragkit.observe.flops import active_weights
from dragkit.trainer.build import build_joint
from dragkit.trainer.compile import compile_generator

pytestmark = pytest.mark.timeout(1800)
_LARGE = "nemotron-3-nano-30b-a3b"
# The same blocks and experts. All widths and the vocabulary are divided by 21. The widths then
# determine the numbers of heads and groups.
_REDUCED = Architecture(
    ARCHITECTURES[_LARGE].pattern,
    {
        **ARCHITECTURES[_LARGE].sizes,
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
_NUM_QUESTIONS, _MICROBATCH = 16, 4


@contextmanager
def _as_earlier(model: nn.Module) -> Iterator[None]:
    """transformers' eager attention and loop over experts, as in the earlier implementation."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    saved = config._attn_implementation, config._experts_implementation, config.use_cache
    # transformers reads these fields at every call, so the same model runs both formulations.
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    config.use_cache = True
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation, config.use_cache = saved


class _Step:
    """Loss and gradients of a batch of prompts, by packs or as earlier.

    Attributes:
        generator: with its adapters.
        whole: all prompts as one pack.
        parts: the same in micro-batches.
        vectors: float [slots, M] of all prompts, which need gradients.
    """

    def __init__(
        self, generator: Generator, whole: NeuralPrompt, parts: list[NeuralPrompt], vectors: Tensor
    ) -> None:
        self.generator, self.whole = generator, whole
        self.parts, self.vectors = parts, vectors
        self.num_targets = len(whole.target_id)

    def packed(self) -> Tensor:
        """Ours: one pass, with logits at supervised tokens only."""
        loss = self.generator(self.whole, self.vectors).loss_sum / self.num_targets
        loss.backward()
        return loss.detach()

    def earlier(self) -> Tensor:
        """Padded micro-batches with logits at every token."""
        loss = torch.zeros((), device=self.vectors.device)
        with _as_earlier(self.generator.model):
            for part in self.parts:
                embeds = self.generator.embed(part, self.vectors)
                _, padded, mask = pad(embeds, part, left=False)
                labels = torch.full(mask.shape, -100, device=mask.device)
                row, column = part.question[part.target_row], part.position[part.target_row]
                # transformers shifts labels by one, and `target_row` predicts the next token.
                labels[row, column + 1] = part.target_id
                mean = self.generator.model(
                    inputs_embeds=padded, attention_mask=mask, labels=labels
                ).loss
                part_loss = mean * (len(part.target_id) / self.num_targets)
                part_loss.backward()
                loss = loss + part_loss.detach()
        return loss

    def pop_gradients(self) -> list[Tensor]:
        """Gradients of the vectors and adapters, which are then cleared."""
        leaves = [self.vectors, *(p for p in self.generator.parameters() if p.requires_grad)]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients

    def check(self, dtype: torch.dtype) -> None:
        """Both formulations agree in the loss and in every gradient.

        Raises:
            ValueError: loss or gradients differ.
        """
        loss_limit, limit = (1e-2, 0.15) if dtype == torch.bfloat16 else (1e-5, 1e-4)
        ours, our_gradients = self.packed(), self.pop_gradients()
        check_agreement("loss", ours, self.earlier(), loss_limit)
        pairs = zip(our_gradients, self.pop_gradients(), strict=True)
        for index, (mine, theirs) in enumerate(pairs):
            check_agreement(f"gradient {index}", mine, theirs, limit, order=2)

    def contender(self, label: str, run: Callable[[], object], peer: bool = False) -> Contender:
        """One formulation, which counts its tokens."""
        tally = Tally(weights=active_weights(self.generator.model))

        def call() -> None:
            tally.tokens += len(self.whole.input_ids)
            tally.supervised += self.num_targets
            run()

        return Contender(label, call, peer=peer, tally=tally)


def _prompts(cache_dir: Path) -> tuple[Generator, NeuralPrompt, list[NeuralPrompt], str]:
    """The bundled generator, and questions with their best facts.

    Returns:
        The generator, the prompts as one pack and in micro-batches, and the name of the data.
    """
    config = bench_config(2, run__device=DEVICE.type)
    joint = build_joint(config, text_encoder(cache_dir), DEVICE).model.eval()
    file = question_file(SMALL, cache_dir)
    source = question_source(file, config, cache_dir, joint.generator, _NUM_QUESTIONS)
    (rows,) = whole_batches(source, _NUM_QUESTIONS, 1)
    whole, *parts = (
        best_facts_prompt(joint, source, part, with_target=True)[0]
        for part in (rows, *(rows[i : i + _MICROBATCH] for i in range(0, len(rows), _MICROBATCH)))
    )
    # Slots count up through the batch, so each micro-batch needs those of its own questions.
    for number, part in enumerate(parts):
        part.slot[part.slot >= 0] += number * _MICROBATCH * config.sampler.k_facts
    return joint.generator, whole, parts, file.name


@pytest.mark.full
def test_joint_step(
    timed: Callable[..., None], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward through the frozen model into adapters and fact vectors."""
    bundled, whole, parts, data = _prompts(cache_dir)
    name, dtype = _LARGE, torch.bfloat16
    if DEVICE.type != "cuda":
        name, dtype = "small", torch.float32
        monkeypatch.setitem(ARCHITECTURES, name, _REDUCED)
    model = random_model(PREFIX + name, DEVICE, dtype).requires_grad_(False)
    patch_nemotron_h(model)
    model = add_adapters(model, GeneratorConfig()).train()
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:  # B at zero would leave A without a gradient to compare
            nn.init.normal_(parameter, std=0.02)
    generator = Generator(model, bundled.tokenizer)
    draw = torch.Generator().manual_seed(0)
    num_slots = _NUM_QUESTIONS * bench_config(2).sampler.k_facts
    vectors = 0.02 * torch.randn(num_slots, generator.dim, generator=draw)
    step = _Step(generator, whole, parts, vectors.to(DEVICE, dtype).requires_grad_())
    step.check(dtype)

    contenders = [
        step.contender("packs", step.packed),
        step.contender("earlier formulation", step.earlier, peer=True),
    ]
    if DEVICE.type == "cuda":  # as training runs there
        compiled = _Step(Generator(model, generator.tokenizer), whole, parts, step.vectors)
        compile_generator(compiled.generator)
        contenders.insert(0, compiled.contender("packs, compiled", compiled.packed))
    about = {
        "model": name,
        "questions from": data,
        "blocks": len(generator._decoder[0].layers),
        "tokens": len(whole.input_ids),
        "padded tokens": sum(len(p.length) * int(p.length.max()) for p in parts),
        "supervised": len(whole.target_id),
    }
    title = "generator's part of a joint step"
    timed(Comparison(title, about, [], questions=_NUM_QUESTIONS), contenders, DEVICE)
