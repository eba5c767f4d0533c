"""Who may import whom, read from the syntax trees of the shipped code."""

from __future__ import annotations

import sys

from tests.source_tree import ROOTS, imports, is_within, modules, of_module

# Room -> what it may import of dragkit and the kernels, besides itself and `_LOWEST`; the longest
# matching name decides. An entry admits a module and everything below it. Imports for type checkers
# count: a type that two rooms need stands in the lower one.
_LOWEST = ("dragkit.errors", "dragkit.console", "dragkit.observe")
_MODELS = ("dragkit.retriever", "dragkit.generator", "dragkit.joint")
_BELOW_TRAINER = (
    *("dragkit.config", "dragkit.data", *_MODELS, "dragkit.memory_plan", "dragkit.checkpoint"),
    *("dragkit.distributed", "dragkit.eval", "dragkit_kernels"),
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # The package's front names what other rooms define, when it is asked for.
    "dragkit": ("dragkit.config", "dragkit.data", "dragkit.eval", "dragkit.trainer"),
    "dragkit.errors": (),
    "dragkit.console": (),
    "dragkit.observe": (),
    "dragkit.config": (),
    "dragkit.data": ("dragkit.config", "dragkit_kernels"),
    "dragkit.retriever": ("dragkit.config", "dragkit.data", "dragkit_kernels"),
    "dragkit.generator": (
        *("dragkit.config", "dragkit.data", "dragkit.retriever", "dragkit_kernels"),
    ),
    "dragkit.joint": (*_MODELS, "dragkit.config", "dragkit.data", "dragkit_kernels"),
    "dragkit.memory_plan": (
        *("dragkit.config", "dragkit.retriever", "dragkit.generator", "dragkit_kernels"),
    ),
    "dragkit.checkpoint": ("dragkit.config",),
    "dragkit.distributed": ("dragkit.config",),
    "dragkit.distributed.sharding": ("dragkit.config", "dragkit.generator"),
    "dragkit.eval": ("dragkit.data", "dragkit.distributed"),
    # The bundled demo is a data set of the trainer's.
    "dragkit.trainer": (*_BELOW_TRAINER, "dragkit.demo"),
    "dragkit.demo": ("dragkit.data",),
    # The names of the demo's entities only train the tokeniser.
    "dragkit.tiny": ("dragkit.data", "dragkit.demo", "dragkit.generator", "dragkit_kernels"),
    "dragkit.train": ("dragkit.config", "dragkit.distributed", "dragkit.trainer"),
    "dragkit.evaluate": ("dragkit.config", "dragkit.trainer"),
    "dragkit.plan": ("dragkit.config", "dragkit.memory_plan"),
    # It trains by the command line, in processes of their own, and reads what these wrote.
    "dragkit.experiment": ("dragkit.config", "dragkit.checkpoint"),
    # It plants faults under all of these, and trains by the command line in other processes.
    "dragkit.selftest": (
        *("dragkit.config", "dragkit.data", "dragkit.generator", "dragkit.checkpoint"),
    ),
    "dragkit.selftest.data_cases": (
        *("dragkit.selftest.outcome", "dragkit.selftest.toy", "dragkit.data", "dragkit.retriever"),
    ),
    "dragkit.selftest.metric_table": ("dragkit.selftest.outcome", "dragkit.eval"),
    # It compares numbers of training in its own process.
    "dragkit.selftest.numbers": (
        *("dragkit.selftest.outcome", "dragkit.selftest.toy", "dragkit.config", "dragkit.data"),
        *("dragkit.retriever", "dragkit.generator", "dragkit.trainer", "dragkit.eval"),
        "dragkit_kernels",
    ),
    "dragkit.selftest.ops": ("dragkit.selftest.outcome", "dragkit_kernels"),
    "dragkit_kernels": (),
}
# Imported inside functions only, so that the command lines answer before torch is loaded.
ONLY_LAZILY = {
    "dragkit.train": "dragkit.trainer",
    "dragkit.evaluate": "dragkit.trainer",
    "dragkit.plan": "dragkit.memory_plan",
    "dragkit.experiment.__main__": "dragkit.experiment.plan",
    "dragkit.selftest.__main__": "dragkit.selftest.checks",
    "dragkit.data.build.command": "dragkit.data.build.building",
    "dragkit.data.build.inspection": "dragkit.data.build.check",
}
_PROGRAMS = (
    *("train", "evaluate", "plan", "experiment.__main__", "selftest.__main__", "data.__main__"),
)
_LIGHT = (
    *("", ".errors", ".console", ".observe.gpu", ".config", *(f".{p}" for p in _PROGRAMS)),
    *(
        ".data.build.command",
        ".data.build.earlier",
        ".data.build.released",
        ".data.build.inspection",
        ".data.build.subcommand",
    ),
)
# What the tests of the ops use, for the self-test alone.
KERNEL_TESTING = {"dragkit_kernels.testing", "dragkit_kernels.op_cases"}
# Graphs in, sorted graphs out: data takes no op.
DATA_TAKES = {"FactGroups", "FactIndex", "build_fact_index", "concat_fact_indexes"}
COMMON = {"torch", "numpy", "scipy", "safetensors", "tqdm", "msgspec", "yaml", "pydantic"}
CONFINED: dict[str, tuple[str, ...]] = {
    "torch_geometric": ("dragkit.data.subgraph",),
    "sentence_transformers": ("dragkit.retriever.text_encoder",),
    "transformers": (
        *("dragkit.generator", "dragkit.memory_plan.dims", "dragkit.tiny"),
        "dragkit.selftest.numbers.small_joint",
    ),
    "tokenizers": ("dragkit.tiny",),
    "peft": ("dragkit.generator", "dragkit.tiny"),
    "huggingface_hub": (
        *("dragkit.retriever.text_encoder", "dragkit.generator.load"),
        "dragkit.data.build.released",
    ),
    "duckdb": ("dragkit.data.build",),
    "pyarrow": ("dragkit.data.build.records",),
    "datasets": ("dragkit.data.build.records",),
    "ahocorasick_rs": ("dragkit.data.build.linking",),
    "filelock": ("dragkit.checkpoint.lock", "dragkit.data.cache"),
    "pynvml": ("dragkit.observe.gpu",),
    "triton": ("dragkit_kernels",),
    "pydantic": ("dragkit.config", "dragkit.experiment"),
    "matplotlib": ("dragkit.experiment.plot", "dragkit.data.build.stats"),
    "yaml": ("dragkit.config", "dragkit.demo"),
}
NARROW: dict[str, set[str]] = {
    "dragkit_kernels": {"torch", "triton"},
    "dragkit.retriever.losses": {"torch"},
    "dragkit.eval.metrics": {"torch"},
    "dragkit.observe": {"torch", "pynvml"},
    "dragkit.config": {"pydantic", "yaml"},
    "dragkit.errors": set(),
    "dragkit.console": set(),
}


