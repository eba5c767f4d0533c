"""What is installed, under which names, with which requirements; and the folder called kernels."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dragkit

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"dragkit": ROOT / "dragkit", "dragkit_kernels": ROOT / "kernels" / "dragkit_kernels"}
COMPILED = {"mamba_ssm", "causal_conv1d", "torch_scatter"}
# Imported only where a setting asks for it.
OPTIONAL = {"mamba_ssm", "causal_conv1d", "matplotlib"}
MAX_WEIGHTS_BYTES = 2_000_000


def folders() -> Iterator[tuple[Path, list[str]]]:
    """Every folder of the repository with its files, without environments and outputs."""
    for name, inner, files in os.walk(ROOT):
        inner[:] = [
            item
            for item in inner
            if not item.startswith(".")
            and item not in {"__pycache__", "dist", "runs"}
            and (item != "build" or (Path(name) / item / "__init__.py").is_file())
            and not item.endswith(".egg-info")
            and not (Path(name) / item / "pyvenv.cfg").exists()
        ]
        yield Path(name), files


def python_files() -> list[Path]:
    """Every Python file of the repository."""
    return [folder / name for folder, files in folders() for name in files if name.endswith(".py")]


@pytest.fixture(scope="module")
def arguments() -> dict:
    """What setup.py hands to setuptools."""
    caught: dict = {}
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: caught.update(given))
        os.chdir(ROOT)
        try:
            runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
        finally:
            os.chdir(before)
    return caught


@pytest.fixture(scope="module")
def shipped(arguments: dict) -> tuple[set[Path], set[Path]]:
    """Modules and data files that setuptools itself would install."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        command = setuptools.Distribution(arguments | {"script_name": "setup.py"}).get_command_obj(
            "build_py"
        )
        command.ensure_finalized()
        modules = {Path(row[2]).resolve() for row in command.find_all_modules()}
        data = {
            (Path(source) / name).resolve()
            for _, source, _, names in command.data_files
            for name in names
        }
    finally:
        os.chdir(before)
    return modules, data


def run_python(*words: str, cwd: Path, path: str | None) -> subprocess.CompletedProcess:
    """A fresh interpreter with nothing but `path` as its PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_folder_called_kernels_is_a_package() -> None:
    """Hugging Face's package of that name is looked for by import name first."""
    named = [(folder, files) for folder, files in folders() if folder.name == "kernels"]
    assert ROOT / "kernels" in [folder for folder, _ in named]
    assert [folder for folder, files in named if "__init__.py" in files] == []


