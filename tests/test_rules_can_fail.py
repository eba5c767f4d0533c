"""Every rule for the shipped code sees a fault that is planted for it."""

from __future__ import annotations

import ast

import pytest

from tests import source_tree
from tests import test_architecture as imports
from tests import test_code_rules as code
from tests.source_tree import ROOTS, Module, modules


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("import networkx\n", imports.test_third_party_packages_stay_where_they_belong),
        (
            "from transformers import AutoModel\n",
            imports.test_third_party_packages_stay_where_they_belong,
        ),
        ("def f():\n    import peft\n", imports.test_third_party_packages_stay_where_they_belong),
        (
            "from dragkit.trainer import loop\n",
            imports.test_imports_between_packages_follow_the_rules,
        ),
        ("from ..train import main\n", imports.test_nobody_imports_a_program),
        (
            "from dragkit_kernels.orders import x\n",
            imports.test_kernels_are_used_through_their_front,
        ),
        (
            "from dragkit_kernels import gumbel_topk\n",
            imports.test_kernels_are_used_through_their_front,
        ),
        ("print('hello')\n", code.test_library_code_does_not_print),
        ("try:\n    pass\nexcept:\n    raise\n", code.test_no_error_is_swallowed),
        (
            "try:\n    pass\nexcept (OSError, Exception):\n    pass\n",
            code.test_no_error_is_swallowed,
        ),
        ("with contextlib.suppress(Exception):\n    pass\n", code.test_no_error_is_swallowed),
        ("assert True\n", code.test_checks_are_no_asserts),
        ("from pickle import loads\n", code.test_nothing_runs_code_from_data),
        ("torch.load(path, weights_only=True)\n", code.test_nothing_runs_code_from_data),
        ("from torch import load\n", code.test_nothing_runs_code_from_data),
        ("np.load(path, allow_pickle=flag)\n", code.test_nothing_runs_code_from_data),
        ("f(trust_remote_code=True)\n", code.test_nothing_runs_code_from_data),
        ("subprocess.run(c, shell=True)\n", code.test_nothing_runs_code_from_data),
        ("eval('1')\n", code.test_nothing_runs_code_from_data),
        ("yaml.load(text)\n", code.test_yaml_is_read_by_a_safe_loader),
        ("yaml.load(text, Loader=yaml.Loader)\n", code.test_yaml_is_read_by_a_safe_loader),
        ("def f(a) -> int: ...\n", code.test_every_function_is_annotated),
        ("def f(a: int): ...\n", code.test_every_function_is_annotated),
        ("def f(*a, **b) -> int: ...\n", code.test_every_function_is_annotated),
        ("tl.atomic_add(p, v)\n", code.test_kernels_have_no_float_atomics_and_no_autotune),
        ("f = triton.autotune(c)(f)\n", code.test_kernels_have_no_float_atomics_and_no_autotune),
        ("@triton.jit\ndef _x_kernel(): ...\n", code.test_kernels_are_short_and_well_named),
        ("@triton.jit\ndef f():\n" + "    a\n" * 81, code.test_kernels_are_short_and_well_named),
        (
            "import sys\nsys.path.insert(0, 'x')\n",
            code.test_shipped_code_leaves_the_import_path_alone,
        ),
        ("\n" * 401, code.test_modules_are_not_longer_than_the_hard_limit),
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
    for reader in (source_tree, imports, code):
        monkeypatch.setattr(reader, "modules", lambda: everything)
    with pytest.raises(AssertionError, match="planted.py"):
        test()
