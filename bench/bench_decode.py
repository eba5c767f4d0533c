"""Greedy decoding with the model's cache against running the whole prompt for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.data import QuestionFile, bench_config, question_source, text_encoder
from bench.measure import Tally, Way
from bench.tables import Comparison
from bench.train_ways import DEVICE
from dragkit.demo import demo_files
from dragkit.model.decode import greedy_decode
from dragkit.model.generator import Generator
from dragkit.model.prompt import NeuralPrompt
from dragkit.trainer.run import build_joint

# A step without the cache is as slow as the prompt is long.
pytestmark = pytest.mark.timeout(1800)
_TOKENS = 12


class Decoded(NamedTuple):
    """What one call gave.

    Attributes:
        tokens: int64 [B, at most T], the end token where a text is done.
        texts: without it.
    """

    tokens: Tensor
    texts: list[str]


@contextmanager
def _kept_tokens(generator: Generator) -> Iterator[list[Tensor]]:
    """The token ids that the model's `generate` returns meanwhile."""
    model, kept = generator.model, []
    # Around PEFT's or the library's own method, which the instance gets back.
    own, generate = vars(model).get("generate"), model.generate

    def keeping(**arguments: object) -> Tensor:
        kept.append(generate(**arguments))
        return kept[-1]

    model.generate = keeping
    try:
        yield kept
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def decode_cached(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, count: int
) -> Decoded:
    """`greedy_decode`, and the tokens that its texts are made of."""
    with _kept_tokens(generator) as kept:
        texts = greedy_decode(generator, prompt, vectors, count)
    return Decoded(kept[0], texts)


@torch.no_grad()
def decode_anew(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, count: int
) -> Decoded:
    """The same by a loop that runs everything again for each token; only last logits are made."""
    embeds, mask = generator.embed(prompt, vectors, left=True)
    end, table = generator.eos_token_id, generator.model.get_input_embeddings()
    done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    found = []
    for _ in range(count):
        logits = generator.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        token = logits.argmax(-1).masked_fill(done, end)
        found.append(token)
        done |= token == end
        if done.all():
            break
        embeds = torch.cat([embeds, table(token).unsqueeze(1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    tokens = torch.stack(found, dim=1)
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Decoded(tokens, [text.strip() for text in texts])


def check_tokens(cached: Decoded, anew: Decoded) -> None:
    """The gate in front of the timing.

    Raises:
        ValueError: a token differs, with the first such prompt.
    """
    if cached.tokens.shape != anew.tokens.shape:
        shapes = f"{list(cached.tokens.shape)} and {list(anew.tokens.shape)}"
        raise ValueError(f"decoding: tokens of shapes {shapes}; not timed")
    wrong = (cached.tokens != anew.tokens).any(1).nonzero().flatten().tolist()
    if wrong or cached.texts != anew.texts:
        raise ValueError(f"decoding: the ways differ at prompts {wrong[:3]}; not timed")


def generated(decoded: Decoded, end: int) -> int:
    """Tokens of all texts, each one's end token included."""
    before = (decoded.tokens == end).cumsum(1) - (decoded.tokens == end).long()
    return int((before == 0).sum())


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
    file = QuestionFile(tmp_path / "questions.jsonl", "demo.test")
    file.path.write_text("".join(lines[:prompts]), encoding="utf-8")
    source = question_source(file, config, cache_dir, joint.generator, prompts)
    batch = source.collator(list(range(prompts))).to(DEVICE)
    with torch.no_grad():
        output = joint.retriever(batch, source.relations.to(DEVICE))
        chosen = joint.sampler.best(output.fact_logits, batch.graph)
        prompt = joint.prompt(batch, chosen.index, with_target=False)
        vectors = joint.vectors(output, batch, chosen).flatten(0, 1)

    kept = []
    for way in (decode_cached, decode_anew):
        kept.append(way(joint.generator, prompt, vectors, _TOKENS))
    check_tokens(*kept)
    made = generated(kept[0], joint.generator.eos_token_id)
    ways = []
    for name, way in (("dragkit, cached", decode_cached), ("every token anew", decode_anew)):
        tally = Tally()

        def step(way: Callable[..., Decoded] = way, tally: Tally = tally) -> None:
            way(joint.generator, prompt, vectors, _TOKENS)
            tally.tokens += made

        ways.append(Way(name, step, prompts, 1, tally))
    about = {
        "data": file.name,
        "prompts": prompts,
        "prompt tokens": f"{int(prompt.length.min())} to {int(prompt.length.max())}",
        "tokens at most": _TOKENS,
        "tokens generated": made,
    }
    timed("greedy decoding, tiny generator", ways, about, DEVICE)
