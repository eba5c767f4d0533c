"""The memory plan of a run: checkpointing policy and micro-batch that fit a card, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dragkit.config import TrainConfig
from dragkit.errors import ConfigError
from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS
from dragkit.generator.nemotron_h import ACTIVATION_CHECKPOINTING
from dragkit.generator.projector import Projector
from dragkit.generator.random_weights import architecture_of
from dragkit.memory_plan import memory
from dragkit.memory_plan.dims import LoraDims, NemotronHDims, num_lora_parameters, num_parameters
from dragkit.observe.gpu import CARDS, CardSpec, card_spec
from dragkit.retriever.retriever import Retriever

TOKEN_MULTIPLE = 256
# A micro-batch of this many tokens fills a GPU: every expert has hundreds of rows. A larger one
# gains little, and free memory covers what the estimates miss.
SATURATING_TOKENS = 16_384
MAX_DECODE_BATCH = 32
# Supervised tokens over all tokens: answers are 1 to 5 % of a prompt.
SUPERVISED_FRACTION = 0.05
# Bytes of CUDA context and library workspaces, and the fraction of a card lost to fragmentation.
CUDA_CONTEXT_BYTES, FRAGMENTATION = 3 << 29, 0.06
# Assumed sizes of the data, which the plan does not read.
_FACTS_PER_QUESTION, _NODES_PER_FACT, _PAIRS_PER_FACT = 10_000, 0.5, 0.25
_TEXT_DIM, _RELATIONS, _RELATION_TOKENS = 384, 10_000, 12
BYTES_PER_FACT = 200
_OFFERED_WORLD_SIZES = (2, 4, 8, 16)
_RETRIEVER_ACTIVATIONS = "retriever activations"


def local_card(device: torch.device) -> CardSpec:
    """This machine's GPU with its true memory. Its rates are 0 if the table of cards lacks it."""
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return replace(card_spec(name) or CardSpec(name), name=name, memory_bytes=total)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The predicted memory of a run on a card.

    Attributes:
        card: the card of each rank.
        dims: the generator's dimensions.
        num_shards: number of shards of the frozen weights, 1 if they are replicated.
        policy: a key of `ACTIVATION_CHECKPOINTING`.
        tokens: tokens of a micro-batch.
        fixed: bytes by component that do not depend on `tokens`.
        per_token: bytes per token by component.
        supervised_rows: supervised tokens of a micro-batch.
        longest: tokens of the longest prompt.
        fit: tokens of the largest micro-batch that fits, by policy, or 0 if the weights do not fit.
        decode_batch: questions decoded at once.
        decoding: bytes of validation by component.
    """

    card: CardSpec
    dims: NemotronHDims
    num_shards: int
    policy: str
    tokens: int
    fixed: dict[str, int]
    per_token: dict[str, int]
    supervised_rows: int
    longest: int
    fit: dict[str, int]
    decode_batch: int
    decoding: dict[str, int]

    @property
    def training(self) -> dict[str, int]:
        """Bytes at the peak of training, by component."""
        scaled = {name: size * self.tokens for name, size in self.per_token.items()}
        logits = memory.logits_bytes(self.dims, self.supervised_rows)
        return self.fixed | scaled | {"logits of supervised rows": logits}

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of training and validation."""
        return max(sum(self.training.values()), sum(self.decoding.values()))

    @property
    def fits(self) -> bool:
        """Whether the longest prompt, the micro-batch and the decoding of an answer fit."""
        decodes = sum(self.decoding.values()) <= self.card.memory_bytes
        return decodes and self.fit[self.policy] >= max(self.tokens, self.longest)


def lora_dims_of(config: TrainConfig) -> LoraDims:
    """The adapters that a run trains."""
    if config.generator.freeze_lm:
        return LoraDims(0, ())
    targets = config.generator.lora_targets or DEFAULT_LORA_TARGETS
    return LoraDims(config.generator.lora_rank, targets)


def _num_retriever_projector_parameters(config: TrainConfig, dims: NemotronHDims) -> int:
    with torch.device("meta"):
        retriever = Retriever(config.retriever, _TEXT_DIM)
        width = config.generator.projector_dim
        projector = Projector(retriever.fact_dim, width, dims.hidden_size, 1.0)
    return sum(p.numel() for module in (retriever, projector) for p in module.parameters())


def _itemsize(config: TrainConfig) -> int:
    return 4 if config.generator.dtype == "float32" else 2


