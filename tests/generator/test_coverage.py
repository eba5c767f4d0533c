"""The coverage of a model's products by its adapters."""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronHForCausalLM

from dragkit.generator.lora.coverage import coverage, coverage_table
from tests.nemotron_cases import ALL_LINEAR, ROUTED_EXPERTS, adapted, config_30b, toy_model


def large_model() -> NemotronHForCausalLM:
    """The 30B on the meta device."""
    with torch.device("meta"):
        return NemotronHForCausalLM(config_30b()).requires_grad_(False)


def test_coverage_of_the_30b():
    model = adapted(rank=16, model=large_model())
    rows = {row.target: row for row in coverage(model)}
    assert rows["mixer.in_proj"][:3] == (("mixer.in_proj"), 23, 23)
    assert rows["mixer.out_proj"][1:4] == (23, 0, 0)
    assert rows["experts.up_proj"][1:4] == (23, 0, 0) and rows["mixer.q_proj"][1:3] == (6, 6)
    assert sum(row.trainable for row in rows.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert round(sum(row.trainable for row in rows.values()) / 1e6, 1) == 11.4
    active = 23 * (2688 * 10304 + 4096 * 2688) + 6 * 2688 * (2 * 4096 + 2 * 256)
    active += 23 * (2 * 2688 * 3712 + 6 * 2 * 2688 * 1856 + 128 * 2688)
    assert sum(row.flops for row in rows.values()) == pytest.approx(1)
    assert rows["mixer.in_proj"].flops == pytest.approx(23 * 2688 * 10304 / active)
    assert rows["experts.up_proj"].flops == pytest.approx(23 * 6 * 2688 * 1856 / active)
    assert rows["mixer.gate"].flops == pytest.approx(23 * 128 * 2688 / active)
    assert sum(row.covered for row in rows.values()) == pytest.approx(0.430, abs=5e-4)


def test_coverage_of_all_no_and_one_projection():
    everything = coverage(adapted((*ALL_LINEAR, *ROUTED_EXPERTS)))
    assert all(
        row.num_adapted == row.num_modules for row in everything if row.target != "mixer.gate"
    )
    assert all(row.covered == row.flops for row in everything if row.target != "mixer.gate")
    nothing = coverage(toy_model(std=0.2))
    for bare, full in zip(nothing, everything, strict=True):
        assert (bare.target, bare.num_modules, bare.flops) == (
            full.target,
            full.num_modules,
            full.flops,
        )
    assert not any(row.num_adapted or row.trainable or row.covered for row in nothing)
    (up,) = [row for row in coverage(adapted(("experts.up_proj",))) if row.num_adapted]
    assert up.target == "experts.up_proj" and up.trainable == 4 * (4 * 32 + 4 * 16)


def test_the_table_is_logged_when_adapters_are_added(caplog):
    with caplog.at_level("INFO"):
        model = adapted()
    table = coverage_table(coverage(model))
    assert table in caplog.text and "mixer.out_proj" in table
    *lines, total = table.splitlines()
    assert len({len(line) for line in lines}) == 1 and total.startswith("all")
