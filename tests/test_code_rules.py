"""What must not appear, read from the syntax trees of the shipped code."""

from __future__ import annotations

import ast
import re

from tests.source_tree import ROOT, dotted, functions, imports, is_jit, modules, nodes

HARD_LIMIT_LINES = 400
JIT_LIMIT_LINES = 80
KERNEL_NAME = re.compile(r"_[a-z_]+_(fwd|bwd)(_[a-z_]+)?_kernel")
# Functions without full annotations, each marked `noqa: ANN` where it stands: a method that
# replaces a library's and has to keep its signature.
# Float atomics make sums depend on the order of arrival; an entry needs a deterministic twin.
FLOAT_ATOMICS: set[str] = set()


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


def test_every_function_is_annotated() -> None:
    wrong = []
    for module in modules():
        for _, node, is_method in functions(module):
            # A kernel's arguments are pointers and numbers to the compiler, not Python types.
            if is_jit(node):
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


def test_no_annotation_is_waived() -> None:
    waived = [
        f"{module.path.relative_to(ROOT)}:{number}"
        for module in modules()
        for number, line in enumerate(module.lines, 1)
        if "noqa" in line and "ANN" in line
    ]
    assert not waived, waived


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
            if not is_jit(node):
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
