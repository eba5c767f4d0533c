"""Result files by the real writer: what is printed, drawn, compared, projected and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import records
from bench.projection import LABEL, NoProjection, ceiling, project, projection
from bench.reading import ResultError, read_all, read_profile, read_results
from bench.records import command_line, write_results
from bench.report import main
from bench.tables import Comparison, KernelComparison, KernelTiming, Rates, Timing
from dragkit.observe.gpu import device_spec

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = "NVIDIA H200", None
COMMAND = "python -m pytest bench --benchmark-only"


def timing(name: str, ms: float, rates: Rates | None = None) -> Timing:
    return Timing(name, 16e3 / ms, (ms, ms / 2, ms * 2), (ms, ms, ms), 8e3 / ms, 1.0, 1.0, rates)


def kernel_row(name: str, ms: float | None, peer: bool = False) -> KernelTiming:
    spread = None if ms is None else (ms, 0.9 * ms, 1.1 * ms)
    return KernelTiming(name, peer, ms=spread, note="" if ms else "not installed")


def step(ours: float = 100.0, theirs: float = 300.0, facts: int = 800) -> Comparison:
    rates = Rates(2000.0, 90.0, 4.5e9, None, None)
    about = {"data": "webqsp", "questions": 16, "facts": facts, "K": 2}
    name = f"phase 1, {facts // 16}-fact graphs, packed PyG"
    return Comparison(name, about, [timing("dragkit", ours, rates), timing("eager PyG", theirs)])


def kernel(
    ours: float = 0.2,
    theirs: float = 1.0,
    *,
    counted: bool = True,
    dtype: str = "bfloat16",
    facts: int = 320_000,
) -> KernelComparison:
    about = {"graphs": 64, "facts": facts, "dtype": dtype}
    timings = [
        kernel_row("dragkit, Triton", ours),
        kernel_row("PyG", theirs, peer=True),
        kernel_row("torch_scatter", None, peer=True),
    ]
    counts = {"bytes": 4.8e8, "flops": 2e9} if counted else {}
    return KernelComparison("C: layer, forward", about, timings, copy_gb_s=4000.0, **counts)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write(run, theme, comparisons, gpu, device)`: a file by the real writer; its path."""

    def run(
        run: str,
        theme: str,
        comparisons: list,
        gpu: str | None = GPU,
        device: str = "nvidia-h200",
        **others: object,
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
        monkeypatch.setattr(records, "machine_info", lambda: info | others)
        return write_results(tmp_path / run, theme, comparisons)

    return run


def test_what_is_written_is_read_back(write: Callable[..., Path]) -> None:
    asked = [step(), kernel(), kernel(counted=False)]
    found = read_results(write("a", "mixed", asked))
    assert found.comparisons == asked and found.theme == "mixed"
    assert found.machine["command"] == COMMAND


def test_files_of_earlier_versions_are_read() -> None:
    results, _ = read_all([ROOT / "bench" / "results"])
    names = [comparison.name for result in results for comparison in result.comparisons]
    assert "phase 2, tiny generator" in names


def test_the_writers_own_machine() -> None:
    info = records.machine_info()
    assert {"device", "gpu", "packages", "date", "commit", "command"} <= set(info)
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
def test_command_lines_without_the_folder_of_results(words: list[str], line: str) -> None:
    assert command_line(words) == line


def test_every_table_says_where_it_comes_from(write, tmp_path, capsys) -> None:
    write("a", "train_step", [step(), step(facts=32_000)])
    write("a", "kernels", [kernel(), kernel(facts=6_400, counted=False, dtype="float32")])
    write("a", "sizes", [kernel(counted=False), kernel(counted=False, facts=6_400)])
    assert main([str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    titles = [place for place, line in enumerate(lines) if line.startswith("### ")]
    assert len(titles) == 6
    for place in titles:
        for part in ("nvidia-h200", "torch 2.13.0", "2026-11-24", "commit 0123456789", COMMAND):
            assert part in lines[place + 2]
    assert "| dragkit | 2000 | 90 | 4.5 |" in text
    folder = tmp_path / "a" / "nvidia-h200"
    drawn = ("kernels_roofline.png", "sizes_throughput.png", "train_step_throughput.png")
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(drawn)
    for name in drawn:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"plot: {folder / name}" in text
    assert "not on the roofline" in text and "C: layer, forward, float32" in text


def test_tables_without_plots(write, tmp_path, capsys) -> None:
    write("a", "kernels", [kernel()])
    assert main([str(tmp_path / "a"), "--no-plots"]) == 0
    assert "plot:" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.png"))


def test_the_parts_of_a_step(tmp_path, capsys) -> None:
    ranges = {"copy": {"calls": 3, "ms": 3.0}, "generator": {"calls": 6, "ms": 60.0}}
    content = {"steps": "10:13", "problems": [], "traces": {"phase2": {"ranges": ranges}}}
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(content | {"machine": {"device": "x", "commit": "c0ffee"}}))
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| generator | 20.000 |" in text and "| copy | 1.000 |" in text
    assert "x, commit c0ffee" in text
    assert (tmp_path / "profile_parts.png").is_file()
    file.write_text(json.dumps(content))  # as it was before machines were noted
    assert read_profile(file).machine == {}
    for damage in ({"steps": "10"}, {"steps": "13:13"}, {"traces": {"phase2": {}}}, {"traces": 3}):
        file.write_text(json.dumps(content | damage))
        with pytest.raises(ResultError, match="profile.json"):
            read_profile(file)


def compared(first: Path, second: Path, *options: str) -> int:
    return main(["--compare", str(first), str(second), *options])


def test_equal_runs(write, capsys) -> None:
    files = [write(run, "train_step", [step(), kernel()]) for run in "ab"]
    assert compared(*files) == 0
    text = capsys.readouterr().out
    assert "device nvidia-h200" in text and "0 of our rows slower" in text
    assert "only in" not in text and "note:" not in text
    # A way that was never timed is no row.
    assert text.count("| 1.000 |") == 4 and "torch_scatter" not in text


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "code", "word"),
    [
        (109.0, 300.0, [], 0, ""),
        (111.0, 300.0, [], 1, "SLOWER"),
        (111.0, 300.0, ["--threshold", "0.2"], 0, ""),
        (103.0, 300.0, ["--threshold", "0.02"], 1, "SLOWER"),
        (50.0, 300.0, [], 0, "faster"),
        (100.0, 900.0, [], 0, ""),
    ],
)
def test_verdicts(write, capsys, ours, theirs, options, code, word) -> None:
    files = write("a", "train_step", [step()]), write("b", "train_step", [step(ours, theirs)])
    assert compared(*files, *options) == code
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if ": dragkit |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[3]) == pytest.approx(ours / 100, abs=1e-3) and cells[4] == word
    (opponent,) = (line for line in lines if ": eager PyG |" in line)
    assert opponent.endswith("| opponent |")
    assert f"opponents: median ratio {theirs / 300:.3f} of 1 rows" in lines


