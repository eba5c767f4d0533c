"""Greedy decoding with the model's cache against running the whole prompt for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.data import BenchFile, bench_config, best_facts_prompt, question_source, text_encoder
from bench.measure import DEVICE, Contender, Tally
from bench.results import Comparison
from dragkit.demo import demo_files
from dragkit.generator.causal_lm import pad
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt
from dragkit.trainer.build import build_joint

# A step without the cache takes as long as the prompt.
pytestmark = pytest.mark.timeout(1800)
_MAX_NEW_TOKENS = 12


@torch.no_grad()
def decode_without_cache(
    generator: Generator, prompt: NeuralPrompt, vectors: Tensor | None, max_new_tokens: int
) -> list[list[int]]:
    """As `Generator.greedy_tokens`, but runs the whole prompt for each token, with last logits."""
    _, embeds, mask = pad(generator.embed(prompt, vectors), prompt, left=True)
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
    return [row[: row.index(end)] for row in rows]


def check_tokens(cached: list[list[int]], uncached: list[list[int]]) -> None:
    """The gate before the timing.

    Raises:
        ValueError: a token differs. The message has the indices of the first such prompts.
    """
    pairs = zip(cached, uncached, strict=True)
    if wrong := [index for index, (ours, peers) in enumerate(pairs) if ours != peers]:
        raise ValueError(f"decoding: the results differ at prompts {wrong[:3]}; not timed")


def test_decoding(
    timed: Callable[..., None], cache_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
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

    arguments = (joint.generator, prompt, vectors, _MAX_NEW_TOKENS)
    tokens = Generator.greedy_tokens(*arguments)
    check_tokens(tokens, decode_without_cache(*arguments))
    num_tokens = sum(len(row) for row in tokens)

    def contender(name: str, decode: Callable[..., list[list[int]]], peer: bool) -> Contender:
        tally = Tally()

        def step() -> None:
            decode(*arguments)
            tally.tokens += num_tokens

        return Contender(name, step, peer=peer, tally=tally)

    contenders = [
        contender("dragkit, cached", Generator.greedy_tokens, False),
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
