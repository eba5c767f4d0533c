"""Score function of a draw: the gradient of its log-probability at the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segments import segment_ids


@torch.no_grad()
def draw_score(
    logits: Tensor, noise: Tensor, fact_ptr: Tensor, k: int, mode: str = "bernoulli"
) -> Tensor:
    """Gradient at the logits of the log-probability of what `gumbel_topk` selects.

    For any function f of the selected set, E[f dlog P(selection)/dl] is the gradient of E[f]. The
    density of a key, key_i = l_i + noise_i, has the score tanh(noise_i / 2) = 2 u_i - 1, which is
    right for every selection. Where "bernoulli" draws between 1 and k facts, the set depends on
    the signs z_i = [key_i > 0] alone. There the mean given the signs, z_i - sigmoid(l_i), takes
    its place and has less variance. Where it draws none or more than k, the order of the keys
    decides, as it always does in "exact_k".

    Args:
        logits: float [E].
        noise: float [M, E] noise of the draws.
        fact_ptr: int32 [B+1] first fact of each question.
        k: maximum number of facts per question.
        mode: "bernoulli" or "exact_k".

    Returns:
        float [M, E]. Padding rows after the last question, and facts of a question of at most k
        facts in "exact_k", have 0.
    """
    num_facts = logits.shape[0]
    segment = segment_ids(fact_ptr, num_facts)
    score = torch.tanh(0.5 * noise)
    if mode == "bernoulli":
        fires = (logits + noise > 0).to(noise.dtype)
        # The padding rows after the last question are one more segment.
        ptr = F.pad(fact_ptr, (0, 1), value=num_facts)
        count = torch.segment_reduce(fires.t().contiguous(), "sum", offsets=ptr, unsafe=True)
        by_signs = ((count >= 1) & (count <= k)).index_select(0, segment).t()
        score = torch.where(by_signs, fires - torch.sigmoid(logits), score)
        chosen = torch.ones_like(segment, dtype=torch.bool)
    else:
        chosen = F.pad(fact_ptr.diff() > k, (0, 1)).index_select(0, segment)
    return torch.where(chosen & (segment < fact_ptr.shape[0] - 1), score, 0.0)