def test_a_slower_kernel_of_ours_among_peers(write, capsys) -> None:
    first = write("a", "kernels", [kernel(), kernel(dtype="float32")])
    second = write("b", "kernels", [kernel(), kernel(0.3, dtype="float32")])
    assert compared(first, second) == 1
    text = capsys.readouterr().out
    (row,) = (line for line in text.splitlines() if "SLOWER" in line)
    assert "C: layer, forward, float32: dragkit, Triton" in row and "| 1.500 |" in row
    assert "1 of our rows slower by more than 10%" in text


def test_different_devices_are_refused(write, capsys) -> None:
    first = write("a", "train_step", [step()])
    second = write("b", "train_step", [step()], "NVIDIA B200", "nvidia-b200")
    assert compared(first, second) == 2
    captured = capsys.readouterr()
    assert "nvidia-h200 and nvidia-b200 are different devices" in captured.err
    assert captured.out == ""


def test_several_devices_on_one_side_are_refused(write, tmp_path, capsys) -> None:
    first = write("a", "train_step", [step()])
    write("b", "train_step", [step()])
    write("b", "train_step", [step()], "NVIDIA B200", "nvidia-b200")
    assert compared(first, tmp_path / "b") == 2
    assert "the second holds runs of 2 devices" in capsys.readouterr().err


def test_rows_of_one_run_are_listed(write, capsys) -> None:
    first, second = step(), step()
    first.timings.append(timing("dragkit, CUDA graphs", 50.0))
    one, other = kernel(), kernel()
    other.timings[0].ms = None
    files = write("a", "x", [first, one]), write("b", "x", [second, other, step(facts=32_000)])
    assert compared(*files) == 0
    text = capsys.readouterr().out
    assert "- only in the first: x: phase 1, 50-fact graphs, packed PyG: dragkit, CUDA" in text
    assert "- timed only in the first: x: C: layer, forward, bfloat16: dragkit, Triton" in text
    assert text.count("- only in the second: x: phase 1, 2000-fact graphs") == 2


