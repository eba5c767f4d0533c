"""Both phases from a JSONL file to a checkpoint and back, on eight invented questions."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dragkit import evaluate as evaluate_command
from dragkit import train as train_command
from dragkit.checkpoint.checkpoint import (
    RunInUseError,
    RunLock,
    Snapshot,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dragkit.config import load_config
from dragkit.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    MissingInputError,
    WriteError,
)
from dragkit.trainer import loop
from dragkit.trainer.anomaly import NumericalError
from dragkit.trainer.build import build_retriever
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.resume import resolve_checkpoint
from dragkit.trainer.run_folder import resume_dir
from tests.trainer.run_cases import FIXTURE, assert_same, make_run, stop_after


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("phase", [1, 2])
def test_resume_is_bit_exact(tmp_path, monkeypatch, phase):
    start = {} if phase == 1 else {"run.phase1_checkpoint": str(tmp_path / "first")}
    if phase == 2:
        make_run(tmp_path, 1, "first", **{"optim.epochs": 1}).execute()
    make_run(tmp_path, phase, "whole", **start).execute()
    for steps in (1, 4):
        with monkeypatch.context() as patch:
            stop_after(steps, patch)
            with pytest.raises(Interrupted, match="--resume"):
                make_run(tmp_path, phase, f"cut{steps}", **start).execute()
        resumed = make_run(tmp_path, phase, f"cut{steps}", **start | {"run.resume": True})
        resumed.execute()
        assert_same(tmp_path / "whole", tmp_path / f"cut{steps}")


def test_phase_2_without_a_checkpoint_trains_phase_1_and_reports_all_stages(tmp_path):
    summary = make_run(
        tmp_path,
        2,
        **{"data.val_heuristics_path": str(FIXTURE), "data.test_heuristics_path": str(FIXTURE)},
    ).execute()
    for stage in ("untrained", "after phase 1 (cascade)", "after phase 2 (joint)"):
        assert stage in summary
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(row["counts"]["asked"] == row["counts"]["scored"] == 8 for row in results.values())
    lines = logged(tmp_path / "run")
    assert any("validation" in line for line in lines)
    adapter = find_checkpoint(tmp_path / "run") / "adapter"
    assert (adapter / "adapter_config.json").is_file()


def test_a_run_may_skip_the_tests_before_training(tmp_path):
    data = {"data.test_heuristics_path": str(FIXTURE), "optim.epochs": 1}
    data |= {"generator.max_new_tokens": 4}
    for name, extra in (("all", {}), ("last", {"run.test_before_training": False})):
        make_run(tmp_path, 1, f"{name}1", **data, **extra).execute()
        start = {"run.phase1_checkpoint": str(tmp_path / f"{name}1")}
        make_run(tmp_path, 2, f"{name}2", **data, **extra, **start).execute()
    for phase, stages in ((1, 2), (2, 3)):
        every, last = (tmp_path / f"{name}{phase}" for name in ("all", "last"))
        assert_same(every, last)
        results, few = (json.loads((f / "results.json").read_text()) for f in (every, last))
        assert len(results) == stages and list(few.items()) == list(results.items())[-1:]
        text = (last / "test_predictions.jsonl").read_text()
        # Those of the final model, also where earlier ones were tested before.
        assert text == (every / "test_predictions.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        texts = [json.loads(line)["question"] for line in FIXTURE.read_text().splitlines()]
        assert [row["question"] for row in rows] == texts
        (means,) = few.values()
        for name, metric in means["metrics"].items():
            values = [row["scores"][name] for row in rows if name in row["scores"]]
            assert len(values) == metric["scored"]
            assert sum(values) / len(values) == pytest.approx(metric["mean"], abs=1e-12)


@pytest.mark.parametrize("resumed", [False, True])
def test_validation_without_generation_scores_retrieval_alone(tmp_path, monkeypatch, resumed):
    data = {"data.val_heuristics_path": str(FIXTURE), "data.test_heuristics_path": str(FIXTURE)}
    make_run(tmp_path, 1, "first", **{"optim.epochs": 1}).execute()
    start = {"run.phase1_checkpoint": str(tmp_path / "first"), "run.val_generation_limit": 2}
    start |= data | {"generator.max_new_tokens": 4}
    if resumed:
        with monkeypatch.context() as patch:
            stop_after(4, patch)
            patch.setattr(JointPhase, "score", lambda self, means: 2.0)
            with pytest.raises(Interrupted):
                make_run(tmp_path, 2, **start).execute()
        # A best value of answers must not be compared with one of facts.
        assert load_checkpoint(find_checkpoint(tmp_path / "run")).state.best == 2.0
        start |= {"run.resume": True}
    make_run(tmp_path, 2, **start, **{"run.val_generation": False}).execute()
    lines = logged(tmp_path / "run")
    scores = [line["validation"] for line in lines if "validation" in line]
    assert ["strict-f1" in row for row in scores] == [resumed, False]
    # The checkpoint of an epoch is older than its validation. `best` names the epoch.
    best = load_checkpoint(resolve_checkpoint(tmp_path / "run", "best")).state.epoch
    values = [row["retrieval-f1"] for row in scores]
    assert best == 1 + max(range(resumed, 2), key=lambda epoch: values[epoch])
    # The limit is for generated answers, so facts are scored on all questions.
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all("strict-f1" in row["metrics"] for row in results.values())


def test_a_compiled_run_learns_the_same_with_one_graph_per_block_type(tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    from dragkit.generator.nemotron_h.decoder import residual_block
    from dragkit.trainer import compile as settings

    counters, stock = {}, torch.compile

    def compile_with(function, **options):
        counters[function] = CompileCounterWithBackend("eager")
        return stock(function, **options, backend=counters[function])

    monkeypatch.setattr(torch, "compile", compile_with)
    lines = {}
    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=True),
    ):
        for name, compiled in (("eager", False), ("compiled", True)):
            torch._dynamo.reset()
            before = settings.num_compiled_graphs()
            start = {"run.phase1_checkpoint": str(tmp_path / "first")}
            if not compiled:
                make_run(tmp_path, 1, "first", **{"optim.epochs": 1}).execute()
            make_run(tmp_path, 2, name, **start, **{"run.compile": compiled}).execute()
            lines[name] = [line for line in logged(tmp_path / name) if "train" in line]
            assert lines[name][-1]["compiled_graphs"] - before == sum(
                counter.frame_count for counter in counters.values()
            )
    # Mamba-2, attention and dense. The last attention computes some rows alone, uncompiled.
    assert counters[residual_block].frame_count == 3 and len(counters) == 2
    assert len(lines["eager"]) == len(lines["compiled"]) > 4
    for compiled, eager in zip(lines["compiled"], lines["eager"], strict=True):
        assert compiled["train"]["loss"] == pytest.approx(eager["train"]["loss"], rel=1e-4)


def test_adapter_loads_with_peft_and_gives_equal_logits(tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dragkit.generator.bundled import tiny_generator_path
    from dragkit.generator.nemotron_h.patches import patch_nemotron_h
    from dragkit.trainer.build import build_joint

    checks, check = [], JointPhase.check_gradients
    monkeypatch.setattr(JointPhase, "check_gradients", lambda *a: checks.append(1) or check(*a))
    training_run = make_run(tmp_path, 2, **{"run.phase1_checkpoint": None, "optim.epochs": 1})
    training_run.execute()
    assert len(checks) == load_checkpoint(find_checkpoint(tmp_path / "run")).state.step
    folder = find_checkpoint(tmp_path / "run")
    phase = build_joint(training_run.config, training_run.encoder, torch.device("cpu"))
    phase.load(load_checkpoint(folder))
    phase.model.eval()
    stock = AutoModelForCausalLM.from_pretrained(tiny_generator_path(), dtype=torch.float32)
    # transformers floors the time step at its initialisation's minimum, whatever the configuration
    # says; the same repair on both sides leaves the adapters as the only thing compared.
    patch_nemotron_h(stock)
    stock = PeftModel.from_pretrained(stock, folder / "adapter").eval()
    ids = torch.randint(8, 900, (2, 40))
    with torch.no_grad():
        ours = phase.model.generator.model(input_ids=ids, use_cache=False).logits
        theirs = stock(input_ids=ids, use_cache=False).logits
    assert any(
        v.abs().sum() > 0 for k, v in phase.model.generator.adapter_state().items() if "lora_B" in k
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _gradient(monkeypatch, tmp_path, name, batch_size, accumulation):
    """The first optimizer step's gradients over six questions, by parameter."""
    training_run = make_run(
        tmp_path,
        2,
        name,
        **{
            "run.phase1_checkpoint": str(tmp_path / "first"),
            "optim.batch_size": batch_size,
            "optim.accumulation_steps": accumulation,
            "optim.epochs": 1,
            "retriever.dropout": 0.0,
        },
    )

    class Stop(Exception):
        pass

    def stop(parameters, limit, norm):
        raise Stop([None if p.grad is None else p.grad.clone() for p in parameters])

    with monkeypatch.context() as patch, pytest.raises(Stop) as stopped:
        patch.setattr(loop, "clip_grads_with_norm_", stop)
        training_run.execute()
    return stopped.value.args[0]


