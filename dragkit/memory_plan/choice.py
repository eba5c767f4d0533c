"""What of a run fits on a card: how blocks keep their tensors, tokens of a pass, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dragkit.config import TrainConfig
from dragkit.errors import ConfigError
from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS
from dragkit.generator.nemotron_h import ACTIVATION_CHECKPOINTING
from dragkit.generator.projector import Projector
from dragkit.generator.random_weights import architecture_of
from dragkit.memory_plan import memory
from dragkit.memory_plan.dims import LoraDims, NemotronHDims, num_lora_parameters, num_parameters
from dragkit.observe.gpu import CARDS, card_spec
from dragkit.retriever.retriever import Retriever

TOKEN_MULTIPLE = 256
# A pass of so many tokens fills a GPU: every expert has hundreds of rows. Larger ones bring little,
# and room that is left forgives what the estimates miss.
SATURATING_TOKENS = 16_384
# Questions whose answers are decoded at once, at most.
MAX_DECODE_BATCH = 32
# Supervised tokens over all: answers are 1 to 5 % of a prompt.
SUPERVISED_FRACTION = 0.05
# Context, libraries' workspaces, and what fragmentation takes of a card.
CUDA_CONTEXT_BYTES, FRAGMENTATION = 3 << 29, 0.06
# A question's facts where nothing is known of the data, and what a pack has of nodes and pairs.
_FACTS_PER_QUESTION, _NODES_PER_FACT, _PAIRS_PER_FACT = 10_000, 0.5, 0.25
# Numbers of ranks that are offered.
_OFFERED_WORLD_SIZES = (2, 4, 8, 16)
# Bytes of a fact in a batch.
BYTES_PER_FACT = 200
_RETRIEVER_ACTIVATIONS = "retriever's activations"
_TEXT_DIM, _RELATIONS, _RELATION_TOKENS = 384, 10_000, 12


class Device(NamedTuple):
    """A card: its name, bytes, dense bfloat16 operations a second (0: unknown), bytes a second."""

    name: str
    memory: int
    flops: float = 0.0
    bandwidth: float = 0.0


DEVICES = {
    name: Device(name, spec.memory_mib << 20, spec.bf16_tflops * 1e12, spec.memory_gb_per_s * 1e9)
    for name, spec in CARDS.items()
}


def local_card(device: torch.device) -> Device:
    """The GPU that is here, with its peak rates where its name is in the table of cards."""
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory
    if (spec := card_spec(name)) is None:
        return Device(name, total)
    return Device(name, total, spec.bf16_tflops * 1e12, spec.memory_gb_per_s * 1e9)


@dataclass(frozen=True)
class MemoryPlan:
    """A prediction for a run on a device.

    Attributes:
        device: where; shape: of the generator; policy: of `ACTIVATION_CHECKPOINTING`.
        tokens: of a pass.
        shards: parts of the frozen weights, each on a device of its own.
        fixed: bytes by component, whatever the tokens; per_token: bytes per token by component.
        rows: supervised tokens of a pass; needed: tokens of the longest prompt.
        fit: tokens of a pass that fit, by policy; 0 where not even the weights do.
        questions: decoded at once when validating; validation: bytes of that by component.
    """

    device: Device
    dims: NemotronHDims
    policy: str
    tokens: int
    fixed: dict[str, int]
    per_token: dict[str, int]
    rows: int
    needed: int
    fit: dict[str, int]
    questions: int
    validation: dict[str, int]
    shards: int = 1

    @property
    def components(self) -> dict[str, int]:
        """Bytes at the peak of training, by component."""
        found = dict(self.fixed)
        found |= {name: each * self.tokens for name, each in self.per_token.items()}
        return found | {"logits of supervised rows": memory.logits_bytes(self.dims, self.rows)}

    @property
    def peak(self) -> int:
        """Bytes at the peak of training and validation."""
        return max(sum(part.values()) for part in (self.components, self.validation))

    @property
    def fits(self) -> bool:
        """Whether the longest prompt, the chosen tokens and an answer's decoding have room."""
        room = sum(self.validation.values()) <= self.device.memory
        return room and self.fit[self.policy] >= max(self.tokens, self.needed)


def lora_dims_of(config: TrainConfig) -> LoraDims:
    """The adapters that a run would train."""
    if config.generator.freeze_lm:
        return LoraDims(0, ())
    return LoraDims(
        config.generator.lora_rank, config.generator.lora_targets or DEFAULT_LORA_TARGETS
    )