def test_rows_of_one_name_are_told_apart(write, capsys) -> None:
    """As where a published set was not found and the demo stands for two of them."""
    first, second = write("a", "x", [step(), step()]), write("b", "x", [step(), step(150.0)])
    assert compared(first, second) == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line)
    assert "dragkit (no. 2)" in row


def test_other_versions_are_noted(write, capsys) -> None:
    first = write("a", "x", [step()])
    second = write("b", "x", [step()], threads=1, packages={"torch": "2.14.0"})
    assert compared(first, second) == 0
    text = capsys.readouterr().out
    assert "note: torch differs: 2.13.0 and 2.14.0" in text and "note: threads differs" in text


def damaged(change: Callable[[dict], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


def row_of(content: dict) -> dict:
    return content["comparisons"][0]["timings"][0]


DAMAGES = {
    "cut off": (lambda text: text[: len(text) // 2], "is no JSON, or cut off"),
    "empty": (lambda text: "", "is no JSON, or cut off"),
    "a list": (lambda text: "[1, 2]", "holds no object"),
    "foreign": (lambda text: '{"machine_info": {}, "benchmarks": []}', "no machine"),
    "no rows": (damaged(lambda c: c.pop("comparisons")), "no list of comparisons"),
    "no timings": (damaged(lambda c: c["comparisons"][0].pop("timings")), "no list of timings"),
    "a field less": (damaged(lambda c: row_of(c).pop("cpu_ms")), "'cpu_ms' is missing"),
    "a field more": (damaged(lambda c: row_of(c).update(fps=1)), "unknown field 'fps'"),
    "text": (damaged(lambda c: row_of(c).update(questions_per_s="1")), "questions_per_s: a finite"),
    "NaN": (damaged(lambda c: row_of(c)["wall_ms"].__setitem__(0, float("nan"))), "wall_ms: a fin"),
    "two values": (damaged(lambda c: row_of(c)["wall_ms"].pop()), "wall_ms: median"),
    "no order": (damaged(lambda c: row_of(c)["wall_ms"].reverse()), "is no median of times"),
    "negative": (damaged(lambda c: row_of(c).update(cpu_ms=[1, -1, 2])), "is no median of times"),
    "rates": (damaged(lambda c: row_of(c)["rates"].update(mfu="x")), "rates.mfu: a finite"),
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


def test_other_files(tmp_path, capsys) -> None:
    assert main([str(tmp_path / "nowhere")]) == 66
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "env.json").write_text("{}")  # the device suite's, no results
    assert main([str(tmp_path)]) == 66
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path)]) == 65
    assert f"{tmp_path / 'x.json'}: is no text" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--threshold", "-1"], ["--compare", "a", "b", "c"]])
def test_usage(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_ceilings_by_hand() -> None:
    """4.8e8 bytes at 4.8 TB/s take 0.1 ms; 9.89e11 operations at 989 TFLOP/s 1 ms."""
    h200, b200 = device_spec("NVIDIA H200"), device_spec("NVIDIA B200")
    at = ceiling(h200, 4.8e8, 2e9, "bfloat16")
    assert at.by == "memory" and at.ms == pytest.approx(0.1)
    at = ceiling(h200, 4.8e8, 9.89e11, "bfloat16")
    assert at.by == "arithmetic" and at.ms == pytest.approx(1.0)
    # float32 by the vector units: 67 TFLOP/s.
    assert ceiling(h200, 1.0, 6.7e10, "float32").ms == pytest.approx(1.0)
    # Half of the ceiling: 0.2 ms become 4.8e8 / 8e12 s = 0.06 ms at a half, 0.12 ms.
    ms, share = project(0.2, 4.8e8, 2e9, "bfloat16", h200, b200)
    assert (ms, share) == (pytest.approx(0.12), pytest.approx(0.5))
    ms, share = project(4.0, 4.8e8, 9.89e11, "bfloat16", h200, b200)
    assert (ms, share) == (pytest.approx(4 * 989 / 2250), pytest.approx(0.25))


def test_every_line_of_a_projection_says_so(write, capsys) -> None:
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
        (CPU, "b200", "which is no GPU"),
        ("NVIDIA T4", "b200", "peak rates of NVIDIA T4 are not known"),
        (GPU, "c300", "peak rates of c300 are not known"),
    ],
)
def test_nothing_is_projected_from_nothing(write, capsys, gpu, target, message) -> None:
    file = write("a", "kernels", [kernel()], gpu)
    assert main(["--project", target, str(file)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_projection_needs_rows(write) -> None:
    results = [read_results(write("a", "kernels", []))]
    with pytest.raises(NoProjection, match="no rows"):
        projection(results, "b200")