def test_accumulation_equals_one_large_batch(tmp_path, monkeypatch):
    make_run(tmp_path, 1, "first", **{"optim.epochs": 1, "retriever.dropout": 0.0}).execute()
    whole = _gradient(monkeypatch, tmp_path, "a", 8, 1)
    for batch_size, steps in ((4, 2), (2, 4), (1, 8)):
        parts = _gradient(monkeypatch, tmp_path, f"b{batch_size}", batch_size, steps)
        for a, b in zip(whole, parts, strict=True):
            if a is None or b is None:
                assert a is None or not a.any()
                continue
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


def test_phase_1_overfits_eight_questions(tmp_path):
    training_run = make_run(
        tmp_path,
        1,
        **{
            "optim.epochs": 60,
            "optim.lr": 5e-3,
            "retriever.dropout": 0.0,
            "data.val_heuristics_path": str(FIXTURE),
        },
    )
    training_run.execute()
    lines = logged(tmp_path / "run")
    losses = [line["train"]["loss"] for line in lines if "train" in line]
    assert sum(losses[-5:]) / 5 < 0.05 < losses[0]
    recalls = [line["validation"]["retrieval-recall"] for line in lines if "validation" in line]
    assert recalls[-1] == 1.0


def test_a_folder_that_is_used_or_in_use_is_refused(tmp_path):
    training_run = make_run(tmp_path, 1, **{"optim.epochs": 1})
    with RunLock(tmp_path / "run"), pytest.raises(RunInUseError):
        training_run.execute()
    training_run.execute()
    with pytest.raises(ConfigError, match="--resume"):
        make_run(tmp_path, 1)


