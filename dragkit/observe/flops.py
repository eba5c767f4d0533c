"""Model FLOPs of a LoRA step on a frozen causal language model, and the share of a peak rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dragkit.observe.gpu import CardSpec

FORMULA = "(4 N_blocks + 6 N_lora) tokens + 4 N_head supervised tokens"
# A convolution's and a table's entries are no factors of a matrix product with every token.
_NO_PRODUCTS = (nn.Conv1d, nn.Embedding)


@dataclass(frozen=True, slots=True)
class ActiveWeights:
    """Weights that one token is multiplied with.

    Attributes:
        blocks: of the frozen layers; of routed experts only as many as a token is sent to.
        head: of the output head, which sees supervised tokens alone.
        lora: of the adapters.
    """

    blocks: int
    head: int
    lora: int

    @property
    def active(self) -> int:
        """N_active of a token that also passes the head."""
        return self.blocks + self.head

    def step_flops(self, tokens: float, supervised: float) -> float:
        """FLOPs of a training step, `FORMULA`: 4 N_active + 6 N_lora for a token that passes all.

        Forward and backward cost 2 each for a frozen weight, since only the gradient of its input
        is wanted, and an adapter's own gradient 2 more. Attention scores, scans and what
        checkpointing recomputes are left out.

        Args:
            tokens: real ones, without padding; supervised: those whose successor is learned.
        """
        everywhere = 4.0 * self.blocks + 6.0 * self.lora
        return everywhere * tokens + 4.0 * self.head * supervised


def block_weights(base: nn.Module) -> Iterator[tuple[str, int | None]]:
    """The matrices in the blocks of a model, and with how many of their weights a token multiplies.

    A token visits `num_experts_per_tok` of the matrices that a module named `experts` stacks. The
    count is None of a weight that is neither such a stack nor the `weight` of a layer.

    Args:
        base: a causal language model, with PEFT's layers in it or without; meta tensors do.

    Yields:
        The path of a matrix without PEFT's wrappers, such as `model.layers.0.mixer.q_proj`.
    """
    outside = {id(p) for m in base.modules() if isinstance(m, _NO_PRODUCTS) for p in m.parameters()}
    outside |= {id(p) for p in base.get_output_embeddings().parameters()}
    visited = getattr(getattr(base, "config", None), "num_experts_per_tok", None)
    for name, parameter in base.named_parameters():
        *module, leaf = (part for part in name.split(".") if part != "base_layer")
        if parameter.dim() < 2 or "lora_" in name or id(parameter) in outside:
            continue
        if parameter.dim() == 2 and leaf == "weight":
            yield ".".join(module), parameter.numel()
        elif parameter.dim() == 3 and visited and module[-1:] == ["experts"]:
            yield ".".join([*module, leaf]), parameter.numel() // len(parameter) * int(visited)
        else:
            yield ".".join([*module, leaf]), None


def active_weights(model: nn.Module) -> ActiveWeights:
    """Counts the weights of a Hugging Face causal LM, with adapters or without; meta tensors do.

    Norms, convolutions and the embedding table count nothing.

    Raises:
        ValueError: a weight that `block_weights` cannot count.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    counts = dict(block_weights(base))
    if unknown := [name for name, count in counts.items() if count is None]:
        raise ValueError(
            f"active_weights: {unknown[0]} is neither the weight of a layer nor a stack of experts "
            "whose number for each token the configuration tells (num_experts_per_tok)"
        )
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.dim() == 2)
    return ActiveWeights(sum(counts.values()), base.get_output_embeddings().weight.numel(), lora)


def model_flops_utilisation(flops_per_s: float, spec: CardSpec | None) -> float | None:
    """Share of the device's dense bfloat16 rate; None where that is not known, as on a CPU."""
    return None if spec is None else flops_per_s / (spec.bf16_tflops * 1e12)
