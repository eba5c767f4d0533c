"""The device suite where no device is: its smallest sizes, and what it does when things fail."""

from __future__ import annotations

import gzip
import importlib.util
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


load("device_runner")  # of which the suite is made
suite_module, parts_module = load("device_suite"), load("device_parts")
Part = suite_module.Part


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[object]:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    before = signal.getsignal(signal.SIGINT)
    suite_module.hear_interrupts()
    yield suite_module.Suite(tmp_path / "out", tmp_path / "work", cpu=True)
    signal.signal(signal.SIGINT, before)


def summary(out: Path) -> dict[str, dict]:
    parts = json.loads((out / "summary.json").read_text())["parts"]
    return {part["name"]: part for part in parts}


@pytest.mark.slow
def test_the_command_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    out = tmp_path / "results"
    command = [str(ROOT / "scripts" / "device_suite.sh"), "--cpu", "--parts", "report,profile,env"]
    done = subprocess.run([*command, str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "profile.log").read_text()
    parts = summary(out)
    assert list(parts) == ["env", "profile", "report"]
    assert all(part["exit_code"] == 0 and not part["notes"] for part in parts.values())
    files = [out / file for part in parts.values() for file in part["files"]]
    assert all(file.is_file() for file in files) and len(files) == 8
    machine = json.loads((out / "env.json").read_text())
    assert machine["machine"]["packages"]["torch"] and machine["torch"]["cuda"] is None
    profiled = json.loads((out / "profile.json").read_text())
    assert profiled["problems"] == [] and set(profiled["traces"]) == {"phase1", "phase2"}
    # Three steps each.
    ranges = profiled["traces"]["phase2"]["ranges"]
    for name in ("copy", "retriever", "sampler", "prompt", "optimizer"):
        assert ranges[name]["calls"] == 3, name
    assert profiled["traces"]["phase1"]["ranges"]["backward"]["ms"] > 0
    report = (out / "report.md").read_text()
    assert f"plot: {out / 'profile_parts.png'}" in report and "| generator |" in report
    assert "scripts/device_suite.sh" in report and str(out) not in json.dumps(machine["machine"])


def test_a_part_that_fails_stops_no_other(suite, monkeypatch, capsys):
    def raises(part: object, end: float) -> None:
        raise OSError("no space left")

    def writes(part: object, end: float) -> None:
        (suite.out / "kernels.log").write_text("fast")

    monkeypatch.setattr(suite, "env", raises)
    monkeypatch.setattr(suite, "kernels", writes)
    parts = suite.run(["kernels", "env"])
    assert [(part.name, part.exit_code) for part in parts] == [("env", 70), ("kernels", 0)]
    found = summary(suite.out)
    assert found["env"]["notes"] == ["OSError: no space left"] and found["env"]["files"] == []
    assert found["kernels"]["files"] == ["kernels.log"]
    assert "env: exit code 70" in capsys.readouterr().out


def test_the_time_of_all_parts_is_limited(suite, monkeypatch):
    suite.end = time.monotonic() - 1
    monkeypatch.setattr(suite, "prepare", lambda: None)
    (part,) = suite.run(["kernels"])
    assert part.exit_code == 124 and part.notes == ["not begun: out of time"]


def test_the_report_comes_even_if_time_is_out(suite, monkeypatch):
    """Of what is in the folder; a damaged file fails it."""
    suite.end = time.monotonic() - 1
    monkeypatch.setattr(suite, "prepare", lambda: None)
    traces = {"phase1": {"ranges": {"copy": {"calls": 1, "ms": 2.0}}}}
    (suite.out / "profile.json").write_text(json.dumps({"steps": "1:2", "traces": traces}))
    (part,) = suite.run(["report"])
    assert part.exit_code == 0 and part.files == ["profile_parts.png", "report.md"]
    assert "| copy | 2.000 |" in (suite.out / "report.md").read_text()
    (suite.out / "kernels.json").write_text("{")
    (part,) = suite.run(["report"])
    assert part.exit_code == 65
    assert "kernels.json: is no JSON" in (suite.out / "report.md").read_text()


def test_a_command_out_of_time_is_interrupted_with_its_children(suite):
    """It may still write what it has; a child of its own ends too."""
    code = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(sleep, stderr=subprocess.DEVNULL)\n"
        "print(child.pid)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('written'); child.wait()\n"
    )
    part, log = Part("x"), suite.out / "x.log"
    begin = time.monotonic()
    assert suite.call(part, ["-c", code], log, begin + 2) == 124
    assert time.monotonic() - begin < 30 and part.exit_code == 124
    child, *rest = log.read_text().splitlines()
    assert "written" in rest and part.notes[0].startswith("out of time")
    assert not Path(f"/proc/{child}").exists()


