"""Linear layers side by side under LoRA, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from dragkit.model.nemotron_h.lora import adapted_linear


def side_by_side(dtype, *, adapters=torch.float32, targets=("a", "b", "c"), rank=8):
    """Three frozen layers of width 64, those of `targets` under LoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    layers = {
        n: torch.nn.Linear(64, w, bias=n != "b") for n, w in zip("abc", (96, 64, 7), strict=True)
    }
    inner = torch.nn.ModuleDict(layers).to(dtype).requires_grad_(False)
    ranks = {"c": 3} if "c" in targets else {}
    lora = LoraConfig(r=rank, target_modules=list(targets), rank_pattern=ranks)
    model = get_peft_model(inner, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(adapters)
    return model, [model.base_model.model[n] for n in "abc"]


def definition(x, layers):
    """x W^T + b + s x A^T B^T of each layer in float64, from whatever its tensors hold."""
    outputs = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        y = x @ base.weight.double().T
        y = y if base.bias is None else y + base.bias.double()
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            y = y + layer.scaling["default"] * (x @ down.double().T @ up.double().T)
        outputs.append(y)
    return outputs


def rms_ratio(got, wanted):
    return float(
        (got.detach().double() - wanted.detach()).pow(2).mean().sqrt()
        / wanted.detach().pow(2).mean().sqrt()
    )


@pytest.mark.parametrize("targets", [("a", "b", "c"), ("a", "c"), ("b",)])
@pytest.mark.parametrize(
    ("dtype", "adapters", "limits"),
    [
        (torch.float32, torch.float32, (2e-6, 1e-5)),
        (torch.bfloat16, torch.float32, (4e-3, 8e-3)),
        (torch.bfloat16, torch.bfloat16, (4e-3, 8e-3)),
        (torch.float16, torch.float32, (1e-3, 2e-3)),
    ],
)
def test_layers_side_by_side_in_every_type_and_mixture(dtype, adapters, limits, targets):
    model, layers = side_by_side(dtype, adapters=adapters, targets=targets)
    x = torch.randn(2, 40, 64).to(dtype).requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    exact = x.detach().double().requires_grad_()
    wanted = definition(exact, layers)
    weight = [torch.randn_like(y) for y in wanted]
    got = adapted_linear(x, layers)
    assert all(y.dtype == dtype for y in got)
    assert all(rms_ratio(y, z) <= limits[0] for y, z in zip(got, wanted, strict=True))
    loss = sum((y * w.to(dtype)).sum() for y, w in zip(got, weight, strict=True))
    ours = torch.autograd.grad(loss, leaves)
    true = sum((y * w.to(dtype).double()).sum() for y, w in zip(wanted, weight, strict=True))
    theirs = torch.autograd.grad(true, [exact, *leaves[1:]])
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        assert a.dtype == leaf.dtype and rms_ratio(a, b.double()) <= limits[1]
    joined = adapted_linear(x, layers, [100, 67])
    assert [y.shape for y in joined] == [(2, 40, 100), (2, 40, 67)]
    assert torch.equal(torch.cat(joined, -1), torch.cat(got, -1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_half_precision_makes_no_adapted_weight_and_casts_no_rows(adapters, count, made):
    _, layers = side_by_side(torch.bfloat16, adapters=adapters)
    x = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    with made:
        sum(y.sum() for y in adapted_linear(x, layers[:count])).backward()
    assert ((300, 96), torch.bfloat16) in made.tensors
    assert not any(shape in ((96, 64), (167, 64)) for shape, _ in made.tensors)
    assert not any(shape[:1] == (300,) and kind == torch.float32 for shape, kind in made.tensors)
