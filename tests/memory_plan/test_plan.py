"""`python -m dragkit.plan`, which predicts memory and time."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dragkit import plan
from dragkit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_docs_show_the_output_of_the_command(capsys: pytest.CaptureFixture) -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ python -m dragkit\.plan ([^\n]*)\n(.*?)```", text, re.DOTALL)
    assert {"--preset h200 --card H200", "--preset b200 --card B200"} <= {
        args for args, _ in blocks
    }
    for args, shown in blocks:
        plan.main(shlex.split(args))
        assert capsys.readouterr().out == shown, f"run python -m dragkit.plan {args}"


def test_json_output_is_consistent(capsys: pytest.CaptureFixture) -> None:
    assert plan.main(["--preset", "h200", "--card", "H200", "--json"]) == 0
    plan_json = json.loads(capsys.readouterr().out)
    assert plan_json["fits"] and plan_json["alternatives"] == []
    assert sum(plan_json["bytes"].values()) == plan_json["peak_bytes"] <= plan_json["device_bytes"]
    assert sum(plan_json["validation_bytes"].values()) < plan_json["peak_bytes"]
    assert plan_json["questions_decoded_at_once"] == 32
    assert plan_json["bytes"]["frozen weights"] == 2 * plan_json["parameters"] == 2 * 31_577_937_344
    work = plan_json["work"]
    assert work["seconds_at_40%"] <= work["seconds_at_10%"]
    assert work["seconds_at_40%"] >= work["seconds_reading_weights"]


def test_a_run_that_does_not_fit_has_an_exit_code_and_offers(capsys: pytest.CaptureFixture) -> None:
    argv = [
        "--preset",
        "h200",
        "--card",
        "H100",
        "--set",
        "generator.max_tokens_per_microbatch=300000",
    ]
    assert plan.main(argv) == ConfigError.exit_code
    out = capsys.readouterr().out
    assert re.search(r"^fits +no$", out, re.MULTILINE)
    assert len(out.partition("these settings would fit:\n")[2].splitlines()) == 3


def test_the_plan_is_of_phase_2_and_covers_the_bundled_generator(
    capsys: pytest.CaptureFixture,
) -> None:
    plan.main(["--preset", "b200", "--card", "B200", "--phase", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["work"]["questions_per_batch"] == 4
    assert plan.main(["--card", "H100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generator"] == "tiny"


def test_every_draw_of_a_question_is_a_prompt(capsys: pytest.CaptureFixture) -> None:
    tokens = []
    for draws in (1, 3):
        plan.main(["--preset", "b200", "--json", "--set", f"sampler.num_draws={draws}"])
        tokens.append(json.loads(capsys.readouterr().out)["work"]["tokens_per_batch"])
    assert tokens[1] == 3 * tokens[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "h200", "--card", "A100"], "--card"),
        (["--preset", "h200", "--jsn"], "--json|unknown flag"),
        (["--preset", "h200", "--generator_model", "random:none"], "nemotron-3-nano-30b-a3b"),
        (["--preset", "h200", "--generator_model", "no/such"], "not on this machine"),
    ],
)
def test_wrong_arguments_are_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert plan.main(argv) in (2, 66)
    assert re.search(message, capsys.readouterr().err)


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom dragkit.plan import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--card" in done.stdout and "python -m dragkit.plan" in done.stdout
