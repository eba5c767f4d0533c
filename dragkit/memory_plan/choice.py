"""What of a run fits on a card: how blocks keep their tensors, tokens of a pass, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dragkit.config import TrainConfig
from dragkit.errors import ConfigError
from dragkit.generator.lora.adapters import LORA_TARGETS
from dragkit.generator.nemotron_h import RECOMPUTED
from dragkit.generator.projector import Projector
from dragkit.generator.random_weights import architecture_of
from dragkit.memory_plan import memory
from dragkit.memory_plan.dims import Adapters, Shape, adapter_parameters, parameters
from dragkit.observe.gpu import CARDS, device_spec
from dragkit.retriever.retriever import Retriever

MULTIPLE = 256
# A pass of so many tokens fills a GPU: every expert has hundreds of rows. Larger ones bring little,
# and room that is left forgives what the estimates miss.
ENOUGH = 16_384
# Questions whose answers are decoded at once, at most.
EVALUATED = 32
# Supervised tokens over all: answers are 1 to 5 % of a prompt.
ROWS_SHARE = 0.05
# Context, libraries' workspaces, and what fragmentation takes of a card.
CONTEXT, FRAGMENTED = 3 << 29, 0.06
# A question's facts where nothing is known of the data, and what a pack has of nodes and pairs.
_FACTS, _NODES, _PAIRS = 10_000, 0.5, 0.25
# Numbers of ranks that are offered.
_RANKS = (2, 4, 8, 16)
# Bytes of a fact in a batch.
_FACT = 200
_RETRIEVING = "retriever's activations"
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


def this_device(device: torch.device) -> Device:
    """The GPU that is here, with its peak rates where its name is in the table of cards."""
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.get_device_properties(device).total_memory
    if (spec := device_spec(name)) is None:
        return Device(name, total)
    return Device(name, total, spec.bf16_tflops * 1e12, spec.memory_gb_per_s * 1e9)


@dataclass(frozen=True)
class Plan:
    """A prediction for a run on a device.

    Attributes:
        device: where; shape: of the generator; policy: of `RECOMPUTED`; tokens: of a pass.
        shards: parts of the frozen weights, each on a device of its own.
        fixed: bytes by component, whatever the tokens; per_token: bytes per token by component.
        rows: supervised tokens of a pass; needed: tokens of the longest prompt.
        fit: tokens of a pass that fit, by policy; 0 where not even the weights do.
        questions: decoded at once when validating; validation: bytes of that by component.
    """

    device: Device
    shape: Shape
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
        return found | {"logits of supervised rows": memory.logits_bytes(self.shape, self.rows)}

    @property
    def peak(self) -> int:
        """Bytes at the peak of training and validation."""
        return max(sum(part.values()) for part in (self.components, self.validation))

    @property
    def fits(self) -> bool:
        """Whether the longest prompt, the chosen tokens and an answer's decoding have room."""
        room = sum(self.validation.values()) <= self.device.memory
        return room and self.fit[self.policy] >= max(self.tokens, self.needed)


def adapters_of(config: TrainConfig) -> Adapters:
    """The adapters that a run would train."""
    if config.generator.freeze_lm:
        return Adapters(0, ())
    return Adapters(config.generator.lora_rank, config.generator.lora_targets or LORA_TARGETS)


def _head_parameters(config: TrainConfig, shape: Shape) -> int:
    with torch.device("meta"):
        retriever = Retriever(config.retriever, _TEXT_DIM)
        width = config.generator.projector_dim
        projector = Projector(retriever.fact_dim, width, shape.hidden, 1.0)
    return sum(p.numel() for part in (retriever, projector) for p in part.parameters())


