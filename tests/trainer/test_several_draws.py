"""Several draws of a question in a step, and the ways of the answer loss into the retriever."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.joint_cases import make, make_batch, relation_states

LEAVE_ONE_OUT = {"estimator": "leave_one_out", "num_draws": 3}


def gradients(phase, batch, step=0):
    phase.model.zero_grad()
    out = phase.training_step(batch, relation_states(), phase.counts([batch]), step)
    grads = {
        name: parameter.grad.clone()
        for name, parameter in phase.model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    return out, grads


@pytest.mark.parametrize("objective", ["expected", "marginal"])
def test_draws_equal_prompts_one_at_a_time(objective):
    """Every draw of every question alone gives the losses, and these give the gradient."""
    weights = {"ret_loss_weight": 0.3, "draw_objective": objective}
    phase = make(sampler=LEAVE_ONE_OUT, loss=weights)
    model, batch = phase.model, make_batch(phase.model.generator)
    counts = phase.counts([batch])
    out, grads = gradients(phase, batch)
    model.zero_grad()
    output = model.retriever(batch, relation_states())
    logits = output.fact_logits
    selection, score = model.fact_sampler.draw(logits.detach(), batch.graph, 0)
    total, losses = 0.0, torch.zeros(3, 4)
    for m in range(3):
        draw = selection._replace(index=selection.index[m])
        prompt = model.layout(batch, draw.index, with_target=True)
        sizes = prompt.copy_lengths().result()
        vectors = model.structural_vectors(output, batch, draw).flatten(0, -2)
        for b in range(4):
            loss = model.generator(prompt.assemble([b], *sizes), vectors).loss_sum
            losses[m, b] = loss.detach()
            total = total + loss / (3 * counts["tokens"])
    retrieval = phase.retrieval_loss(logits, batch.graph) / counts["questions"]
    others = (losses.sum(0) - losses) / 2
    advantage = (losses - others) / 3
    if objective == "marginal":
        likelihood = torch.exp(-losses)
        advantage = 1 / 3 - likelihood / likelihood.sum(0)
    advantage = advantage[:, batch.graph.fact_graph.long()] / counts["tokens"]
    surrogate = ((advantage * score).sum(0) * logits).sum()
    (total + 0.3 * retrieval + surrogate).backward()
    torch.testing.assert_close(out.loss, (total + 0.3 * retrieval).detach())
    assert float(losses.std(0).min()) > 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any() and name in grads:
            difference = (grads[name] - parameter.grad).norm()
            assert difference <= 1e-3 * parameter.grad.norm() + 1e-7, name


def test_the_draws_of_a_question_are_the_same_in_any_micro_batch():
    """A prompt's loss belongs to its draw and question, in whatever order prompts run."""
    whole = make(sampler=LEAVE_ONE_OUT)
    split = make(sampler=LEAVE_ONE_OUT, generator={"generator_microbatch": 5})
    batch = make_batch(whole.model.generator)
    (_, expected), (_, grads) = gradients(whole, batch), gradients(split, batch)
    name = "retriever.fact_score.weight"
    torch.testing.assert_close(grads[name], expected[name], rtol=1e-3, atol=1e-6)


SCORER, LAYERS = "retriever.fact_score.weight", "retriever.layers"


@pytest.mark.parametrize("estimator", ["straight_through", "leave_one_out"])
@pytest.mark.parametrize(
    ("ways", "reaches_scorer", "reaches_layers"),
    [
        ("both", True, True),
        ("gates", True, True),
        ("vectors", False, True),
        ("none", False, False),
    ],
)
def test_each_way_of_the_answer_loss(estimator, ways, reaches_scorer, reaches_layers):
    """The scorer has no way but the draw. The projector and the adapters learn in any case."""
    sampler = {"estimator": estimator, "num_draws": 2}
    phase = make(sampler=sampler, loss={"generator_gradient": ways})
    _, grads = gradients(phase, make_batch(phase.model.generator))
    assert (SCORER in grads) == reaches_scorer
    assert any(name.startswith(LAYERS) for name in grads) == reaches_layers
    assert any(name.startswith("projector") for name in grads)
    assert any("lora_B" in name for name in grads)


def test_both_ways_add_up():
    grads = {}
    for ways in ("both", "gates", "vectors"):
        phase = make(sampler=LEAVE_ONE_OUT, loss={"generator_gradient": ways})
        _, grads[ways] = gradients(phase, make_batch(phase.model.generator))
    for name in grads["both"]:
        if name.startswith("retriever"):
            parts = [grads[way].get(name, 0.0) for way in ("gates", "vectors")]
            torch.testing.assert_close(grads["both"][name], sum(parts), rtol=1e-3, atol=1e-6)


def test_leave_one_out_trains_the_retriever_by_text_alone():
    """Straight-through gates act on vectors, so that with text alone they have no gradient."""
    for estimator, learns in (("straight_through", False), ("leave_one_out", True)):
        sampler = {"estimator": estimator, "num_draws": 2}
        phase = make(sampler=sampler, generator={"structural_vectors": False})
        _, grads = gradients(phase, make_batch(phase.model.generator))
        assert (SCORER in grads) == learns


def test_a_frozen_retriever_has_no_gradient_and_no_optimizer_state():
    phase = make(optim={"retriever_lr_scale": 0.0}, loss={"ret_loss_weight": 0.5})
    _, grads = gradients(phase, make_batch(phase.model.generator))
    assert grads and not any(name.startswith("retriever") for name in grads)
    assert [group["name"] for group in phase.parameter_groups()] == ["projector", "lora"]


def test_the_scale_of_the_retrievers_rate():
    phase = make(optim={"retriever_lr_scale": 0.25, "lr": 1e-3})
    rates = {group["name"]: group["lr"] for group in phase.parameter_groups()}
    assert rates["retriever"] == 2.5e-4 and rates["projector"] == 1e-3
