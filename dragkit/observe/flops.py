"""Model FLOPs of a LoRA step on a frozen causal language model, and its FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dragkit.observe.gpu import CardSpec

FORMULA = "(4 N_blocks + 6 N_lora) tokens + 4 N_head supervised tokens"
# Their parameters are not multiplied with every token as a matrix.
_NO_PRODUCTS = (nn.Conv1d, nn.Embedding)


@dataclass(frozen=True, slots=True)
class ActiveWeights:
    """Numbers of weights that one token is multiplied with.

    Attributes:
        blocks: weights of the frozen blocks, with `num_experts_per_tok` of the routed experts.
        head: weights of the LM head, which runs on supervised tokens only.
        lora: weights of the adapters.
    """

    blocks: int
    head: int
    lora: int

    @property
    def active(self) -> int:
        """Frozen weights that a supervised token is multiplied with."""
        return self.blocks + self.head

    def step_flops(self, tokens: float, supervised: float) -> float:
        """FLOPs of a training step by `FORMULA`.

        A frozen weight costs 2 FLOPs in the forward and 2 in the backward, which computes only the
        gradient of its input. An adapter's weight gradient costs 2 more. Attention scores, scans
        and recomputation are not counted.

        Args:
            tokens: number of tokens without padding.
            supervised: number of tokens whose next token is learned.
        """
        per_token = 4.0 * self.blocks + 6.0 * self.lora
        return per_token * tokens + 4.0 * self.head * supervised


def block_weights(base: nn.Module) -> Iterator[tuple[str, int | None]]:
    """The matrices in the blocks of a model, and how many of their weights multiply a token.

    A token passes `num_experts_per_tok` of the matrices that a module named `experts` stacks. The
    number is None for a weight that is neither such a stack nor the `weight` of a layer.

    Args:
        base: a causal language model, with PEFT's layers or without. Meta tensors suffice.

    Yields:
        The path without PEFT's wrappers, such as `model.layers.0.mixer.q_proj`, and the number.
    """
    outside = {id(p) for m in base.modules() if isinstance(m, _NO_PRODUCTS) for p in m.parameters()}
    outside |= {id(p) for p in base.get_output_embeddings().parameters()}
    num_experts = getattr(getattr(base, "config", None), "num_experts_per_tok", None)
    for name, parameter in base.named_parameters():
        *module, leaf = (part for part in name.split(".") if part != "base_layer")
        if parameter.dim() < 2 or "lora_" in name or id(parameter) in outside:
            continue
        if parameter.dim() == 2 and leaf == "weight":
            yield ".".join(module), parameter.numel()
        elif parameter.dim() == 3 and num_experts and module[-1:] == ["experts"]:
            yield ".".join([*module, leaf]), parameter.numel() // len(parameter) * int(num_experts)
        else:
            yield ".".join([*module, leaf]), None


def active_weights(model: nn.Module) -> ActiveWeights:
    """Counts the active weights of a Hugging Face causal LM. Meta tensors suffice.

    Norms, convolutions and the embedding table are not counted.

    Raises:
        ValueError: a weight that `block_weights` cannot count.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    counts = dict(block_weights(base))
    if unknown := [name for name, count in counts.items() if count is None]:
        raise ValueError(
            f"the weights of {unknown[0]} cannot be counted: it is neither a layer's weight nor a "
            "stack of experts of a model whose config has num_experts_per_tok"
        )
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.dim() == 2)
    return ActiveWeights(sum(counts.values()), base.get_output_embeddings().weight.numel(), lora)


def model_flops_utilisation(flops_per_s: float, spec: CardSpec | None) -> float | None:
    """Fraction of the card's dense bfloat16 rate, or None without a `spec`, as on a CPU."""
    return None if spec is None else flops_per_s / (spec.bf16_tflops * 1e12)