def test_the_packages_are_found() -> None:
    names = {module.name for module in modules()}
    assert {"dragkit.train", "dragkit.trainer.loop", "dragkit_kernels.orders"} <= names


def test_imports_between_packages_follow_the_rules() -> None:
    wrong = []
    for module in modules():
        own = max((key for key in MAY_IMPORT if is_within(module.name, key)), key=len)
        allowed = (*MAY_IMPORT[own], *_LOWEST)
        if own != "dragkit":
            allowed = (*allowed, own)
        for item in imports(module):
            if item.target.split(".")[0] not in ROOTS or item.target == "dragkit":
                continue
            if not any(is_within(item.target, name) for name in allowed):
                wrong.append(f"{module.at(item.node)}: {module.name} imports {item.target}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle() -> None:
    names = {module.name for module in modules()}
    edges = {
        m.name: {i.target for i in imports(m) if i.target in names - {m.name}}
        for m in modules()
        # A package's front takes from its modules what these may take from it: nothing below.
        if m.path.name != "__init__.py"
    }
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"in a circle, or behind one: {', '.join(sorted(edges))}"


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
            if item.target in KERNEL_TESTING and module.name == "dragkit.selftest.ops":
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
    light = {f"dragkit{suffix}" for suffix in _LIGHT}
    light |= {m.name for m in modules() if is_within(m.name, "dragkit.config")}
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
