"""Families of causal language models: each is used as transformers computes it, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.conformance import check_conformance, packed
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters, load_adapter
from dragkit.generator.lora.coverage import adapted_layers
from tests.generator.families import FAMILIES, REFUSED, VOCABULARY, Tokens, family_model

CPU = torch.device("cpu")
_OUTDATED = "run PYTHONPATH=.:kernels python scripts/family_table.py"
DRAW = torch.Generator().manual_seed(11)
TARGET = [5, 6, 7, 1]
PROMPTS = [torch.randint(3, VOCABULARY, (n,), generator=DRAW).tolist() for n in (23, 9, 14)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`scripts/family_table.py`, which writes the table of the page."""
    path = Path(__file__).parents[2] / "scripts" / "family_table.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented(script: ModuleType) -> dict[str, str]:
    """The rows of the page by family."""
    rows = script.PAGE.read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    return {row.split("|")[1].strip(): row + "\n" for row in rows.splitlines()[2:]}


def adapted(family: str, dtype: torch.dtype = torch.float32) -> Generator:
    """A generator with default adapters. What they add is zero, as in a new run."""
    model = family_model(family).to(dtype)
    return Generator(add_adapters(model, GeneratorConfig(lora_rank=2)), Tokens())


def draw_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Fills the adapters with small random numbers, and returns them by name."""
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(0.0, 0.1, generator=draw)
    return adapters


def own_continuation(model: nn.Module, prompt: list[int], limit: int) -> list[int]:
    """Greedy tokens of a prompt alone, by the model's forward without a cache."""
    ids = list(prompt)
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        if (token := int(logits[0, -1].argmax())) == Tokens.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_answers_are_the_models_own(
    family: str, tmp_path: Path, script: ModuleType
) -> None:
    generator = adapted(family)
    check_conformance(generator, "probed")
    model = generator.model.get_base_model()
    adapters = draw_adapters(generator.model)
    # One at a time, from ids, by the loss of transformers.
    losses = []
    for prompt in PROMPTS:
        labels = torch.tensor([[-100] * len(prompt) + TARGET])
        ids = torch.tensor([prompt + TARGET])
        losses.append(model(input_ids=ids, labels=labels, use_cache=False).loss * len(TARGET))
    sum(losses).backward()
    own = {name: parameter.grad.clone() for name, parameter in adapters.items()}
    generator.zero_grad()
    # Together, with a structural vector in each prompt, as in training.
    prompts = packed([(prompt, TARGET) for prompt in PROMPTS], CPU)
    vectors = generator.embed(prompts, None)[prompts.slot >= 0].detach().requires_grad_()
    out = generator.train()(prompts, vectors)
    out.loss_sum.backward()
    torch.testing.assert_close(out.prompt_loss, torch.stack(losses).detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in adapters.items():
        scale = float(own[name].abs().max())
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-3, atol=1e-3 * scale)
    assert float(vectors.grad.abs().amax(1).min()) > 0
    # A routed expert may have had no token.
    stacked = {n for n, m in adapted_layers(generator.model) if hasattr(m, "parameter_name")}
    dead = [n for n, gradient in own.items() if float(gradient.abs().max()) == 0.0]
    assert not dead or stacked, dead
    # Decoding.
    generator.eval()
    prompts = packed([(prompt, []) for prompt in PROMPTS], CPU)
    with torch.no_grad():
        wanted = [own_continuation(model, prompt, 6) for prompt in PROMPTS]
        assert generator.greedy_tokens(prompts, vectors.detach(), 6) == wanted
    # Saved adapters.
    generator.save_adapters(tmp_path)
    logits = torch.cat(list(generator.target_logits(packed([(PROMPTS[0], TARGET)], CPU), None)))
    again = Generator(load_adapter(family_model(family), tmp_path).eval(), Tokens())
    same = torch.cat(list(again.target_logits(packed([(PROMPTS[0], TARGET)], CPU), None)))
    torch.testing.assert_close(same, logits)
    assert documented(script)[family] == script.served_row(family, generator), _OUTDATED


@pytest.mark.parametrize(
    "family",
    ["gpt2", "qwen3_moe", "llama4_text", "mamba2", "bamba", "recurrent_gemma", "nemotron_h"],
)
def test_half_precision_trains_and_answers(family: str) -> None:
    generator = adapted(family, torch.bfloat16)
    check_conformance(generator, "probed")
    adapters = draw_adapters(generator.model)
    prompts = packed([(prompt, TARGET) for prompt in PROMPTS], CPU)
    vectors = generator.embed(prompts, None)[prompts.slot >= 0]
    generator.train()(prompts, vectors).loss_sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapters.values())
    prompts = packed([(prompt, []) for prompt in PROMPTS], CPU)
    assert len(generator.eval().greedy_tokens(prompts, vectors, 3)) == len(PROMPTS)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_served_is_refused_by_name(family: str, script: ModuleType) -> None:
    with pytest.raises(MissingInputError, match=rf"the generator mine \(family {family}\)"):
        check_conformance(Generator(family_model(family), Tokens()), "mine")
    assert documented(script)[family] == script.refused_row(family), _OUTDATED


def test_the_page_lists_these_families_and_no_others(script: ModuleType) -> None:
    assert list(documented(script)) == [*FAMILIES, *REFUSED], _OUTDATED
