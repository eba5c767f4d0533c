"""What the documents show works: commands, files, settings, examples in Python, JSON and YAML."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from dragkit.config import FIELDS, SECTIONS, resolve_config
from dragkit.config.__main__ import main as config_main
from dragkit.config.arguments import parse_train_args
from dragkit.config.resolve import RENAMED
from dragkit.data.question_file import read_questions
from dragkit.evaluate import parse_evaluate_args
from dragkit.experiment.__main__ import parse_experiment_args
from dragkit.experiment.plan import read_experiment
from dragkit.plan import parse_plan_args
from dragkit.selftest.__main__ import parse_selftest_args

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
# This page lists old names beside the new ones.
RENAMES = ROOT / "docs" / "moving-from-the-earlier-trainer.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "experiments" / "README.md",
    ROOT / "kernels" / "README.md",
]

_FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
# `2>&1` and the 2 of `2>file`, which a lexer would take for words.
_STREAMS = re.compile(r"(?<!\S)[0-2]?>&[0-2]|(?<!\S)[0-2](?=>)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+)`")
_FOLDERS = r"(?:dragkit|kernels|bench|tests|docs|experiments|scripts|\.ci)"
_REPOSITORY_PATH = re.compile(rf"(?<![\w./:-])({_FOLDERS}/[\w./*-]*)")
_TOP_LEVEL_FILE = re.compile(r"[\w.-]+\.(?:md|toml|txt|py)")
_SETTING = re.compile(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[a-z0-9_]+)(?![\w.])")
_MODULE = re.compile(r"dragkit(?:_kernels)?(?:\.\w+)+")
_FILE_ENDINGS = (".json", ".jsonl", ".lock", ".md", ".py", ".safetensors", ".yaml")


def read(path: Path) -> str:
    """A document's text; empty for one that is not there."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def command_lines(text: str) -> list[list[str]]:
    """The simple commands of all fenced blocks, as words; `a && b | c` are three."""
    found = []
    for block in _FENCE.finditer(text):
        joined = re.sub(r"\\\n\s*", " ", block.group(4))
        for line in joined.splitlines():
            line = _STREAMS.sub(" ", line)
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="();<>|&")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            try:
                words = list(lexer)
            except ValueError:  # an apostrophe in output that a block shows
                words = line.split()
            found += split_at_operators(words)
    return found


def split_at_operators(words: list[str]) -> list[list[str]]:
    """Cuts at ;, |, && and the like; a redirection takes its file with it."""
    parts: list[list[str]] = [[]]
    skip = False
    for word in words:
        if word and set(word) <= set("<>&") and set(word) & set("<>"):
            skip = True
        elif word and set(word) <= set("();|&"):
            parts.append([])
        elif not skip:
            parts[-1].append(word)
        else:
            skip = False
    return [part for part in parts if part]


def dragkit_commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of each `python -m dragkit.x ...`, behind variables or a profiler too.

    Also of `torchrun [options] -m dragkit.x ...`.
    """
    found = []
    for words in command_lines(text):
        if "torchrun" in words and "-m" in words:
            place = words.index("-m", words.index("torchrun"))
            found.append((words[place + 1], words[place + 2 :]))
            continue
        for place, word in enumerate(words[:-2]):
            is_python = re.fullmatch(r"(.*/)?python[\d.]*|\$\(?\w+\)?", word)
            if is_python and words[place + 1] == "-m" and words[place + 2].startswith("dragkit"):
                found.append((words[place + 2], words[place + 3 :]))
                break
    return found


def make_targets(text: str) -> set[str]:
    """Targets of each `make x`, without variables."""
    return {
        word
        for words in command_lines(text)
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word and not word.startswith("-")
    }


def named_paths(text: str, *, bare_names: bool = True) -> set[str]:
    """Paths of the repository that a document names: by link, in backticks, or in a tree.

    A bare file name in backticks counts in the README; elsewhere it may be a general rule's.
    """
    links = {link.split("#")[0] for link in _LINK.findall(text) if "://" not in link}
    inline = set(_INLINE.findall(text))
    bare = {name for name in inline if bare_names and _TOP_LEVEL_FILE.fullmatch(name)}
    inside = {path.rstrip(".,:;") for path in _REPOSITORY_PATH.findall(text)}
    return {path for path in links | bare | inside if path and not path.startswith("mailto:")}


def exists(path: str, folder: Path) -> bool:
    """Whether a named path is there: beside the document, in the repository, or (bare) anywhere."""
    if any(root.joinpath(path).exists() for root in (folder, ROOT)):
        return True
    if "*" in path:
        return any(ROOT.glob(path))
    places = ("dragkit", "kernels", "bench", "tests", "docs", "scripts")
    return "/" not in path and any(any((ROOT / place).rglob(path)) for place in places)


def examples(language: str) -> list[tuple[Path, str]]:
    """All fenced blocks of a language, with their documents."""
    return [
        (document, block.group(4))
        for document in DOCUMENTS
        for block in _FENCE.finditer(read(document))
        if block.group(3).strip() == language
    ]


def missing_names(code: str) -> list[str]:
    """Names of our packages that an example uses and that are not there."""
    used: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dragkit"):
            used += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used += [(node.value.id, node.attr)] if node.value.id == "dragkit" else []
    return [f"{m}.{n}" for m, n in used if not hasattr(importlib.import_module(m), n)]


def missing_modules(text: str) -> list[str]:
    """Dotted names of our packages in backticks that are neither modules nor names in one."""
    names = [m[0] for m in map(_MODULE.match, _INLINE.findall(text)) if m]
    return [name for name in names if not is_there(name)]


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or a name in its parent."""
    parent, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # the parent is a module and not a package
        pass
    return hasattr(importlib.import_module(parent), last)


def unknown_settings(text: str) -> set[str]:
    """Dotted keys that a text names in backticks or in blocks, and that the schema lacks."""
    blocks = [block.group(4) for block in _FENCE.finditer(text) if block.group(3) != "python"]
    named = _SETTING.findall("\n".join([*_INLINE.findall(text), *blocks]))
    return {key for key in named if key not in FIELDS and not key.endswith(_FILE_ENDINGS)}


COMMANDS = [
    (document, module, arguments)
    for document in DOCUMENTS
    for module, arguments in dragkit_commands(read(document))
]


def accept(module: str, arguments: list[str], folder: Path) -> None:
    """Hands a command to its parser; whatever is wrong with it is raised."""
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