def _fixed_bytes(
    config: TrainConfig, dims: NemotronHDims, card: CardSpec, num_shards: int
) -> dict[str, int]:
    """Bytes by component that do not depend on the size of a micro-batch."""
    itemsize = _itemsize(config)
    questions, retriever = config.optim.batch_size_in(2), config.retriever
    facts = min(config.data.max_facts_per_batch, questions * _FACTS_PER_QUESTION)
    num_layers = retriever.num_reasoning_steps * retriever.num_stages
    # A layer saves its input and output, two tables of pairs, and the gate of each instruction.
    rows = facts * (2 * _NODES_PER_FACT + (2 + retriever.num_instructions) * _PAIRS_PER_FACT)
    # Two texts of each relation, in float32.
    table = _RELATIONS * 2 * _RELATION_TOKENS * _TEXT_DIM * 4
    lora = num_lora_parameters(dims, lora_dims_of(config))
    others = _num_retriever_projector_parameters(config, dims)
    weights = {"frozen weights": -(-num_parameters(dims) * itemsize // num_shards)}
    if num_shards > 1:
        weights["all-gathered weights"] = memory.gathered_bytes(dims, itemsize)
    per_param = memory.BYTES_PER_TRAINED_PARAM
    overhead = CUDA_CONTEXT_BYTES + int(FRAGMENTATION * card.memory_bytes)
    return weights | {
        "adapters, gradients, moments": per_param * lora,
        "retriever and projector, gradients, moments": per_param * others,
        _RETRIEVER_ACTIVATIONS: int(4 * retriever.hidden_dim * num_layers * rows),
        "relation table and batch": table + BYTES_PER_FACT * facts,
        "CUDA context, libraries, fragmentation": overhead,
    }


def _supervised_rows(tokens: int) -> int:
    return math.ceil(tokens * SUPERVISED_FRACTION)


def _max_tokens(dims: NemotronHDims, free: int, per_token: int) -> int:
    """The largest multiple of `TOKEN_MULTIPLE` tokens whose activations and logits fit."""
    low, high = 0, max(free, 0) // max(per_token, 1) // TOKEN_MULTIPLE + 1
    while high - low > 1:
        middle = (low + high) // 2
        tokens = middle * TOKEN_MULTIPLE
        needed = tokens * per_token + memory.logits_bytes(dims, _supervised_rows(tokens))
        low, high = (middle, high) if needed <= free else (low, middle)
    return low * TOKEN_MULTIPLE


def _decode_batch(
    config: TrainConfig, dims: NemotronHDims, card: CardSpec, fixed: dict[str, int], tokens: int
) -> tuple[int, dict[str, int]]:
    """The largest number of questions whose decoding fits (at least 1), and bytes by component."""
    itemsize = _itemsize(config)
    settings = config.generator
    prompt = settings.max_prompt_tokens - settings.max_new_tokens
    answer = config.run.val_max_new_tokens or settings.max_new_tokens
    # A no-grad pass saves no activations of the retriever.
    resident = sum(size for name, size in fixed.items() if name != _RETRIEVER_ACTIVATIONS)
    for questions in range(MAX_DECODE_BATCH, 0, -1):
        facts = min(config.data.max_facts_per_batch, questions * _FACTS_PER_QUESTION)
        decoding = {"resident from training": resident, "facts": BYTES_PER_FACT * facts}
        decoding |= memory.decode_bytes(
            dims, questions, prompt, answer, max(tokens, prompt), itemsize
        )
        if sum(decoding.values()) <= card.memory_bytes:
            break
    return questions, decoding


def make_plan(
    config: TrainConfig, dims: NemotronHDims, card: CardSpec, world_size: int = 1
) -> MemoryPlan:
    """The plan of phase 2 on a card, whether it fits or not.

    Picks the cheapest checkpointing policy that still allows a saturating micro-batch, else the one
    with the largest. Settings of the run override these choices. The bytes are those of our own ops
    in half precision. Float32 and the other `generator.mamba_backend` values save more.

    Args:
        config: the run's settings.
        dims: dimensions of the run's generator.
        card: the card of each rank.
        world_size: number of ranks that train together.
    """
    settings, lora = config.generator, lora_dims_of(config)
    num_shards = world_size if config.run.generator_fsdp else 1
    itemsize = _itemsize(config)
    fixed = _fixed_bytes(config, dims, card, num_shards)
    free = card.memory_bytes - sum(fixed.values())
    per_token, fit = {}, {}
    for policy in ACTIVATION_CHECKPOINTING:
        per_token[policy] = memory.activation_bytes_per_token(dims, policy, lora, itemsize)
        # The embedded prompt, the same with structural vectors, padded, and its gradient.
        per_token[policy]["prompt embeddings"] = 4 * itemsize * dims.hidden_size
        fit[policy] = _max_tokens(dims, free, sum(per_token[policy].values()))
    longest = -(-settings.max_prompt_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    prompts = config.optim.batch_size_in(2) * config.sampler.num_draws
    useful = min(prompts * longest, SATURATING_TOKENS)
    wanted = settings.max_tokens_per_microbatch or max(useful, longest)
    policy = settings.activation_checkpointing
    if policy == "auto":
        sufficient = (p for p in ACTIVATION_CHECKPOINTING if fit[p] >= wanted)
        policy = next(sufficient, max(fit, key=lambda p: fit[p]))
    tokens = settings.max_tokens_per_microbatch or max(min(useful, fit[policy]), longest)
    decode_batch, decoding = _decode_batch(config, dims, card, fixed, tokens)
    return MemoryPlan(
        card=card,
        dims=dims,
        num_shards=num_shards,
        policy=policy,
        tokens=tokens,
        fixed=fixed,
        per_token=per_token[policy],
        supervised_rows=_supervised_rows(tokens),
        longest=longest,
        fit=fit,
        decode_batch=decode_batch,
        decoding=decoding,
    )


def _with_settings(
    config: TrainConfig, section: str = "generator", **values: object
) -> TrainConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def alternatives(
    config: TrainConfig, dims: NemotronHDims, card: CardSpec, world_size: int = 1
) -> Iterator[str]:
    """Settings with which the run would fit, the smallest change first."""
    world_sizes = sorted({world_size, *_OFFERED_WORLD_SIZES} - set(range(world_size)))
    sharded = _with_settings(config, "run", generator_fsdp=True)
    fewest = next((n for n in world_sizes if make_plan(sharded, dims, card, n).fits), 0)
    if fewest == world_size > 1:
        yield "--set run.generator_fsdp=true"
    rank = max(1, min(8, config.generator.lora_rank))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    recompute: dict[str, object] = {"activation_checkpointing": "all"}
    fewer_adapters: dict[str, object] = {"lora_targets": attention, "lora_rank": rank}
    candidates = [recompute, fewer_adapters]
    for extra in ({}, recompute, recompute | fewer_adapters):
        unbounded = _with_settings(
            config, max_tokens_per_microbatch=None, max_prompt_tokens=TOKEN_MULTIPLE, **extra
        )
        plan = make_plan(unbounded, dims, card, world_size)
        tokens = plan.fit[plan.policy]
        if tokens > config.generator.max_new_tokens:
            candidates.append({"max_tokens_per_microbatch": tokens} | extra)
            if tokens < config.generator.max_prompt_tokens:
                candidates[-1]["max_prompt_tokens"] = tokens
    for values in candidates:
        if make_plan(_with_settings(config, **values), dims, card, world_size).fits:
            yield " ".join(
                f"--set generator.{key}={','.join(x) if isinstance(x, tuple) else x}"
                for key, x in values.items()
            )
    if fewest > world_size:
        yield f"{fewest} such cards: torchrun --nproc-per-node {fewest}, run.generator_fsdp=true"
    for other in CARDS.values():
        larger = other.memory_bytes > card.memory_bytes
        if larger and make_plan(config, dims, other, world_size).fits:
            yield f"another card: {other.name}"
    if name := architecture_of(config.generator_model):
        for count in range(len(dims.block_types) - 1, 0, -1):
            cut = dims._replace(block_types=dims.block_types[:count])
            if make_plan(config, cut, card, world_size).fits:
                yield f"its first blocks, to measure speed: --generator_model {name}:layers={count}"
                break
    yield "the bundled tiny generator: --preset tiny --generator_model tiny"


def apply_memory_plan(
    config: TrainConfig, dims: NemotronHDims, card: CardSpec, world_size: int = 1
) -> TrainConfig:
    """Writes the plan's policy and micro-batch into the configuration.

    Raises:
        ConfigError: the run does not fit. The message names up to three settings that would.
    """
    plan = make_plan(config, dims, card, world_size)
    if plan.fits:
        return _with_settings(
            config, activation_checkpointing=plan.policy, max_tokens_per_microbatch=plan.tokens
        )
    offers = list(alternatives(config, dims, card, world_size))[:3]
    gib = 2.0**30
    raise ConfigError(
        f"the generator {config.generator_model} does not fit. {card.name} has "
        f"{card.memory_bytes / gib:.0f} GiB. A micro-batch of {plan.tokens:,} tokens with "
        f"generator.activation_checkpointing={plan.policy} needs "
        f"{sum(plan.training.values()) / gib:.0f} GiB, and decoding {plan.decode_batch} questions "
        f"at once needs {sum(plan.decoding.values()) / gib:.0f} GiB. What would fit:\n"
        + "\n".join(f"  {offer}" for offer in offers)
        + "\nRun `python -m dragkit.plan` with the same flags to see what takes the memory."
    )
