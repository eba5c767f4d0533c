"""The cases of tests/ops, for the files that are still in this folder."""

from tests.ops.cases import (  # noqa: F401
    FORWARD,
    GRADIENT,
    LAYER_NAMES,
    layer_inputs,
    random,
    to_device,
)
