"""The command that predicts memory and time."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dragkit import plan
from dragkit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_is_what_the_command_writes(capsys: pytest.CaptureFixture) -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    found = re.findall(r"```\n\$ python -m dragkit\.plan ([^\n]*)\n(.*?)```", text, re.DOTALL)
    assert {"--preset h200 --card H200", "--preset b200 --card B200"} <= {args for args, _ in found}
    for args, shown in found:
        plan.main(shlex.split(args))
        assert capsys.readouterr().out == shown, f"run python -m dragkit.plan {args}"


def test_json_holds_the_same_figures(capsys: pytest.CaptureFixture) -> None:
    assert plan.main(["--preset", "h200", "--card", "H200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["alternatives"] == []
    assert sum(found["bytes"].values()) == found["peak_bytes"] <= found["device_bytes"]
    assert sum(found["validation_bytes"].values()) < found["peak_bytes"]
    assert found["questions_decoded_at_once"] == 32
    assert found["bytes"]["frozen weights"] == 2 * found["parameters"] == 2 * 31_577_937_344
    work = found["work"]
    assert work["seconds_at_40%"] <= work["seconds_at_10%"]
    assert work["seconds_at_40%"] >= work["seconds_reading_weights"]


def test_what_does_not_fit_is_said_with_an_exit_code(capsys: pytest.CaptureFixture) -> None:
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
    assert len(out.partition("These settings do:\n")[2].splitlines()) == 3


def test_the_plan_is_of_phase_2_and_the_bundled_generator_has_one(
    capsys: pytest.CaptureFixture,
) -> None:
    plan.main(["--preset", "b200", "--card", "B200", "--phase", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["work"]["questions_per_batch"] == 4
    assert plan.main(["--card", "H100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generator"] == "tiny"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "h200", "--card", "A100"], "--card"),
        (["--preset", "h200", "--jsn"], "--json|unknown flag"),
        (["--preset", "h200", "--generator_model", "random:none"], "nemotron-3-nano-30b-a3b"),
        (["--preset", "h200", "--generator_model", "no/such"], "not on this machine"),
    ],
)
def test_wrong_arguments_are_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert plan.main(argv) in (2, 66)
    assert re.search(said, capsys.readouterr().err)
