"""Selection of at most k facts per question: a differentiable draw, or the best facts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import accumulator_dtype, check_float, check_index, check_shape
from ..noise import logistic_noise
from ..segments import max_segment_length
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import FactSelection, gumbel_topk_ref, perturb_logits
from .score import draw_score

__all__ = ["FactSelection", "draw_score", "gumbel_topk", "gumbel_topk_ref", "top_facts"]

MODES = ("bernoulli", "exact_k")
ESTIMATORS = ("binary_concrete", "straight_through")


def gumbel_topk(
    logits: Tensor,
    fact_ptr: Tensor,
    k: int,
    *,
    temperature: float = 0.5,
    seed: Tensor | None = None,
    question_key: Tensor | None = None,
    noise: Tensor | None = None,
    num_draws: int | None = None,
    mode: str = "bernoulli",
    estimator: str = "binary_concrete",
    max_facts: int | None = None,
    backend: str = "auto",
) -> FactSelection:
    """Draws facts by their perturbed logits, key_i = l_i + noise_i.

    "bernoulli" (the model of D-RAG) draws fact i if key_i > 0, independently with probability
    sigmoid(l_i). If more than k facts are drawn, the k largest keys are selected. If none is drawn,
    the largest key is selected, with its own gradient. "exact_k" selects the min(k, E_g) largest
    keys. Fact i is then selected with probability close to sigmoid(l_i - nu), where nu makes these
    probabilities sum to k.

    The gate is 1 in the forward. In the backward it has the gradient of a relaxed choice s_i:

        bernoulli  binary_concrete   s = sigmoid(key / T)      ds/dl = s (1 - s) / T
        bernoulli  straight_through  s = sigmoid(l)            ds/dl = s (1 - s)
        exact_k    binary_concrete   s = sigmoid(key / T - nu) ds/dl = (diag(d) - d d^T / sum d) / T
        exact_k    straight_through  s = sigmoid(l - nu)       ds/dl = diag(d) - d d^T / sum d

    with d = s (1 - s), the temperature T, and nu solved per question on the argument shown. With
    "exact_k", a question of at most k facts has s = 1 and zero gradient. An infinite logit is
    certain and has no gradient. NaN logits do not raise: the check would wait for the device.

    Args:
        logits: float [E].
        fact_ptr: int32 [B+1] first fact of each question.
        k: maximum number of facts per question, at least 0. It may exceed a question's facts.
        temperature: T > 0 of "binary_concrete".
        seed: int64 [] seed of the noise, with question_key. See logistic_noise.
        question_key: int64 [B], with seed.
        noise: float [E] or [M, E] in place of seed and question_key.
        num_draws: number M of independent draws, with seed. None makes one.
        mode: "bernoulli" or "exact_k".
        estimator: "binary_concrete" or "straight_through".
        max_facts: upper bound on the facts of a question. None reads it from the device, and waits.
        backend: "auto", "triton" or "torch".

    Returns:
        FactSelection in float32, or float64 for float64 logits. Its fields begin with the dimension
        M if `num_draws` or noise [M, E] is given.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    _check(logits, fact_ptr, k, "gumbel_topk")
    if mode not in MODES or estimator not in ESTIMATORS:
        raise ValueError(
            f"gumbel_topk: mode must be one of {MODES} and estimator one of {ESTIMATORS}, "
            f"got {mode!r} and {estimator!r}"
        )
    if not temperature > 0:
        raise ValueError(f"gumbel_topk: temperature must be above 0, got {temperature}")
    if (noise is None) == (seed is None) or (seed is None) != (question_key is None):
        raise ValueError("gumbel_topk: give either noise, or both seed and question_key")
    path = resolve_backend("gumbel_topk", logits, backend)
    num_facts = logits.shape[0]
    if seed is not None and question_key is not None:
        noise = logistic_noise(
            seed, question_key, fact_ptr, num_facts=num_facts, num_draws=num_draws, backend=path
        )
    else:
        shape = (None, num_facts) if noise.dim() == 2 else (num_facts,)
        check_shape("gumbel_topk", "noise", noise, shape)
        noise = noise.to(accumulator_dtype(logits))
    x, key = perturb_logits(logits, noise, temperature, estimator)
    width = max_segment_length(fact_ptr) if max_facts is None else max_facts
    return _select(x, key, fact_ptr, k, width, 0.0, mode == "exact_k", path == "triton")


def top_facts(
    logits: Tensor,
    fact_ptr: Tensor,
    k: int,
    threshold: float = 0.0,
    *,
    max_facts: int | None = None,
    backend: str = "auto",
) -> FactSelection:
    """The k largest logits with sigmoid(l) > threshold, for inference. No noise, no gradient.

    A question with facts selects at least its best fact if k > 0. Equal logits go to the lowest
    fact.

    Args:
        logits: float [E].
        fact_ptr: int32 [B+1] first fact of each question.
        k: maximum number of facts per question.
        threshold: probability that a fact must exceed. It is compared as a logit.
        max_facts: upper bound on the facts of a question. None reads it from the device, and waits.
        backend: "auto", "triton" or "torch".

    Returns:
        FactSelection with soft = sigmoid(logits).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    _check(logits, fact_ptr, k, "top_facts")
    x, key = perturb_logits(logits.detach(), None, 1.0, "straight_through")
    width = max_segment_length(fact_ptr) if max_facts is None else max_facts
    triton = resolve_backend("gumbel_topk", logits, backend) == "triton"
    return _select(x, key, fact_ptr, k, width, _logit(threshold), False, triton)


def _select(x: Tensor, key: Tensor, *options: object) -> FactSelection:
    """Calls the op, which takes [M, E]. Without the dimension M in `key` the result has none."""
    x, rows = x.expand_as(key), key.detach()
    if key.dim() == 1:
        x, rows = x.unsqueeze(0), rows.unsqueeze(0)
    gate, soft, index, count = torch.ops.dragkit.gumbel_topk_fwd(x, rows, *options)
    selection = FactSelection(index, gate, count, soft)
    return FactSelection(*(t[0] for t in selection)) if key.dim() == 1 else selection


def _check(logits: Tensor, fact_ptr: Tensor, k: int, op: str) -> None:
    check_shape(op, "logits", logits, (None,))
    check_shape(op, "fact_ptr", fact_ptr, (None,))
    check_float(op, logits=logits)
    check_index(op, fact_ptr=fact_ptr)
    if k < 0:
        raise ValueError(f"{op}: k must be 0 or more, got {k}")


def _logit(probability: float) -> float:
    """The logit of a probability, -inf up to 0 and inf from 1 on."""
    if 0.0 < probability < 1.0:
        return math.log(probability) - math.log1p(-probability)
    return math.inf if probability >= 1.0 else -math.inf
