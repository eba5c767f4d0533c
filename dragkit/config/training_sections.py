"""The settings of training: losses, optimizer, and the run itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dragkit.config.section import Section

DEVICE_PATTERN = r"^(auto|cpu|cuda(:[0-9]+)?)$"


class LossConfig(Section):
    """Weights of the training losses."""

    rho: float = Field(0.7, ge=0, le=1, description="rho BCE + (1 - rho) rank (paper: 0.7).")
    margin: float = Field(1.0, ge=0, description="Margin of the rank loss, on logits.")
    ret_loss_weight: float = Field(
        5.0,
        ge=0,
        description="Weight of the retriever loss in phase 2 (earlier trainer: 0.1, with which "
        "phase 2 retrieves worse than phase 1).",
    )
    generator_gradient: Literal["both", "gates", "vectors", "none"] = Field(
        "both",
        description="Ways of the answer loss into the retriever: through the draw of the facts, "
        "through their structural vectors, both (paper), or none (labels alone train it).",
    )
    draw_objective: Literal["expected", "marginal"] = Field(
        "expected",
        description="What leave_one_out minimizes over draws: the expected answer loss, or the "
        "negative log-likelihood of the answer with the draw summed out.",
    )
    use_grad_norm_balance: bool = Field(
        False, description="Set ret_loss_weight from the ratio of gradient norms (paper)."
    )
    balance_rho: float = Field(
        0.9, ge=0, description="Target ratio of retriever to generator gradient norm (paper: 0.9)."
    )
    eos_loss_weight: float = Field(1.0, ge=0, description="Weight of the end token.")


class OptimConfig(Section):
    """AdamW, its schedule, and the batch size."""

    lr: float = Field(5e-5, gt=0, description="Learning rate (paper: 5e-5).")
    lora_lr: float | None = Field(
        None, gt=0, description="Learning rate of the adapters. Unset: lr times lora_lr_scale."
    )
    lora_lr_scale: float = Field(
        0.2, gt=0, description="lora_lr over lr (paper: 1e-5, which is 0.2 of 5e-5)."
    )
    retriever_lr_scale: float = Field(
        1.0, ge=0, description="Retriever's rate over lr in phase 2. 0 freezes it."
    )
    projector_lr_scale: float = Field(1.0, gt=0, description="Projector's rate over lr.")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW weight decay (paper: 1e-3).")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Warm-up steps over all steps.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Final learning rate over lr.")
    grad_clip: float = Field(
        1.0, gt=0, description="Largest gradient norm over all trained weights."
    )
    epochs: int | None = Field(
        None, ge=1, description="Epochs. Unset: 10 in phase 1 (paper), 5 in phase 2."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Questions per batch. Unset: 16 in phase 1 (paper), 1 in phase 2."
    )
    accumulation_steps: int = Field(1, ge=1, description="Batches per optimizer step.")

    @property
    def adapter_lr(self) -> float:
        """Learning rate of the adapters."""
        return self.lr * self.lora_lr_scale if self.lora_lr is None else self.lora_lr

    def epochs_in(self, phase: int) -> int:
        """Epochs of phase 1 or 2."""
        return self.epochs or {1: 10, 2: 5}[phase]

    def batch_size_in(self, phase: int) -> int:
        """Questions per batch in phase 1 or 2."""
        return self.batch_size or {1: 16, 2: 1}[phase]


class RunConfig(Section):
    """Phase, device, folders and reports of a run."""

    phase: Literal[1, 2] = Field(2, description="1: retriever. 2: retriever and generator.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, order and draws.")
    checkpoint_dir: str | None = Field(
        None, description="Folder for checkpoints. Unset: a new folder under runs/."
    )
    phase1_checkpoint: str | None = Field(
        None, description="Retriever to start phase 2 from. Unset: phase 1 is trained first."
    )
    resume: bool | str = Field(
        False,
        description="Resume this run or checkpoint. Alone: checkpoint_dir, else the newest run.",
    )
    device: str = Field("auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda or cuda:N.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Autocast type. auto: bfloat16 on GPU, float32 on CPU. float32 uses no TF32.",
    )
    compile: bool | None = Field(
        None, description="Compile the retriever and the generator's blocks. Unset: on GPU only."
    )
    cuda_graphs: bool = Field(
        True, description="Replay the step of phase 1 as a CUDA graph. On CPU it has no effect."
    )
    max_cuda_graphs: int = Field(
        16, ge=0, description="Maximum number of batch sizes with a CUDA graph. Others run without."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads. Unset: torch decides.")
    rank_timeout: int = Field(1800, ge=1, description="Seconds that a rank waits for the others.")
    generator_fsdp: bool = Field(
        False, description="Shard the generator's frozen weights over the ranks (FSDP2)."
    )
    save_every_steps: int = Field(0, ge=0, description="Steps between checkpoints. 0: every epoch.")
    keep_checkpoints: int = Field(
        3, ge=1, description="Newest checkpoints to keep besides the best."
    )
    log_every_steps: int = Field(10, ge=1, description="Steps between log lines.")
    val_generation: bool = Field(True, description="Generate answers when validating in phase 2.")
    val_max_new_tokens: int | None = Field(
        None, ge=1, description="Longest answer when validating. Unset: generator.max_new_tokens."
    )
    val_generation_limit: int = Field(200, ge=1, description="Questions answered per validation.")
    val_log_samples: int = Field(3, ge=0, description="Number of validation answers in the log.")
    test_before_training: bool = Field(
        True,
        description="Evaluate the test questions before training, too: untrained, and in phase 2 "
        "after phase 1.",
    )
    log_grad_norms: bool = Field(False, description="Log gradient norms of each part.")
    grad_norm_log_interval: int = Field(50, ge=1, description="Steps between these logs.")
    profile_steps: str | None = Field(
        None,
        pattern=r"^[0-9]+:[0-9]+$",
        description="Steps first:end to profile, for example 10:13.",
    )
    profile_trace: bool = Field(
        False, description="Also write these steps as a Chrome trace, except under nsys or ncu."
    )

    @field_validator("profile_steps")
    @classmethod
    def _first_before_end(cls, value: str | None) -> str | None:
        if value is not None:
            first, end = (int(step) for step in value.split(":"))
            if first >= end:
                raise ValueError(f"must be first:end with first < end, as in {first}:{first + 3}")
        return value
