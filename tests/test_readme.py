"""What the documents show works: commands, files, settings, examples in Python, JSON and YAML."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from dragkit.config import resolve_config
from dragkit.config.__main__ import main as config_main
from dragkit.config.arguments import parse_train_args
from dragkit.config.resolve import RENAMED
from dragkit.data.__main__ import parse_data_args
from dragkit.data.question_file import read_questions
from dragkit.evaluate import parse_evaluate_args
from dragkit.experiment.__main__ import parse_experiment_args
from dragkit.experiment.plan import read_experiment
from dragkit.plan import parse_plan_args
from dragkit.selftest.__main__ import parse_selftest_args
from tests.documents import (
    CONFIGURATION,
    DOCUMENTS,
    README,
    RENAMES,
    ROOT,
    dragkit_commands,
    examples,
    exists,
    make_targets,
    missing_modules,
    missing_names,
    named_paths,
    read,
    unknown_settings,
)

COMMANDS = [
    (document, module, arguments)
    for document in DOCUMENTS
    for module, arguments in dragkit_commands(read(document))
]


def accept(module: str, arguments: list[str], folder: Path) -> None:
    """Hands a command to its parser; whatever is wrong with it is raised."""
    # A variable that a scheduler sets to a number.
    arguments = [re.sub(r"\$[A-Z_]+", "1", argument) for argument in arguments]
    for flag, value in zip(arguments, arguments[1:], strict=False):
        # The reader's own settings file: any content will do.
        if flag == "--config" and not (ROOT / value).is_file():
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).touch()
    if module == "dragkit.train":
        parse_train_args(arguments)
    elif module == "dragkit.plan":
        parse_plan_args(arguments)
    elif module == "dragkit.evaluate":
        parse_evaluate_args(arguments)
    elif module == "dragkit.experiment":
        assert (ROOT / parse_experiment_args(arguments).file).is_file()
    elif module == "dragkit.selftest":
        parse_selftest_args(arguments)
    elif module == "dragkit.data":
        parse_data_args(arguments)
    elif module == "dragkit.config":
        code = config_main(arguments)
        assert code == 0, f"exit code {code}"
    else:
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"there is no module {module}"
        if spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None, f"{module} is not a program"
        assert "__main__" in Path(spec.origin).read_text(encoding="utf-8") + Path(spec.origin).stem


def test_the_readme_shows_how_to_train_and_to_evaluate() -> None:
    assert README.is_file(), f"{README} is missing; write it, with its commands in fenced blocks"
    modules = {module for document, module, _ in COMMANDS if document == README}
    missing = {"dragkit.train", "dragkit.evaluate"} - modules
    assert not missing, (
        f"{README} has no fenced command `python -m {min(missing)} ...`; what a document does not "
        "show in a fenced block is not checked"
    )


@pytest.mark.parametrize(
    ("document", "module", "arguments"),
    COMMANDS,
    ids=[f"{path.parent.name}/{path.name}-{place}" for place, (path, _, _) in enumerate(COMMANDS)],
)
def test_every_command_is_accepted(
    document: Path,
    module: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"python -m {module} {shlex.join(arguments)}"
    try:
        accept(module, arguments, tmp_path)
    except SystemExit as error:  # --help
        assert error.code == 0, f"{document}: {command}"
    except Exception as error:
        pytest.fail(f"{document}: {command}\n{type(error).__name__}: {error}")


def test_every_make_target_exists() -> None:
    makefile = read(ROOT / "Makefile")
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    wanted = set().union(*(make_targets(read(document)) for document in DOCUMENTS))
    assert wanted <= targets, sorted(wanted - targets)


def test_every_path_that_a_document_names_exists() -> None:
    wrong = [
        f"{document.relative_to(ROOT)}: {path}"
        for document in DOCUMENTS
        for path in sorted(named_paths(read(document), bare_names=document == README))
        if not exists(path, document.parent)
    ]
    assert wrong == []


def test_the_first_page_stays_short() -> None:
    assert len(read(README).splitlines()) <= 120


def test_the_configuration_page_is_what_the_schema_says() -> None:
    path = ROOT / "scripts" / "configuration_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert read(CONFIGURATION) == script.page(), "run python scripts/configuration_page.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_setting_that_a_document_names_exists(document: Path) -> None:
    if document != RENAMES:
        assert unknown_settings(read(document)) == set()


def test_the_table_of_renamed_settings_is_that_of_the_code() -> None:
    old, new = zip(*re.findall(r"^\|([^|]*)\|([^|]*)\|$", read(RENAMES), re.MULTILINE), strict=True)
    assert unknown_settings("\n".join(new)) == set()
    words = set(re.findall(r"[\w.]+", " ".join(old)))
    for key, (_, values) in RENAMED.items():
        assert {key, key.rpartition(".")[2]} & words and set(values) <= words, key


def test_python_examples_use_names_that_exist() -> None:
    found = examples("python")
    assert README in {document for document, _ in found}
    wrong = [f"{document.name}: {name}" for document, code in found for name in missing_names(code)]
    assert wrong == []


def test_every_module_that_a_document_names_exists() -> None:
    wrong = [f"{d.name}: {name}" for d in DOCUMENTS for name in missing_modules(read(d))]
    assert wrong == []


def test_json_examples_are_questions(tmp_path: Path) -> None:
    found = examples("json")
    assert README in {document for document, _ in found}
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(json.loads(text)) for _, text in found))
    for question in read_questions(path).questions:
        assert question.topics and question.answers and question.triples


def test_yaml_examples_are_configurations_or_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAGKIT_DATA", str(tmp_path))
    for _, text in examples("yaml"):
        path = tmp_path / "example.yaml"
        path.write_text(text)
        if not re.search("^arms:", text, re.MULTILINE):
            resolve_config(file=path)
            continue
        for name in re.findall(r"\$\{DRAGKIT_DATA\}/([\w.-]+)", text):
            (tmp_path / name).touch()
        read_experiment(path)


def test_no_placeholder_is_left_in_a_document() -> None:
    marks = re.compile(r"@@\w+@@|\bTODO\b|\bTBD\b")
    left = [
        f"{document.relative_to(ROOT)}: {mark}"
        for document in DOCUMENTS
        for mark in marks.findall(read(document))
    ]
    assert left == []


SAMPLE = """
Text with `setup.py`, `docs/nothing.md`, `a phrase` and [a link](LICENSE#top), and
[away](https://example.org/x.md).

```bash
make test VENV=env        # a comment with an ' in it
OMP_NUM_THREADS=2 python3 -m dragkit.train --phase 1 \\
    --set 'optim.lr=1e-3' > log.txt 2>&1 && python -m dragkit.evaluate runs/x | tee out
nsys profile -o p \\
    python -m dragkit.train --phase 2 --profile_steps 10:13
```

```
tests/no_such_file.py     listed in a tree
step 3 isn't a command; python is not run here
```
"""


def test_the_reading_of_documents() -> None:
    """Continuation lines, variables, pipes, redirections, profilers, comments and apostrophes."""
    assert dragkit_commands(SAMPLE) == [
        ("dragkit.train", ["--phase", "1", "--set", "optim.lr=1e-3"]),
        ("dragkit.evaluate", ["runs/x"]),
        ("dragkit.train", ["--phase", "2", "--profile_steps", "10:13"]),
    ]
    assert make_targets(SAMPLE) == {"test"}
    paths = named_paths(SAMPLE)
    assert paths == {"setup.py", "docs/nothing.md", "LICENSE", "tests/no_such_file.py"}
    assert [path for path in sorted(paths) if not exists(path, ROOT)] == [
        "docs/nothing.md",
        "tests/no_such_file.py",
    ]


def test_wrong_names_are_noticed() -> None:
    assert missing_names("import dragkit\ndragkit.no_such_name()") == ["dragkit.no_such_name"]
    assert missing_names("from dragkit.errors import DragkitError, No") == ["dragkit.errors.No"]
    text = "`dragkit.eval.evaluate`, `dragkit.data.no_such`, `dragkit.train --phase 1`"
    assert missing_modules(text) == ["dragkit.data.no_such"]
    text = "`run.seed`, `run.sede=1`, `retriever.py`\n```\npython x --set optim.rate=1\n```\n"
    assert unknown_settings(text) == {"run.sede", "optim.rate"}


def test_a_wrong_command_is_noticed(tmp_path: Path) -> None:
    for module, words in [
        ("dragkit.train", ["--no_such_flag", "1"]),
        ("dragkit.train", ["--phase", "3"]),
        ("dragkit.evaluate", []),
        ("dragkit.config", ["shwo"]),
        ("dragkit.plan", ["--crad", "H100"]),
        ("dragkit.experiment", ["experiments/no_such_file.yaml"]),
        ("dragkit.no_such_module", []),
        ("dragkit.retriever.losses", []),
    ]:
        with pytest.raises((Exception, SystemExit)):
            accept(module, words, tmp_path)
