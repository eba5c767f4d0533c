"""The estimators' page: exact gradients, estimators and gates against independent truths."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.joint_cases import make, make_batch, relation_states

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
REPETITIONS = 20_000


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    names = ("subset_tables", "gradient_estimators", "estimators")
    yield [importlib.import_module(name) for name in names]
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def tables(scripts):
    return scripts[0]


@pytest.fixture
def gradients(scripts):
    return scripts[1]


@pytest.fixture
def page(scripts):
    return scripts[2]


def first_is_larger(logits):
    """P(l_0 + noise > l_1 + noise) of two logistic variables, in closed form."""
    odds = (logits[0] - logits[1]).exp()
    return odds * (odds - 1 - odds.log()) / (odds - 1) ** 2


LOGITS = torch.tensor([0.7, -0.4, -1.5, -0.9], dtype=torch.float64)


def loss_of(num_facts):
    """A loss without structure, so that no error cancels."""
    generator = torch.Generator().manual_seed(1)
    return 5 * torch.rand(2**num_facts, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["bernoulli", "exact_k"])
def test_one_of_two_facts_is_drawn_as_by_hand(gradients, mode):
    logits = torch.tensor([1.3, -0.6], dtype=torch.float64, requires_grad=True)
    probability = gradients.subset_probability(logits, 1, mode)
    by_hand = first_is_larger(logits)
    torch.testing.assert_close(
        probability, torch.stack([0 * by_hand, by_hand, 1 - by_hand, 0 * by_hand])
    )
    loss = torch.tensor([7.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(by_hand * (2 - 3), logits)
    torch.testing.assert_close(gradients.exact_gradient(logits, loss, 1, mode), expected)


def test_an_empty_draw_goes_to_the_largest_key(gradients):
    logits = torch.full((2,), -0.8, dtype=torch.float64)
    p = torch.sigmoid(logits[0])
    probability = gradients.subset_probability(logits, 2)
    # Equal facts share the empty draw.
    single = p * (1 - p) + (1 - p) ** 2 / 2
    torch.testing.assert_close(probability, torch.stack([0 * p, single, single, p * p]))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_probabilities_are_the_frequencies_of_the_product(gradients, tables, k, scale):
    logits = scale * LOGITS
    probability = gradients.subset_probability(logits, k)
    draws = gradients.draw(logits, gradients.noise_of(4, REPETITIONS, 1, seed=3), k)
    frequency = torch.bincount(draws.subset.flatten(), minlength=16) / REPETITIONS
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    assert (probability[tables.all_subsets(4).sum(1) > k] == 0).all()
    sigma = (probability * (1 - probability) / REPETITIONS).sqrt()
    assert ((frequency - probability).abs() <= 4.5 * sigma + 1e-9).all()


def z_score(values, exact):
    """Distance of the mean estimate from the exact gradient, in its standard errors."""
    return ((values.mean(0) - exact) / (values.std(0) / len(values) ** 0.5)).abs().max()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_score_function_estimators_are_unbiased(gradients, k):
    loss = loss_of(4)
    exact = gradients.exact_gradient(LOGITS, loss, k)
    noise = gradients.noise_of(4, REPETITIONS, 3, seed=5)
    draws = gradients.draw(LOGITS, noise, k)
    slope = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    losses, p = loss[draws.subset], torch.sigmoid(LOGITS)
    estimates = {
        "leave-one-out": gradients.leave_one_out(losses, draws.score),
        "control": gradients.leave_one_out_with_control(losses, draws, slope, p),
        "DisARM": gradients.disarm(LOGITS, loss, noise, k),
    }
    for name, values in estimates.items():
        assert z_score(values, exact) < 4, name
    # The score of the signs ignores how the keys' order decides an empty or capped draw.
    assert z_score(gradients.leave_one_out(losses, draws.fires - p), exact) > 8


def test_the_marginal_estimate_tends_to_the_exact_gradient(gradients):
    """Its bias is of order 1 / M. The exact gradient is compared with differences."""
    loss, k = loss_of(4), 3
    exact = gradients.exact_marginal_gradient(LOGITS, loss, k)

    def objective(logits):
        return -(gradients.subset_probability(logits, k) @ torch.exp(-loss)).log()

    step = 1e-5 * torch.eye(4, dtype=torch.float64)
    by_difference = [(objective(LOGITS + d) - objective(LOGITS - d)) / 2e-5 for d in step]
    torch.testing.assert_close(exact, torch.stack(by_difference), rtol=1e-6, atol=1e-9)
    bias = []
    for count in (4, 32):
        draws = gradients.draw(LOGITS, gradients.noise_of(4, REPETITIONS, count, seed=8), k)
        weight = gradients.posterior_weight(loss[draws.subset])
        values = gradients.weighted_scores(weight, draws.score)
        bias.append(float((values.mean(0) - exact).norm() / exact.norm()))
    assert bias[1] < min(bias[0] / 4, 0.1)


def test_arms_is_unbiased_where_no_draw_is_empty(gradients):
    logits = LOGITS + torch.tensor([12.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    loss = loss_of(4)
    uniform = torch.sigmoid(gradients.noise_of(4, REPETITIONS, 4, seed=6))
    values = gradients.arms(logits, loss, uniform, 4)
    exact = gradients.exact_gradient(logits, loss, 4)
    assert z_score(values[:, 1:], exact[1:]) < 4
    independent = gradients.draw(logits, gradients.noise_of(4, REPETITIONS, 4, seed=6), 4)
    plain = gradients.leave_one_out(loss[independent.subset], independent.score)
    assert values.var(0).sum() < plain.var(0).sum()


def test_gates_of_a_linear_loss_have_the_derivative_of_the_probability(gradients):
    slope = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    noise = gradients.noise_of(4, REPETITIONS, 1, seed=7)
    table = slope.expand(16, 4)
    p = torch.sigmoid(LOGITS)
    mean = gradients.straight_through(LOGITS, table, noise, k=4, estimator="straight_through")
    torch.testing.assert_close(mean, (slope * p * (1 - p)).expand_as(mean))
    concrete = gradients.straight_through(
        LOGITS, table, noise, k=4, estimator="binary_concrete", temperature=0.5
    )
    soft = torch.sigmoid((LOGITS + noise[0]) / 0.5)
    torch.testing.assert_close(concrete, slope * soft * (1 - soft) / 0.5)


@pytest.fixture
def question(tables):
    phase = make(sampler={"k_facts": 9})
    model = phase.model.eval().requires_grad_(False)
    batch = make_batch(model.generator, count=1)
    return tables.QuestionPrompts(model, batch, relation_states(), 4)


def test_a_question_keeps_positive_and_probable_facts(question):
    logits, label = question.logits, question.label
    assert question.fits()
    assert (logits.diff() <= 0).all()
    assert label.sum() >= 2
    assert label.sum() < 4


def test_tables_are_the_losses_of_training_and_their_derivatives(tables, question):
    made = tables.make_tables(question, num_draws=3, temperatures=(0.5,), seed=0)
    model, batch = question.model, question.batch
    index = torch.tensor([[question.facts[0], question.facts[2], -1]], dtype=torch.int32)
    prompt = model.prompt(batch, index, with_target=True)
    vectors = question.vectors[[0, 2, 0]]
    loss = model.generator(prompt, vectors).loss_sum
    torch.testing.assert_close(made.loss[0b101].float(), loss)
    assert made.num_tokens[0b101] == prompt.length[0]
    assert (made.vector_gate[0b101][[1, 3]] == 0).all()
    assert (made.log_gate[0b101][[1, 3]] == 0).all()
    gate = torch.ones(3, 1, requires_grad=True)
    loss = model.generator(prompt, gate * vectors).loss_sum
    (expected,) = torch.autograd.grad(loss, gate)
    torch.testing.assert_close(
        made.vector_gate[0b101][[0, 2]].float(), expected[:2, 0], rtol=1e-3, atol=1e-5
    )


def test_gradients_at_log_gates_are_differences_of_the_loss(question):
    question.model.double()
    question.vectors = question.vectors.double()
    local = torch.tensor([[0, 2, 3, -1]])
    gate = torch.tensor([[0.9, 0.2, 0.5, 1.0]], dtype=torch.float64)
    _, at_gate = question.gradients(local, gate)

    def loss(gate):
        return question.model.generator(*question._prompt(local, gate)).prompt_loss[0]

    step = 3e-3 * torch.eye(4, dtype=torch.float64)  # the loss is float32
    expected = [(loss(gate + row) - loss(gate - row)) / 6e-3 for row in step]
    torch.testing.assert_close(at_gate[0], torch.stack(expected).double(), rtol=2e-3, atol=2e-3)
    assert at_gate[0, 3] == 0


def test_errors_of_a_known_estimator(page, gradients):
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    noise = torch.randn(50_000, 3, generator=generator, dtype=torch.float64)
    shift = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    rows = [
        gradients.Estimates("e", "f", 2, exact + noise, exact),
        gradients.Estimates("e", "f", 2, exact + shift + noise, exact),
    ]
    summary = page.summarise(rows)
    # |shift| = 5 and |exact|^2 = 50 over both questions.
    assert summary.bias == pytest.approx(5 / 50**0.5, rel=0.02)
    assert summary.variance == pytest.approx(6 / 50, rel=0.02)
    assert summary.cosine_of_mean == pytest.approx(50 / (50 * 75) ** 0.5, rel=0.01)
    assert "| e | 2 | 0.71 | 0.12 |" in page.table([summary])


def test_the_plot_is_the_same_each_time(page, tmp_path):
    rows = [page.Summary("a", "leave-one-out", m, 0, 1, 1, 0.5, 1, 0.5) for m in (2, 4)]
    for name in ("a.svg", "b.svg"):
        page.plot({"start": rows, "end": rows}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
