"""Finding, checking and loading the language model."""

from __future__ import annotations

import os
import types
from pathlib import Path

import torch
from torch import nn

from dragkit.config import TINY_GENERATOR, GeneratorConfig
from dragkit.errors import ConfigError, MissingInputError
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.nemotron_h.experts import uses_grouped_mm
from dragkit.generator.random_weights import (
    is_random,
    meta_model,
    random_config,
    random_model,
)


def resolve_generator(config: GeneratorConfig, *, name: str) -> str:
    """The folder of a generator.

    Args:
        config: for the revision; name: "tiny", a folder, or a hub name.

    Raises:
        MissingInputError: its weights are not there; says where it looked and what to do.
    """
    if name == TINY_GENERATOR:
        return str(tiny_generator_path())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise MissingInputError(f"{name}: no config.json in this folder, so it holds no model.")
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    # Weights are never fetched behind the user's back: they can be tens of gigabytes.
    try:
        folder = Path(snapshot_download(name, revision=config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        folder = None
    if folder is not None and any(folder.glob("*.safetensors")):
        return str(folder)
    revision = "" if config.revision is None else f" --revision {config.revision}"
    raise MissingInputError(
        f"the weights of the generator {name} are not on this machine. Looked at: a folder of that "
        f"name, and the hub cache {os.environ.get('HF_HOME', '~/.cache/huggingface')}. Get them "
        f"with: hf download {name}{revision}"
        " (the 30B is about 63 GB and needs a card of 80 GB or more); or name a folder with "
        "--generator_model FOLDER; or run the bundled tiny one on any machine: --preset tiny "
        "--generator_model tiny."
    )


def host_memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(need: int, name: str, device: torch.device) -> None:
    """Stops before loading weights of so many bytes that cannot fit on the device."""
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
        where = torch.cuda.get_device_name(device)
    else:
        have, where = host_memory_bytes(), "this machine (without a GPU's)"
    if need > have:
        raise MissingInputError(
            f"the generator {name} needs {need / 2**30:.0f} GiB for its weights and {where} has "
            f"{have / 2**30:.0f} GiB. Use a larger card, a smaller model, or the bundled tiny one: "
            "--preset tiny --generator_model tiny."
        )


def _dtype(config: GeneratorConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def weight_bytes(config: GeneratorConfig, device: torch.device, *, name: str) -> int:
    """Bytes of the generator's weights, before they are loaded.

    Raises:
        MissingInputError, ConfigError: as `check_generator`.
    """
    if is_random(name):
        model = meta_model(random_config(name), _dtype(config, device))
        return sum(p.nbytes for p in model.parameters())
    folder = Path(resolve_generator(config, name=name))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_generator(
    config: GeneratorConfig, device: torch.device, *, name: str, num_shards: int = 1
) -> str:
    """The generator's folder, once its weights are known to be there and to fit.

    Random weights need none; the folder is then that of their stand-in tokeniser.

    Args:
        config: revision and type; device: where the weights go; name: as for `load_generator`.
        shards: parts into which they are cut, on the host, so that it has to hold them, too.

    Raises:
        MissingInputError: no weights, or no room for them.
        ConfigError: random weights of an architecture that does not exist.
    """
    need = weight_bytes(config, device, name=name)
    _check_memory(need // num_shards, name, device)
    if num_shards > 1:
        _check_memory(need, name, torch.device("cpu"))
    return resolve_generator(config, name=TINY_GENERATOR if is_random(name) else name)


def check_grouped_mm(model: nn.Module, device: torch.device) -> None:
    """Refuses routed experts that would stop a GPU for every expert, once their weights are on it.

    Raises:
        ConfigError: their type, their widths or the card forbid it.
    """
    mixers = [module for module in model.modules() if type(module).__name__ == "NemotronHMoE"]
    if device.type == "cuda" and not all(uses_grouped_mm(mixer) for mixer in mixers):
        raise ConfigError(
            f"the generator's routed experts would run one by one on {device}: the grouped product "
            "needs compute capability 8.0 or newer, a type of bfloat16, float16 or float32, and "
            "widths that fill whole 16 bytes. Set generator.dtype to auto, use such a card, or "
            "name another model."
        )


def prepare_nemotron_h(model: nn.Module) -> None:
    """Two repairs on the instance; the class itself stays the library's."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

    if not isinstance(model, NemotronHForCausalLM):
        return

    # generate() reads this signature to learn whether a model takes embeddings; the class hides
    # the argument in its keyword arguments, although its forward handles it.
    def prepare(self, input_ids, inputs_embeds=None, **kwargs):  # noqa: ANN001, ANN003, ANN202
        return NemotronHForCausalLM.prepare_inputs_for_generation(
            self, input_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    model.prepare_inputs_for_generation = types.MethodType(prepare, model)
    # The mixers floor dt at the initialisation's minimum; the configuration's limit is what the
    # checkpoint was trained with, and what the one-token path uses.
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(float(x) for x in model.config.time_step_limit)


def load_generator(
    config: GeneratorConfig,
    device: torch.device,
    *,
    name: str,
    adapters: bool = True,
    num_shards: int = 1,
) -> Generator:
    """Loads the model, freezes it and adds LoRA.

    Args:
        config: revision, type and adapters; device: where the weights go.
        name: "tiny", `random:...`, a folder, or a hub name.
        adapters: False loads the bare model.
        shards: parts into which the caller will cut the weights; if several, they stay on the host.

    Raises:
        MissingInputError: no weights, or no room for them.
        ConfigError: `generator_dim` or a LoRA target does not fit the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = check_generator(config, device, name=name, num_shards=num_shards)
    dtype = _dtype(config, device)
    place = device if num_shards == 1 else torch.device("cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if is_random(name):
            model = random_model(name, place, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise MissingInputError(
            f"the generator {name} in {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has no end token, which training needs.")
    prepare_nemotron_h(model)
    width = model.get_input_embeddings().weight.shape[1]
    if config.generator_dim not in (None, width):
        raise ConfigError(
            f"generator.generator_dim: {config.generator_dim} was given, but {name} is {width} "
            "wide. Leave the flag away; the width is read from the model."
        )
    model.requires_grad_(False)
    if adapters and not config.freeze_lm:
        model = add_adapters(model, config)
    model = model.to(place)
    check_grouped_mm(model, device)
    return Generator(
        model,
        tokenizer,
        mamba_backend=config.mamba_backend,
        pad_to_multiple_of=config.pad_to_multiple_of,
        activation_checkpointing=config.activation_checkpointing,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
