"""What commands write: standard output and files that cannot be written end with 73 or 74."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dragkit.console import output_file, printable, run_main, setup_console, show
from dragkit.errors import CreateError, DataError, Stopped, WriteError

ROOT = Path(__file__).parents[1]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs `$CONFIG`, the command that prints settings, in a shell."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": paths, "CONFIG": f"{sys.executable} -m dragkit.config"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "command",
    [
        "$CONFIG show >&-",
        "$CONFIG show > /dev/full",
        "$CONFIG show --help > /dev/full",
        # The reader ends before anything is written.
        "($CONFIG show; echo $? >&2) | true; exit 74",
    ],
)
def test_standard_output_that_cannot_be_written_exits_74(command: str) -> None:
    told = shell(command)
    assert told.returncode == 74
    assert "standard output" in told.stderr
    assert "Traceback" not in told.stderr and "Exception ignored" not in told.stderr
    if "true" in command:
        assert told.stderr.split()[-1] == "74"


def test_closed_standard_error_changes_no_exit_code() -> None:
    assert shell("$CONFIG show 2>&-").returncode == 0
    assert shell("$CONFIG show --epochs no 2>&-").returncode == 2


def test_an_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    with pytest.raises(Stopped), output_file(path, "") as file:
        file.write("part")
        raise Stopped("SIGTERM")
    assert os.listdir(path.parent) == []
    with output_file(path, "") as file:
        file.write("first")
        assert not path.exists()
    link = tmp_path / "link"
    link.symlink_to(path)
    with output_file(link, "") as file:
        file.write("second")
        assert path.read_text() == "first"
    assert link.is_symlink() and path.read_text() == "second"
    assert os.listdir(path.parent) == ["out.json"]


def test_an_output_that_cannot_be_created_is_refused_before_the_block(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file/below.json", "n" * 300, "/proc/out.json"):
        path = tmp_path / name
        with pytest.raises(CreateError, match="cannot be created: .* REMEDY") as caught:
            output_file(path, "REMEDY").__enter__()
        assert str(path) in str(caught.value) and caught.value.exit_code == 73
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "questions.jsonl", tmp_path / "link"
    link.symlink_to(path)
    for mine in ("{}", '{"question": "?"}', "{\n", "\x1f\x8b"):
        path.write_text(mine)
        for name in (path, link):
            with pytest.raises(CreateError, match="holds something else.* REMEDY"):
                output_file(name, "REMEDY", head='{\n "dragkit"').__enter__()
        assert path.read_text() == mine
    for own in ("", '{\n "dragkit": "0"}'):
        path.write_text(own)
        with output_file(link, "", head='{\n "dragkit"') as out:
            out.write("new")
        assert path.read_text() == "new"


def test_a_named_pipe_that_nobody_reads_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CreateError, match="pipe: cannot be created: No such device"):
        output_file(tmp_path / "pipe", "").__enter__()
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with output_file(tmp_path / "pipe", "") as out:
        out.write("text")
    assert os.read(reading, 10) == b"text"
    os.close(reading)


def test_a_device_is_written_to_and_not_replaced() -> None:
    full = Path("/dev/full")
    with pytest.raises(WriteError, match="full: cannot be") as caught, output_file(full, "") as out:
        out.write("text")
    assert caught.value.exit_code == 74
    assert full.is_char_device()


def test_an_output_to_a_pipe_is_written_to_it() -> None:
    reading, writing = os.pipe()
    with output_file(Path(f"/dev/fd/{writing}"), "") as out:
        out.write("text")
    os.close(writing)
    assert os.read(reading, 10) == b"text"
    os.close(reading)


def test_a_full_disk_is_no_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    assert run_main(fail, []) == 74
    assert "some/file: cannot be written: No space left" in capsys.readouterr().err


def test_a_stop_before_anything_was_saved_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(argv: list[str]) -> None:
        raise Stopped("SIGTERM")

    assert run_main(stop, []) == 130
    assert "SIGTERM. Nothing was saved" in capsys.readouterr().err


STEERING = "\x1b[31mred\x1b[0m\x07\x00\r\x9b2J\u202eevil\u2066\u2028\ud800"


def test_nothing_that_is_printed_steers_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> None:
        logging.getLogger("dragkit").warning("logged %s", STEERING)
        show(f"shown {STEERING}")
        raise DataError(f"raised {STEERING}")

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    setup_console(debug=True)
    assert run_main(fail, []) == DataError.exit_code
    out, err = capsys.readouterr()
    for text, kind in ((out, "shown"), (err, "logged"), (err, "raised")):
        assert rf"{kind} \x1b[31mred\x1b[0m\x07\x00\r\x9b2J\u202eevil\u2066\u2028\ud800" in text
    assert not set(STEERING) & set(out + err) - set("[31mred0m2Jevil")


def test_what_is_plain_is_printed_as_it_is() -> None:
    plain = "a\tb\nc \u05e7\u05d5\u05b9\u05dc \u200f \U0001f468\u200d\U0001f469 e\u0301 |\\n"
    assert printable(plain) == plain


_LATE = """
import os, signal, sys
from dragkit.console import run_main
def work(argv):
    print("done", flush=True)
    return 3
code = run_main(work)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
    os.kill(os.getpid(), number)
sys.exit(code)
"""


def test_a_signal_while_python_exits_changes_no_exit_code() -> None:
    told = subprocess.run([sys.executable, "-c", _LATE], capture_output=True, text=True, cwd=ROOT)
    assert (told.returncode, told.stdout, told.stderr) == (3, "done\n", "")


_LOGS = """
import logging, sys
from dragkit.console import run_main, setup_console
def work(argv):
    setup_console(debug=False)
    for number in range(3):
        logging.getLogger("dragkit").info("line %d", number)
    if argv:
        raise ValueError("a reason")
    print("done")
sys.exit(run_main(work))
"""


@pytest.mark.parametrize("error", ["2> /dev/full", "2> >(true)", "2> >(head -1 > /dev/null)"])
@pytest.mark.parametrize(("argument", "code"), [("", 0), ("fail", 70)])
def test_a_log_that_nobody_reads_ends_no_command(error: str, argument: str, code: int) -> None:
    # The readers end first.
    script = f"{sys.executable} -c '{_LOGS}' {argument} {error}; code=$?; sleep 0.1; exit $code"
    told = shell(f"cd {ROOT}; {script}")
    assert told.returncode == code and told.stderr == ""
    assert told.stdout == ("" if argument else "done\n")
