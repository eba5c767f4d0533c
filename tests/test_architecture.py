"""Who may import whom, and what must not appear, read from the syntax trees of the shipped code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"dragkit": ROOT / "dragkit", "dragkit_kernels": ROOT / "kernels" / "dragkit_kernels"}
HARD_LIMIT_LINES = 400
JIT_LIMIT_LINES = 80
KERNEL_NAME = re.compile(r"_[a-z_]+_(fwd|bwd)(_[a-z_]+)?_kernel")

# Package or module -> what of dragkit it may import besides itself and dragkit.errors; the longest
# matching name decides. An entry admits a module and everything below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "dragkit": (),
    "dragkit.schema": (),
    "dragkit.config": ("dragkit.schema", "dragkit.cli"),
    "dragkit.flags": ("dragkit.config", "dragkit.schema"),
    "dragkit.cli": ("dragkit.config", "dragkit.flags"),
    "dragkit.console": (),
    "dragkit.train": ("dragkit.cli", "dragkit.console", "dragkit.trainer"),
    "dragkit.evaluate": ("dragkit.cli", "dragkit.console", "dragkit.trainer"),
    "dragkit.plan": ("dragkit.cli", "dragkit.config", "dragkit.console", "dragkit.model"),
    "dragkit.losses": ("dragkit_kernels",),
    "dragkit.observe": (),
    "dragkit.data": ("dragkit.config", "dragkit_kernels"),
    "dragkit.model": (
        "dragkit.config",
        "dragkit.data.arrays",
        "dragkit.data.cache",
        "dragkit.data.packed",
        "dragkit_kernels",
    ),
    # Only to find the bundled weights, when they are asked for.
    "dragkit.model.load": (
        "dragkit.config",
        "dragkit.data.packed",
        "dragkit.model",
        "dragkit.tiny",
    ),
    "dragkit.eval": ("dragkit.data.packed",),
    "dragkit.eval.families": (),
    "dragkit.eval.metrics": ("dragkit.eval.families",),
    "dragkit.eval.report": ("dragkit.eval.metrics",),
    # The names of the demo's entities only train the tokeniser.
    "dragkit.tiny": ("dragkit.data.relations", "dragkit.demo", "dragkit.model.prompt"),
    "dragkit.demo": ("dragkit.data.cache",),
    "dragkit.trainer": (
        "dragkit.cli",
        "dragkit.config",
        "dragkit.data",
        "dragkit.demo",
        "dragkit.eval",
        "dragkit.losses",
        "dragkit.model",
        "dragkit.observe",
    ),
    "dragkit_kernels": (),
}
# Imported inside functions only, so that the command lines answer before torch is loaded.
ONLY_LAZILY = {
    "dragkit.train": "dragkit.trainer",
    "dragkit.evaluate": "dragkit.trainer",
    "dragkit.plan": "dragkit.model",
}
_PROGRAMS = ("train", "evaluate", "plan")
_LIGHT_MODULES = ("errors", "schema", "config", "flags", "cli", "console", *_PROGRAMS)
LIGHT = ("", *(f".{name}" for name in _LIGHT_MODULES))
# Graphs in, sorted graphs out: data takes no op.
DATA_TAKES = {"FactGroups", "FactOrders", "build_fact_orders", "concat_fact_orders"}

COMMON = {"torch", "numpy", "scipy", "safetensors", "tqdm", "msgspec", "yaml", "pydantic"}
CONFINED: dict[str, tuple[str, ...]] = {
    "torch_geometric": ("dragkit.data.subgraph",),
    "sentence_transformers": ("dragkit.model.encoder",),
    "transformers": ("dragkit.model.load", "dragkit.model.random_weights", "dragkit.tiny"),
    "tokenizers": ("dragkit.tiny",),
    "peft": ("dragkit.model.adapters", "dragkit.model.generator", "dragkit.tiny"),
    "huggingface_hub": ("dragkit.model.encoder", "dragkit.model.load"),
    "pynvml": ("dragkit.observe.gpu",),
    "triton": ("dragkit_kernels",),
    "pydantic": ("dragkit.schema", "dragkit.config"),
    "yaml": ("dragkit.config", "dragkit.demo"),
}
NARROW: dict[str, set[str]] = {
    "dragkit_kernels": {"torch", "triton"},
    "dragkit.losses": {"torch"},
    "dragkit.eval.metrics": {"torch"},
    "dragkit.observe": {"torch", "pynvml"},
    "dragkit.schema": {"pydantic"},
    "dragkit.config": {"pydantic", "yaml"},
    "dragkit.errors": set(),
    "dragkit.flags": set(),
    "dragkit.cli": set(),
}
# Functions without full annotations, each marked `noqa: ANN` where it stands: a method that
# replaces a library's and has to keep its signature.
UNANNOTATED = {"dragkit.model.load.prepare"}
# Float atomics make sums depend on the order of arrival; an entry needs a deterministic twin.
FLOAT_ATOMICS: set[str] = set()


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
    """What a module imports when it runs; imports for type checkers alone are left out."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child, lazy)
            return
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


