"""The device suite without a device: its smallest sizes, and failures of its parts."""

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
    sys.modules[name] = module  # dataclasses look for the module there
    spec.loader.exec_module(module)
    return module


suite_module, parts_module = load("device_suite"), load("device_parts")
Part = suite_module.Part


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    handler = signal.getsignal(signal.SIGINT)
    suite_module.restore_interrupts()
    monkeypatch.setattr(suite_module.Suite, "prepare", lambda self: None)
    yield suite_module.Suite(tmp_path / "out", tmp_path / "work", cpu=True)
    signal.signal(signal.SIGINT, handler)


def summary(out: Path) -> dict[str, dict]:
    parts = json.loads((out / "summary.json").read_text())["parts"]
    return {part["name"]: part for part in parts}


@pytest.mark.slow
def test_the_command_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    out = tmp_path / "results"
    command = [str(ROOT / "scripts" / "device_suite.sh"), "--cpu", "--parts", "report,profile,env"]
    run = subprocess.run([*command, str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + (out / "profile.log").read_text()
    parts = summary(out)
    assert list(parts) == ["env", "profile", "report"]
    assert all(part["exit_code"] == 0 for part in parts.values())
    assert [part["notes"] for part in parts.values()] == [[], [], ["no benchmarks ran"]]
    files = [out / file for part in parts.values() for file in part["files"]]
    assert all(file.is_file() for file in files) and len(files) == 8
    machine = json.loads((out / "env.json").read_text())
    assert machine["machine"]["packages"]["torch"] and machine["machine"]["gpu"] is None
    profiled = json.loads((out / "profile.json").read_text())
    assert profiled["problems"] == [] and set(profiled["traces"]) == {"phase1", "phase2"}
    # Three steps are profiled.
    ranges = profiled["traces"]["phase2"]["ranges"]
    for name in ("copy", "retriever", "sampler", "prompt", "optimizer"):
        assert ranges[name]["calls"] == 3, name
    assert profiled["traces"]["phase1"]["ranges"]["backward"]["ms"] > 0
    assert "| generator |" in (out / "profile.md").read_text()
    assert machine["machine"]["command"] == "scripts/device_suite.sh"


def test_a_part_that_fails_stops_no_other(suite, monkeypatch, capsys) -> None:
    def raises(part: object, end: float) -> None:
        raise OSError("no space left")

    def writes(part: object, end: float) -> None:
        (suite.out / "kernels.log").write_text("fast")

    monkeypatch.setattr(suite, "env", raises)
    monkeypatch.setattr(suite, "bench", writes)
    parts = suite.run(["kernels", "env"])
    assert [(part.name, part.exit_code) for part in parts] == [("env", 70), ("kernels", 0)]
    written = summary(suite.out)
    assert written["env"]["notes"] == ["OSError: no space left"] and written["env"]["files"] == []
    assert written["kernels"]["files"] == ["kernels.log"]
    assert "env: exit code 70" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 3])
def test_the_suite_fails_if_a_part_failed(code, tmp_path, monkeypatch, capsys) -> None:
    parts = [Part("env"), Part("kernels", exit_code=code)]
    ran: list[list[str]] = []
    monkeypatch.setattr(suite_module.Suite, "run", lambda self, names: ran.append(names) or parts)
    monkeypatch.setattr(sys, "argv", ["device_suite.py", "--cpu", str(tmp_path)])
    assert suite_module.main() == bool(code)
    text = capsys.readouterr().out
    assert ("failed: kernels" in text) == bool(code) and ("all parts done" in text) == (not code)
    # The whole generator runs only when it is named.
    assert ran == [[name for name in suite_module.LIMITS if name != "generator"]]
    monkeypatch.setattr(sys, "argv", ["device_suite.py", "--parts", "env,speed"])
    with pytest.raises(SystemExit) as caught:
        suite_module.main()
    assert caught.value.code == 2 and "unknown parts speed" in capsys.readouterr().err


def test_only_the_report_runs_when_the_time_is_up(suite) -> None:
    """It reports what is in the folder. A damaged file fails it."""
    suite.end = time.monotonic() - 1
    row = {"name": "dragkit", "ms": [2.0, 1.0, 3.0]}
    content = {"comparisons": [{"name": "step", "about": {}, "timings": [row]}]}
    (suite.out / "x.json").write_text(json.dumps({"machine": {"device": "x"}} | content))
    late, report = suite.run(["kernels", "report"])
    assert late.exit_code == 124 and late.notes[0].startswith("not started, out of time: ")
    assert report.exit_code == 0 and report.files == ["report.md"]
    assert "| dragkit | 2 (1-3) |" in (suite.out / "report.md").read_text()
    (suite.out / "kernels.json").write_text("{")
    (part,) = suite.run(["report"])
    assert part.exit_code == 65
    assert "kernels.json: is no result file" in (suite.out / "report.md").read_text()


def test_a_command_out_of_time_is_interrupted_with_its_children(suite) -> None:
    """It may still write its results. Its child ends too."""
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
def test_files_that_need_a_missing_module_are_skipped(suite, monkeypatch, tmp_path, known) -> None:
    """A file fails the part if its module is not among those that the suite found missing."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    suite.cpu, suite.missing = False, ["absent_module"] * known
    files = [str(tmp_path / name) for name in FILES]
    monkeypatch.setattr(suite_module, "gpu_test_files", lambda: files)
    part = Part("tests")
    suite.tests(part, time.monotonic() + 120)
    assert part.exit_code == (0 if known else 2) and part.tests["passed"] == 1
    kinds = [note.split(":")[0] for note in sorted(part.notes)]
    assert kinds == (["no tests", "skipped"] if known else ["failed", "no tests"])
    notes = " ".join(part.notes)
    assert "test_absent.py" in notes and ("needs absent_module" in notes) == known
    assert "test_good.py" in (suite.out / "gpu_tests.log").read_text()


def test_every_gpu_test_is_found() -> None:
    files = suite_module.gpu_test_files()
    assert "tests/retriever/test_retriever_on_gpu.py" in files
    assert "tests/trainer/test_replay.py" in files
    assert "tests/ops/test_triton_math.py" in files
    assert "tests/ops/test_gated_rms_norm.py" in files
    assert "tests/config/test_command_lines.py" not in files


def test_gaps_of_a_trace_are_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json.gz"
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 1500},
        {"ph": "X", "cat": "user_annotation", "name": "copy", "dur": 500},
        {"ph": "X", "cat": "kernel", "name": "void at::native::add", "dur": 30},
        {"ph": "i", "name": "a mark"},
    ]

    def gaps(cpu: bool) -> list[str]:
        with gzip.open(trace, "wt") as file:
            json.dump({"traceEvents": events}, file)
        summary = parts_module.summarise(trace)
        assert summary["ranges"] == {"copy": {"calls": 2, "ms": 2.0}}
        return list(parts_module.gaps(summary, {"copy", "backward"}, cpu=cpu))

    assert gaps(cpu=True) == ["no range backward"]
    assert gaps(cpu=False) == ["no range backward", "no kernel of dragkit ran on the device"]
    events.append({"ph": "X", "cat": "kernel", "name": "_fact_head_fwd_kernel", "dur": 30})
    assert gaps(cpu=False) == ["no range backward"]