def imported(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Top-level package, place, and whether inside a function, of every import of a file."""
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while todo:
        node, inside = todo.pop()
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        for name in names:
            yield str(name).split(".")[0], f"{path.relative_to(ROOT)}:{node.lineno}", inside
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo.extend((child, inside) for child in ast.iter_child_nodes(node))


def test_nobody_imports_kernels_nor_at_module_level_what_needs_a_compiler() -> None:
    found = [item for path in python_files() for item in imported(path)]
    assert [where for top, where, _ in found if top == "kernels"] == []
    assert [where for top, where, inside in found if top in COMPILED and not inside] == []


def test_transformers_sees_no_kernels_package_from_the_repository(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "spec = u.find_spec('kernels')\n"
        "print(is_kernels_available(), spec is not None and spec.origin is not None)"
    )
    elsewhere = run_python("-c", code, cwd=tmp_path, path=None)
    here = run_python("-c", code, cwd=ROOT, path=f"kernels{os.pathsep}.")
    assert (elsewhere.returncode, here.returncode) == (0, 0), elsewhere.stderr + here.stderr
    # A regular package exists for both or for neither; ours is only a namespace candidate.
    assert here.stdout.splitlines()[-1] == elsewhere.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "module",
    [f"dragkit.{name}" for name in ("train", "evaluate", "config", "experiment", "selftest")],
)
def test_programs_run_from_any_folder(module: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    shown = run_python("-m", module, "--help", cwd=tmp_path, path=path)
    assert shown.returncode == 0, shown.stderr
    assert f"python -m {module}" in shown.stdout
    assert shown.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_version_is_the_packages_own(arguments: dict) -> None:
    assert arguments["version"] == dragkit.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", dragkit.__version__)
    assert arguments["name"] == "dragkit"


def test_every_module_is_installed(shipped: tuple[set[Path], set[Path]]) -> None:
    """A folder without __init__.py would be left out in silence."""
    present = {file.resolve() for folder in SOURCES.values() for file in folder.rglob("*.py")}
    assert sorted(present - shipped[0]) == []


def test_only_the_two_packages_are_installed(arguments: dict) -> None:
    assert {name.split(".")[0] for name in arguments["packages"]} == set(SOURCES)
    assert arguments["package_dir"] == {"dragkit_kernels": "kernels/dragkit_kernels"}


def test_every_data_file_is_installed(shipped: tuple[set[Path], set[Path]]) -> None:
    present = {
        file.resolve()
        for source in SOURCES.values()
        for file in source.rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc"} and not file.name.startswith(".")
    }
    assert sorted(present - shipped[1]) == []
    names = {str(file.relative_to(ROOT)) for file in shipped[1]}
    assert {"dragkit/py.typed", "kernels/dragkit_kernels/py.typed"} <= names
    presets = {name for name in names if name.startswith("dragkit/config/presets/")}
    expected = {
        f"dragkit/config/presets/{p}.yaml" for p in ("tiny", "webqsp", "cwq", "h200", "b200")
    }
    assert presets == expected
    assert any(name.startswith("dragkit/demo/tables/") for name in names)


def test_the_bundled_model_is_small_and_holds_no_code(shipped: tuple[set[Path], set[Path]]) -> None:
    folder = SOURCES["dragkit"] / "tiny" / "model"
    files = [file for file in shipped[1] if file.is_relative_to(folder.resolve())]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights, f"{folder} holds no safetensors file"
    assert sum(file.stat().st_size for file in weights) <= MAX_WEIGHTS_BYTES
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja"}
    assert {"config.json", "tokenizer.json"} <= {file.name for file in files}


def test_the_build_goes_through_a_backend_and_metadata_is_in_setup_py() -> None:
    """Without a build-system table an older pip installs without package_dir."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (backend,) = (Requirement(text) for text in settings["build-system"]["requires"])
    assert backend.name == "setuptools"
    assert backend.specifier.contains("77") and not backend.specifier.contains("76.1")
    assert settings["build-system"]["build-backend"] == "setuptools.build_meta"
    assert "project" not in settings
    assert settings["tool"]["pytest"]["ini_options"]["pythonpath"] == [".", "kernels"]


def test_what_needs_a_compiler_is_an_extra(arguments: dict) -> None:
    extras = arguments["extras_require"]
    assert {"demo", "bench", "dev", "scatter", "mamba"} <= set(extras)

    def names(requirements: list[str]) -> set[str]:
        return {Requirement(text).name.replace("-", "_") for text in requirements}

    assert names(extras["mamba"]) == {"mamba_ssm", "causal_conv1d"}
    assert names(extras["scatter"]) == {"torch_scatter"}
    assert not names([*arguments["install_requires"], *extras["dev"], *extras["demo"]]) & COMPILED


def test_what_is_imported_is_required(arguments: dict) -> None:
    """Every third-party import of the packages comes with the installation."""
    homes = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py"}
    homes |= dict.fromkeys(("tokenizers", "huggingface_hub"), "transformers")
    required = {canonicalize_name(Requirement(t).name) for t in arguments["install_requires"]}
    own = set(SOURCES) | set(sys.stdlib_module_names) | OPTIONAL
    missing = [
        f"{where}: {top}"
        for source in SOURCES.values()
        for path in source.rglob("*.py")
        for top, where, _ in imported(path)
        if top not in own and canonicalize_name(homes.get(top, top)) not in required
    ]
    assert missing == []


def test_constraints_pin_everything_that_is_installed_for_development(arguments: dict) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in (line.split("#")[0].strip() for line in lines) if line]
    pins = {}
    for row in rows:
        pin = Requirement(row)
        (only,) = pin.specifier
        assert only.operator == "==", row
        name = canonicalize_name(pin.name)
        assert name not in pins, f"{name} is pinned twice"
        pins[name] = only.version
    wanted = [Requirement(t) for t in arguments["install_requires"]]
    wanted += [Requirement(t) for t in arguments["extras_require"]["dev"]]
    problems = []
    for requirement in wanted:
        version = pins.get(canonicalize_name(requirement.name))
        if version is None:
            problems.append(f"{requirement.name} is not pinned")
        elif not requirement.specifier.contains(version):
            problems.append(f"{requirement} does not admit the pin {version}")
    assert problems == []


def test_requirements_keep_the_floors_that_the_layout_needs(arguments: dict) -> None:
    floors = {Requirement(t).name: Requirement(t).specifier for t in arguments["install_requires"]}
    # Before 5.10 transformers fails on a folder called kernels on the path.
    assert not floors["transformers"].contains("5.9.1") and floors["transformers"].contains(
        "5.17.0"
    )
    assert floors["torch"].contains("2.11.0") and floors["numpy"].contains("2.5.0")
    assert floors["triton"].contains("3.6.0")
    assert arguments["python_requires"] == ">=3.11"


def test_the_license_is_apache_2(arguments: dict) -> None:
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert arguments["license"] == "Apache-2.0"


def test_the_working_copy_is_what_is_tested() -> None:
    """An installed older copy in front of it would test the wrong code."""
    for name, folder in SOURCES.items():
        assert Path(importlib.util.find_spec(name).origin).parent == folder
