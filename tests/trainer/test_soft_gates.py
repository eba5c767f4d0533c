"""Gates that weigh whole facts: their place in the prompt, and their gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dragkit.errors import ConfigError
from tests.trainer.joint_cases import make, make_batch, relation_states


def prompt_with_gates(phase, gates):
    """The prompts of four questions around facts of different number, and their vectors."""
    model = phase.model
    batch = make_batch(model.generator)
    index = torch.tensor([[0, 1, 2], [9, -1, -1], [20, 18, -1], [-1, -1, -1]], dtype=torch.int32)
    layout = model.layout(batch, index, with_target=True)
    torch.manual_seed(1)
    vectors = torch.randn(12, model.generator.dim) * model.generator.embedding_rms()
    return layout.assemble(range(4), *layout.copy_lengths().result(), gates), vectors


def test_a_gate_covers_the_slot_and_the_text_of_its_fact():
    phase = make()
    gates = torch.arange(1.0, 13.0).view(4, 3) / 20
    prompt, _ = prompt_with_gates(phase, gates)
    tokenize = phase.model.generator.tokenize
    for g, facts in enumerate(([0, 1, 2], [9], [20, 18], [])):
        lines = tokenize([f"node {i}, likes, thing {i % 3}\n" for i in facts])
        first = len(tokenize([f"Question: who is {g}?\n"])[0])
        expected = [1.0] * first
        for k, line in enumerate(lines):
            expected += [float(gates[g, k])] * (1 + len(line))
        start, end = prompt.ptr[g : g + 2].tolist()
        expected += [1.0] * (end - start - len(expected))
        assert prompt.gate[start:end].tolist() == pytest.approx(expected)


def test_gates_of_1_change_nothing_and_gates_near_0_hide_a_fact():
    phase = make()
    generator = phase.model.generator.eval()
    with torch.no_grad():
        plain, vectors = prompt_with_gates(phase, None)
        expected = generator(plain, vectors).prompt_loss
        ones, _ = prompt_with_gates(phase, torch.ones(4, 3))
        torch.testing.assert_close(generator(ones, vectors).prompt_loss, expected)
        # Other words in a hidden fact hardly matter. The convolutions still mix the last of them
        # with the tokens after the fact.
        gates = torch.ones(4, 3)
        gates[0, 1] = 1e-30
        hidden, _ = prompt_with_gates(phase, gates)
        rows = ((hidden.gate < 0.5) & (hidden.slot < 0)).nonzero().flatten()[:-4]
        ids = hidden.input_ids.clone()
        ids[rows] = ids[rows.flip(0)]
        effects = [
            generator(replace(prompt, input_ids=ids), vectors).prompt_loss[0]
            - generator(prompt, vectors).prompt_loss[0]
            for prompt in (hidden, plain)
        ]
        assert abs(float(effects[0])) < 0.1 * abs(float(effects[1]))


def test_the_gradient_of_a_gate_is_that_of_differences():
    phase = make()
    generator = phase.model.generator.eval()
    gates = torch.full((4, 3), 0.6).requires_grad_()
    prompt, vectors = prompt_with_gates(phase, gates)
    (gradient,) = torch.autograd.grad(generator(prompt, vectors).loss_sum, gates)
    assert not gradient[3].any() and bool(gradient[0].all())
    step = 0.02
    with torch.no_grad():
        for row, column in ((0, 0), (0, 2), (2, 1)):
            around = []
            for sign in (1, -1):
                moved = gates.detach().clone()
                moved[row, column] += sign * step
                prompt, _ = prompt_with_gates(phase, moved)
                around.append(generator(prompt, vectors).loss_sum)
            difference = (around[0] - around[1]) / (2 * step)
            torch.testing.assert_close(
                gradient[row, column], difference, rtol=2e-2, atol=2e-3, check_dtype=False
            )


def test_the_facts_are_those_of_the_largest_keys_with_relaxed_gates():
    phase = make(sampler={"estimator": "soft_gates", "temperature": 0.7})
    graph = make_batch(phase.model.generator).graph
    logits = torch.randn(graph.num_facts, requires_grad=True)
    selection, score = phase.model.fact_sampler.draw(logits, graph, 0)
    assert score is None and selection.index.shape == selection.gate.shape == (1, 4, 4)
    assert (selection.index >= 0).all()
    (gradient,) = torch.autograd.grad(selection.gate.sum(), logits)
    chosen = torch.zeros(graph.num_facts, dtype=torch.bool)
    chosen[selection.index.flatten().long()] = True
    gate = torch.zeros(graph.num_facts)
    gate[selection.index.flatten().long()] = selection.gate.detach().flatten()
    torch.testing.assert_close(gradient, gate * (1 - gate) / 0.7)
    assert bool((selection.gate.diff(dim=-1) <= 0).all()), "best key first"


@pytest.mark.parametrize("limits", [{}, {"generator_microbatch": 1}], ids=str)
def test_training_reaches_the_scorer_by_text_alone(limits):
    settings = {"estimator": "soft_gates"}
    phase = make(sampler=settings, generator={"structural_vectors": False, **limits})
    batch = make_batch(phase.model.generator)
    phase.training_step(batch, relation_states(), phase.counts([batch]), 0)
    gradient = phase.model.retriever.fact_score.weight.grad
    assert gradient is not None and bool(gradient.any())


def test_a_generator_without_gates_is_refused_before_training(monkeypatch):
    monkeypatch.setattr("dragkit.generator.generator.Generator.is_packed", False)
    with pytest.raises(ConfigError, match="soft_gates.*tiny is not a Nemotron-H.*leave_one_out"):
        make(sampler={"estimator": "soft_gates"})
