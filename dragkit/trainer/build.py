"""Builds the parts of a run: device, files, memory plan, and the model of each phase."""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

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
from dragkit.trainer.compile import (
    compile_enabled,
    compile_generator,
    compile_retriever,
    set_gpu_products,
)
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.replay import StepReplay, capture_for

logger = logging.getLogger(__name__)

# Batches whose largest sizes are the usual capacity of a CUDA graph.
_BUCKET_SAMPLES = 8
# Fraction of the host memory that copies of the weights may take while they are loaded.
_HOST_FRACTION = 0.8


class DataPaths(NamedTuple):
    """The three files of a run. `bundled` marks the demo set."""

    train: str
    val: str | None
    test: str | None
    bundled: bool


def data_paths(config: TrainConfig) -> DataPaths:
    """The files named in the configuration, or the bundled demo set, built on first use."""
    data = config.data
    train, val, test = data.heuristics_path, data.val_heuristics_path, data.test_heuristics_path
    if train is not None:
        return DataPaths(train, val, test, bundled=False)
    from dragkit.demo import demo_files

    demo = demo_files(cache_root(data.cache_dir))
    return DataPaths(str(demo.train), val or str(demo.dev), test or str(demo.test), bundled=True)


def setup_process(config: TrainConfig, ranks: Ranks | None = None) -> torch.device:
    """Applies the process-wide settings of a run and returns this rank's device.

    Raises:
        ConfigError: a CUDA device was named and this machine has none.
    """
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    # State-space decays underflow into denormals, which some processors handle very slowly.
    torch.set_flush_denormal(True)
    name, has_cuda = config.run.device, torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not has_cuda:
        raise ConfigError(
            f"run.device: {name} was given, but this machine has no CUDA device. Use --device cpu."
        )
    device = (ranks or Ranks()).bind_device(device)
    if device.type == "cuda":
        set_gpu_products(config)
    return device


def with_memory_plan(config: TrainConfig, device: torch.device, ranks: int = 1) -> TrainConfig:
    """The configuration with the memory plan's choices for a GPU. On a CPU it is unchanged.

    Raises:
        ConfigError: the run does not fit. The message names settings with which it would.
    """
    if device.type != "cuda":
        return config
    dims = generator_dims(config.generator, name=config.generator_model)
    if dims is None:
        logger.info("no memory plan for %s: it is not a Nemotron-H", config.generator_model)
        return config
    config = apply_memory_plan(config, dims, local_card(device), ranks)
    logger.info(
        "plan: %d tokens in a generator micro-batch, activation checkpointing %s "
        "(python -m dragkit.plan)",
        config.generator.max_tokens_per_microbatch,
        config.generator.activation_checkpointing,
    )
    return config


def num_shards(config: TrainConfig, ranks: Ranks) -> int:
    """Number of ranks that the generator's frozen weights are sharded over. 1 means no sharding."""
    return ranks.world_size if config.run.generator_fsdp else 1


def build_retriever(config: TrainConfig, encoder: TextEncoder) -> Retriever:
    """A new retriever, whose weights are a function of the seed."""
    torch.manual_seed(config.run.seed)
    return Retriever(config.retriever, encoder.dim)


def build_retriever_phase(
    config: TrainConfig,
    retriever: Retriever,
    device: torch.device,
    train: QuestionDataset,
    ranks: Ranks | None = None,
) -> RetrieverPhase:
    """Phase 1 around a retriever on `device`, compiled and replayed as the configuration says.

    The first batches of `train` give the usual capacity of a CUDA graph.
    """
    forward = compile_retriever(retriever) if compile_enabled(config, device) else None
    capture = capture_for(device) if config.run.cuda_graphs else None
    if capture is None or train.store.num_relations == 0:
        return RetrieverPhase(config, retriever, forward=forward)
    # A resumed run takes the batches of epoch 0 too, so that capacities are the same.
    batches = train.batch_sampler.batches(0)[:_BUCKET_SAMPLES]
    slices = (ranks or Ranks()).local_slices(batches)
    # A slice may be empty where a batch has fewer questions than there are ranks.
    samples = [rows or whole for rows, whole in zip(slices, batches, strict=True)]
    make_replay = partial(
        StepReplay,
        buckets=Buckets([train.collator(rows) for rows in samples]),
        capture=capture,
        max_graphs=config.run.max_cuda_graphs,
    )
    return RetrieverPhase(config, retriever, forward=forward, make_replay=make_replay)


def build_joint(
    config: TrainConfig, encoder: TextEncoder, device: torch.device, ranks: Ranks | None = None
) -> JointPhase:
    """Phase 2 on `device`, with a new retriever and projector around the loaded generator."""
    ranks = ranks or Ranks()
    retriever = build_retriever(config, encoder)
    torch.manual_seed(config.run.seed + 1)
    if num_shards(config, ranks) > 1:
        model = _sharded_joint(config, retriever, device, ranks)
    else:
        generator = load_generator(config.generator, device, name=config.generator_model)
        model = JointModel(config, retriever, generator)
    forward = None
    if compile_enabled(config, device):
        compile_generator(model.generator)
        forward = compile_retriever(retriever)
    return JointPhase(config, model.to(device), ranks=ranks, forward=forward)


def _sharded_joint(
    config: TrainConfig, retriever: Retriever, device: torch.device, ranks: Ranks
) -> JointModel:
    """The joint model with this rank's shards of the generator's frozen weights."""
    name, shards = config.generator_model, num_shards(config, ranks)
    mesh = ranks.mesh(device)
    need = weight_bytes(config.generator, device, name=name)
    # Each rank loads all weights into host memory before it keeps its shards.
    with ranks.limited_concurrency(max(1, int(_HOST_FRACTION * host_memory_bytes() / need))):
        generator = load_generator(config.generator, device, name=name, num_shards=shards)
        fingerprint = frozen_fingerprint(generator)
        model = JointModel(config, retriever, generator)
        shard_generator(generator, mesh, ranks.all_reduce_max)
    # Compare here, because shards of different ranks cannot be compared later.
    ranks.require_same(fingerprint)
    logger.info("the generator's frozen weights are sharded over %d ranks", shards)
    return model