def test_the_packages_are_found() -> None:
    names = {module.name for module in modules()}
    assert {"dragkit.train", "dragkit.trainer.loop", "dragkit_kernels.orders"} <= names


def test_imports_between_packages_follow_the_rules() -> None:
    wrong = []
    for module in modules():
        own = max((key for key in MAY_IMPORT if is_within(module.name, key)), key=len)
        allowed = (*MAY_IMPORT[own], "dragkit.errors")
        if own != "dragkit":
            allowed = (*allowed, own)
        for item in imports(module):
            if item.target.split(".")[0] not in ROOTS or item.target == "dragkit":
                continue
            if not any(is_within(item.target, name) for name in allowed):
                wrong.append(f"{module.at(item.node)}: {module.name} imports {item.target}")
    assert not wrong, "\n".join(wrong)


def test_the_kernels_know_nothing_of_dragkit_and_errors_of_nobody() -> None:
    wrong = [
        f"{module.at(item.node)}: imports {item.target}"
        for module in modules()
        if module.name == "dragkit.errors" or is_within(module.name, "dragkit_kernels")
        for item in imports(module)
        if is_within(item.target, "dragkit")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_used_through_their_front() -> None:
    wrong = []
    for module in modules():
        for item in imports(module):
            if module.name.startswith("dragkit_kernels") or not is_within(
                item.target, "dragkit_kernels"
            ):
                continue
            if item.target != "dragkit_kernels":
                wrong.append(f"{module.at(item.node)}: {item.target} is private")
            elif is_within(module.name, "dragkit.data") and not set(item.names) <= DATA_TAKES:
                wrong.append(f"{module.at(item.node)}: data may take {sorted(DATA_TAKES)} only")
    assert not wrong, "\n".join(wrong)


def test_op_folders_do_not_import_one_another() -> None:
    ops = [path.parent.name for path in ROOTS["dragkit_kernels"].glob("*/__init__.py")]
    assert "message_passing" in ops
    wrong = [
        f"{module.at(item.node)}: {op} imports {other}"
        for op in ops
        for other in ops
        for module in modules()
        if op != other and is_within(module.name, f"dragkit_kernels.{op}")
        for item in imports(module)
        if is_within(item.target, f"dragkit_kernels.{other}")
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_program() -> None:
    wrong = [
        f"{module.at(item.node)}: imports {item.target}"
        for module in modules()
        for item in imports(module)
        if item.target in {f"dragkit.{name}" for name in _PROGRAMS}
    ]
    assert not wrong, "\n".join(wrong)


def test_command_lines_load_torch_only_when_they_need_it() -> None:
    light = {f"dragkit{suffix}" for suffix in LIGHT}
    wrong = []
    for module in modules():
        if module.name not in light:
            continue
        for item in imports(module):
            top = item.target.split(".")[0]
            heavy = top not in {*sys.stdlib_module_names, "dragkit", "pydantic", "yaml"}
            heavy = heavy or (top == "dragkit" and item.target not in light)
            if heavy and not item.lazy:
                wrong.append(f"{module.at(item.node)}: imports {item.target} at module level")
    for name, target in ONLY_LAZILY.items():
        (module,) = (module for module in modules() if module.name == name)
        assert any(is_within(i.target, target) and i.lazy for i in imports(module)), name
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_where_they_belong() -> None:
    wrong = []
    for module in modules():
        narrow = of_module(NARROW, module.name)
        for item in imports(module):
            package = item.target.split(".")[0]
            if package in sys.stdlib_module_names or package in ROOTS:
                continue
            homes = CONFINED.get(package)
            at_home = homes is None or any(is_within(module.name, home) for home in homes)
            known = package in COMMON or homes is not None
            if not known or not at_home or (narrow is not None and package not in narrow):
                wrong.append(f"{module.at(item.node)}: {module.name} imports {package}")
    assert not wrong, "\n".join(wrong)


def test_modules_are_not_longer_than_the_hard_limit() -> None:
    long = [
        f"{module.path.relative_to(ROOT)}: {len(module.lines)} lines"
        for module in modules()
        if len(module.lines) > HARD_LIMIT_LINES
    ]
    assert not long, "\n".join(long)


def test_library_code_does_not_print() -> None:
    wrong = [module.at(node) for module, node in nodes(ast.Call) if dotted(node.func) == "print"]
    assert not wrong, "\n".join(wrong)


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(dotted(kind).split(".")[-1] in ("Exception", "BaseException") for kind in caught)


def test_no_error_is_swallowed() -> None:
    """A handler for everything has to raise, or to use what it caught."""
    wrong = []
    for module, node in nodes((ast.ExceptHandler, ast.Call)):
        if isinstance(node, ast.Call):
            if dotted(node.func).split(".")[-1] == "suppress" and any(
                dotted(kind) in ("Exception", "BaseException") for kind in node.args
            ):
                wrong.append(f"{module.at(node)}: suppresses every error")
        elif node.type is None:
            wrong.append(f"{module.at(node)}: bare except")
        elif _is_broad(node):
            inner = [part for child in node.body for part in ast.walk(child)]
            used = any(isinstance(part, ast.Name) and part.id == node.name for part in inner)
            if not used and not any(isinstance(part, ast.Raise) for part in inner):
                wrong.append(f"{module.at(node)}: catches everything and says nothing")
    assert not wrong, "\n".join(wrong)


def test_checks_are_no_asserts() -> None:
    wrong = [module.at(node) for module, node in nodes(ast.Assert)]
    assert not wrong, "python -O removes these:\n" + "\n".join(wrong)


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.save_pickle"),
}
UNSAFE_NAMES = {"UnsafeLoader", "FullLoader", "unsafe_load", "full_load", "read_pickle"}
UNSAFE_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}