def test_resume_without_a_folder_takes_the_newest_run_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny", overrides={"run.phase": 2, "run.resume": True})
    for name in ("1-phase2-a/step-00000001", "2-phase2-a/phase1/step-00000001", "3-phase2-a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert resume_dir(config).name == "2-phase2-a"
    with pytest.raises(MissingInputError, match="--resume FOLDER"):
        resume_dir(load_config("tiny", overrides={"run.phase": 1, "run.resume": True}))


@pytest.mark.parametrize(("fails", "saves"), [("xx.xx...", 8), ("xxx", 3), ("x.xxx", 5)], ids=str)
def test_training_continues_until_three_saves_in_a_row_have_failed(
    tmp_path, monkeypatch, fails, saves
):
    save, steps = loop.save_checkpoint, []

    def unreliable(*arguments, **options):
        steps.append(arguments[1])
        if fails[len(steps) - 1] == "x":
            raise WriteError("disk full")
        return save(*arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", unreliable)
    training_run = make_run(tmp_path, 1, **{"run.save_every_steps": 1})
    if saves == 8:
        training_run.execute()
    else:
        with pytest.raises(WriteError):
            training_run.execute()
    # Every step, and once more at the end of each epoch.
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6][:saves]


def test_evaluate_needs_only_the_run_folder(tmp_path, capsys):
    make_run(tmp_path, 2, **{"optim.epochs": 1}).execute()
    out = tmp_path / "scores.json"
    code = evaluate_command.main(
        [str(tmp_path / "run"), "--data", str(FIXTURE), "--output", str(out), "--device", "cpu"]
    )
    assert code == 0
    content = json.loads(out.read_text())
    (result,) = content["files"].values()
    assert result["counts"]["asked"] == 8 and result["counts"]["no_gold"] == 1
    assert {"rog-hit", "subgraphrag-hit", "strict-hits@1"} <= result["metrics"].keys()
    assert len(result["predictions"]) == 8
    find_checkpoint(tmp_path / "run")  # evaluation left the run intact


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["--phase", "1", "--heuristics_path", "no/such.jsonl"], 66, "no such file"),
        (["--phase", "3"], 2, "phase"),
        (["--phase", "1", "--epocs", "3"], 2, "epochs"),
        (["--phase", "1", "--k_facts", "500"], 2, "max_facts_cap"),
        (["--phase", "1", "--set", "retriever.hiden_dim=4"], 2, "hidden_dim"),
        (["--phase", "2", "--heuristics_path", str(FIXTURE)], 66, "Nemotron-3-Nano-30B-A3B"),
        (["--phase", "2", "--generator_model", "no/such"], 66, "--generator_model tiny"),
        (["--phase", "2", "--phase1_checkpoint", "no/such"], 66, "no/such"),
        (["--phase", "1", "--device", "cuda:7"], 2, "CUDA"),
    ],
)
def test_a_user_error_gives_a_message_and_its_exit_code(
    tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    assert train_command.main(arguments) == code
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_bad_lines_exit_65_and_name_every_line(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"question": "q"\n' + FIXTURE.read_text().splitlines()[0] + '\n{"question": 3}\n'
    )
    code = train_command.main(
        ["--phase", "1", "--heuristics_path", str(path), "--checkpoint_dir", str(tmp_path / "run")]
    )
    shown = capsys.readouterr().err
    assert code == 65 and "bad.jsonl:1:" in shown and "bad.jsonl:3:" in shown


def test_a_checkpoint_that_does_not_fit_lists_the_settings(tmp_path):
    make_run(tmp_path, 1, "first", **{"optim.epochs": 1}).execute()
    wrong = make_run(
        tmp_path,
        2,
        "second",
        **{"run.phase1_checkpoint": str(tmp_path / "first"), "retriever.hidden_dim": 32},
    )
    with pytest.raises(CheckpointError, match="retriever.hidden_dim: 32 was given, .* has 16"):
        wrong.execute()


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path, monkeypatch):
    original, models = RetrieverPhase.training_step, []

    def poisoned(self, batch, relations, counts, step):
        out = original(self, batch, relations, counts, step)
        self.model.start.weight.grad[0, 0] = float("nan")
        models.append((self.model, copy.deepcopy(self.model.state_dict())))
        return out

    monkeypatch.setattr(RetrieverPhase, "training_step", poisoned)
    with pytest.raises(NumericalError, match="start.weight"):
        make_run(tmp_path, 1).execute()
    ((model, before),) = models
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    (record,) = (tmp_path / "run").glob("anomaly-*.json")
    assert json.loads(record.read_text())["questions"]


def test_a_checkpoint_with_heads_safetensors_still_loads(training_run, tmp_path):
    """Earlier versions wrote the trained tensors under this name."""
    retriever = build_retriever(training_run.config, training_run.encoder)
    phase = RetrieverPhase(training_run.config, retriever)
    saved = {name: tensor + 1 for name, tensor in phase.trainable_state().items()}
    state = TrainState(phase="phase1", epoch=1, step=1, batch=0, questions_seen=3)
    folder = save_checkpoint(tmp_path, 1, Snapshot(tensors={"heads": saved}), state)
    assert (folder / "heads.safetensors").is_file()
    phase.load(load_checkpoint(folder))
    for name, tensor in phase.trainable_state().items():
        assert torch.equal(tensor, saved[name])


def test_training_runs_outside_of_the_main_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: make_run(tmp_path, 1, **{"optim.epochs": 1}).execute()).result()
