"""The generator on neural prompts: batches change no result, and only answers are scored."""

from __future__ import annotations

import pytest
import torch

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError, MissingInputError
from dragkit.generator.generator import Generator
from dragkit.generator.load import load_generator, resolve_generator
from dragkit.generator.nemotron_h import decoding
from dragkit.generator.nemotron_h.patches import patch_nemotron_h
from dragkit.generator.prompt import NeuralPrompt
from tests.nemotron_cases import toy_model

WIDTH = 32


class Words:
    """A tokenizer whose texts are the token ids."""

    eos_token_id = 1

    def batch_decode(self, rows, **_):
        return [" ".join(str(int(i)) for i in row if int(i) != 1) for row in rows]


@pytest.fixture(scope="module")
def generator() -> Generator:
    """All types of blocks of a Nemotron-H at toy widths."""
    model = toy_model(std=0.15)
    patch_nemotron_h(model)
    return Generator(model, Words())


def prompt_of(questions: list[tuple[list[int], int, list[int]]]) -> NeuralPrompt:
    """Packs (tokens, position of the slot, target) of every question."""
    ids, slot, position, question, ptr, rows, wanted = [], [], [], [], [0], [], []
    for b, (tokens, slot_position, target) in enumerate(questions):
        start = len(ids)
        whole = tokens + target
        ids += whole
        slot += [b if i == slot_position else -1 for i in range(len(whole))]
        position += range(len(whole))
        question += [b] * len(whole)
        ptr.append(len(ids))
        rows += range(start + len(tokens) - 1, start + len(whole) - 1)
        wanted += target
    return NeuralPrompt(
        *map(torch.tensor, (ids, slot, position, question, ptr, rows, wanted)),
        longest=max(position) + 4,
    )


