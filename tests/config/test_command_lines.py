"""The command lines: every flag in both spellings, mistakes, help and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dragkit.config.__main__ import main as config_main
from dragkit.config.arguments import TrainArguments, parse_train_args
from dragkit.config.flags import FLAGS, train_parser
from dragkit.console import run_main
from dragkit.errors import (
    EXIT_CODES,
    CheckpointError,
    ConfigError,
    DataError,
    DragkitError,
    Interrupted,
    MissingInputError,
    WriteError,
)
from dragkit.evaluate import evaluate_parser, parse_evaluate_args
from dragkit.experiment.__main__ import experiment_parser
from dragkit.plan import plan_parser

ROOT = Path(__file__).resolve().parents[2]

# Flag -> dotted key, text and value. A new setting is a field of the schema without a flag.
FROZEN: dict[str, tuple[str, str, object]] = {
    "phase": ("run.phase", "1", 1),
    "seed": ("run.seed", "7", 7),
    "device": ("run.device", "cuda:1", "cuda:1"),
    "compile": ("run.compile", "true", True),
    "profile_steps": ("run.profile_steps", "10:13", "10:13"),
    "checkpoint_dir": ("run.checkpoint_dir", "out-a_b", "out-a_b"),
    "phase1_checkpoint": ("run.phase1_checkpoint", "c/phase1_best.pt", "c/phase1_best.pt"),
    "resume": ("run.resume", "runs/x", "runs/x"),
    "heuristics_path": ("data.heuristics_path", "train-set_1.jsonl", "train-set_1.jsonl"),
    "val_heuristics_path": ("data.val_heuristics_path", "v.jsonl.gz", "v.jsonl.gz"),
    "num_workers": ("data.num_workers", "4", 4),
    "hidden_dim": ("retriever.hidden_dim", "128", 128),
    "node_dim": ("retriever.node_dim", "64", 64),
    "relation_dim": ("retriever.relation_dim", "64", 64),
    "num_reasoning_steps": ("retriever.num_reasoning_steps", "2", 2),
    "k_facts": ("sampler.k_facts", "15", 15),
    "max_facts_cap": ("sampler.max_facts_cap", "50", 50),
    "prob_threshold": ("sampler.prob_threshold", "0.05", 0.05),
    "temperature": ("sampler.temperature", "1", 1.0),
    "generator_model": ("generator.model", "a/b-c_d", "a/b-c_d"),
    "generator_revision": ("generator.revision", "main", "main"),
    "generator_dim": ("generator.generator_dim", "2688", 2688),
    "freeze_lm": ("generator.freeze_lm", "yes", True),
    "generator_microbatch": ("generator.generator_microbatch", "4", 4),
    "epochs": ("optim.epochs", "3", 3),
    "batch_size": ("optim.batch_size", "8", 8),
    "lr": ("optim.lr", "1e-4", 1e-4),
    "lora_lr": ("optim.lora_lr", "2e-5", 2e-5),
    "lora_lr_scale": ("optim.lora_lr_scale", "0.5", 0.5),
    "weight_decay": ("optim.weight_decay", "0", 0.0),
    "ret_loss_weight": ("loss.ret_loss_weight", "0.3", 0.3),
    "rho": ("loss.rho", "0.6", 0.6),
    "margin": ("loss.margin", "0.5", 0.5),
    "eos_loss_weight": ("loss.eos_loss_weight", "2", 2.0),
    "use_grad_norm_balance": ("loss.use_grad_norm_balance", "1", True),
    "val_generation": ("run.val_generation", "false", False),
    "val_max_new_tokens": ("run.val_max_new_tokens", "16", 16),
    "val_generation_limit": ("run.val_generation_limit", "20", 20),
    "val_log_samples": ("run.val_log_samples", "0", 0),
    "log_grad_norms": ("run.log_grad_norms", "true", True),
    "grad_norm_log_interval": ("run.grad_norm_log_interval", "5", 5),
}
FROZEN_OTHERS = {"help", "preset", "config", "set", "debug"}
SWITCHES = {
    "compile": True,
    "resume": False,
    "freeze_lm": False,
    "use_grad_norm_balance": False,
    "val_generation": True,
    "log_grad_norms": False,
}


def value_of(args: TrainArguments, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(args.config, section), name)


def test_the_command_line_is_frozen() -> None:
    assert {name: key for name, (key, _, _) in FROZEN.items()} == FLAGS
    options = train_parser("x")._option_string_actions
    expected = FROZEN.keys() | FROZEN_OTHERS | {f"no_{name}" for name in SWITCHES}
    assert {option.lstrip("-") for option in options} == expected | {"h"}
    assert {option.lstrip("-") for option in evaluate_parser()._option_string_actions} == {
        *("h", "help", "data", "checkpoint", "output", "limit", "batch_size", "device"),
        *("max_new_tokens", "seed", "facts", "debug"),
    }


@pytest.mark.parametrize("dashed", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", FROZEN)
def test_every_flag_in_every_spelling(name: str, joined: bool, dashed: bool) -> None:
    key, text, value = FROZEN[name]
    flag = f"--{name.replace('_', '-') if dashed else name}"
    args = parse_train_args([f"{flag}={text}"] if joined else [flag, text])

    assert value_of(args, key) == value
    assert type(value_of(args, key)) is type(value)
    assert args.origins[key] == f"--{name}"
    assert args.overrides.keys() == {key}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_stands_alone_or_takes_a_truth_value_or_is_negated(name: str) -> None:
    key = FLAGS[name]
    dashed = name.replace("_", "-")
    for words, value in [
        ([f"--{name}"], True),
        ([f"--{dashed}", "true"], True),
        ([f"--{name}=false"], False),
        ([f"--no_{name}"], False),
        ([f"--no-{dashed}"], False),
        ([f"--{name}", "--no_compile", f"--no_{name}", f"--{name}"], True),
    ]:
        assert value_of(parse_train_args(words), key) is value, words
    assert value_of(parse_train_args([f"--{name}", "--lr", "1"]), key) is True


COMMON = "--lr 5e-5 --node_dim 256 --hidden_dim 256 --relation_dim 256 --num_reasoning_steps 3"
BIG = "--generator_model unsloth/Nemotron-3-Nano-30B-A3B"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--phase 1 --heuristics_path data/train_heuristics_cwq.jsonl --epochs 10 "
            f"--batch_size 16 {COMMON} --checkpoint_dir checkpoints_cwq",
            {"optim.batch_size": 16, "run.phase": 1, "optim.lr": 5e-5},
        ),
        (f"--epochs 5 --batch_size 1 {BIG}", {"optim.batch_size": 1, "sampler.k_facts": 10}),
        (f"--epochs 5 --batch_size 1 --k_facts 10 {COMMON} {BIG}", {"sampler.k_facts": 10}),
        (
            "--phase 2 --phase1_checkpoint checkpoints_cwq_subgraph/phase1_best.pt "
            f"--heuristics_path x.jsonl --epochs 5 --batch_size 4 --k_facts 15 {BIG}",
            {
                "run.phase1_checkpoint": "checkpoints_cwq_subgraph/phase1_best.pt",
                "optim.batch_size": 4,
                "sampler.k_facts": 15,
                "generator.model": "unsloth/Nemotron-3-Nano-30B-A3B",
            },
        ),
    ],
)
def test_commands_of_the_earlier_implementation(line: str, expected: dict[str, object]) -> None:
    args = parse_train_args(line.split())
    assert {key: value_of(args, key) for key in expected} == expected


def test_without_arguments_it_is_phase_2_of_the_demo() -> None:
    args = parse_train_args([])
    assert (args.config.preset, args.config.run.phase, args.debug) == ("tiny", 2, False)
    assert args.config.generator_model == "tiny"
    assert args.overrides == {}


def test_set_reaches_the_whole_schema_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("retriever: {num_stages: 4}\noptim: {lr: 9}\n")
    line = (
        f"--config {path} --set optim.lr=1e-3 --lr 2e-3 --set generator.lora_targets=q_proj,v_proj"
    )
    args = parse_train_args(
        [*line.split(), "--set", "optim.epochs=none", "--set=data.cache_dir=a=b"]
    )

    assert args.config.retriever.num_stages == 4
    assert (args.config.optim.lr, args.origins["optim.lr"]) == (2e-3, "--lr")
    assert args.config.generator.lora_targets == ("q_proj", "v_proj")
    assert args.config.optim.epochs is None
    assert args.config.data.cache_dir == "a=b"
    assert args.origins["data.cache_dir"] == "--set data.cache_dir"
    assert args.origins["retriever.num_stages"] == str(path)


def test_the_other_phase_of_the_same_command() -> None:
    args = parse_train_args(["--preset", "b200", "--hidden_dim", "32"])
    first = args.config_for_phase(1)
    assert (first.run.phase, first.retriever.hidden_dim) == (1, 32)
    assert (args.config.optim.batch_size_in(2), first.optim.batch_size_in(1)) == (4, 16)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--k_fcts 5", ["--k_fcts: unknown flag; did you mean --k_facts?"]),
        ("--heuristic-path x", ["--heuristic_path", "did you mean --heuristics_path?"]),
        ("--heur x", ["--heur: unknown flag"]),
        ("--num_stages=4", ["did you mean --set retriever.num_stages=VALUE?"]),
        ("--optim.lr 4", ["did you mean --set optim.lr=VALUE?"]),
        ("--frobnicate", ["--frobnicate: unknown flag (--help lists all)"]),
        ("-x", ["-x: unknown flag"]),
        ("train.jsonl", ["unexpected argument 'train.jsonl'"]),
        ("--lr", ["--lr: expected one argument"]),
        ("--lr abc", ["optim.lr (--lr)", "valid number", "'abc'"]),
        ("--epochs 1.5", ["optim.epochs (--epochs)", "valid integer"]),
        ("--freeze_lm maybe", ["generator.freeze_lm (--freeze_lm)"]),
        ("--no_lr", ["--no_lr: unknown flag"]),
        ("--set lr=1", ["lr (--set lr): unknown key; did you mean optim.lr?"]),
        ("--set sampler.k_factz=1", ["did you mean sampler.k_facts?"]),
        ("--set optim.lr", ["--set takes section.field=value, got 'optim.lr'"]),
        ("--set optim=1", ["optim (--set optim): is a section"]),
        ("--preset h20", ["preset (--preset)", "'h200'", "'h20'"]),
        ("--k_facts 101", ["sampler.k_facts (--k_facts)", "max_facts_cap (100)"]),
    ],
)
def test_a_mistake_says_where_and_what_was_meant(line: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train_args(line.split())
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2


def test_flags_keys_and_values_are_reported_together() -> None:
    line = "--k_fcts 5 --lr abc --phase 3 --set optim.lrr=1 stray --optim.lr 1 value"
    with pytest.raises(ConfigError) as caught:
        parse_train_args(line.split())
    message = str(caught.value)
    for part in ("--k_fcts", "(--lr)", "(--phase)", "optim.lrr", "'stray'", "--optim.lr:"):
        assert part in message
    # The value of an unknown flag is not reported.
    assert "argument '5'" not in message
    assert "argument 'value'" in message


def test_evaluation_arguments() -> None:
    plain = parse_evaluate_args(["runs/demo"])
    assert (plain.run, plain.data, plain.checkpoint) == (Path("runs/demo"), [], "best")
    assert (plain.output, plain.limit, plain.batch_size, plain.seed) == (None, None, None, None)
    assert (plain.device, plain.max_new_tokens, plain.debug) == ("auto", None, False)
    assert plain.facts == "retrieved"

    line = (
        "runs/demo --data a.jsonl b.jsonl --data c.jsonl --checkpoint latest --output o.json "
        "--limit 5 --batch-size 2 --device cpu --max-new-tokens 8 --seed 0 --facts gold --debug"
    )
    full = parse_evaluate_args(line.split())
    assert full.data == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert (full.checkpoint, full.output, full.limit) == ("latest", Path("o.json"), 5)
    assert (full.batch_size, full.device, full.max_new_tokens) == (2, "cpu", 8)
    assert (full.seed, full.facts, full.debug) == (0, "gold", True)
    assert parse_evaluate_args(["x", "--checkpoint", "step-40"]).checkpoint == 40
    assert parse_evaluate_args(["x", "--checkpoint", "40"]).checkpoint == 40


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "required: RUN"),
        ("x --limit 0", "at least 1, got '0'"),
        ("x --limit many", "got 'many'"),
        ("x --seed 4294967296", "at most 4294967295"),
        ("x --checkpoint newest", "best, latest or a step"),
        ("x --device tpu", "cuda:N"),
        ("x --facts all", "(choose from"),
        ("x --hidden-dim 64", "--hidden_dim: is read from the checkpoint"),
        ("x --limti 3", "did you mean --limit?"),
        ("x y", "unexpected argument 'y'"),
    ],
)
def test_mistakes_in_evaluation(line: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_evaluate_args(line.split())
    assert part in str(caught.value)


HELP = """
import sys
from {module} import {call}
try:
    {call}(sys.argv[1:])
