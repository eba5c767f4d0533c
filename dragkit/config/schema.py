"""The settings of a training run with their defaults and sources, as frozen models.

Descriptions name the source of a default: "paper" is D-RAG (EMNLP 2025), "ReaRev" its released
settings, and "earlier trainer" the code whose flags this command line keeps.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from dragkit.config.section import Section
from dragkit.config.training_sections import LossConfig, OptimConfig, RunConfig

DEFAULT_GENERATOR = "unsloth/Nemotron-3-Nano-30B-A3B"
TINY_GENERATOR = "tiny"
PresetName = Literal["tiny", "webqsp", "cwq", "h200", "b200"]
Estimator = Literal["binary_concrete", "straight_through", "leave_one_out", "soft_gates"]
PRESETS: tuple[str, ...] = get_args(PresetName)


class DataConfig(Section):
    """Question files and their packing."""

    heuristics_path: str | None = Field(
        None, description="Training questions, JSONL or JSONL.gz. Unset: the bundled demo set."
    )
    val_heuristics_path: str | None = Field(
        None, description="Validation questions. Unset: the demo's own, or none."
    )
    test_heuristics_path: str | None = Field(
        None, description="Test questions, evaluated at the end. Unset: the demo's own, or none."
    )
    cache_dir: str | None = Field(
        None, description="Folder of packed data sets. Unset: the user's cache folder."
    )
    label_rule: Literal["auto", "shortest", "paths"] = Field(
        "auto",
        description="Positive facts: those on shortest paths from topics to answers, or on the "
        "given paths. auto takes shortest where topics and answers are known.",
    )
    merge_equal_nodes: bool = Field(
        True,
        description="Merge nodes that the retriever cannot tell apart: the same scores in less "
        "time. Merged nodes share a dropout mask.",
    )
    max_facts_per_batch: int = Field(200_000, ge=1, description="Largest batch, in facts.")
    max_bad_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of unusable rows that a file may hold. They are skipped and counted.",
    )
    num_workers: int = Field(0, ge=0, description="Loader processes. 0 loads in the main process.")
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the training questions that is used, drawn with the seed.",
    )
    label_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the training questions whose labels are used. The others still "
        "train the generator, and the retriever through the answer loss. It is for experiments.",
    )
    label_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability that a positive label moves to a random other fact of its "
        "question, in training only. It makes labels wrong on purpose, for experiments.",
    )


class EncoderConfig(Section):
    """The frozen sentence encoder."""

    model: str | None = Field(None, description="Folder or hub name. Unset: all-MiniLM-L6-v2.")


class RetrieverConfig(Section):
    """The ReaRev retriever."""

    hidden_dim: int = Field(256, ge=1, description="Width of all states (earlier trainer: 256).")
    node_dim: int | None = Field(None, ge=1, description="If given, must be hidden_dim.")
    relation_dim: int | None = Field(None, ge=1, description="If given, must be hidden_dim.")
    num_instructions: int = Field(2, ge=1, description="Instructions (ReaRev: 2 WebQSP, 3 CWQ).")
    num_reasoning_steps: int = Field(
        3, ge=1, description="Layers per stage (ReaRev: 2 or 3 WebQSP, 3 CWQ, earlier trainer: 3)."
    )
    num_stages: int = Field(
        2, ge=1, description="Passes with revised instructions (ReaRev: 3 WebQSP, 2 CWQ)."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability while training.")
    gate_relation_by_instruction: bool = Field(
        False,
        description="Gate a fact's relation vector by the question's instructions. Off: "
        "the relation's own vector (paper).",
    )
    message: Literal["fused", "per_instruction"] = Field(
        "fused",
        description="fused sums over instructions first. per_instruction keeps one sum per "
        "instruction as ReaRev does. It is slower and has dropout at its published place.",
    )

    @field_validator("node_dim", "relation_dim")
    @classmethod
    def _one_width(cls, value: int | None, info: ValidationInfo) -> int | None:
        width = info.data.get("hidden_dim", value)
        if value is not None and value != width:
            raise ValueError(
                f"must equal retriever.hidden_dim ({width}), because ReaRev adds node, relation "
                "and instruction vectors. Omit it, or set all three alike."
            )
        return value


class SamplerConfig(Section):
    """Drawing of facts in training, and their choice in evaluation."""

    mode: Literal["bernoulli", "exact_k"] = Field(
        "bernoulli", description="bernoulli: independent draws (paper). exact_k: exactly k facts."
    )
    estimator: Estimator = Field(
        "binary_concrete",
        description="Gradient of a draw: through gates of the structural vectors, that of the "
        "relaxed sample (paper) or of the probability (straight_through); the score function, with "
        "the question's other draws as baseline (leave_one_out); or through gates that weigh whole "
        "facts in a Nemotron-H (soft_gates).",
    )
    num_draws: int = Field(
        1,
        ge=1,
        description="Draws of a question in each step, a prompt each. leave_one_out needs 2.",
    )
    temperature: float = Field(0.5, gt=0, description="Temperature of the relaxation (paper: 0.5).")
    max_facts_cap: int = Field(
        100, ge=1, description="Largest k_facts that is accepted (paper: at most 100 facts)."
    )
    k_facts: int = Field(
        10,
        ge=1,
        description="Largest number of facts in a prompt (earlier trainer: 10, paper: 100).",
    )
    prob_threshold: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Evaluation drops facts with a probability at or below it (paper: 0.01).",
    )

    @field_validator("num_draws")
    @classmethod
    def _leave_one_out_has_others(cls, value: int, info: ValidationInfo) -> int:
        if value < 2 and info.data.get("estimator") == "leave_one_out":
            raise ValueError(
                "must be 2 or more with sampler.estimator leave_one_out, which compares the draws "
                "of a question."
            )
        return value

    # A validator gets only the fields above its own, so max_facts_cap comes first.
    @field_validator("k_facts")
    @classmethod
    def _within_cap(cls, value: int, info: ValidationInfo) -> int:
        cap = info.data.get("max_facts_cap", value)
        if value > cap:
            raise ValueError(
                f"must be at most sampler.max_facts_cap ({cap}). Lower it, or raise the cap."
            )
        return value


class GeneratorConfig(Section):
    """The language model, its LoRA adapters, and the projector."""

    model: str | None = Field(
        None,
        description=f"'{TINY_GENERATOR}', a folder, a hub name, or random:NAME[:layers=N] (speed "
        f"and memory only). Unset: {TINY_GENERATOR} with the demo set, else {DEFAULT_GENERATOR}.",
    )
    revision: str | None = Field(None, description="Hub revision. Unset: the newest.")
    generator_dim: int | None = Field(
        None, ge=1, description="Only checked. Unset: read from the model."
    )
    freeze_lm: bool = Field(False, description="Train no adapters. The projector still trains.")
    fact_text: bool = Field(
        True, description="The text of each fact in the prompt (paper). Off is a control arm."
    )
    structural_vectors: bool = Field(
        True, description="One vector per fact in the prompt (paper). Off is a control arm."
    )
    lora_rank: int = Field(16, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale is alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    lora_targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Layers with adapters, such as q_proj, out_proj, experts.up_proj. Unset: "
        "attention, in_proj, dense and shared experts.",
    )
    generator_microbatch: int | None = Field(
        None,
        ge=1,
        description="Largest micro-batch of the generator, in questions. Unset: the batch.",
    )
    max_tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="Largest micro-batch of the generator, in tokens. A longer prompt has a "
        "micro-batch to itself. Unset: what the memory plan allows on GPU, no limit on CPU.",
    )
    activation_checkpointing: Literal["auto", "none", "mamba", "all"] = Field(
        "auto",
        description="Blocks of a Nemotron-H that are recomputed in the backward. auto: the first "
        "of none, mamba and all that fits the memory plan, and none on CPU.",
    )
    max_prompt_tokens: int = Field(4096, ge=16, description="Longest prompt, in tokens.")
    max_answers: int = Field(
        50, ge=1, description="Answers taught per question, those of the graph first."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights. auto: bfloat16 on GPU, float32 on CPU."
    )

    mamba_backend: Literal["dragkit", "mamba_ssm", "reference"] = Field(
        "dragkit",
        description="Convolution and scan of Mamba-2 layers: our ops, the packages mamba-ssm and "
        "causal-conv1d, or the definitions of our ops in PyTorch.",
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        description="Micro-batches are padded to a multiple of this number of tokens. Unset: 256 "
        "on GPU, no padding on CPU.",
    )

    @field_validator("max_new_tokens")
    @classmethod
    def _shorter_than_prompt(cls, value: int, info: ValidationInfo) -> int:
        limit = info.data.get("max_prompt_tokens")
        if limit is not None and value >= limit:
            raise ValueError(f"must be less than generator.max_prompt_tokens ({limit})")
        return value

    @field_validator("structural_vectors")
    @classmethod
    def _text_or_vectors(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and not info.data.get("fact_text", True):
            raise ValueError("must be true where generator.fact_text is false. Prompts need facts")
        return value

    # Routed experts are 3-D parameters, for which PEFT has no dropout.
    @field_validator("lora_targets")
    @classmethod
    def _routed_experts_have_no_dropout(
        cls, value: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        routed = [name for name in value or () if name.startswith("experts.")]
        if routed and info.data.get("lora_dropout"):
            raise ValueError(
                f"{', '.join(routed)}: adapters of routed experts have no dropout, but "
                f"generator.lora_dropout is {info.data['lora_dropout']}. Set that to 0."
            )
        return value

    projector_dim: int | None = Field(
        None, ge=1, description="Hidden width of the projector. Unset: the generator's width."
    )


class TrainConfig(Section):
    """All settings of a run. `TrainConfig()` has the defaults."""

    preset: PresetName | None = Field(None, description="Preset of the other values.")
    data: DataConfig = Field(default_factory=DataConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    retriever: RetrieverConfig = Field(default_factory=RetrieverConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @property
    def generator_model(self) -> str:
        """The named generator, else the tiny one for the demo set, else the 30B."""
        demo = self.data.heuristics_path is None
        return self.generator.model or (TINY_GENERATOR if demo else DEFAULT_GENERATOR)