def _fixed(
    config: TrainConfig, shape: Shape, device: Device, half: int, shards: int
) -> dict[str, int]:
    questions, settings = config.optim.batch_size_in(2), config.retriever
    facts = min(config.data.max_facts_per_batch, questions * _FACTS)
    passes = settings.num_reasoning_steps * settings.num_stages
    # A layer keeps its input and output, two tables of pairs, and the gate of each instruction.
    rows = facts * (2 * _NODES + (2 + settings.num_instructions) * _PAIRS)
    kept = int(4 * settings.hidden_dim * passes * rows)
    table = _RELATIONS * 2 * _RELATION_TOKENS * _TEXT_DIM * 2
    weights = {"frozen weights": -(-parameters(shape) * half // shards)}
    if shards > 1:
        weights["frozen weights of others, gathered"] = memory.gathered_bytes(shape, half)
    return weights | {
        "adapters, gradients, moments": memory.TRAINED
        * adapter_parameters(shape, adapters_of(config)),
        "retriever and projector, gradients, moments": memory.TRAINED
        * _head_parameters(config, shape),
        _RETRIEVING: kept,
        "relation table and batch": table + _FACT * facts,
        "context, libraries, fragmentation": CONTEXT + int(FRAGMENTED * device.memory),
    }


def _rows(tokens: int) -> int:
    return math.ceil(tokens * ROWS_SHARE)


def _fitting(shape: Shape, free: int, each: int) -> int:
    """Most tokens, a multiple of `MULTIPLE`, whose tensors and logits have room."""
    low, high = 0, max(free, 0) // max(each, 1) // MULTIPLE + 1
    while high - low > 1:
        middle = (low + high) // 2
        tokens = middle * MULTIPLE
        taken = tokens * each + memory.logits_bytes(shape, _rows(tokens))
        low, high = (middle, high) if taken <= free else (low, middle)
    return low * MULTIPLE


def _validation(
    config: TrainConfig, shape: Shape, fixed: dict[str, int], room: int, tokens: int, half: int
) -> tuple[int, dict[str, int]]:
    """Questions decoded at once, the most that fit but one at least, and bytes by component."""
    settings = config.generator
    prompt = settings.max_prompt_tokens - settings.max_new_tokens
    answer = config.run.val_max_new_tokens or settings.max_new_tokens
    # Without gradients little of the retriever stays.
    held = sum(size for name, size in fixed.items() if name != _RETRIEVING)
    for questions in range(EVALUATED, 0, -1):
        facts = min(config.data.max_facts_per_batch, questions * _FACTS)
        found = {"held from training": held, "facts of the questions": _FACT * facts}
        found |= memory.decode_bytes(shape, questions, prompt, answer, max(tokens, prompt), half)
        if sum(found.values()) <= room:
            break
    return questions, found


def make_plan(config: TrainConfig, shape: Shape, device: Device, ranks: int = 1) -> Plan:
    """What phase 2 of a run would choose on a device, whether it fits or not.

    The first of none, mamba, all whose passes can be as large as is useful; else the one with the
    largest. Settings of the run take the place of choices. The figures are those of our own ops in
    half precision; float32 and the packages of `generator.mamba` keep more.

    Args:
        config: of the run; shape: of its generator; device: the card of each rank.
        ranks: how many train together.
    """
    settings, adapters = config.generator, adapters_of(config)
    shards = ranks if config.run.sharding == "full" else 1
    half = 4 if settings.dtype == "float32" else 2
    fixed = _fixed(config, shape, device, half, shards)
    free = device.memory - sum(fixed.values())
    per_token, fit = {}, {}
    for policy in RECOMPUTED:
        per_token[policy] = memory.activations_per_token(shape, policy, adapters, half)
        # Rows of the prompt, with vectors in their places, padded; and the gradient of that.
        per_token[policy]["embeddings of prompts"] = 4 * half * shape.hidden
        fit[policy] = _fitting(shape, free, sum(per_token[policy].values()))
    longest = -(-settings.max_prompt_tokens // MULTIPLE) * MULTIPLE
    most = config.optim.batch_size_in(2) * longest
    goal = settings.tokens_per_pass or max(min(most, ENOUGH), longest)
    policy = settings.checkpointing
    if policy == "auto":
        policy = next((p for p in RECOMPUTED if fit[p] >= goal), max(fit, key=lambda p: fit[p]))
    tokens = settings.tokens_per_pass or max(min(most, ENOUGH, fit[policy]), longest)
    questions, validation = _validation(config, shape, fixed, device.memory, tokens, half)
    return Plan(
        device,
        shape,
        policy,
        tokens,
        fixed,
        per_token[policy],
        _rows(tokens),
        longest,
        fit,
        questions,
        validation,
        shards,
    )


def _changed(config: TrainConfig, section: str = "generator", **values: object) -> TrainConfig:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def alternatives(
    config: TrainConfig, shape: Shape, device: Device, ranks: int = 1
) -> Iterator[str]:
    """Settings with which the run would fit, the least change first."""
    more = sorted({ranks, *_RANKS} - set(range(ranks)))
    cut = _changed(config, "run", sharding="full")
    fewest = next((n for n in more if make_plan(cut, shape, device, n).fits), 0)
    if fewest == ranks > 1:
        yield "--set run.sharding=full"
    rank = max(1, min(8, config.generator.lora_rank))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    again: dict[str, object] = {"checkpointing": "all"}
    less: dict[str, object] = {"lora_targets": attention, "lora_rank": rank}
    tried = [again, less]
    for extra in ({}, again, again | less):
        loose = _changed(config, tokens_per_pass=None, max_prompt_tokens=MULTIPLE, **extra)
        plan = make_plan(loose, shape, device, ranks)
        room = plan.fit[plan.policy]
        shorter = {"max_prompt_tokens": room} if room < config.generator.max_prompt_tokens else {}
        if room > config.generator.max_new_tokens:
            tried.append({"tokens_per_pass": room} | shorter | extra)
    for values in tried:
        if make_plan(_changed(config, **values), shape, device, ranks).fits:
            yield " ".join(
                f"--set generator.{key}={','.join(x) if isinstance(x, tuple) else x}"
                for key, x in values.items()
            )
    if fewest > ranks:
        yield f"{fewest} such cards: torchrun --nproc-per-node {fewest}, run.sharding=full"
    for other in DEVICES.values():
        if other.memory > device.memory and make_plan(config, shape, other, ranks).fits:
            yield f"another card: {other.name}"
    if name := architecture_of(config.generator_model):
        for count in range(len(shape.kinds) - 1, 0, -1):
            part = shape._replace(kinds=shape.kinds[:count])
            if make_plan(config, part, device, ranks).fits:
                yield f"a part of it, for speed alone: --generator_model {name}:layers={count}"
                break
    yield "the bundled tiny one: --preset tiny --generator_model tiny"


def planned(config: TrainConfig, shape: Shape, device: Device, ranks: int = 1) -> TrainConfig:
    """The run's configuration with the plan's choices in it.

    Raises:
        ConfigError: it does not fit; names three settings with which it would.
    """
    plan = make_plan(config, shape, device, ranks)
    if plan.fits:
        return _changed(config, checkpointing=plan.policy, tokens_per_pass=plan.tokens)
    found = list(alternatives(config, shape, device, ranks))[:3]
    gib = 2.0**30
    raise ConfigError(
        f"the generator {config.generator_model} does not fit: {plan.tokens:,} tokens in a pass "
        f"would take {sum(plan.components.values()) / gib:.0f} GiB with "
        f"generator.checkpointing={plan.policy}, decoding {plan.questions} questions at once "
        f"{sum(plan.validation.values()) / gib:.0f} GiB, and "
        f"{device.name} has {device.memory / gib:.0f} GiB. What would:\n"
        + "\n".join(f"  {line}" for line in found)
        + "\n`python -m dragkit.plan` with the same flags shows where the memory goes."
    )
