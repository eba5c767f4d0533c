"""Greedy decoding with the model's cache against running the whole prompt for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.data import BenchFile, bench_config, question_source, text_encoder
from bench.measure import DEVICE, Contender, Tally
from bench.results import Comparison
from dragkit.demo import demo_files
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt
from dragkit.trainer.build import build_joint

# A step without the cache is as slow as the prompt is long.
pytestmark = pytest.mark.timeout(1800)
_TOKENS = 12


class Decoded(NamedTuple):
    """Tokens of every prompt, without the end token, and their texts."""

    tokens: list[list[int]]
    texts: list[str]


def decode_cached(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, count: int
) -> Decoded:
    """By the generator's own loop, with the model's cache."""
    return _decoded(generator, generator.greedy_tokens(prompt, vectors, count))


def _decoded(generator: Generator, tokens: list[list[int]]) -> Decoded:
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Decoded(tokens, [text.strip() for text in texts])


@torch.no_grad()
def decode_anew(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, count: int
) -> Decoded:
    """By a loop that runs the whole prompt for each token and computes the last logits only."""
    embeds, mask = generator.pad(generator.embed(prompt, vectors), prompt, left=True)
    end, table = generator.eos_token_id, generator.model.get_input_embeddings()
    done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    found = []
    for _ in range(count):
        logits = generator.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        token = logits.argmax(-1)
        found.append(token)
        done |= token == end
        if done.all():
            break
        embeds = torch.cat([embeds, table(token).unsqueeze(1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    rows = [row + [end] for row in torch.stack(found, dim=1).tolist()]
    return _decoded(generator, [row[: row.index(end)] for row in rows])


def check_tokens(cached: Decoded, anew: Decoded) -> None:
    """The gate before the timing.

    Raises:
        ValueError: a token or a text differs. The message names the first such prompts.
    """
    pairs = zip(cached.tokens, anew.tokens, strict=True)
    wrong = [place for place, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if wrong or cached.texts != anew.texts:
        raise ValueError(f"decoding: the results differ at prompts {wrong[:3]}; not timed")


def test_decoding(
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Questions of the demo, ten facts a prompt, 12 tokens at most, the bundled generator."""
    prompts = request.config.getoption("--bench-prompts")
    config = bench_config(2, run__device=DEVICE.type)
    joint = build_joint(config, text_encoder(cache_dir), DEVICE).model.eval()
    # The first ones alone: every question of a set is packed and its text encoded.
    lines = Path(demo_files(cache_dir).test).read_text(encoding="utf-8").splitlines(keepends=True)
    file = BenchFile(tmp_path / "questions.jsonl", "demo.test")
    file.path.write_text("".join(lines[:prompts]), encoding="utf-8")
    source = question_source(file, config, cache_dir, joint.generator, prompts)
    batch = source.collator(list(range(prompts))).to(DEVICE)
    with torch.no_grad():
        output = joint.retriever(batch, source.relations.to(DEVICE))
        chosen = joint.fact_sampler.best(output.fact_logits, batch.graph)
        prompt = joint.prompt(batch, chosen.index, with_target=False)
        vectors = joint.structural_vectors(output, batch, chosen).flatten(0, 1)

    decoded = [
        decode(joint.generator, prompt, vectors, _TOKENS) for decode in (decode_cached, decode_anew)
    ]
    check_tokens(*decoded)
    num_tokens = sum(len(tokens) for tokens in decoded[0].tokens)

    def contender(name: str, decode: Callable[..., Decoded], peer: bool) -> Contender:
        tally = Tally()

        def step() -> None:
            decode(joint.generator, prompt, vectors, _TOKENS)
            tally.tokens += num_tokens

        return Contender(name, step, peer=peer, tally=tally)

    contenders = [
        contender("dragkit, cached", decode_cached, False),
        contender("every token anew", decode_anew, True),
    ]
    about = {
        "data": file.name,
        "prompts": prompts,
        "prompt tokens": f"{int(prompt.length.min())} to {int(prompt.length.max())}",
        "tokens at most": _TOKENS,
        "tokens generated": num_tokens,
    }
    name = "greedy decoding, tiny generator"
    timed(Comparison(name, about, [], questions=prompts), contenders, DEVICE)
