"""Result files of the real writer are printed, drawn, compared, projected and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import records
from bench.records import command_line, write_results
from bench.report import LABEL, ceiling, main
from bench.results import Comparison, Rates, Timing, read_all, read_results
from dragkit.observe.gpu import card_spec

ROOT = Path(__file__).resolve().parents[2]
GPU = "NVIDIA H200"
COMMAND = "python -m pytest bench --benchmark-only"


def row(name: str, ms: float | None, peer: bool = False, **fields: object) -> Timing:
    spread = None if ms is None else (ms, ms / 2, ms * 2)
    return Timing(name, peer, spread, note="" if ms else "not installed", **fields)


def step(ours: float = 100.0, peer: float = 300.0, facts: int = 800) -> Comparison:
    rates = Rates(2000.0, 90.0, 4.5e9)
    rows = [row("dragkit", ours, cpu_ms=ours, rates=rates), row("eager PyG", peer, peer=True)]
    about = {"data": "webqsp", "questions": 16, "facts": facts, "K": 2}
    return Comparison(f"phase 1, {facts // 16}-fact graphs", about, rows, questions=16)


def kernel(ours: float | None = 0.2, *, counted: bool = True, dtype: str = "bfloat16"):
    rows = [row("dragkit, Triton", ours), row("PyG", 1.0, True), row("other", None, True)]
    counts = {"bytes": 4.8e8, "flops": 2e9} if counted else {}
    about = {"graphs": 64, "facts": 320_000, "dtype": dtype}
    return Comparison("C: layer, forward", about, rows, copy_gb_s=4000.0, **counts)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write(run, theme, comparisons, gpu, device)` writes a file and returns its path."""

    def run(
        run: str,
        theme: str,
        comparisons: list,
        gpu: str | None = GPU,
        device: str = "nvidia-h200",
        **settings: object,
    ) -> Path:
        info = {
            "device": device,
            "gpu": gpu,
            "threads": 2,
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "triton": None},
            "date": "2026-11-24",
            "commit": "0123456789",
            "command": COMMAND,
        }
        monkeypatch.setattr(records, "machine_info", lambda: info | settings)
        return write_results(tmp_path / run, theme, comparisons)

    return run


def test_files_are_read_as_they_were_written(write: Callable[..., Path]) -> None:
    comparisons = [step(), kernel(), kernel(counted=False)]
    results = read_results(write("a", "mixed", comparisons))
    assert results.comparisons == comparisons and results.theme == "mixed"
    assert results.machine["command"] == COMMAND


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    results = read_all([ROOT / "bench" / "results"])
    steps = {c.name: c for result in results for c in result.comparisons}
    assert [row.peer for row in steps["phase 2, tiny generator"].timings] == [False, True, True]
    assert steps["phase 2, tiny generator"].questions == 16
    # Timings of ops had more fields, which tables now compute.
    timing = {"name": "PyG", "peer": True, "ms": [2.0, 1.0, 3.0], "host_ms": 1.0, "ratio": 1.0}
    timing |= {"gb_s": 1.0, "copy_share": 0.1, "tflop_s": 0.1, "peak_mb": None, "note": ""}
    old = {"name": "layer", "about": {}, "timings": [timing], "bytes": 5.0, "flops": 4.0}
    content = {"machine": {"device": "x"}, "comparisons": [old]}
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    (op,) = read_results(tmp_path / "kernels.json").comparisons
    assert op.timings == [Timing("PyG", True, (2.0, 1.0, 3.0))] and op.bytes == 5.0


def test_machine_info_of_this_machine() -> None:
    assert {"device", "gpu", "packages", "date", "commit"} <= set(records.machine_info())
    assert records.machine_info("x")["command"] == "x"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["/a/pytest/__main__.py", "bench", "-k", "a or b"], "python -m pytest bench -k 'a or b'"),
        (["/a/pytest/__main__.py", "--results", "/tmp/x", "bench"], "python -m pytest bench"),
        (["/a/bin/pytest", "--results=/tmp/x", "bench"], "pytest bench"),
        (["scripts/suite.py", "env"], "python suite.py env"),
    ],
)
def test_recorded_commands_omit_the_folder_of_results(words: list[str], line: str) -> None:
    assert command_line(words) == line


