"""A finished run, loaded again for evaluation: its settings come from the checkpoint."""

from __future__ import annotations

from pathlib import Path

from dragkit import __version__
from dragkit.checkpoint.checkpoint import load_checkpoint
from dragkit.config import TrainConfig
from dragkit.config.arguments import EvaluateArguments
from dragkit.data.cache import cache_root
from dragkit.errors import ConfigError, MissingInputError
from dragkit.eval.evaluate import evaluate
from dragkit.generator.random_weights import is_random
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import build_joint, build_retriever, data_paths, setup_process
from dragkit.trainer.phase import Phase
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.question_dataset import QuestionDataset, evaluation_batch_size
from dragkit.trainer.resume import resolve_checkpoint


def _config(saved: TrainConfig, args: EvaluateArguments) -> TrainConfig:
    """The run's configuration with what an evaluation may change."""
    run = {"device": args.device}
    if args.seed is not None:
        run["seed"] = args.seed
    if args.max_new_tokens is not None:
        run["val_max_new_tokens"] = args.max_new_tokens
    return saved.model_copy(update={"run": saved.run.model_copy(update=run)})


def _files(config: TrainConfig, args: EvaluateArguments) -> list[str]:
    if args.data:
        return args.data
    paths = data_paths(config)
    found = paths.test or paths.val
    if found is None:
        raise MissingInputError(
            f"{args.run}: the run names neither test nor validation questions; give --data FILE."
        )
    return [found]


def evaluate_run(args: EvaluateArguments) -> dict:
    """Scores of a run's model on files of questions.

    Args:
        args: the run folder, the files, and how many questions.

    Returns:
        JSON-ready: versions, checkpoint, configuration, and per file the report and predictions.

    Raises:
        ConfigError: its generator has random weights.
    """
    loaded = load_checkpoint(resolve_checkpoint(args.run, args.checkpoint))
    config = _config(TrainConfig.model_validate(loaded.json["config"]), args)
    if loaded.state.phase != "phase1" and is_random(config.generator_model):
        raise ConfigError(
            f"{args.run}: was trained with the generator {config.generator_model}. Random weights "
            "answer nothing, so there is nothing to evaluate; its metrics.jsonl holds loss and "
            "throughput."
        )
    device = setup_process(config)
    encoder = TextEncoder(find_encoder(config.encoder.model), cache_root(config.data.cache_dir))
    generator = None
    phase: Phase
    if loaded.state.phase == "phase1":
        phase = RetrieverPhase(config, build_retriever(config, encoder).to(device))
    else:
        joint = build_joint(config, encoder, device)
        generator, phase = joint.model.generator, joint
    phase.load(loaded)
    content: dict = {
        "dragkit": __version__,
        "checkpoint": str(loaded.folder),
        "step": loaded.state.step,
        "config": config.model_dump(mode="json"),
        "files": {},
    }
    for path in _files(config, args):
        if not Path(path).is_file():
            raise MissingInputError(f"{path}: no such file.")
        size = args.batch_size or evaluation_batch_size(config, generator, device)
        source = QuestionDataset(path, config, encoder, generator, size)
        result = evaluate(phase, source, device, limit=args.limit)
        content["files"][str(path)] = {
            "data_fingerprint": source.store.fingerprint,
            "summary": source.store.summary,
            **result.report.to_dict(),
            "table": result.report.to_table(),
            "predictions": result.predictions,
        }
    return content
