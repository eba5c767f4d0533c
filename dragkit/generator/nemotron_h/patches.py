"""Every change that dragkit makes to an object of transformers, PEFT or FSDP.

Only instances change, never a class. Checked with transformers 5.23, PEFT 0.21 and torch 2.13.

What changes                                  Why
`block.forward` takes `packed_forward`        FSDP's hooks and activation checkpointing act on a
                                              call of the block. Our forward runs inside it.
`model.prepare_inputs_for_generation`         `generate()` reads its signature to learn whether a
  names `inputs_embeds`                       model takes embeddings. The class hides the argument
                                              in `**kwargs`.
`mixer.time_step_limit`                       The mixers clamp dt at `time_step_min`, a setting of
                                              the initialisation. The weights were trained with
                                              the configuration's `time_step_limit`.
`config.model_type`, while PEFT adds          PEFT refuses `out_proj` of every Mamba model, because
  adapters                                    the fused CUDA path of transformers reads the bare
                                              weight. Our mixer calls the layer.
`module._is_fsdp_managed_module`              Dynamo makes the sizes of marked modules symbolic for
                                              hooks inside a graph. Our graphs lie between hooks.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# (block, hidden [T, M]) -> hidden states after the block.
PackedForward = Callable[[nn.Module, Tensor], Tensor]
_FSDP_MARK = "_is_fsdp_managed_module"


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    packed_forward: PackedForward | None = None,
    **kwargs: Any,
) -> Tensor:
    if packed_forward is None:
        return type(self).forward(self, hidden_states, **kwargs)
    return packed_forward(self, hidden_states)


def accept_packed_forward(block: nn.Module) -> None:
    """Lets a call of the block run another forward. Patching a block twice changes nothing."""
    if "forward" not in vars(block):
        block.forward = types.MethodType(_forward, block)


def patch_nemotron_h(model: nn.Module) -> None:
    """Patches a Nemotron-H for generation from embeddings and sets its time step limit.

    Other models stay as they are.
    """
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

    if not isinstance(model, NemotronHForCausalLM):
        return

    def prepare(
        self: nn.Module, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return NemotronHForCausalLM.prepare_inputs_for_generation(
            self, input_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    model.prepare_inputs_for_generation = types.MethodType(prepare, model)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(float(x) for x in model.config.time_step_limit)


@contextmanager
def hidden_model_type(model: nn.Module) -> Iterator[None]:
    """Hides the model type from PEFT inside the `with` block, and restores it afterwards."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        yield
        return
    # `model_type` is a class attribute, and an instance may have a value of the same name.
    on_instance = "model_type" in vars(config)
    config.model_type = f"{model_type} (hidden from PEFT)"
    try:
        yield
    finally:
        del config.model_type
        if on_instance:
            config.model_type = model_type


def unmark_fsdp_modules(root: nn.Module) -> None:
    """Sets FSDP's mark of all modules to False, so that Dynamo specialises on their sizes."""
    for module in root.modules():
        setattr(module, _FSDP_MARK, False)


def is_under_fsdp(module: nn.Module) -> bool:
    """Whether FSDP has marked the module. The mark may be False by now."""
    return hasattr(module, _FSDP_MARK)