def test_nothing_runs_code_from_data() -> None:
    wrong = []
    for module in modules():
        for item in imports(module):
            if item.target.split(".")[0] in UNSAFE_MODULES or set(item.names) & UNSAFE_NAMES:
                wrong.append(f"{module.at(item.node)}: imports {item.target}")
            if item.target in ("torch", "os") and set(item.names) & {"load", "system", "popen"}:
                wrong.append(f"{module.at(item.node)}: imports {item.names} from {item.target}")
    for module, node in nodes((ast.Call, ast.Attribute)):
        if isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_NAMES:
                wrong.append(f"{module.at(node)}: {node.attr}")
            continue
        name = dotted(node.func)
        if name in UNSAFE_CALLS or name.removeprefix("builtins.") in ("eval", "exec"):
            wrong.append(f"{module.at(node)}: calls {name}")
        for argument in node.keywords:
            harmless = isinstance(argument.value, ast.Constant) and argument.value.value is False
            if argument.arg in UNSAFE_ARGUMENTS and not harmless:
                wrong.append(f"{module.at(node)}: {argument.arg} is not False")
    assert not wrong, "\n".join(wrong)


def test_yaml_is_read_by_a_safe_loader() -> None:
    """`yaml.load` only with a class that is derived from SafeLoader in the same module."""
    wrong = []
    for module in modules():
        safe = {"yaml.SafeLoader", "yaml.CSafeLoader"} | {
            node.name
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
            and any(dotted(base) in ("yaml.SafeLoader", "SafeLoader") for base in node.bases)
        }
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and dotted(node.func) == "yaml.load":
                loaders = [dotted(a.value) for a in node.keywords if a.arg == "Loader"]
                loaders += [dotted(a) for a in node.args[1:]]
                if not loaders or not set(loaders) <= safe:
                    wrong.append(f"{module.at(node)}: yaml.load with {loaders or 'no loader'}")
    assert not wrong, "\n".join(wrong)


def _is_jit(node: ast.FunctionDef) -> bool:
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


