"""Gradients of phase 2: which parameters the answer loss reaches, and by which path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dragkit.generator.lora.gradient_watch import AdapterNotTrainedError
from dragkit.retriever.losses import retrieval_loss
from dragkit.trainer.joint_step import split_by_tokens
from dragkit.trainer.phase2 import CascadeBaseline
from tests.trainer.joint_cases import make, make_batch, relation_states


@pytest.fixture
def relations():
    return relation_states()


def gradients(phase, batch, relations):
    phase.model.zero_grad()
    counts = phase.counts([batch])
    out = phase.training_step(batch, relations, counts, 0)
    grads = {
        n: p.grad.clone()
        for n, p in phase.model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    return out, grads


def test_the_answer_loss_alone_trains_the_retriever(relations):
    phase = make()
    _, grads = gradients(phase, make_batch(phase.model.generator), relations)
    assert "retriever.fact_score.weight" in grads, "its only path is the gate"
    assert any(n.startswith("retriever.layers") for n in grads)
    assert any(n.startswith("projector") for n in grads)
    assert any("lora_B" in n for n in grads)


def test_the_adapter_watch_skips_steps_without_answers(relations):
    phase = make()
    batch = make_batch(phase.model.generator)
    gradients(phase, batch, relations)
    phase.check_gradients(phase.counts([replace(batch, target=None)]))
    assert phase.watch.step == 0
    phase.check_gradients(phase.counts([batch]))
    assert phase.watch.step == 1
    layer = next(m for m in phase.model.generator.modules() if hasattr(m, "lora_A"))
    layer.lora_B["default"].weight.grad = None
    with pytest.raises(AdapterNotTrainedError, match="lora_B"):
        phase.check_gradients(phase.counts([batch]))


def test_without_gate_or_without_vectors_the_scorer_gets_no_gradient(relations, monkeypatch):
    phase = make(generator={"structural_vectors": False})
    batch = make_batch(phase.model.generator)
    _, grads = gradients(phase, batch, relations)
    assert not any(n.startswith("retriever") for n in grads)
    assert any("lora_B" in n for n in grads)
    phase = make()
    draw, grad = phase.model.fact_sampler.draw, torch.autograd.grad

    def cut(logits, graph, step):
        selection, score = draw(logits.detach(), graph, step)
        gates = {"gate": selection.gate.detach(), "soft": selection.soft.detach()}
        return selection._replace(**gates), score

    def grad_of_connected(outputs, *args, **kwargs):
        unconnected = isinstance(outputs, torch.Tensor) and not outputs.requires_grad
        return (None,) if unconnected else grad(outputs, *args, **kwargs)

    monkeypatch.setattr(phase.model.fact_sampler, "draw", cut)
    monkeypatch.setattr(torch.autograd, "grad", grad_of_connected)
    _, grads = gradients(phase, batch, relations)
    assert "retriever.fact_score.weight" not in grads


def test_gradients_equal_those_of_one_uncut_backward(relations):
    """The cuts of `JointStep.run` must not change the gradient."""
    phase = make(loss={"ret_loss_weight": 0.3})
    model, batch = phase.model, make_batch(phase.model.generator)
    counts = phase.counts([batch])
    out, grads = gradients(phase, batch, relations)
    model.zero_grad()
    output = model.retriever(batch, relations)
    selection, _ = model.fact_sampler.draw(output.fact_logits, batch.graph, 0)
    prompt = model.prompt(batch, selection.index, with_target=True)
    vectors = selection.gate.unsqueeze(-1) * model.structural_vectors(output, batch, selection)
    generated = model.generator(prompt, vectors.flatten(0, -2)).loss_sum / counts["tokens"]
    retrieval = retrieval_loss(
        output.fact_logits, batch.graph.label, batch.graph.fact_ptr, rho=0.7, margin=1.0
    )
    total = generated + 0.3 * retrieval / counts["questions"]
    total.backward()
    torch.testing.assert_close(out.loss, total.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "max_prompts", "sizes"),
    [
        ([], 10, 2, []),
        ([5], 10, 2, [1]),
        ([11], 10, 2, [1]),  # longer than a micro-batch
        ([2, 3, 5], 10, 9, [3]),  # exactly full
        ([2, 3, 6], 10, 9, [2, 1]),
        ([2, 3, 6], 10, 1, [1, 1, 1]),
        ([4, 4, 4, 4], 8, 9, [2, 2]),
        ([1, 1, 20, 20], 10, 9, [2, 1, 1]),
        ([1, 1, 1, 1, 1], 100, 2, [2, 2, 1]),
        ([3, 90, 2], None, 9, [3]),
    ],
)
def test_micro_batches_hold_at_most_the_given_tokens_and_prompts(
    lengths, max_tokens, max_prompts, sizes
):
    assert split_by_tokens(lengths, max_tokens, max_prompts) == sizes


def test_one_micro_batch_keeps_the_order_and_several_start_with_short_prompts():
    phase = make()
    for max_tokens, max_prompts, microbatches in (
        (None, None, [[0, 1, 2, 3]]),
        (22, None, [[0, 1, 2, 3]]),
        (21, None, [[1, 3, 2], [0]]),
        (None, 3, [[1, 3, 2], [0]]),
        (8, 4, [[1, 3], [2], [0]]),
        (1, None, [[1], [3], [2], [0]]),
    ):
        phase.model.generator.max_tokens_per_microbatch = max_tokens
        update = {"generator_microbatch": max_prompts}
        generator = phase.step.config.generator.model_copy(update=update)
        phase.step.config = phase.config.model_copy(update={"generator": generator})
        assert phase.step.microbatches([9, 3, 7, 3]) == microbatches


@pytest.mark.parametrize(
    "limits",
    [{"generator_microbatch": 1}, {"generator_microbatch": 3}, {"max_tokens_per_microbatch": 150}],
    ids=str,
)
def test_generator_micro_batches_do_not_change_loss_and_gradients(relations, limits):
    whole, split = make(), make(generator=limits)
    microbatches = []
    forward = split.model.generator.forward

    def spy(prompt, *rest):
        microbatches.append(prompt.length.tolist())
        return forward(prompt, *rest)

    split.model.generator.forward = spy
    batch = make_batch(whole.model.generator)
    whole_out, whole_grads = gradients(whole, batch, relations)
    split_out, split_grads = gradients(split, batch, relations)
    assert sum(map(len, microbatches)) == 4 and len(microbatches) > 1
    max_prompts = limits.get("generator_microbatch", 4)
    max_tokens = limits.get("max_tokens_per_microbatch", 10_000)
    for lengths in microbatches:
        assert len(lengths) <= max_prompts and (sum(lengths) <= max_tokens or len(lengths) == 1)
    torch.testing.assert_close(whole_out.loss, split_out.loss)
    # This bias shifts all scores of a softmax alike, so its gradient is rounding alone.
    rounding = {"retriever.node_score.bias"}
    assert whole_grads.keys() - rounding == split_grads.keys() - rounding
    for name in whole_grads.keys() - rounding:
        # Micro-batches differ in padding and in the order of float32 sums, so single entries may
        # differ by more than the norm does.
        difference = (whole_grads[name] - split_grads[name]).norm()
        assert difference <= 1e-4 * whole_grads[name].norm() + 1e-7, name


def test_balance_makes_the_two_gradients_proportional(relations):
    phase = make(
        loss={"use_grad_norm_balance": True, "balance_rho": 0.9}, run={"log_grad_norms": True}
    )
    out, _ = gradients(phase, make_batch(phase.model.generator), relations)
    weighted = out.parts["retrieval_weight"] * out.parts["grad_norm_retrieval"]
    torch.testing.assert_close(weighted, 0.9 * out.parts["grad_norm_generator"])


@pytest.mark.parametrize("gate", [False, True])
def test_mixed_precision_trains_through_the_slots(relations, gate):
    phase = make(
        retriever={"gate_relation_by_instruction": gate},
        sampler={"k_facts": 2},
        run={"precision": "bfloat16"},
    )
    out, grads = gradients(phase, make_batch(phase.model.generator), relations)
    assert out.loss.isfinite() and "retriever.fact_score.weight" in grads
    assert all(bool(g.isfinite().all()) for g in grads.values())


def test_the_same_step_draws_the_same_facts(relations):
    phase = make()
    graph = make_batch(phase.model.generator).graph
    logits = torch.randn(graph.num_facts)
    one, two, other = (
        phase.model.fact_sampler.draw(logits, graph, step)[0].index for step in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_predictions_are_deterministic_and_complete(relations):
    phase = make()
    phase.model.eval()
    batch = make_batch(phase.model.generator)
    first, second = phase.predict(batch, relations), phase.predict(batch, relations)
    assert first == second and len(first) == 4
    assert all(len(p.ranked) == 9 and 1 <= len(p.selected) <= 4 for p in first)


def test_an_arm_of_vectors_alone_reads_text_in_the_cascade_only(relations):
    phase = make(generator={"fact_text": False})
    model, batch = phase.model, make_batch(phase.model.generator)
    index = torch.tensor([[0], [-1], [-1], [-1]], dtype=torch.int32)
    text = batch.facts.ids[batch.facts.ptr[0] : batch.facts.ptr[1]].tolist()
    fixed = len(batch.prefix.ids[: batch.prefix.ptr[1]]) + len(model.cue)
    lengths = {}
    for vectors in (True, False):
        prompt = model.prompt(batch, index, with_target=False, vectors=vectors)
        lengths[vectors] = int(prompt.length[0]) - fixed
    assert lengths == {True: 1, False: len(text)}
    _, grads = gradients(phase, batch, relations)
    assert any(name.startswith("projector") for name in grads)


def test_prompts_of_the_cascade_have_no_structural_vectors(relations, monkeypatch):
    joint, with_vectors = make(), []
    layout = joint.model.layout

    def spy(*args, **options):
        with_vectors.append(options["vectors"])
        return layout(*args, **options)

    monkeypatch.setattr(joint.model, "layout", spy)
    batch = make_batch(joint.model.generator)
    for phase in (joint, CascadeBaseline(joint.config, joint.model)):
        phase.predict(batch, relations)
    assert with_vectors == [True, False]
