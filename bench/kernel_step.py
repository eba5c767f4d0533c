"""The problem of a whole retriever: phase 1, forward and backward, six layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch_geometric.data import Batch

from bench.kernel_packs import Pack, random_questions
from bench.kernel_ways import Contender, Problem, compiled, ours
from bench.pyg_rearev import PackedPyGReaRev
from dragkit.config import RetrieverConfig
from dragkit.data.packed import QuestionBatch
from dragkit.retriever.losses import retrieval_loss
from dragkit.retriever.retriever import Retriever


def retriever_step(
    pack: Pack, dtype: torch.dtype, width: int, count: int, compile_: bool
) -> Problem:
    """Logits and loss of two stages of three layers; the gradients are those of the loss.

    bfloat16 stands for autocast over float32 weights, as in training.
    """
    device = pack.device
    batch, pyg, relations = random_questions(pack)
    config = RetrieverConfig(
        hidden_dim=width,
        num_instructions=count,
        num_reasoning_steps=3,
        num_stages=2,
        dropout=0.0,
    )
    torch.manual_seed(0)
    mine = Retriever(config, relations.states.shape[-1]).to(device)
    theirs = PackedPyGReaRev(config, relations.states.shape[-1]).to(device)
    names = [name for name, _ in mine.named_parameters()]
    # The same tensors in both, so that gradients are those of one list of leaves.
    for name, parameter in mine.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(module), leaf, parameter)
    graph = batch.graph

    def loss(logits: Tensor) -> tuple[Tensor, ...]:
        total = retrieval_loss(
            logits.float() if logits.dtype == torch.bfloat16 else logits,
            graph.label,
            graph.fact_ptr,
            rho=0.7,
            margin=1.0,
            max_facts=graph.max_facts,
        )
        return total / graph.num_graphs, logits.detach()

    def step(model: Callable[..., Tensor], data: QuestionBatch | Batch) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16):
            logits = model(data, relations)
        return loss(logits)

    def fact_logits(batch: QuestionBatch, relations: object) -> Tensor:
        return mine(batch, relations).fact_logits

    def truth(*leaves: Tensor) -> tuple[Tensor, ...]:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        wide_batch = batch.with_tensors([wide(tensor) for tensor in batch.tensors()])
        states = type(relations)(relations.states.double(), relations.mask)
        parameters = dict(zip(names, leaves, strict=True))
        found = torch.func.functional_call(mine, parameters, (wide_batch, states))
        return loss(found.fact_logits)

    def eager() -> tuple[Tensor, ...]:
        return step(theirs, pyg)

    narrow = dtype == torch.bfloat16
    return Problem(
        name="retriever step",
        about=pack.sizes() | {"C": width, "K": count, "layers": 6},
        # A softmax does not see what all its scores have in common.
        leaves=[p for n, p in mine.named_parameters() if n != "node_score.bias"],
        truth=lambda *leaves: truth(*_with_bias(names, mine, leaves)),
        contenders=[
            *ours("message_passing", pack.node_ptr.float(), lambda: step(fact_logits, batch)),
            Contender("PyG, relations projected once", eager),
            compiled("PyG, relations projected once", eager, compile_),
        ],
        dtype=dtype,
        # One ReLU of n that rounding decides moves a gradient by 1 / sqrt(n) of its size.
        tolerance=(5e-2, 2e-1) if narrow else (1e-4, 2e-3),
    )


def _with_bias(
    names: list[str], model: torch.nn.Module, leaves: tuple[Tensor, ...]
) -> list[Tensor]:
    """The leaves and the one parameter that is none, in the model's order."""
    following = iter(leaves)
    bias = model.get_parameter("node_score.bias").detach()
    return [bias.to(leaves[0]) if n == "node_score.bias" else next(following) for n in names]