def test_every_function_is_annotated() -> None:
    wrong = []
    for module in modules():
        for name, node, is_method in functions(module):
            # A kernel's arguments are pointers and numbers to the compiler, not Python types.
            if _is_jit(node) or name in UNANNOTATED:
                continue
            static = any(dotted(d) == "staticmethod" for d in node.decorator_list)
            arguments = [*node.args.posonlyargs, *node.args.args][int(is_method and not static) :]
            arguments += node.args.kwonlyargs
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            missing = [a.arg for a in arguments if a.annotation is None]
            missing += ["return"] if node.returns is None else []
            if missing:
                wrong.append(f"{module.at(node)}: {node.name}: {', '.join(missing)}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_unannotated_functions_is_short_and_true() -> None:
    found = {name for module in modules() for name, _, _ in functions(module)}
    assert found >= UNANNOTATED, "a function on the list is gone"
    marked = {
        f"{module.path.relative_to(ROOT)}:{number}"
        for module in modules()
        for number, line in enumerate(module.lines, 1)
        if "noqa" in line and "ANN" in line
    }
    assert len(marked) == len(UNANNOTATED), sorted(marked)


def test_kernels_have_no_float_atomics_and_no_autotune() -> None:
    wrong = [
        f"{module.at(node)}: {node.attr}"
        for module, node in nodes(ast.Attribute)
        if (node.attr.startswith("atomic_") and module.name not in FLOAT_ATOMICS)
        or (node.attr == "autotune" and dotted(node) == "triton.autotune")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_short_and_well_named() -> None:
    """_<op>_fwd_kernel, _<op>_bwd_<what>_kernel; a jit body has at most 80 lines."""
    wrong = []
    for module in modules():
        for _, node, _ in functions(module):
            if not _is_jit(node):
                continue
            body = node.end_lineno - node.body[0].lineno + 1
            if body > JIT_LIMIT_LINES:
                wrong.append(f"{module.at(node)}: {node.name} has {body} lines")
            if node.name.endswith("_kernel") and not KERNEL_NAME.fullmatch(node.name):
                wrong.append(f"{module.at(node)}: {node.name} is not _<op>_fwd.._kernel")
    assert not wrong, "\n".join(wrong)


def test_shipped_code_leaves_the_import_path_alone() -> None:
    wrong = [module.at(node) for module, node in nodes(ast.Attribute) if dotted(node) == "sys.path"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("import networkx\n", test_third_party_packages_stay_where_they_belong),
        ("from transformers import AutoModel\n", test_third_party_packages_stay_where_they_belong),
        ("def f():\n    import peft\n", test_third_party_packages_stay_where_they_belong),
        ("from dragkit.trainer import loop\n", test_imports_between_packages_follow_the_rules),
        ("from ..train import main\n", test_nobody_imports_a_program),
        ("from dragkit_kernels.orders import x\n", test_kernels_are_used_through_their_front),
        ("from dragkit_kernels import gumbel_topk\n", test_kernels_are_used_through_their_front),
        ("print('hello')\n", test_library_code_does_not_print),
        ("try:\n    pass\nexcept:\n    raise\n", test_no_error_is_swallowed),
        ("try:\n    pass\nexcept (OSError, Exception):\n    pass\n", test_no_error_is_swallowed),
        ("with contextlib.suppress(Exception):\n    pass\n", test_no_error_is_swallowed),
        ("assert True\n", test_checks_are_no_asserts),
        ("from pickle import loads\n", test_nothing_runs_code_from_data),
        ("torch.load(path, weights_only=True)\n", test_nothing_runs_code_from_data),
        ("from torch import load\n", test_nothing_runs_code_from_data),
        ("np.load(path, allow_pickle=flag)\n", test_nothing_runs_code_from_data),
        ("f(trust_remote_code=True)\n", test_nothing_runs_code_from_data),
        ("subprocess.run(c, shell=True)\n", test_nothing_runs_code_from_data),
        ("eval('1')\n", test_nothing_runs_code_from_data),
        ("yaml.load(text)\n", test_yaml_is_read_by_a_safe_loader),
        ("yaml.load(text, Loader=yaml.Loader)\n", test_yaml_is_read_by_a_safe_loader),
        ("def f(a) -> int: ...\n", test_every_function_is_annotated),
        ("def f(a: int): ...\n", test_every_function_is_annotated),
        ("def f(*a, **b) -> int: ...\n", test_every_function_is_annotated),
        ("tl.atomic_add(p, v)\n", test_kernels_have_no_float_atomics_and_no_autotune),
        ("f = triton.autotune(c)(f)\n", test_kernels_have_no_float_atomics_and_no_autotune),
        ("@triton.jit\ndef _x_kernel(): ...\n", test_kernels_are_short_and_well_named),
        ("@triton.jit\ndef f():\n" + "    a\n" * 81, test_kernels_are_short_and_well_named),
        ("import sys\nsys.path.insert(0, 'x')\n", test_shipped_code_leaves_the_import_path_alone),
        ("\n" * 401, test_modules_are_not_longer_than_the_hard_limit),
    ],
)  # fmt: skip
def test_the_rules_catch_what_they_are_for(
    source: str, test: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule sees a planted fault in a module of dragkit.data."""
    path = ROOTS["dragkit"] / "data" / "planted.py"
    tree = ast.parse(source, str(path))
    planted = Module("dragkit.data.planted", path, tree, source.splitlines())
    everything = (*modules(), planted)
    monkeypatch.setattr(sys.modules[__name__], "modules", lambda: everything)
    with pytest.raises(AssertionError, match="planted.py"):
        test()
