"""Model FLOPs of a LoRA step on a frozen causal language model, and the share of a peak rate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dragkit.observe.gpu import DeviceSpec

FORMULA = "(4 N_blocks + 6 N_lora) tokens + 4 N_head supervised tokens"
_ADAPTERS = ("lora_A", "lora_B")
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

    def forward_flops(self, tokens: float, supervised: float) -> float:
        """Of a forward pass: 2 for each weight."""
        return 2.0 * ((self.blocks + self.lora) * tokens + self.head * supervised)

    def step_flops(self, tokens: float, supervised: float) -> float:
        """Of a training step, `FORMULA`: 4 N_active + 6 N_lora for a token that passes all.

        Forward and backward cost 2 each for a frozen weight, since only the gradient of its input
        is wanted, and an adapter's own gradient 2 more. Attention scores, scans and what
        checkpointing computes again are left out.

        Args:
            tokens: real ones, without padding; supervised: those whose successor is learned.
        """
        everywhere = 4.0 * self.blocks + 6.0 * self.lora
        return everywhere * tokens + 4.0 * self.head * supervised


def _routed(model: nn.Module) -> int:
    """How many experts a token is sent to."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_experts_per_tok", None)
    if count is None:
        raise ValueError(
            "active_weights: the model has experts, and its configuration no num_experts_per_tok"
        )
    return int(count)


def active_weights(model: nn.Module) -> ActiveWeights:
    """Counts the weights of a Hugging Face causal LM, with adapters or without; meta tensors do.

    Args:
        model: its matrix products are linear layers, routers (a matrix `weight` beside `top_k`)
            and stacked experts (three axes, in a module with `num_experts`).

    Returns:
        See `ActiveWeights`. Norms, convolutions and the embedding table count nothing.

    Raises:
        ValueError: a weight of another kind, or experts without the number of those chosen.
    """
    head_layer = model.get_output_embeddings()
    blocks = head = lora = 0
    for name, module in model.named_modules():
        if module is head_layer:
            head = module.weight.numel()
            continue
        if isinstance(module, _NO_PRODUCTS):
            continue
        if any(part in _ADAPTERS for part in name.split(".")):
            lora += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 2)
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            router = leaf == "weight" and hasattr(module, "top_k")
            if isinstance(module, nn.Linear) or (parameter.dim() == 2 and router):
                blocks += parameter.numel()
            elif parameter.dim() == 3 and hasattr(module, "num_experts"):
                blocks += parameter.numel() // module.num_experts * _routed(model)
            else:
                shape = list(parameter.shape)
                raise ValueError(
                    f"active_weights: {name}.{leaf} {shape} is neither a linear layer, a router "
                    "nor stacked experts"
                )
    return ActiveWeights(blocks, head, lora)


def model_flops_utilisation(flops_per_s: float, spec: DeviceSpec | None) -> float | None:
    """Share of the device's dense bfloat16 rate; None where that is not known, as on a CPU."""
    return None if spec is None else flops_per_s / (spec.bf16_tflops * 1e12)
