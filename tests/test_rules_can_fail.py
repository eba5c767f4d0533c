"""Every rule for the shipped code sees a fault that is planted for it."""

from __future__ import annotations

import ast

import pytest

from tests import source_tree
from tests import test_architecture as imports
from tests import test_code_rules as code
from tests.source_tree import ROOTS, Module, modules

FAULTS: dict[object, tuple[str, ...]] = {
    imports.test_third_party_packages_stay_where_they_belong: (
        "import networkx\n",
        "from transformers import AutoModel\n",
        "def f():\n    import peft\n",
    ),
    imports.test_imports_between_packages_follow_the_rules: ("from dragkit.trainer import loop\n",),
    imports.test_nobody_imports_a_program: ("from ..train import main\n",),
    imports.test_kernels_are_used_through_their_front: (
        "from dragkit_kernels.orders import x\n",
        "from dragkit_kernels import gumbel_topk\n",
    ),
    code.test_library_code_does_not_print: ("print('hello')\n",),
    code.test_no_error_is_swallowed: (
        "try:\n    pass\nexcept:\n    raise\n",
        "try:\n    pass\nexcept (OSError, Exception):\n    pass\n",
        "with contextlib.suppress(Exception):\n    pass\n",
    ),
    code.test_checks_are_no_asserts: ("assert True\n",),
    code.test_nothing_runs_code_from_data: (
        "from pickle import loads\n",
        "torch.load(path, weights_only=True)\n",
        "from torch import load\n",
        "np.load(path, allow_pickle=flag)\n",
        "f(trust_remote_code=True)\n",
        "subprocess.run(c, shell=True)\n",
        "eval('1')\n",
    ),
    code.test_yaml_is_read_by_a_safe_loader: (
        "yaml.load(text)\n",
        "yaml.load(text, Loader=yaml.Loader)\n",
    ),
    code.test_every_function_is_annotated: (
        "def f(a) -> int: ...\n",
        "def f(a: int): ...\n",
        "def f(*a, **b) -> int: ...\n",
    ),
    code.test_kernels_have_no_float_atomics_and_no_autotune: (
        "tl.atomic_add(p, v)\n",
        "f = triton.autotune(c)(f)\n",
    ),
    code.test_kernels_are_short_and_well_named: (
        "@triton.jit\ndef _x_kernel(): ...\n",
        "@triton.jit\ndef f():\n" + "    a\n" * 81,
    ),
    code.test_shipped_code_leaves_the_import_path_alone: ("import sys\nsys.path.insert(0, 'x')\n",),
    code.test_modules_are_not_longer_than_the_hard_limit: ("\n" * 401,),
}


@pytest.mark.parametrize(
    ("source", "test"), [(source, test) for test, found in FAULTS.items() for source in found]
)
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
