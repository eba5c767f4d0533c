"""Choice of at most k facts per question: noisy and differentiable, or the best ones."""

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

__all__ = ["FactSelection", "gumbel_topk", "gumbel_topk_ref", "top_facts"]

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
    mode: str = "bernoulli",
    estimator: str = "binary_concrete",
    max_facts: int | None = None,
    backend: str = "auto",
) -> FactSelection:
    """Draws facts by logistic-perturbed logits, key_i = l_i + noise_i.

    "bernoulli" (D-RAG's model): fact i is drawn when key_i > 0, so independently with probability
    sigmoid(l_i). Of more than k drawn facts the k largest keys stay; if none is drawn the best key
    is taken, with its own gradient. "exact_k": exactly min(k, E_g) facts, the largest keys; fact i
    is among them with probability close to sigmoid(l_i - nu), where nu makes these sum to k.

    The gate is 1 in the forward. Backward it stands for a relaxed choice s_i:

        bernoulli  binary_concrete   s = sigmoid(key / T)      ds/dl = s (1 - s) / T
        bernoulli  straight_through  s = sigmoid(l)            ds/dl = s (1 - s)
        exact_k    binary_concrete   s = sigmoid(key / T - nu) ds/dl = (diag(d) - d d^T / sum d) / T
        exact_k    straight_through  s = sigmoid(l - nu)       ds/dl = diag(d) - d d^T / sum d

    with d = s (1 - s), T the temperature, and nu solved per question on the argument shown. In
    budget mode a question of at most k facts has no choice: s = 1 and zero gradient. Infinite
    logits are certain facts without gradient. NaN logits are not refused: a check would wait for
    the device.

    Args:
        logits: float [E].
        fact_ptr: int32 [B+1] first fact of each question.
        k: slots per question, 0 or more; may exceed the number of facts.
        temperature: above 0; used by "binary_concrete".
        seed: int64 [] of the noise, with question_key int64 [B]; see logistic_noise.
        noise: float [E] in place of seed and question_key.
        mode: "bernoulli" or "exact_k".
        estimator: "binary_concrete" or "straight_through".
        max_facts: at least the facts of every question; without it the device is asked.
        backend: "auto", "triton" or "torch".

    Returns:
        FactSelection, floats in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or options do not fit.
        RuntimeError: Triton was asked for where it cannot run.
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
        raise ValueError("gumbel_topk: give either noise, or seed and question_key")
    path = resolve_backend("gumbel_topk", logits, backend)
    if seed is not None and question_key is not None:
        num_facts = logits.shape[0]
        noise = logistic_noise(seed, question_key, fact_ptr, num_facts=num_facts, backend=path)
    else:
        check_shape("gumbel_topk", "noise", noise, tuple(logits.shape))
        noise = noise.to(accumulator_dtype(logits))
    x, key = perturb_logits(logits, noise, temperature, estimator)
    width = max_segment_length(fact_ptr) if max_facts is None else max_facts
    exact_k, triton = mode == "exact_k", path == "triton"
    gate, soft, index, count = torch.ops.dragkit.gumbel_topk_fwd(
        x, key.detach(), fact_ptr, k, width, 0.0, exact_k, triton
    )
    return FactSelection(index, gate, count, soft)


def top_facts(
    logits: Tensor,
    fact_ptr: Tensor,
    k: int,
    threshold: float = 0.0,
    *,
    max_facts: int | None = None,
    backend: str = "auto",
) -> FactSelection:
    """The facts used at inference: the k largest logits with sigmoid(l) > threshold, best first.

    At least the best fact of a question that has one is kept (if k > 0); equal logits are taken
    by lowest fact. Deterministic; the gate carries no gradient.

    Args:
        logits: float [E].
        fact_ptr: int32 [B+1].
        k: slots per question.
        threshold: probability a fact must exceed; compared on the scale of the logits.
        max_facts: at least the facts of every question; without it the device is asked.
        backend: "auto", "triton" or "torch".

    Returns:
        FactSelection; `soft` is sigmoid(logits).

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    _check(logits, fact_ptr, k, "top_facts")
    x, key = perturb_logits(logits.detach(), None, 1.0, "straight_through")
    width = max_segment_length(fact_ptr) if max_facts is None else max_facts
    triton = resolve_backend("gumbel_topk", logits, backend) == "triton"
    gate, soft, index, count = torch.ops.dragkit.gumbel_topk_fwd(
        x, key, fact_ptr, k, width, _logit(threshold), False, triton
    )
    return FactSelection(index, gate, count, soft)


def _check(logits: Tensor, fact_ptr: Tensor, k: int, op: str) -> None:
    check_shape(op, "logits", logits, (None,))
    check_shape(op, "fact_ptr", fact_ptr, (None,))
    check_float(op, logits=logits)
    check_index(op, fact_ptr=fact_ptr)
    if k < 0:
        raise ValueError(f"{op}: k must be 0 or more, got {k}")


def _logit(probability: float) -> float:
    """The logit of a probability; infinite at and beyond 0 and 1."""
    if 0.0 < probability < 1.0:
        return math.log(probability) - math.log1p(-probability)
    return math.inf if probability >= 1.0 else -math.inf
