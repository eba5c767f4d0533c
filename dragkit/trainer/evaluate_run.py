"""Evaluation of a finished run, whose settings come from the checkpoint."""

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


def _with_arguments(saved: TrainConfig, args: EvaluateArguments) -> TrainConfig:
    run = {"device": args.device}
    if args.seed is not None:
        run["seed"] = args.seed
    if args.max_new_tokens is not None:
        run["val_max_new_tokens"] = args.max_new_tokens
    return saved.model_copy(update={"run": saved.run.model_copy(update=run)})


def _files(config: TrainConfig, args: EvaluateArguments) -> list[str]:
    """The files given, else the run's test questions, else its validation questions."""
    if args.data:
        return args.data
    paths = data_paths(config)
    path = paths.test or paths.val
    if path is None:
        raise MissingInputError(
            f"{args.run}: the run has neither test nor validation questions. Give --data FILE."
        )
    return [path]


def evaluate_run(args: EvaluateArguments) -> dict:
    """Evaluates a run's model on files of questions.

    Args:
        args: the run folder, the files, and how many questions.

    Returns:
        JSON-ready: versions, checkpoint, configuration, and per file the report and predictions.

    Raises:
        ConfigError: the generator has random weights.
        MissingInputError: the run or a file is missing.
    """
    loaded = load_checkpoint(resolve_checkpoint(args.run, args.checkpoint))
    config = _with_arguments(TrainConfig.model_validate(loaded.json["config"]), args)
    if loaded.state.phase != "phase1" and is_random(config.generator_model):
        raise ConfigError(
            f"{args.run}: the run was trained with the generator {config.generator_model}. Random "
            "weights answer nothing, so there is nothing to evaluate. Loss and throughput are in "
            "its metrics.jsonl."
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
        batch_size = args.batch_size or evaluation_batch_size(config, generator, device)
        dataset = QuestionDataset(path, config, encoder, generator, batch_size)
        result = evaluate(phase, dataset, device, limit=args.limit)
        content["files"][str(path)] = {
            "data_fingerprint": dataset.store.fingerprint,
            "summary": dataset.store.summary,
            **result.report.to_dict(),
            "table": result.report.to_table(),
            "predictions": result.predictions,
        }
    return content
