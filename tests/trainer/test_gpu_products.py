"""How matrix products round on a GPU, as the process's settings say, which need no GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from dragkit.config import resolve_config
from dragkit.trainer import build
from dragkit.trainer.build import setup_process


@pytest.mark.parametrize(
    ("settings", "allows_tf32"),
    [
        ({}, True),
        ({"run.precision": "bfloat16", "generator.dtype": "bfloat16"}, True),
        ({"run.precision": "float32"}, False),
        ({"generator.dtype": "float32"}, False),
    ],
)
def test_a_run_that_asks_for_float32_uses_no_tf32(
    settings: dict[str, str],
    allows_tf32: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build.Ranks, "bind_device", lambda ranks, device: device)
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = not allows_tf32
    config, _ = resolve_config("h200", None, {"run.device": "cuda", **settings})
    with caplog.at_level(logging.INFO, logger="dragkit"):
        assert setup_process(config).type == "cuda"
    assert matmul.allow_tf32 == allows_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
    (line,) = [x for x in caplog.messages if "matrix products" in x]
    assert ("TF32" in line) == allows_tf32


def test_a_cpu_run_changes_no_setting_of_a_gpu() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    setup_process(resolve_config("tiny", None, {"run.device": "cpu"})[0])
    assert before == (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction)
