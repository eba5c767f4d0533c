"""The language model: loading, LoRA, and the loss at the supervised tokens alone."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError, MissingInputError
from dragkit.model.nemotron_h import computes, hidden_at_rows
from dragkit.model.prompt import NeuralPrompt, PromptTemplate

logger = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj")
_LOGIT_ROWS = 4096


class GeneratorOutput(NamedTuple):
    """Loss of one pass: float32 [] summed over target tokens, and how many of them were right."""

    loss_sum: Tensor
    num_correct: Tensor


def resolve_generator(config: GeneratorConfig, *, name: str) -> str:
    """The folder of a generator.

    Args:
        config: for the revision; name: "tiny", a folder, or a hub name.

    Raises:
        MissingInputError: its weights are not there; says where it looked and what to do.
    """
    if name == "tiny":
        from dragkit.tiny import tiny_generator_path

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


def _check_memory(folder: str, name: str, device: torch.device) -> None:
    """Stops before loading weights that cannot fit on the device."""
    need = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
        where = torch.cuda.get_device_name(device)
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        where = "this machine (no GPU in use)"
    if need > have:
        raise MissingInputError(
            f"the generator {name} needs {need / 2**30:.0f} GiB for its weights and {where} has "
            f"{have / 2**30:.0f} GiB. Use a larger card, a smaller model, or the bundled tiny one: "
            "--preset tiny --generator_model tiny."
        )


def check_generator(config: GeneratorConfig, device: torch.device, *, name: str) -> str:
    """The generator's folder, once its weights are known to be there and to fit.

    Raises:
        MissingInputError: no weights, or no room for them.
    """
    folder = resolve_generator(config, name=name)
    _check_memory(folder, name, device)
    return folder


def _prepare_nemotron_h(model: nn.Module) -> None:
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


def lora_targets(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        ConfigError: a wanted name matches no layer, with the nearest names that exist.
    """
    present = sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    if wanted is None:
        chosen = [name for name in LORA_TARGETS if name in present]
        if not chosen:
            raise ConfigError(
                f"generator.lora_targets: none of the usual names {', '.join(LORA_TARGETS)} is a "
                f"linear layer of this model; name some of its own: {', '.join(present)}."
            )
        return chosen
    for name in wanted:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=3, cutoff=0.0)
            raise ConfigError(
                f"generator.lora_targets: {name!r} matches no linear layer of this model. "
                f"Nearest: {', '.join(near)}."
            )
    return list(wanted)


