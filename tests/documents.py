"""Reads commands, paths, settings and examples out of the project's documents."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

from dragkit.config import FIELDS, SECTIONS

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

FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
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
    for block in FENCE.finditer(text):
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
        for block in FENCE.finditer(read(document))
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
    blocks = [block.group(4) for block in FENCE.finditer(text) if block.group(3) != "python"]
    named = _SETTING.findall("\n".join([*_INLINE.findall(text), *blocks]))
    return {key for key in named if key not in FIELDS and not key.endswith(_FILE_ENDINGS)}
