"""torch.compile and mixed precision, applied from outside the models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._dynamo.utils
import torch.fx.experimental._config
from torch import nn

from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch, RelationStates
from dragkit.generator.generator import Generator
from dragkit.retriever.retriever import RetrieverOutput

logger = logging.getLogger(__name__)


def use_dynamic_shapes() -> None:
    """Sets the compiler's process-wide options so that packs of all sizes share one graph."""
    # Sizes that are equal in one pack by chance (as many questions as tokens, say) would otherwise
    # become one symbol, and the first pack where they differ would need another graph.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 32
    # Dropout rates are constants. As graph inputs they would make Dynamo trace each graph twice.
    torch._dynamo.config.specialize_float = True


def compile_enabled(config: TrainConfig, device: torch.device) -> bool:
    """Whether models are compiled: `run.compile`, or by default on a GPU."""
    return device.type == "cuda" if config.run.compile is None else config.run.compile


def compile_retriever(retriever: nn.Module) -> Callable[..., RetrieverOutput]:
    """The retriever's forward as one graph with dynamic sizes.

    It reads `padded` of a batch that has it, and returns the rows of the batch itself.
    """
    use_dynamic_shapes()
    compiled = torch.compile(retriever, fullgraph=True, dynamic=True)

    def forward(batch: QuestionBatch, relations: RelationStates) -> RetrieverOutput:
        if batch.padded is None:
            return compiled(batch, relations)
        logits, node, relation = compiled(batch.padded, relations)
        graph = batch.graph
        return RetrieverOutput(
            logits[: graph.num_facts],
            node[: graph.num_nodes],
            relation[: graph.fact_index.num_pairs],
        )

    return forward


def compile_generator(generator: Generator) -> None:
    """Compiles the blocks of a generator, one graph per block type, with dynamic sizes."""
    use_dynamic_shapes()
    generator.compile_blocks()


def num_compiled_graphs() -> int:
    """Number of graphs that this process has compiled. In a run it soon stops growing."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def set_gpu_products(config: TrainConfig) -> None:
    """Sets, for this process, how a GPU rounds inside matrix products.

    A run that asks for float32 gets no TF32. Otherwise the float32 products, such as those of the
    routers, read bfloat16 values, which TF32 holds exactly. Partial sums of bfloat16 products are
    added in float32.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = "float32" not in (config.run.precision, config.generator.dtype)
    matmul.allow_bf16_reduced_precision_reduction = False
    logger.info(
        "matrix products of float32 tensors in %s, sums of bfloat16 products in float32",
        "TF32" if matmul.allow_tf32 else "float32",
    )


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager:
    """Mixed precision of retriever and projector.

    Args:
        precision: `run.precision`. "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: device of the tensors.
        cache: whether to keep the converted weights. Must be False while a CUDA graph is captured.
    """
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache)
    return nullcontext()
