"""The device suite where no device is: its smallest sizes, and what it does when things fail."""

from __future__ import annotations

import gzip
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


suite_module, parts_module = load("device_suite"), load("device_parts")
Part = suite_module.Part


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    before = signal.getsignal(signal.SIGINT)
    suite_module.hear_interrupts()
    monkeypatch.setattr(suite_module.Suite, "prepare", lambda self: None)
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
    assert machine["machine"]["packages"]["torch"] and machine["machine"]["gpu"] is None
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


def test_a_part_that_fails_stops_no_other(suite, monkeypatch, capsys) -> None:
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


@pytest.mark.parametrize("code", [0, 3])
def test_the_suite_fails_if_a_part_failed(code, tmp_path, monkeypatch, capsys) -> None:
    parts = [Part("env"), Part("kernels", exit_code=code)]
    asked: list[list[str]] = []
    monkeypatch.setattr(suite_module.Suite, "run", lambda self, names: asked.append(names) or parts)
    monkeypatch.setattr(sys, "argv", ["device_suite.py", "--cpu", str(tmp_path)])
    assert suite_module.main() == bool(code)
    said = capsys.readouterr().out
    assert ("failed: kernels" in said) == bool(code) and ("all parts done" in said) == (not code)
    # The whole generator runs only when it is named.
    assert asked == [[name for name in suite_module.LIMITS if name != "generator"]]
    monkeypatch.setattr(sys, "argv", ["device_suite.py", "--parts", "env,speed"])
    with pytest.raises(SystemExit) as caught:
        suite_module.main()
    assert caught.value.code == 2 and "unknown parts speed" in capsys.readouterr().err


def test_when_time_is_out_only_the_report_comes(suite) -> None:
    """Of what is in the folder; a damaged file fails it."""
    suite.end = time.monotonic() - 1
    traces = {"phase1": {"ranges": {"copy": {"calls": 1, "ms": 2.0}}}}
    (suite.out / "profile.json").write_text(json.dumps({"steps": "1:2", "traces": traces}))
    late, report = suite.run(["kernels", "report"])
    assert late.exit_code == 124 and late.notes[0].startswith("not begun, out of time: ")
    assert report.exit_code == 0 and report.files == ["profile_parts.png", "report.md"]
    assert "| copy | 2.000 |" in (suite.out / "report.md").read_text()
    (suite.out / "kernels.json").write_text("{")
    (part,) = suite.run(["report"])
    assert part.exit_code == 65
    assert "kernels.json: is no JSON" in (suite.out / "report.md").read_text()


def test_a_command_out_of_time_is_interrupted_with_its_children(suite) -> None:
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


@pytest.mark.parametrize("known", [True, False])
def test_files_that_need_a_missing_module_are_left_out(suite, monkeypatch, tmp_path, known) -> None:
    """One that needs a module that should be there fails the part."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    suite.cpu, suite.missing = False, ["absent_module"] * known
    files = [str(tmp_path / name) for name in FILES]
    monkeypatch.setattr(suite_module, "gpu_test_files", lambda: files)
    part = Part("tests")
    suite.tests(part, time.monotonic() + 120)
    assert part.exit_code == (0 if known else 2) and part.tests["passed"] == 1
    kinds = [note.split(":")[0] for note in sorted(part.notes)]
    assert kinds == (["left out", "no tests"] if known else ["failed", "no tests"])
    notes = " ".join(part.notes)
    assert "test_absent.py" in notes and ("needs absent_module" in notes) == known
    assert "test_good.py" in (suite.out / "gpu_tests.log").read_text()


def test_every_gpu_test_is_found() -> None:
    found = suite_module.gpu_test_files()
    assert "tests/retriever/test_retriever_on_gpu.py" in found
    assert "tests/trainer/test_replay.py" in found
    assert "tests/ops/test_triton_math.py" in found
    assert "tests/ops/test_gated_rms_norm.py" in found
    assert "tests/config/test_command_lines.py" not in found


def test_what_a_trace_lacks_is_said(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json.gz"
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 1500},
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 500},
        {"ph": "X", "cat": "kernel", "name": "void at::native::add", "dur": 30},
        {"ph": "i", "name": "a mark"},
    ]

    def lacking(cpu: bool) -> list[str]:
        with gzip.open(trace, "wt") as file:
            json.dump({"traceEvents": events}, file)
        found = parts_module.summarise(trace)
        assert found["ranges"] == {"copy": {"calls": 2, "ms": 2.0}}
        return list(parts_module.lacking(found, {"copy", "backward"}, cpu=cpu))

    assert lacking(cpu=True) == ["no range backward"]
    assert lacking(cpu=False) == ["no range backward", "no kernel of dragkit ran on the device"]
    events.append({"ph": "X", "cat": "kernel", "name": "_fact_head_fwd_kernel", "dur": 30})
    assert lacking(cpu=False) == ["no range backward"]
