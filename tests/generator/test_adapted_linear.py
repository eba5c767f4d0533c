"""Linear layers under LoRA that read the same rows, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from dragkit.generator.nemotron_h.lora import adapted_linear
from tests.nemotron_cases import relative_rms

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def side_by_side(dtype, *, adapters=F32, targets=("a", "b", "c"), alike=False, **settings):
    """Three frozen layers of input width 64, those of `targets` under LoRA.

    `alike` gives all of them a bias and the same rank.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    widths = {"a": 96, "b": 64, "c": 7}
    layers = {n: torch.nn.Linear(64, w, bias=alike or n != "b") for n, w in widths.items()}
    inner = torch.nn.ModuleDict(layers).to(dtype).requires_grad_(False)
    ranks = {"c": 3} if "c" in targets and not alike else {}
    # PEFT's default scale is 1, with which a scale that is left out would go unnoticed.
    lora = LoraConfig(
        r=8, lora_alpha=20, target_modules=list(targets), rank_pattern=ranks, **settings
    )
    model = get_peft_model(inner, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(adapters)
    return model, [model.base_model.model[n] for n in "abc"]


def definition(x, layers):
    """x W^T + b + s x A^T B^T of each layer in float64."""
    outputs = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        y = x @ base.weight.double().T
        y = y if base.bias is None else y + base.bias.double()
        if hasattr(layer, "lora_A"):
            lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            y = y + layer.scaling["default"] * (x @ lora_a.double().T @ lora_b.double().T)
        outputs.append(y)
    return outputs


def gradients(outputs, leaves):
    torch.manual_seed(6)
    loss = sum((y * torch.randn(y.shape, dtype=F64).to(y.dtype)).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("targets", [("a", "b", "c"), ("a", "c"), ("b",)])
@pytest.mark.parametrize(
    ("dtype", "adapters", "limits"),
    [
        (F64, F64, (1e-12, 1e-12)),
        (F32, F32, (2e-6, 1e-5)),
        (BF16, F32, (4e-3, 8e-3)),
        (BF16, BF16, (4e-3, 8e-3)),
        (torch.float16, F32, (1e-3, 2e-3)),
    ],
)
def test_values_and_gradients_in_all_dtypes(dtype, adapters, limits, targets):
    model, layers = side_by_side(dtype, adapters=adapters, targets=targets)
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    exact = x.detach().double().requires_grad_()
    wanted, got = definition(exact, layers), adapted_linear(x, layers)
    assert all(y.dtype == dtype for y in got)
    assert all(relative_rms(y, z) <= limits[0] for y, z in zip(got, wanted, strict=True))
    theirs = gradients(wanted, [exact, *leaves[1:]])
    for leaf, a, b in zip(leaves, gradients(got, leaves), theirs, strict=True):
        assert a.dtype == leaf.dtype and relative_rms(a, b) <= limits[1]
    parts = adapted_linear(x, layers, [100, 67])
    assert [y.shape for y in parts] == [(2, 40, 100), (2, 40, 67)]
    assert torch.equal(torch.cat(parts, -1), torch.cat(got, -1))


# 3 rows run as x W^T + s (x A^T) B^T, and 200 rows as x (W + s B A)^T.
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("sizes", [None, [96, 64, 7], [1, 166], [167]])
@pytest.mark.parametrize(
    "settings", [{}, {"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str
)
def test_layers_equal_those_of_peft(settings, sizes, rows):
    model, layers = side_by_side(F64, adapters=F64, alike=True, **settings)
    x = torch.randn(rows, 64, dtype=F64, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(7)
    parts = adapted_linear(x, layers, sizes)
    assert sizes is None or [part.shape[-1] for part in parts] == sizes
    torch.manual_seed(7)
    wanted = [torch.cat([layer(x) for layer in layers], dim=-1)]
    mixed = [torch.cat(parts, dim=-1)]
    torch.testing.assert_close(mixed, wanted)
    torch.testing.assert_close(gradients(mixed, leaves), gradients(wanted, leaves))
    with model.disable_adapter():
        bare = torch.cat(adapted_linear(x, layers), -1)
        assert torch.equal(bare, torch.cat([getattr(y, "base_layer", y)(x) for y in layers], -1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("adapters", [F32, BF16])
def test_half_precision_neither_merges_weights_nor_casts_rows(adapters, count, made):
    _, layers = side_by_side(BF16, adapters=adapters)
    x = torch.randn(300, 64, dtype=BF16, requires_grad=True)
    with made:
        sum(y.sum() for y in adapted_linear(x, layers[:count])).backward()
    assert ((300, 96), BF16) in made.tensors
    assert not any(shape in ((96, 64), (167, 64)) for shape, _ in made.tensors)
    assert not any(shape[:1] == (300,) and dtype == F32 for shape, dtype in made.tensors)
