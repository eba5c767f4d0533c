"""The projector: one vector of the generator's width from a fact of the retriever."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dragkit.data.packed import PackedGraph
from dragkit.retriever.retriever import RetrieverOutput
from dragkit_kernels import fact_rows


class Projector(nn.Module):
    """A two-layer MLP whose output has the scale of the generator's token embeddings.

    Args:
        fact_dim: width of [h_head ; x_relation ; h_tail].
        hidden_dim: width of the hidden layer. None is `generator_dim`, but at least 128.
        generator_dim: width M of the generator.
        embedding_rms: root mean square of the generator's token embeddings. An RMS norm brings the
            output to this scale, whatever the projector learns.
    """

    def __init__(
        self, fact_dim: int, hidden_dim: int | None, generator_dim: int, embedding_rms: float
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or max(128, generator_dim)
        self.hidden = nn.Linear(fact_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, generator_dim)
        self.norm = nn.RMSNorm(generator_dim, eps=1e-6)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def forward(self, output: RetrieverOutput, graph: PackedGraph, index: Tensor) -> Tensor:
        """Structural vectors of the selected facts, float [..., K, M].

        Args:
            output: output of the retriever.
            graph: the pack that the retriever read.
            index: int32 [..., K] facts. -1 is no fact, and its vector has no meaning.
        """
        features = fact_rows(
            output.node, output.relation, index, fact_index=graph.fact_index, groups=graph.groups
        )
        return self.norm(self.output(torch.relu(self.hidden(features))))
