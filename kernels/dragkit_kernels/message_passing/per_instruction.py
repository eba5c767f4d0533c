"""The sums of the published layer, one per instruction and direction: plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator_dtype, check_float, check_index, check_shape
from ..orders import FactIndex, check_fact_index


def message_passing_per_instruction(
    p: Tensor,
    rel_fwd: Tensor,
    rel_inv: Tensor,
    self_fwd: Tensor,
    self_inv: Tensor,
    instruction: Tensor,
    *,
    fact_index: FactIndex,
    node_graph: Tensor,
) -> Tensor:
    """The sums of the published layer before its linear map, one per instruction and direction.

    out[v, 2k]   = sum_{e: tail=v} n_e p[head_e] relu(u^F[rel_e] * i_k) + p_v relu(u^F_self * i_k)
    out[v, 2k+1] = sum_{e: head=v} m_e p[tail_e] relu(u^I[rel_e] * i_k) + p_v relu(u^I_self * i_k)

    with n = `tail_count` and m = `head_count`. Tests check `message_passing` against this function.
    It has no kernel, and autograd differentiates it. Node and relation rows in `fact_index` are not
    checked.

    Args:
        p: float [N] weight of each sender.
        rel_fwd, rel_inv: float [R, C] projected relation vectors u, forward and inverse.
        self_fwd, self_inv: float [C] projected vectors of the self-loop.
        instruction: float [B, I, C].
        fact_index: the facts.
        node_graph: int32 [N], ascending.

    Returns:
        [N, 2I, C] in float32 (float64 if an argument is float64).

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: ReaRev (Mavromatis & Karypis 2022).
    """
    op, facts = "message_passing_per_instruction", fact_index
    check_shape(op, "instruction", instruction, (None, None, None))
    width = instruction.shape[2]
    check_shape(op, "p", p, (facts.num_nodes,))
    check_shape(op, "rel_fwd", rel_fwd, (None, width))
    check_shape(op, "rel_inv", rel_inv, tuple(rel_fwd.shape))
    check_shape(op, "self_fwd", self_fwd, (width,))
    check_shape(op, "self_inv", self_inv, (width,))
    check_shape(op, "node_graph", node_graph, (facts.num_nodes,))
    check_float(op, p=p, rel_fwd=rel_fwd, rel_inv=rel_inv, instruction=instruction)
    check_float(op, self_fwd=self_fwd, self_inv=self_inv)
    check_index(op, node_graph=node_graph)
    check_fact_index(op, facts)
    dtype = accumulator_dtype(p, rel_fwd, rel_inv, self_fwd, self_inv, instruction)
    p, instruction = p.to(dtype), instruction.to(dtype)
    gate = instruction.index_select(0, facts.pair_graph)
    sums = []
    for u, u_self, sender, count, perm, ptr in (
        (rel_fwd, self_fwd, facts.head, facts.tail_count, facts.tail_perm, facts.tail_ptr),
        (rel_inv, self_inv, facts.tail, facts.head_count, facts.head_perm, facts.head_ptr),
    ):
        rows = u.to(dtype).index_select(0, facts.pair_relation).unsqueeze(1)
        rows = torch.relu(rows * gate)  # [P, I, C]
        weight = (p.index_select(0, sender) * count).index_select(0, perm)
        # Devices differ in where embedding_bag adds facts of padding, which have weight zero. The
        # last node takes them here.
        bounds = torch.cat([ptr[:-1], ptr.new_full((1,), perm.shape[0])])
        total = F.embedding_bag(
            facts.fact_pair.index_select(0, perm),
            rows.flatten(1),
            bounds,
            mode="sum",
            per_sample_weights=weight,
            include_last_offset=True,
        ).unflatten(1, instruction.shape[1:])
        self_loop = torch.relu(u_self.to(dtype) * instruction).index_select(0, node_graph)
        sums.append(torch.addcmul(total, p.view(-1, 1, 1), self_loop))
    return torch.stack(sums, dim=2).flatten(1, 2)