def questions(with_target=True):
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in (3, 17, 16, 40, 1, 9):
        tokens = torch.randint(2, 64, (length,), generator=generator).tolist()
        target = [*torch.randint(2, 64, (length % 3,), generator=generator).tolist(), 1]
        made.append((tokens, length // 2, target if with_target else []))
    return made


def test_a_question_in_a_batch_equals_the_question_alone(generator):
    torch.manual_seed(3)
    made, vectors = questions(), torch.randn(6, WIDTH)
    together = vectors.clone().requires_grad_()
    out = generator(prompt_of(made), together)
    out.loss_sum.backward()
    singles = []
    for i, question in enumerate(made):
        alone = vectors[i : i + 1].clone().requires_grad_()
        singles.append(generator(prompt_of([question]), alone))
        singles[-1].loss_sum.backward()
        torch.testing.assert_close(together.grad[i], alone.grad[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.loss_sum, sum(x.loss_sum for x in singles), rtol=1e-5, atol=0)
    assert int(out.num_correct) == sum(int(x.num_correct) for x in singles)


def test_decoding_in_a_batch_equals_the_loop_without_a_cache(generator):
    torch.manual_seed(4)
    made, vectors = questions(with_target=False), torch.randn(6, WIDTH)
    batch = generator.greedy_texts(prompt_of(made), vectors, 8)
    for i, question in enumerate(made):
        single = prompt_of([question])
        assert generator.greedy_texts(single, vectors[i : i + 1], 8) == [batch[i]]
        embeds = generator.embed(single, vectors[i : i + 1])[None]
        decoded = []
        with torch.no_grad():
            for _ in range(8):
                logits = generator.model(inputs_embeds=embeds, use_cache=False).logits
                token = int(logits[0, -1].argmax())
                if token == 1:
                    break
                decoded.append(token)
                step = generator.model.get_input_embeddings()(torch.tensor([[token]]))
                embeds = torch.cat([embeds, step], dim=1)
        assert " ".join(map(str, decoded)) == batch[i]


@pytest.mark.parametrize(("tokens", "passes"), [(1, 6), (20, 4), (40, 3), (75, 2), (86, 1)])
def test_prefill_in_several_microbatches(generator, tokens, passes, monkeypatch):
    made, vectors = prompt_of(questions(with_target=False)), torch.randn(6, WIDTH)
    wanted = generator.greedy_tokens(made, vectors, 8)
    assert len({tuple(row) for row in wanted}) > 1
    sizes, prefill = [], decoding.prefill

    def counting(model, embeds, *rest, **options):
        sizes.append(len(embeds))
        return prefill(model, embeds, *rest, **options)

    monkeypatch.setattr(decoding, "prefill", counting)
    monkeypatch.setattr(generator, "max_tokens_per_microbatch", tokens)
    assert generator.greedy_tokens(made, vectors, 8) == wanted
    assert len(sizes) == passes and sum(sizes) == len(made.input_ids)
    longest = int(made.length.max())
    assert max(sizes) <= max(tokens, longest)


@pytest.mark.parametrize("end", [1.0, 0.0, 2.0])
def test_loss_equals_cross_entropy_of_the_models_own_logits(generator, end):
    (question,) = questions()[1:2]
    prompt = prompt_of([question])
    vectors = torch.randn(1, WIDTH)
    embeds = generator.embed(prompt, vectors)[None]
    logits = generator.model(inputs_embeds=embeds, use_cache=False).logits[0]
    start, target = len(question[0]), question[2]
    token_loss = torch.nn.functional.cross_entropy(
        logits[start - 1 : -1], torch.tensor(target), reduction="none"
    )
    assert len(target) > 1
    token_loss[-1] *= end
    torch.testing.assert_close(generator(prompt, vectors, end).loss_sum, token_loss.sum())


def test_the_time_step_limit_is_that_of_the_configuration(generator):
    limits = {
        tuple(m.time_step_limit) for m in generator.model.modules() if hasattr(m, "time_step_limit")
    }
    assert limits == {tuple(float(x) for x in generator.model.config.time_step_limit)}


def test_only_adapters_of_the_tiny_generator_train():
    generator = load_generator(GeneratorConfig(lora_rank=4), torch.device("cpu"), name="tiny")
    trained = [n for n, p in generator.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    state = generator.adapter_state()
    name, tensor = next(iter(state.items()))
    with torch.no_grad():
        tensor.fill_(0.25)
    assert float(generator.adapter_state()[name].mean()) == 0.25, "adapter_state has copied"


def test_errors_of_loading_say_what_to_do(tmp_path):
    with pytest.raises(MissingInputError, match="hf download.*--generator_model tiny"):
        resolve_generator(GeneratorConfig(), name="no-such-organisation/no-such-model")
    with pytest.raises(MissingInputError, match="config.json"):
        resolve_generator(GeneratorConfig(), name=str(tmp_path))
    with pytest.raises(ConfigError, match="generator_dim"):
        load_generator(GeneratorConfig(generator_dim=4096), torch.device("cpu"), name="tiny")


class Scaled(torch.nn.Embedding):
    """Embeddings that are scaled after the lookup, as those of Gemma."""

    def forward(self, ids):
        return 3.0 * super().forward(ids)


@pytest.mark.parametrize("embedding_type", [torch.nn.Embedding, Scaled])
def test_vectors_replace_the_embeddings_at_their_slots(generator, embedding_type, monkeypatch):
    embedding = embedding_type(64, WIDTH).requires_grad_(False)
    monkeypatch.setattr(generator, "_embedding", [embedding])
    prompt = prompt_of([([5, 6, 7], 1, [1]), ([8, 9], 0, [])])
    vectors = torch.randn(2, WIDTH, requires_grad=True)
    embeds = generator.embed(prompt, vectors)
    wanted = embedding(prompt.input_ids).clone()
    assert torch.equal(generator.embed(prompt, None), wanted)
    wanted[1], wanted[4] = vectors[0], vectors[1]
    assert torch.equal(embeds, wanted)
    (grad,) = torch.autograd.grad(embeds[:5].sum(), vectors)
    assert torch.equal(grad, torch.ones(2, WIDTH))