def test_every_table_names_its_machine_and_command(write, tmp_path, capsys) -> None:
    write("a", "train_step", [step(), step(facts=32_000)])
    write("a", "kernels", [kernel(), kernel(counted=False, dtype="float32")])
    assert main([str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith("### ")]
    assert len(titles) == 4
    for number in titles:
        for word in ("nvidia-h200", "torch 2.13.0", "2026-11-24", "commit 0123456789", COMMAND):
            assert word in lines[number + 2]
    # A step: ms / ours and questions/s. A kernel: 4.8e8 bytes in 0.2 ms are 60 % of a copy.
    assert "| eager PyG | 300 (150-600) | 3.00 |  |  | 53.3 |" in text
    assert "| dragkit, Triton | 0.2 (0.1-0.4) | 1.00 | 2.4e+03 | 0.6 | 10 |" in text
    assert "Strongest peer: PyG, 5.00 times the time of dragkit, Triton." in text
    folder = tmp_path / "a" / "nvidia-h200"
    assert [path.name for path in folder.glob("*.png")] == ["kernels_roofline.png"]
    assert (folder / "kernels_roofline.png").read_bytes().startswith(b"\x89PNG")
    assert f"plot: {folder / 'kernels_roofline.png'}" in text
    assert "not on the roofline" in text and "C: layer, forward, float32" in text


def test_tables_without_plots(write, tmp_path, capsys) -> None:
    write("a", "kernels", [kernel()])
    assert main([str(tmp_path / "a"), "--no-plots"]) == 0
    assert "plot:" not in capsys.readouterr().out and not list(tmp_path.rglob("*.png"))


def compared(first: Path, second: Path, *options: str) -> int:
    return main(["--compare", str(first), str(second), *options])


def test_equal_runs(write, capsys) -> None:
    files = [write(run, "train_step", [step(), kernel()]) for run in "ab"]
    assert compared(*files) == 0
    text = capsys.readouterr().out
    assert "device nvidia-h200" in text and "0 of our rows slower" in text
    assert "only in" not in text and "note:" not in text
    # A contender that was not timed in either run has no row.
    assert text.count("| 1.000 |") == 4 and ": other |" not in text


@pytest.mark.parametrize(
    ("ours", "peer", "options", "code", "verdict"),
    [
        (109.0, 300.0, [], 0, ""),
        (111.0, 300.0, [], 1, "SLOWER"),
        (111.0, 300.0, ["--threshold", "0.2"], 0, ""),
        (103.0, 300.0, ["--threshold", "0.02"], 1, "SLOWER"),
        (50.0, 300.0, [], 0, "faster"),
        (100.0, 900.0, [], 0, ""),
    ],
)
def test_verdicts(write, capsys, ours, peer, options, code, verdict) -> None:
    files = write("a", "train_step", [step()]), write("b", "train_step", [step(ours, peer)])
    assert compared(*files, *options) == code
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if ": dragkit |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[3]) == pytest.approx(ours / 100, abs=1e-3) and cells[4] == verdict
    (peer_line,) = (line for line in lines if ": eager PyG |" in line)
    assert peer_line.endswith("| peer |")
    assert f"peers: median ratio {peer / 300:.3f} of 1 rows" in lines


def test_rows_of_one_name_are_told_apart(write, capsys) -> None:
    """The dtype distinguishes them, or a number if one data set replaces two."""
    first = write("a", "x", [step(), step(), kernel(), kernel(dtype="float32")])
    second = write("b", "x", [step(), step(150.0), kernel(), kernel(0.3, dtype="float32")])
    assert compared(first, second) == 1
    text = capsys.readouterr().out
    slower, kernels = (line for line in text.splitlines() if "SLOWER" in line)
    assert "dragkit (no. 2)" in slower and "| 1.500 |" in slower
    assert "C: layer, forward, float32: dragkit, Triton" in kernels
    assert "2 of our rows slower by more than 10%" in text


def test_different_devices_are_refused(write, tmp_path, capsys) -> None:
    first = write("a", "train_step", [step()])
    second = write("b", "train_step", [step()], "NVIDIA B200", "nvidia-b200")
    assert compared(first, second) == 2
    captured = capsys.readouterr()
    assert "nvidia-h200 and nvidia-b200 are different devices" in captured.err
    assert captured.out == ""
    write("b", "train_step", [step()])
    assert compared(first, tmp_path / "b") == 2
    assert "the second holds runs of 2 devices" in capsys.readouterr().err


def test_rows_of_one_run_and_other_versions_are_listed(write, capsys) -> None:
    first = step()
    first.timings.append(row("dragkit, CUDA graphs", 50.0))
    files = [
        write("a", "x", [first, kernel()]),
        write(
            "b",
            "x",
            [step(), kernel(None), step(facts=32_000)],
            threads=1,
            packages={"torch": "2.14.0"},
        ),
    ]
    assert compared(*files) == 0
    text = capsys.readouterr().out
    assert "- only in the first: x: phase 1, 50-fact graphs: dragkit, CUDA" in text
    assert "- timed only in the first: x: C: layer, forward, bfloat16: dragkit, Triton" in text
    assert text.count("- only in the second: x: phase 1, 2000-fact graphs") == 2
    assert "note: torch differs: 2.13.0 and 2.14.0" in text and "note: threads differs" in text


def damaged(change: Callable[[dict], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        content = json.loads(text)
        change(content["comparisons"][0])
        return json.dumps(content)

    return apply


DAMAGES = {
    "cut off": (lambda text: text[: len(text) // 2], "truncated"),
    "a list": (lambda text: "[1, 2]", "Expected `object`"),
    "foreign": (lambda text: '{"machine_info": {}, "benchmarks": []}', "`machine`"),
    "no device": (lambda text: text.replace('"device"', '"host"'), "machine: has no device"),
    "text for timings": (damaged(lambda c: c.update(timings=["x"])), "is no result file"),
    "a field more": (damaged(lambda c: c["timings"][0].update(fps=1)), "`fps`"),
    "text": (damaged(lambda c: c["timings"][0].update(cpu_ms="1")), "timings[0].cpu_ms"),
    "no order": (damaged(lambda c: c["timings"][0]["ms"].sort()), "not between the percentiles"),
    "negative": (damaged(lambda c: c["timings"][0].update(ms=[1, -1, 2])), "not between"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_its_file(name: str, write, capsys) -> None:
    file = write("a", "train_step", [step()])
    damage, message = DAMAGES[name]
    file.write_text(damage(file.read_text()))
    assert main([str(file.parent)]) == 65
    captured = capsys.readouterr()
    assert f"bench.report: {file}: " in captured.err and message in captured.err
    assert compared(file, file) == 65


def test_missing_files_and_usage(tmp_path, capsys) -> None:
    assert main([str(tmp_path / "nowhere")]) == 66
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "env.json").write_text("{}")  # written by the device suite, without timings
    assert main([str(tmp_path)]) == 66
    for arguments in (["--threshold", "-1"], ["--compare", "a", "b", "c"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_ceilings_by_hand() -> None:
    """4.8e8 bytes at 4.8 TB/s take 0.1 ms, and 9.89e11 operations at 989 TFLOP/s take 1 ms."""
    h200 = card_spec("NVIDIA H200")
    assert ceiling(h200, 4.8e8, 2e9, "bfloat16") == (pytest.approx(0.1), "memory")
    assert ceiling(h200, 4.8e8, 9.89e11, "bfloat16") == (pytest.approx(1.0), "arithmetic")
    # The vector units compute 67 TFLOP/s in float32.
    assert ceiling(h200, 1.0, 6.7e10, "float32") == (pytest.approx(1.0), "arithmetic")


def test_every_line_of_a_projection_says_so(write, capsys) -> None:
    """At half of the ceiling, 0.2 ms become 4.8e8 / 8e12 s / 0.5 = 0.12 ms."""
    file = write("a", "kernels", [kernel(), kernel(counted=False), step()])
    assert main(["--project", "b200", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith(f"{LABEL}: ") for line in lines)
    assert "8 TB/s, 2,250 TFLOP/s" in lines[0]
    assert "dragkit, Triton: 0.12 ms on B200 by memory" in lines[2]
    assert "NVIDIA H200: 0.2 ms, 50.0% of its memory ceiling" in lines[2]
    assert "PyG: 0.6 ms" in lines[3]
    assert all("refused, its bytes and operations are not counted" in line for line in lines[4:])


@pytest.mark.parametrize(
    ("gpu", "target", "message"),
    [
        (None, "b200", "which is no GPU"),
        ("NVIDIA T4", "b200", "peak rates of NVIDIA T4 are not known"),
        (GPU, "c300", "peak rates of c300 are not known"),
    ],
)
def test_refused_projections(write, capsys, gpu, target, message) -> None:
    file = write("a", "kernels", [kernel()], gpu)
    assert main(["--project", target, str(file)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert main(["--project", "b200", str(write("b", "kernels", []))]) == 2
    assert "no rows" in capsys.readouterr().err
