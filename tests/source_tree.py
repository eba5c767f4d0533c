"""The syntax trees of the shipped code, for the tests that hold it to rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"dragkit": ROOT / "dragkit", "dragkit_kernels": ROOT / "kernels" / "dragkit_kernels"}


@dataclass(frozen=True, eq=False)
class Module:
    """One source file and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module
    lines: list[str]

    def at(self, node: ast.AST) -> str:
        """Where a node stands, for messages."""
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with the names taken from it."""

    target: str
    names: tuple[str, ...]
    node: ast.stmt
    lazy: bool


@cache
def modules() -> tuple[Module, ...]:
    """Every Python file of both packages."""
    found = []
    for package, folder in ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts and parts[-1] == "__init__" else parts
            text = path.read_text(encoding="utf-8")
            name = ".".join((package, *parts))
            found.append(Module(name, path, ast.parse(text, str(path)), text.splitlines()))
    return tuple(found)


def is_within(name: str, package: str) -> bool:
    """Whether a module is `package` or below it."""
    return name == package or name.startswith(f"{package}.")


def of_module(table: dict[str, object], name: str) -> object | None:
    """The entry whose key is the longest package around the module."""
    keys = [key for key in table if is_within(name, key)]
    return table[max(keys, key=len)] if keys else None


@cache
def imports(module: Module) -> list[Import]:
    """What a module imports, for type checkers alone, too: such imports count as lazy."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), node, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append(from_import(module, node, lazy))
        is_main = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        inside = lazy or is_main or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(module.tree, False)
    return [part for item in found for part in submodules(item)]


def from_import(module: Module, node: ast.ImportFrom, lazy: bool) -> Import:
    """`from x import a, b` with a relative x made absolute."""
    target = node.module or ""
    if node.level:
        package = module.name.split(".")
        drop = node.level - (module.path.name == "__init__.py")
        base = package[: len(package) - drop]
        target = ".".join([*base, *([node.module] if node.module else [])])
    return Import(target, tuple(alias.name for alias in node.names), node, lazy)


@cache
def names_of_modules() -> frozenset[str]:
    """Names under which `from package import name` gives a module.

    An op's function has the name of its folder, and the package's own import of it comes last.
    """
    bound = {
        f"{module.name}.{alias.asname or alias.name}"
        for module in modules()
        if module.path.name == "__init__.py"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return frozenset(module.name for module in modules()) - bound


def submodules(item: Import) -> Iterator[Import]:
    """Names that are modules themselves count as imports of those modules."""
    deeper = [name for name in item.names if f"{item.target}.{name}" in names_of_modules()]
    rest = tuple(name for name in item.names if name not in deeper)
    for name in deeper:
        yield Import(f"{item.target}.{name}", (), item.node, item.lazy)
    if rest or not deeper:
        yield Import(item.target, rest, item.node, item.lazy)


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[Module, ast.AST]]:
    """Every node of a kind in both packages."""
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, kind):
                yield module, node


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else f"?.{node.attr}"
    return ""


def is_jit(node: ast.FunctionDef) -> bool:
    """Whether Triton compiles a function."""
    names = [dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
    return any(name.split(".")[0] == "triton" and name.endswith("jit") for name in names)


def functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """(dotted name without outer functions, definition, whether it is a method)."""
    methods = {
        id(child)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module.name}.{node.name}", node, id(node) in methods