FILES = {
    "test_good.py": "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\n",
    "test_absent.py": "import absent_module\n",
    "test_unselected.py": "def test_c(): assert 0\n",
}


def run_tests_part(suite: object, monkeypatch: pytest.MonkeyPatch, folder: Path) -> object:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    suite.cpu = False
    monkeypatch.setattr(
        suite_module, "gpu_test_files", lambda: [str(folder / name) for name in FILES]
    )
    part = Part("tests")
    suite.tests(part, time.monotonic() + 60)
    return part


def test_files_that_need_a_missing_module_are_left_out(suite, monkeypatch, tmp_path):
    suite.missing = ["absent_module"]
    part = run_tests_part(suite, monkeypatch, tmp_path)
    assert part.exit_code == 0
    assert [note.split(":")[0] for note in sorted(part.notes)] == ["left out", "no tests"]
    assert "test_absent.py, needs absent_module" in " ".join(part.notes)
    assert (
        part.tests["failures"] == 0 and "test_good.py" in (suite.out / "gpu_tests.log").read_text()
    )
    cases = ET.parse(suite.out / "gpu_tests.xml").getroot().iter("testcase")
    assert "test_a" in [case.get("name") for case in cases]


def test_a_module_that_should_be_there_fails_the_part(suite, monkeypatch, tmp_path):
    part = run_tests_part(suite, monkeypatch, tmp_path)
    assert part.exit_code == 2
    assert any(note.startswith("failed") and "test_absent" in note for note in part.notes)


def test_a_report_that_is_cut_off_is_passed_over(tmp_path):
    whole = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'
    (tmp_path / "a.xml").write_text(whole)
    (tmp_path / "b.xml").write_text(whole[:30])
    reports, target = sorted(tmp_path.glob("*.xml")), tmp_path / "all.xml"
    sums = suite_module.merge_reports(reports, target)
    assert sums == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    assert [suite.get("name") for suite in ET.parse(target).getroot()] == ["a"]


def test_every_gpu_test_is_found():
    found = suite_module.gpu_test_files()
    assert "tests/model/test_retriever_on_gpu.py" in found
    assert "tests/trainer/test_replay_on_gpu.py" in found
    assert "tests/triton_ops/test_triton_math.py" in found
    assert "tests/ops/test_gated_rms_norm.py" in found
    assert "tests/test_cli.py" not in found


def test_unknown_parts_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["device_suite.py", "--parts", "env,speed"])
    with pytest.raises(SystemExit) as caught:
        suite_module.main()
    assert caught.value.code == 2 and "unknown parts speed" in capsys.readouterr().err


def test_the_whole_generator_runs_only_when_it_is_named(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(suite_module.Suite, "run", lambda self, names: asked.append(names) or [])
    for more in ([], ["--parts", "generator"]):
        command = ["device_suite.py", "--cpu", *more, str(tmp_path)]
        monkeypatch.setattr(sys, "argv", command)
        assert suite_module.main() == 0
    usual, named = asked
    assert named == ["generator"]
    assert usual == [name for name in suite_module.LIMITS if name != "generator"]


def test_what_a_trace_lacks_is_said(tmp_path):
    trace = tmp_path / "trace.json.gz"
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 1500},
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 500},
        {"ph": "X", "cat": "kernel", "name": "void at::native::add", "dur": 30},
        {"ph": "i", "name": "a mark"},
    ]
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = parts_module.summarise(trace)
    assert found["ranges"] == {"copy": {"calls": 2, "ms": 2.0}}
    wanted = frozenset({"copy", "backward"})
    assert parts_module.lacking(found, wanted, cpu=True) == ["no range backward"]
    problems = parts_module.lacking(found, wanted, cpu=False)
    assert problems[1:] == ["no kernel of dragkit ran on the device"]
    events.append({"ph": "X", "cat": "kernel", "name": "_fact_head_fwd_kernel", "dur": 30})
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert len(parts_module.lacking(parts_module.summarise(trace), wanted, cpu=False)) == 1
