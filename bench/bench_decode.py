"""Greedy decoding with the model's cache against running the whole prompt for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.data import (
    BenchFile,
    bench_config,
    best_facts_prompt,
    question_source,
    text_encoder,
)
from bench.measure import DEVICE, Contender, Tally
from bench.results import Comparison
from dragkit.demo import demo_files
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt
from dragkit.trainer.build import build_joint

# A step without the cache takes as long as the prompt.
pytestmark = pytest.mark.timeout(1800)
_MAX_NEW_TOKENS = 12


class Decoded(NamedTuple):
    """Tokens of every prompt, without the end token, and their texts."""

    tokens: list[list[int]]
    texts: list[str]


def decode_with_cache(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
) -> Decoded:
    """Decodes by the generator's own loop, with the model's cache."""
    return _decoded(generator, generator.greedy_tokens(prompt, vectors, max_new_tokens))


def _decoded(generator: Generator, tokens: list[list[int]]) -> Decoded:
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Decoded(tokens, [text.strip() for text in texts])


@torch.no_grad()
def decode_without_cache(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
) -> Decoded:
    """Decodes by running the whole prompt for each token, with the last logits only."""
    embeds, mask = generator.pad(generator.embed(prompt, vectors), prompt, left=True)
    end, table = generator.eos_token_id, generator.model.get_input_embeddings()
    done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    tokens = []
    for _ in range(max_new_tokens):
        logits = generator.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        token = logits.argmax(-1)
        tokens.append(token)
        done |= token == end
        if done.all():
            break
        embeds = torch.cat([embeds, table(token).unsqueeze(1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    rows = [row + [end] for row in torch.stack(tokens, dim=1).tolist()]
    return _decoded(generator, [row[: row.index(end)] for row in rows])


def check_tokens(cached: Decoded, uncached: Decoded) -> None:
    """The gate before the timing.

    Raises:
        ValueError: a token or a text differs. The message has the indices of the first prompts.
    """
    pairs = zip(cached.tokens, uncached.tokens, strict=True)
    wrong = [index for index, (ours, peers) in enumerate(pairs) if ours != peers]
    if wrong or cached.texts != uncached.texts:
        raise ValueError(f"decoding: the results differ at prompts {wrong[:3]}; not timed")


def test_decoding(
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Questions of the demo, ten facts in a prompt, at most 12 tokens, the bundled generator."""
    num_prompts = request.config.getoption("--bench-prompts")
    config = bench_config(2, run__device=DEVICE.type)
    joint = build_joint(config, text_encoder(cache_dir), DEVICE).model.eval()
    # A shorter file, because the source packs and encodes every question of its file.
    lines = Path(demo_files(cache_dir).test).read_text(encoding="utf-8").splitlines(keepends=True)
    file = BenchFile(tmp_path / "questions.jsonl", "demo.test")
    file.path.write_text("".join(lines[:num_prompts]), encoding="utf-8")
    source = question_source(file, config, cache_dir, joint.generator, num_prompts)
    rows = list(range(num_prompts))
    prompt, vectors = best_facts_prompt(joint, source, rows, with_target=False)

    cached, uncached = (
        decode(joint.generator, prompt, vectors, _MAX_NEW_TOKENS)
        for decode in (decode_with_cache, decode_without_cache)
    )
    check_tokens(cached, uncached)
    num_tokens = sum(len(tokens) for tokens in cached.tokens)

    def contender(name: str, decode: Callable[..., Decoded], peer: bool) -> Contender:
        tally = Tally()

        def step() -> None:
            decode(joint.generator, prompt, vectors, _MAX_NEW_TOKENS)
            tally.tokens += num_tokens

        return Contender(name, step, peer=peer, tally=tally)

    contenders = [
        contender("dragkit, cached", decode_with_cache, False),
        contender("every token anew", decode_without_cache, True),
    ]
    about = {
        "data": file.name,
        "prompts": num_prompts,
        "prompt tokens": f"{int(prompt.length.min())} to {int(prompt.length.max())}",
        "tokens at most": _MAX_NEW_TOKENS,
        "tokens generated": num_tokens,
    }
    name = "greedy decoding, tiny generator"
    timed(Comparison(name, about, [], questions=num_prompts), contenders, DEVICE)
