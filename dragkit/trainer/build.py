"""What a run is built of: files, device, models, and how these are compiled or replayed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dragkit.config import TrainConfig
from dragkit.data.cache import cache_root
from dragkit.data.padding import Buckets
from dragkit.distributed.rank_consistency import frozen_fingerprint
from dragkit.distributed.ranks import Ranks
from dragkit.distributed.sharding import shard_generator
from dragkit.errors import ConfigError
from dragkit.generator.load import host_memory_bytes, load_generator, weight_bytes
from dragkit.joint import JointModel
from dragkit.memory_plan.choice import apply_memory_plan, local_card
from dragkit.memory_plan.dims import generator_dims
from dragkit.retriever.retriever import Retriever
from dragkit.retriever.text_encoder import TextEncoder
from dragkit.trainer.compile import compile_generator, compile_retriever
from dragkit.trainer.phase import Phase
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.replay import StepReplay, capture_for

logger = logging.getLogger(__name__)

_BUCKET_SAMPLES = 8
# Of a machine's memory, what copies of the weights may take while they are loaded.
_HOST_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class DataPaths:
    """The three files of a run; only `train` must exist."""

    train: str
    val: str | None
    test: str | None
    bundled: bool


def select_device(name: str) -> torch.device:
    """The device of a run; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"run.device: {name} was asked for, but no CUDA device is available here."
        )
    return device


def data_paths(config: TrainConfig) -> DataPaths:
    """The files named in the configuration, or the bundled demo set, built on first use."""
    data = config.data
    if data.heuristics_path is not None:
        return DataPaths(
            data.heuristics_path, data.val_heuristics_path, data.test_heuristics_path, False
        )
    from dragkit.demo import demo_files

    demo = demo_files(cache_root(data.cache_dir))
    return DataPaths(
        str(demo.train),
        data.val_heuristics_path or str(demo.dev),
        data.test_heuristics_path or str(demo.test),
        True,
    )


def setup_process(config: TrainConfig, ranks: Ranks | None = None) -> torch.device:
    """Process-wide settings of a run; returns its device, or that of this rank of it."""
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    # State-space decays underflow into denormals, which some processors handle very slowly.
    torch.set_flush_denormal(True)
    device = (ranks or Ranks()).bind_device(select_device(config.run.device))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return device


def with_memory_plan(config: TrainConfig, device: torch.device, ranks: int = 1) -> TrainConfig:
    """The configuration with what the plan chooses for a GPU; on a CPU nothing is chosen.

    Raises:
        ConfigError: the run does not fit; names settings with which it would.
    """
    if device.type != "cuda":
        return config
    shape = generator_dims(config.generator, name=config.generator_model)
    if shape is None:
        logger.info("no plan for %s: it is not a Nemotron-H", config.generator_model)
        return config
    config = apply_memory_plan(config, shape, local_card(device), ranks)
    chosen = config.generator
    logger.info(
        "plan: %d tokens in a generator pass, checkpointing %s (python -m dragkit.plan)",
        chosen.max_tokens_per_microbatch,
        chosen.activation_checkpointing,
    )
    return config


def build_retriever(config: TrainConfig, encoder: TextEncoder) -> Retriever:
    """A fresh retriever; its weights are a function of the seed."""
    torch.manual_seed(config.run.seed)
    return Retriever(config.retriever, encoder.dim)


def shards(config: TrainConfig, ranks: Ranks) -> int:
    """Parts into which the generator's frozen weights are cut; 1 leaves them whole."""
    return ranks.world_size if config.run.generator_fsdp else 1


def build_joint(
    config: TrainConfig, encoder: TextEncoder, device: torch.device, ranks: Ranks | None = None
) -> JointPhase:
    """Phase 2's model with a fresh retriever and projector around the loaded generator.

    Args:
        config: of the run; encoder: of its texts; device: where the model goes.
        ranks: those that may share out the generator's weights; None means this process alone.
    """
    ranks = ranks or Ranks()
    retriever = build_retriever(config, encoder)
    torch.manual_seed(config.run.seed + 1)
    if shards(config, ranks) > 1:
        model = _sharded(config, retriever, device, ranks)
    else:
        generator = load_generator(config.generator, device, name=config.generator_model)
        model = JointModel(config, retriever, generator)
    if compiles(config, device):
        compile_generator(model.generator)
    phase = JointPhase(config, model.to(device))
    phase.ranks = ranks
    return maybe_compile(phase, model.retriever, config, device)


def _sharded(
    config: TrainConfig, retriever: Retriever, device: torch.device, ranks: Ranks
) -> JointModel:
    """The joint model with this rank's part of the generator's frozen weights.

    Every rank loads all weights before it cuts them, as many ranks at a time as the machine's
    memory holds.
    """
    name, parts = config.generator_model, shards(config, ranks)
    mesh = ranks.mesh(device)
    need = weight_bytes(config.generator, device, name=name)
    with ranks.limited_concurrency(max(1, int(_HOST_SHARE * host_memory_bytes() / need))):
        generator = load_generator(config.generator, device, name=name, num_shards=parts)
        fingerprint = frozen_fingerprint(generator)
        model = JointModel(config, retriever, generator)
        shard_generator(generator, mesh, ranks.all_reduce_max)
    # Parts cannot be compared with one another later on.
    ranks.require_same(fingerprint)
    logger.info("the generator's frozen weights are cut between %d ranks", parts)
    return model


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the configuration or the device asks for compiled models."""
    return device.type == "cuda" if config.run.compile is None else config.run.compile


def maybe_compile(
    phase: Phase, retriever: Retriever, config: TrainConfig, device: torch.device
) -> Phase:
    """Compiles the retriever's forward where the configuration or the device asks for it."""
    if compiles(config, device):
        phase.forward = compile_retriever(retriever)  # type: ignore[attr-defined]
    return phase


def maybe_replay(
    phase: RetrieverPhase,
    train: QuestionDataset,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks | None = None,
) -> None:
    """Lets phase 1 replay its step, where the device can and the configuration does not object.

    The usual size of a batch is that of the first ones of epoch 0, also in a resumed run.
    """
    capture = capture_for(device) if config.run.cuda_graphs else None
    if capture is None or train.store.num_relations == 0:
        return
    batches = train.batch_sampler.batches(0)[:_BUCKET_SAMPLES]
    slices = (ranks or Ranks()).local_slices(batches)
    samples = [own or whole for own, whole in zip(slices, batches, strict=True)]
    phase.replay = StepReplay(
        phase.loss,
        list(phase.model.parameters()),
        Buckets([train.collator(rows) for rows in samples]),
        capture,
        max_graphs=config.run.max_cuda_graphs,
    )
    train.to_device = False  # the replay copies a batch into the graph's own buffers
