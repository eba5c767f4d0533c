"""Who may import whom, read from the syntax trees of the shipped code."""

from __future__ import annotations

import sys

from tests.source_tree import ROOTS, imports, is_within, modules, of_module

# Package or module -> what of dragkit it may import besides itself and dragkit.errors; the longest
# matching name decides. An entry admits a module and everything below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "dragkit": (),
    "dragkit.config.schema": (),
    "dragkit.config": ("dragkit.config.schema", "dragkit.cli"),
    "dragkit.config.flags": ("dragkit.config", "dragkit.observe.gpu", "dragkit.config.schema"),
    "dragkit.cli": ("dragkit.config", "dragkit.config.flags"),
    "dragkit.console": (),
    "dragkit.train": ("dragkit.cli", "dragkit.console", "dragkit.trainer"),
    "dragkit.evaluate": ("dragkit.cli", "dragkit.console", "dragkit.trainer"),
    "dragkit.plan": ("dragkit.cli", "dragkit.config", "dragkit.console", "dragkit.model"),
    "dragkit.retriever.losses": ("dragkit_kernels",),
    "dragkit.observe": (),
    "dragkit.data": ("dragkit.config", "dragkit_kernels"),
    "dragkit.model": (
        "dragkit.config",
        "dragkit.data.arrays",
        "dragkit.data.cache",
        "dragkit.data.packed",
        "dragkit.data.tokens",
        "dragkit.observe",
        "dragkit_kernels",
    ),
    # Only to find the bundled weights, when they are asked for.
    "dragkit.generator.load": (
        "dragkit.config",
        "dragkit.data.packed",
        "dragkit.model",
        "dragkit.tiny",
    ),
    "dragkit.eval": ("dragkit.data.packed",),
    "dragkit.eval.published_metrics": (),
    "dragkit.eval.metrics": ("dragkit.data.tokens", "dragkit.eval.published_metrics"),
    "dragkit.eval.report": ("dragkit.data.tokens", "dragkit.eval.metrics"),
    # The names of the demo's entities only train the tokeniser.
    "dragkit.tiny": (
        "dragkit.data.relations",
        "dragkit.demo",
        "dragkit.generator.nemotron_h",
        "dragkit.generator.prompt",
        "dragkit_kernels",
    ),
    "dragkit.demo": ("dragkit.data.cache",),
    "dragkit.trainer": (
        "dragkit.cli",
        "dragkit.config",
        "dragkit.data",
        "dragkit.demo",
        "dragkit.eval",
        "dragkit.retriever.losses",
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
LIGHT = ("", ".observe.gpu", *(f".{name}" for name in _LIGHT_MODULES))
# Graphs in, sorted graphs out: data takes no op.
DATA_TAKES = {"FactGroups", "FactOrders", "build_fact_orders", "concat_fact_orders"}
COMMON = {"torch", "numpy", "scipy", "safetensors", "tqdm", "msgspec", "yaml", "pydantic"}
CONFINED: dict[str, tuple[str, ...]] = {
    "torch_geometric": ("dragkit.data.subgraph",),
    "sentence_transformers": ("dragkit.retriever.text_encoder",),
    "transformers": ("dragkit.generator.load", "dragkit.generator.random_weights", "dragkit.tiny"),
    "tokenizers": ("dragkit.tiny",),
    "peft": ("dragkit.generator.lora.adapters", "dragkit.generator.generator", "dragkit.tiny"),
    "huggingface_hub": ("dragkit.retriever.text_encoder", "dragkit.generator.load"),
    "pynvml": ("dragkit.observe.gpu",),
    "triton": ("dragkit_kernels",),
    "pydantic": ("dragkit.config.schema", "dragkit.config"),
    "yaml": ("dragkit.config", "dragkit.demo"),
    "filelock": ("dragkit.checkpoint.lock",),
}
NARROW: dict[str, set[str]] = {
    "dragkit_kernels": {"torch", "triton"},
    "dragkit.retriever.losses": {"torch"},
    "dragkit.eval.metrics": {"torch"},
    "dragkit.observe": {"torch", "pynvml"},
    "dragkit.config.schema": {"pydantic"},
    "dragkit.config": {"pydantic", "yaml"},
    "dragkit.errors": set(),
    "dragkit.config.flags": set(),
    "dragkit.cli": set(),
}


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