class Generator(nn.Module):
    """A causal language model that reads neural prompts.

    Args:
        model: a Hugging Face causal LM, with its adapters if any.
        tokenizer: of that model.
    """

    def __init__(self, model: nn.Module, tokenizer: object) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)  # type: ignore[attr-defined]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # In lists, so that the modules are not registered a second time.
        self._decoder = [base.base_model, base.get_output_embeddings()]
        self._computed_here = computes(base.config)
        self._embedding = [base.get_input_embeddings()]

    @property
    def dim(self) -> int:
        """Width M of the token embeddings."""
        return self._embedding[0].weight.shape[1]

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA layers are in the model."""
        return hasattr(self.model, "peft_config")

    def save_adapters(self, folder: Path) -> None:
        """Writes the adapters in PEFT's layout, as `PeftModel.from_pretrained` reads it."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters' tensors under PEFT's file names, sharing memory with the model."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)

    @property
    def begin(self) -> list[int]:
        """Tokens in front of every prompt."""
        bos = self.tokenizer.bos_token_id  # type: ignore[attr-defined]
        return [] if bos is None else [int(bos)]

    def prompt_key(self) -> str:
        """Names everything that token rows depend on: the tokeniser and the prompt's texts."""
        probe = PromptTemplate()
        texts = [probe.prefix("?"), probe.fact("a", "b", "c"), probe.cue, probe.target(["x", "y"])]
        digest = hashlib.blake2b(digest_size=16)
        vocabulary = sorted(self.tokenizer.get_vocab().items())  # type: ignore[attr-defined]
        digest.update(repr((texts, self.tokenize(texts), vocabulary)).encode())
        return digest.hexdigest()

    def embedding_rms(self) -> float:
        """Root mean square of the token embeddings."""
        weight = self._embedding[0].weight.detach().float()
        return float(weight.pow(2).mean().sqrt())

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[operator]

    def embed(
        self, prompt: NeuralPrompt, vectors: Tensor | None, *, left: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompts in a padded batch.

        Args:
            prompt: packed prompts; vectors: float [S, M] structural vectors that `slot` points at.
            left: pad on the left (generation) instead of the right (training).

        Returns:
            float [B, L, M] and the attention mask, int64 [B, L].
        """
        batch = prompt.length.shape[0]
        width = int(prompt.length.max()) if batch else 0
        column = prompt.position
        if left:
            column = column + (width - prompt.length)[prompt.question]
        place = prompt.question * width + column
        packed = self._embedding[0](prompt.input_ids)
        if vectors is not None:
            slotted = (prompt.slot >= 0).nonzero().squeeze(1)
            rows = vectors[prompt.slot[slotted]].to(packed.dtype)
            packed = packed.index_copy(0, slotted, rows)
        padded = packed.new_zeros(batch * width, packed.shape[1]).index_copy(0, place, packed)
        mask = torch.zeros(batch * width, dtype=torch.int64, device=packed.device)
        mask[place] = 1
        return padded.view(batch, width, -1), mask.view(batch, width)

    def forward(
        self, prompt: NeuralPrompt, vectors: Tensor | None, eos_weight: float = 1.0
    ) -> GeneratorOutput:
        """Cross-entropy at the answer and end tokens; logits exist at those rows only.

        Args:
            prompt: with targets; vectors: float [S, M]; eos_weight: weight of the end tokens.

        Returns:
            Sums over the target tokens.
        """
        embeds, _ = self.embed(prompt, vectors, left=False)
        decoder, head = self._decoder
        row, place = prompt.question[prompt.target_row], prompt.position[prompt.target_row]
        if self._computed_here and embeds.device.type == "cpu":
            hidden = hidden_at_rows(decoder, embeds, row, place)
        else:
            # Every layer is causal, so padding on the right reaches no real token: no mask is
            # needed, and without one attention takes its fastest path.
            hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[row, place]
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for rows, ids in zip(
            hidden.split(_LOGIT_ROWS), prompt.target_id.split(_LOGIT_ROWS), strict=True
        ):
            logits = head(rows).float()
            each = F.cross_entropy(logits, ids, reduction="none")
            weight = torch.where(ids == self.eos_token_id, eos_weight, 1.0)
            loss = loss + (each * weight).sum()
            correct = correct + (logits.argmax(-1) == ids).sum()
        return GeneratorOutput(loss, correct)


def load_generator(
    config: GeneratorConfig, device: torch.device, *, name: str, adapters: bool = True
) -> Generator:
    """Loads the model, freezes it and adds LoRA.

    Args:
        config: revision, type and adapters; device: where the weights go.
        name: "tiny", a folder, or a hub name.
        adapters: False loads the bare model.

    Raises:
        MissingInputError: no weights, or no room for them.
        ConfigError: `generator_dim` or a LoRA target does not fit the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = check_generator(config, device, name=name)
    if config.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, config.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise MissingInputError(
            f"the generator {name} in {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has no end token, which training needs.")
    _prepare_nemotron_h(model)
    width = model.get_input_embeddings().weight.shape[1]
    if config.generator_dim not in (None, width):
        raise ConfigError(
            f"generator.generator_dim: {config.generator_dim} was given, but {name} is {width} "
            "wide. Leave the flag away; the width is read from the model."
        )
    model.requires_grad_(False)
    if adapters and not config.freeze_lm:
        from peft import LoraConfig, get_peft_model

        targets = lora_targets(model, config.lora_targets)
        model = get_peft_model(
            model,
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "LoRA rank %d on %s: %d parameters", config.lora_rank, ", ".join(targets), count
        )
    return Generator(model.to(device), tokenizer)
