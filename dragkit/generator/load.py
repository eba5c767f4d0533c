"""Finds, checks and loads the language model."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

import torch
from torch import nn

from dragkit.config import TINY_GENERATOR, GeneratorConfig, TrainConfig
from dragkit.data.tensor_files import integers_as_weights
from dragkit.errors import ConfigError, MissingInputError, similar_names
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.conformance import check_conformance
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.nemotron_h.experts import uses_grouped_mm
from dragkit.generator.nemotron_h.patches import patch_nemotron_h
from dragkit.generator.random_weights import is_random, meta_model, random_config, random_model
from dragkit.generator.weight_files import (
    check_tokens,
    check_weight_files,
    first_line,
    num_positions,
    read_config,
    read_tokenizer,
    weight_files,
)

logger = logging.getLogger(__name__)


def resolve_generator(config: GeneratorConfig, *, name: str) -> str:
    """The folder of a generator.

    Args:
        config: settings with the revision.
        name: "tiny", a folder, or a hub name.

    Raises:
        MissingInputError: the weights are not on this machine.
    """
    if name == TINY_GENERATOR:
        return str(tiny_generator_path())
    if os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise MissingInputError(f"{name}: this folder holds no model: config.json is missing.")
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    # Weights are tens of gigabytes, so only the user starts a download.
    try:
        folder = Path(snapshot_download(name, revision=config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        folder = None
    if folder is not None and any(folder.glob("*.safetensors")):
        return str(folder)
    revision = "" if config.revision is None else f" --revision {shlex.quote(config.revision)}"
    path = Path(name)
    local = "This is a file, not a folder" if os.path.exists(path) else "There is no such folder"
    near = similar_names(path) if os.path.isdir(path.parent) else ""
    raise MissingInputError(
        f"the weights of the generator {name} are not on this machine. {local}, "
        f"and the hub cache {os.environ.get('HF_HOME', '~/.cache/huggingface')} does not have "
        f"them.{near} Download them with: hf download {shlex.quote(name)}{revision} (the 30B is "
        "about 63 GB and needs a GPU of 80 GB or more). Or name a folder with --generator_model "
        "FOLDER. Or use the bundled tiny generator: --preset tiny --generator_model tiny."
    )


def host_memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(needed_bytes: int, name: str, device: torch.device) -> None:
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
        holder = torch.cuda.get_device_name(device)
    else:
        available, holder = host_memory_bytes(), "the host"
    if needed_bytes > available:
        raise MissingInputError(
            f"the generator {name} needs {needed_bytes / 2**30:.0f} GiB for its weights, and "
            f"{holder} has {available / 2**30:.0f} GiB. Use a larger GPU, a smaller model, or the "
            "bundled tiny generator: --preset tiny --generator_model tiny."
        )


def _dtype(config: GeneratorConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def weight_bytes(config: GeneratorConfig, device: torch.device, *, name: str) -> int:
    """Bytes of the generator's weights, without loading them.

    Raises:
        MissingInputError, ConfigError: see `check_generator`.
    """
    if is_random(name):
        model = meta_model(random_config(name), _dtype(config, device))
        return sum(p.nbytes for p in model.parameters())
    folder = Path(resolve_generator(config, name=name))
    return sum(file.stat().st_size for file in weight_files(folder))


def check_generator(
    config: GeneratorConfig, device: torch.device, *, name: str, num_shards: int = 1
) -> str:
    """Checks that the files can be used and the weights fit, and returns the generator's folder.

    Random weights have no folder. They take that of the tiny generator, for its tokenizer. No
    weight is read, so `load_generator` may still refuse the model.

    Args:
        config: settings with revision and dtype.
        device: device of the weights.
        name: see `load_generator`.
        num_shards: ranks that share the weights. With several, the host holds all weights once.

    Raises:
        MissingInputError: the weights do not exist, are cut short, or do not fit. Or the tokenizer
            has tokens that the model has no embedding for.
        ConfigError: there is no such architecture for random weights, or the tokenizer has no end
            token.
    """
    folder = Path(resolve_generator(config, name=TINY_GENERATOR if is_random(name) else name))
    check_weight_files(folder)
    rows = (random_config(name) if is_random(name) else read_config(folder)).get_text_config()
    check_tokens(read_tokenizer(folder), rows.vocab_size, folder)
    needed_bytes = weight_bytes(config, device, name=name)
    _check_memory(needed_bytes // num_shards, name, device)
    if num_shards > 1:
        _check_memory(needed_bytes, name, torch.device("cpu"))
    return str(folder)


def within_positions(config: TrainConfig) -> TrainConfig:
    """The configuration with prompts, and answers after them, inside the generator's positions.

    Raises:
        ConfigError: answers alone take all positions.
        MissingInputError: the generator's configuration is missing or cannot be read.
    """
    name, settings = config.generator_model, config.generator
    if is_random(name):
        positions = num_positions(random_config(name))
    else:
        positions = num_positions(read_config(Path(resolve_generator(settings, name=name))))
    if positions is None or settings.max_prompt_tokens <= positions:
        return config
    answer = max(settings.max_new_tokens, config.run.val_max_new_tokens or 0)
    if answer >= positions:
        raise ConfigError(
            f"generator.max_new_tokens: answers of {answer} tokens leave no room for a prompt, "
            f"because the generator {name} has {positions} positions. Lower it, or name another "
            "model with --generator_model."
        )
    logger.warning(
        "generator.max_prompt_tokens is %d instead of %d: the generator %s has no more positions, "
        "so longer prompts lose facts",
        positions,
        settings.max_prompt_tokens,
        name,
    )
    shorter = settings.model_copy(update={"max_prompt_tokens": positions})
    return config.model_copy(update={"generator": shorter})


def check_grouped_mm(model: nn.Module, device: torch.device) -> None:
    """Refuses routed experts on a GPU that would make the host wait for every expert.

    Raises:
        ConfigError: `F.grouped_mm` does not take their dtype or widths, or the GPU is too old.
    """
    mixers = [module for module in model.modules() if type(module).__name__ == "NemotronHMoE"]
    if device.type == "cuda" and not all(uses_grouped_mm(mixer) for mixer in mixers):
        raise ConfigError(
            f"the generator's routed experts would run one by one on {device}. Grouped products "
            "need compute capability 8.0 or newer, bfloat16, float16 or float32, and widths that "
            "are multiples of 16 bytes. Set generator.dtype to auto, use a newer GPU, or name "
            "another model."
        )


def _read_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a folder, on the host.

    Raises:
        MissingInputError: transformers has no causal model of the family, or the files lack
            weights of it, or hold them in other shapes or as integers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # An error of the library names no weight, and `info` names all.
            ignore_mismatched_sizes=True,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # The code of some two hundred families may raise anything.
    except Exception as error:
        raise MissingInputError(
            f"the generator in {folder} cannot be loaded: {first_line(error)}"
        ) from error
    # The library fills what it does not find with random weights.
    wrong = sorted(info["missing_keys"]) + [
        f"{key} (its shape is {list(found)} instead of {list(expected)})"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    wrong += [
        f"{key} (its numbers are of type {dtype}, not floating-point)"
        for key, dtype in integers_as_weights(weight_files(folder), model).items()
    ]
    unused = sorted(info["unexpected_keys"])
    also = f" {len(unused)} others are in the files and not in the model: {', '.join(unused[:3])}."
    if wrong:
        raise MissingInputError(
            f"{folder}: {len(wrong)} weights of the model are not in its files: "
            f"{', '.join(wrong[:3])}.{also if unused else ''} Fetch the files again, or save the "
            "model again with save_pretrained of transformers."
        )
    if unused:
        logger.warning("%s:%s", folder, also)
    return model


def load_generator(
    config: GeneratorConfig,
    device: torch.device,
    *,
    name: str,
    adapters: bool = True,
    num_shards: int = 1,
) -> Generator:
    """Loads a model, freezes it and adds LoRA.

    Args:
        config: settings with revision, dtype and adapters.
        device: device of the weights.
        name: "tiny", `random:NAME[:layers=N]`, a folder, or a hub name.
        adapters: whether to add LoRA.
        num_shards: ranks among which the caller shards the weights. With several, the weights
            stay on the host.

    Raises:
        MissingInputError: the weights do not exist, do not fit, or cannot be read, or the model
            cannot be used (`check_conformance`).
        ConfigError: `generator_dim` or a LoRA target does not fit the model.
    """
    folder = check_generator(config, device, name=name, num_shards=num_shards)
    dtype = _dtype(config, device)
    # With FSDP, one block at a time goes to the device, and only a part of it stays there.
    load_device = device if num_shards == 1 else torch.device("cpu")
    tokenizer = read_tokenizer(Path(folder))
    if is_random(name):
        model = random_model(name, load_device, dtype)
    else:
        model = _read_model(Path(folder), dtype)
    patch_nemotron_h(model)
    width = model.get_input_embeddings().weight.shape[1]
    if config.generator_dim not in (None, width):
        raise ConfigError(
            f"generator.generator_dim is {config.generator_dim}, but the embeddings of {name} are "
            f"{width} wide. Leave it unset: the width is read from the model."
        )
    model.requires_grad_(False)
    if adapters and not config.freeze_lm:
        model = add_adapters(model, config)
    model = model.to(load_device)
    check_grouped_mm(model, device)
    generator = Generator(
        model,
        tokenizer,
        mamba_backend=config.mamba_backend,
        pad_to_multiple_of=config.pad_to_multiple_of,
        activation_checkpointing=config.activation_checkpointing,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    # The packages of mamba_ssm run on GPUs alone, and weights to be sharded are on the host.
    probed = generator if num_shards == 1 else Generator(model, tokenizer)
    check_conformance(probed, name)
    generator.causal_lm.decodes_alone = probed.causal_lm.decodes_alone
    return generator