def _num_retriever_projector_parameters(config: TrainConfig, dims: NemotronHDims) -> int:
    with torch.device("meta"):
        retriever = Retriever(config.retriever, _TEXT_DIM)
        width = config.generator.projector_dim
        projector = Projector(retriever.fact_dim, width, dims.hidden_size, 1.0)
    return sum(p.numel() for part in (retriever, projector) for p in part.parameters())


def _fixed_bytes(
    config: TrainConfig, dims: NemotronHDims, device: Device, itemsize: int, shards: int
) -> dict[str, int]:
    questions, settings = config.optim.batch_size_in(2), config.retriever
    facts = min(config.data.max_facts_per_batch, questions * _FACTS_PER_QUESTION)
    passes = settings.num_reasoning_steps * settings.num_stages
    # A layer keeps its input and output, two tables of pairs, and the gate of each instruction.
    rows = facts * (2 * _NODES_PER_FACT + (2 + settings.num_instructions) * _PAIRS_PER_FACT)
    kept = int(4 * settings.hidden_dim * passes * rows)
    table = _RELATIONS * 2 * _RELATION_TOKENS * _TEXT_DIM * 2
    weights = {"frozen weights": -(-num_parameters(dims) * itemsize // shards)}
    if shards > 1:
        weights["frozen weights of others, gathered"] = memory.gathered_bytes(dims, itemsize)
    return weights | {
        "adapters, gradients, moments": memory.BYTES_PER_TRAINED_PARAM
        * num_lora_parameters(dims, lora_dims_of(config)),
        "retriever and projector, gradients, moments": memory.BYTES_PER_TRAINED_PARAM
        * _num_retriever_projector_parameters(config, dims),
        _RETRIEVER_ACTIVATIONS: kept,
        "relation table and batch": table + BYTES_PER_FACT * facts,
        "context, libraries, fragmentation": CUDA_CONTEXT_BYTES
        + int(FRAGMENTATION * device.memory),
    }


def _supervised_rows(tokens: int) -> int:
    return math.ceil(tokens * SUPERVISED_FRACTION)


def _max_tokens(dims: NemotronHDims, free: int, each: int) -> int:
    """Most tokens, a multiple of `TOKEN_MULTIPLE`, whose tensors and logits have room."""
    low, high = 0, max(free, 0) // max(each, 1) // TOKEN_MULTIPLE + 1
    while high - low > 1:
        middle = (low + high) // 2
        tokens = middle * TOKEN_MULTIPLE
        taken = tokens * each + memory.logits_bytes(dims, _supervised_rows(tokens))
        low, high = (middle, high) if taken <= free else (low, middle)
    return low * TOKEN_MULTIPLE


def _decode_batch(
    config: TrainConfig,
    dims: NemotronHDims,
    fixed: dict[str, int],
    room: int,
    tokens: int,
    itemsize: int,
) -> tuple[int, dict[str, int]]:
    """Questions decoded at once, the most that fit but one at least, and bytes by component."""
    settings = config.generator
    prompt = settings.max_prompt_tokens - settings.max_new_tokens
    answer = config.run.val_max_new_tokens or settings.max_new_tokens
    # Without gradients little of the retriever stays.
    held = sum(size for name, size in fixed.items() if name != _RETRIEVER_ACTIVATIONS)
    for questions in range(MAX_DECODE_BATCH, 0, -1):
        facts = min(config.data.max_facts_per_batch, questions * _FACTS_PER_QUESTION)
        found = {"held from training": held, "facts of the questions": BYTES_PER_FACT * facts}
        found |= memory.decode_bytes(dims, questions, prompt, answer, max(tokens, prompt), itemsize)
        if sum(found.values()) <= room:
            break
    return questions, found


def make_plan(
    config: TrainConfig, dims: NemotronHDims, device: Device, world_size: int = 1
) -> MemoryPlan:
    """What phase 2 of a run would choose on a device, whether it fits or not.

    The first of none, mamba, all whose passes can be as large as is useful; else the one with the
    largest. Settings of the run take the place of choices. The figures are those of our own ops in
    half precision; float32 and the packages of `generator.mamba_backend` keep more.

    Args:
        config: of the run; shape: of its generator; device: the card of each rank.
        ranks: how many train together.
    """
    settings, adapters = config.generator, lora_dims_of(config)
    shards = world_size if config.run.generator_fsdp else 1
    itemsize = 4 if settings.dtype == "float32" else 2
    fixed = _fixed_bytes(config, dims, device, itemsize, shards)
    free = device.memory - sum(fixed.values())
    per_token, fit = {}, {}
    for policy in ACTIVATION_CHECKPOINTING:
        per_token[policy] = memory.activation_bytes_per_token(dims, policy, adapters, itemsize)
        # Rows of the prompt, with vectors in their places, padded; and the gradient of that.
        per_token[policy]["embeddings of prompts"] = 4 * itemsize * dims.hidden_size
        fit[policy] = _max_tokens(dims, free, sum(per_token[policy].values()))
    longest = -(-settings.max_prompt_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    most = config.optim.batch_size_in(2) * longest
    goal = settings.max_tokens_per_microbatch or max(min(most, SATURATING_TOKENS), longest)
    policy = settings.activation_checkpointing
    if policy == "auto":
        policy = next(
            (p for p in ACTIVATION_CHECKPOINTING if fit[p] >= goal), max(fit, key=lambda p: fit[p])
        )
    tokens = settings.max_tokens_per_microbatch or max(
        min(most, SATURATING_TOKENS, fit[policy]), longest
    )
    questions, validation = _decode_batch(config, dims, fixed, device.memory, tokens, itemsize)
    return MemoryPlan(
        device,
        dims,
        policy,
        tokens,
        fixed,
        per_token[policy],
        _supervised_rows(tokens),
        longest,
        fit,
        questions,
        validation,
        shards,
    )


def _with_settings(
    config: TrainConfig, section: str = "generator", **values: object
) -> TrainConfig:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def alternatives(
    config: TrainConfig, dims: NemotronHDims, device: Device, world_size: int = 1
) -> Iterator[str]:
    """Settings with which the run would fit, the least change first."""
    more = sorted({world_size, *_OFFERED_WORLD_SIZES} - set(range(world_size)))
    cut = _with_settings(config, "run", generator_fsdp=True)
    fewest = next((n for n in more if make_plan(cut, dims, device, n).fits), 0)
    if fewest == world_size > 1:
        yield "--set run.generator_fsdp=true"
    rank = max(1, min(8, config.generator.lora_rank))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    again: dict[str, object] = {"activation_checkpointing": "all"}
    less: dict[str, object] = {"lora_targets": attention, "lora_rank": rank}
    tried = [again, less]
    for extra in ({}, again, again | less):
        loose = _with_settings(
            config, max_tokens_per_microbatch=None, max_prompt_tokens=TOKEN_MULTIPLE, **extra
        )
        plan = make_plan(loose, dims, device, world_size)
        room = plan.fit[plan.policy]
        shorter = {"max_prompt_tokens": room} if room < config.generator.max_prompt_tokens else {}
        if room > config.generator.max_new_tokens:
            tried.append({"max_tokens_per_microbatch": room} | shorter | extra)
    for values in tried:
        if make_plan(_with_settings(config, **values), dims, device, world_size).fits:
            yield " ".join(
                f"--set generator.{key}={','.join(x) if isinstance(x, tuple) else x}"
                for key, x in values.items()
            )
    if fewest > world_size:
        yield f"{fewest} such cards: torchrun --nproc-per-node {fewest}, run.generator_fsdp=true"
    for other in DEVICES.values():
        if other.memory > device.memory and make_plan(config, dims, other, world_size).fits:
            yield f"another card: {other.name}"
    if name := architecture_of(config.generator_model):
        for count in range(len(dims.block_types) - 1, 0, -1):
            part = dims._replace(block_types=dims.block_types[:count])
            if make_plan(config, part, device, world_size).fits:
                yield f"a part of it, for speed alone: --generator_model {name}:layers={count}"
                break
    yield "the bundled tiny one: --preset tiny --generator_model tiny"


def apply_memory_plan(
    config: TrainConfig, dims: NemotronHDims, device: Device, world_size: int = 1
) -> TrainConfig:
    """The run's configuration with the plan's choices in it.

    Raises:
        ConfigError: it does not fit; names three settings with which it would.
    """
    plan = make_plan(config, dims, device, world_size)
    if plan.fits:
        return _with_settings(
            config, activation_checkpointing=plan.policy, max_tokens_per_microbatch=plan.tokens
        )
    found = list(alternatives(config, dims, device, world_size))[:3]
    gib = 2.0**30
    raise ConfigError(
        f"the generator {config.generator_model} does not fit: {plan.tokens:,} tokens in a pass "
        f"would take {sum(plan.components.values()) / gib:.0f} GiB with "
        f"generator.activation_checkpointing={plan.policy}, decoding {plan.questions} questions "
        "at once "
        f"{sum(plan.validation.values()) / gib:.0f} GiB, and "
        f"{device.name} has {device.memory / gib:.0f} GiB. What would:\n"
        + "\n".join(f"  {line}" for line in found)
        + "\n`python -m dragkit.plan` with the same flags shows where the memory goes."
    )