finally:
    heavy = {{"torch", "numpy", "transformers", "peft"}} & set(sys.modules)
    sys.stderr.write(" ".join(sorted(heavy)))
"""


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("dragkit.config.arguments", "parse_train_args"),
        ("dragkit.evaluate", "parse_evaluate_args"),
        ("dragkit.plan", "parse_plan_args"),
        ("dragkit.experiment.__main__", "parse_experiment_args"),
        ("dragkit.selftest.__main__", "parse_selftest_args"),
        ("dragkit.data.__main__", "parse_data_args"),
    ],
)
def test_help_imports_nothing_heavy(module: str, call: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(module=module, call=call), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DRAGKIT_DEBUG": ""},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit codes:" in done.stdout
    assert done.stdout.count(f"python -m dragkit.{call.split('_')[1]}") >= 4  # usage, 3 examples


def test_help_names_every_flag_and_its_default() -> None:
    text = " ".join(train_parser("x").format_help().split())
    for name in [*FROZEN, *FROZEN_OTHERS]:
        assert f"--{name} " in text
    assert "(default: 5e-05)" in text
    assert text.count("(default: 0)") == 2  # seed and num_workers
    assert "--no_" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (DataError, 65),
        (MissingInputError, 66),
        (CheckpointError, 66),
        (DragkitError, 70),
        (WriteError, 74),
        (Interrupted, 75),
        (KeyboardInterrupt, 130),
        (ZeroDivisionError, 70),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    error: type[BaseException],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DRAGKIT_DEBUG", raising=False)

    def fail(argv: list[str]) -> int:
        raise error("what\nwhere")

    assert run_main(fail, ["--lr", "1"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dragkit: ")
    assert "Traceback" not in err
    if issubclass(error, DragkitError):
        assert "what\nwhere\n" in err
        assert err.startswith("dragkit: error: ") == (error is not Interrupted)
    elif error is ZeroDivisionError:
        assert "ZeroDivisionError: what where" in err
    assert ("--debug" in err) == (code == 70)

    assert run_main(fail, ["--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("DRAGKIT_DEBUG", "1")
    assert run_main(fail, []) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda argv: None, []) == 0
    assert run_main(lambda argv: len(argv), ["a", "b"]) == 2
    with pytest.raises(SystemExit) as caught:
        run_main(lambda argv: parse_train_args(argv) and 0, ["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().err == ""


def test_the_help_of_config_show_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_main(["show", "--help"])
    shown = capsys.readouterr().out
    assert "Print every setting" in shown and "exit codes" not in shown and "--lr" in shown


def test_help_page_and_error_classes_share_one_table_of_exit_codes() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)] == list(EXIT_CODES)
    for parser in (train_parser("p"), evaluate_parser(), plan_parser(), experiment_parser()):
        listed = parser.format_help().partition("exit codes:\n")[2]
        assert [int(code) for code in re.findall(r"^ +(\d+)  ", listed, re.M)] == list(EXIT_CODES)
    # Read from the source: importing every module would need every optional package.
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "dragkit").rglob("*.py")]
    given = {
        int(code) for text in sources for code in re.findall(r"^    exit_code = (\d+)", text, re.M)
    }
    assert {2, 65, 66, 70, 73, 74, 75} <= given <= set(EXIT_CODES)
