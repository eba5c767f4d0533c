"""Routed experts under LoRA against PEFT's own forward, and against a loop over tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dragkit.model.nemotron_h.experts import install_grouped_experts

EXPERTS, WIDTH, INNER = 6, 32, 24
BOTH = ("up_proj", "down_proj")


def make(dtype=torch.float32, rank=4, names=BOTH, experts=EXPERTS, width=WIDTH, inner=INNER):
    """A library's expert stack under PEFT, frozen, with adapters at work: (model, wrapper)."""
    from peft import LoraConfig, get_peft_model
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern="E",
        hidden_size=width,
        n_routed_experts=experts,
        moe_intermediate_size=inner,
        experts_implementation="eager",
    )
    holder = nn.Module()
    holder.experts = NemotronHExperts(config)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.3)
    holder = holder.to(dtype).requires_grad_(False)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in names],
    )
    model = get_peft_model(holder, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    assert install_grouped_experts(model) == 1
    return model, model.base_model.model.experts


def inputs(tokens=23, copies=2, dtype=torch.float32, experts=EXPERTS, width=WIDTH, skip=()):
    """Rows, distinct experts of each row (never one of `skip`) and their weights."""
    torch.manual_seed(1)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    allowed = torch.tensor([e for e in range(experts) if e not in skip])
    index = torch.stack([allowed[torch.randperm(len(allowed))[:copies]] for _ in range(tokens)])
    kind = torch.promote_types(dtype, torch.float32)
    return x, index, torch.rand(tokens, copies, dtype=kind, requires_grad=True)


def definition(wrapper, x, index, weights):
    """Token by token, expert by expert, in float64."""
    chain, module = {}, wrapper
    while hasattr(module, "parameter_name"):
        chain[module.parameter_name] = module
        module = module.base_layer

    def project(row, name, expert):
        y = getattr(module, name)[expert].double() @ row
        if name not in chain:
            return y
        layer = chain[name]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        number, rank = layer.num_experts, layer.r["default"]
        a = down.double()[expert * rank : (expert + 1) * rank]
        b = up.double()[:, expert::number]
        return y + layer.scaling["default"] * (b @ (a @ row))

    rows = []
    for row, chosen, shares in zip(x.double(), index.tolist(), weights.double(), strict=True):
        total = torch.zeros_like(row)
        for expert, share in zip(chosen, shares, strict=True):
            inner = module.act_fn(project(row, "up_proj", expert))
            total = total + share * project(inner, "down_proj", expert)
        rows.append(total)
    return torch.stack(rows)


def value_and_gradients(forward, model, x, index, weights):
    leaves = [x, weights, *(p for p in model.parameters() if p.requires_grad)]
    y = forward(x, index, weights)
    torch.manual_seed(2)
    return y, torch.autograd.grad((y * torch.randn(y.shape).to(y.dtype)).sum(), leaves)


def rms_ratio(got, wanted):
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())


def worst_ratio(ours, theirs):
    return max(rms_ratio(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rank", [1, 3, 4, 16])
@pytest.mark.parametrize("names", [BOTH, ("up_proj",), ("down_proj",)])
def test_equals_pefts_materialised_weights(names, rank):
    model, wrapper = make(rank=rank, names=names)
    given = inputs()
    y, ours = value_and_gradients(wrapper, model, *given)
    z, theirs = value_and_gradients(
        lambda *args: type(wrapper).forward(wrapper, *args), model, *given
    )
    assert len(ours) == 2 + 2 * len(names)
    assert rms_ratio(y, z) <= 1e-5 and worst_ratio(ours, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("tokens", "copies", "skip"),
    [(23, 2, ()), (23, 6, ()), (1, 1, ()), (1, 3, ()), (9, 2, (0,)), (9, 2, (5,)), (9, 1, (1, 2))],
)
def test_float64_equals_the_loop(tokens, copies, skip):
    model, wrapper = make(torch.float64)
    given = inputs(tokens, copies, torch.float64, skip=skip)
    y, ours = value_and_gradients(wrapper, model, *given)
    z, theirs = value_and_gradients(lambda *a: definition(wrapper, *a), model, *given)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for expert in skip:
        assert not model.base_model.model.experts.lora_B["default"].weight.grad
        assert not ours[3][:, expert::EXPERTS].any(), "no token, no gradient"


@pytest.mark.parametrize(
    ("dtype", "adapters", "limits"),
    [
        (torch.float32, torch.float32, (1e-6, 5e-6)),
        (torch.bfloat16, torch.float32, (4e-3, 8e-3)),
        (torch.bfloat16, torch.bfloat16, (4e-3, 8e-3)),
        (torch.float16, torch.float32, (1e-3, 2e-3)),
    ],
)
@pytest.mark.parametrize("skip", [(), (0, 5)])
def test_every_type_against_the_loop(dtype, adapters, limits, skip):
    model, wrapper = make(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data / 2).to(adapters)
    given = inputs(dtype=dtype, skip=skip)
    y, ours = value_and_gradients(wrapper, model, *given)
    z, theirs = value_and_gradients(lambda *a: definition(wrapper, *a), model, *given)
    assert y.dtype == dtype and all(g.dtype == adapters for g in ours[2:])
    # The limits are those of one product; here two follow one another, with a square between them.
    # PEFT's own forward in bfloat16 comes to 7e-3.
    assert rms_ratio(y, z) <= 2.5 * limits[0]
    assert worst_ratio(ours, theirs) <= 2 * limits[1]


@pytest.mark.parametrize(("width", "inner"), [(7, 24), (32, 5), (1, 1)])
def test_widths_that_the_grouped_product_refuses(width, inner):
    model, wrapper = make(width=width, inner=inner, rank=2)
    given = inputs(width=width)
    y, ours = value_and_gradients(wrapper, model, *given)
    z, theirs = value_and_gradients(lambda *a: definition(wrapper, *a), model, *given)
    assert rms_ratio(y, z) <= 2e-6 and worst_ratio(ours, theirs) <= 1e-5


def test_without_the_grouped_product(monkeypatch):
    model, wrapper = make()
    given = inputs()
    y, ours = value_and_gradients(wrapper, model, *given)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    z, theirs = value_and_gradients(wrapper, model, *given)
    assert rms_ratio(y, z) <= 1e-6 and worst_ratio(ours, theirs) <= 1e-6


def test_the_grouped_product_is_what_runs(monkeypatch):
    model, wrapper = make(rank=3)
    calls = []
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or product(*a, **k)
    )
    value_and_gradients(wrapper, model, *inputs())
    assert len(calls) == 6


def test_no_tokens():
    _, wrapper = make()
    x, index, weights = inputs(1)
    y = wrapper(x[:0], index[:0], weights[:0])
    assert y.shape == (0, WIDTH) and y.dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_experts_is_made(dtype, made):
    """Twelve pairs among 64 experts: PEFT makes the stack, several times over."""
    model, wrapper = make(dtype, rank=8, experts=64, width=64, inner=96)
    stack = 64 * 64 * 96
    x, index, weights = inputs(6, 2, dtype, experts=64, width=64)
    with made:
        (wrapper(x, index, weights) ** 2).sum().backward()
    largest = max(torch.Size(shape).numel() for shape, _ in made.tensors)
    assert largest <= 64 * 8 * 96 < stack / 7
    base = wrapper.get_base_layer()
    assert base.up_proj.grad is None and base.down_proj.grad is None
    made.tensors.clear()
    with made:
        (type(wrapper).forward(wrapper, x, index, weights) ** 2).sum().backward()
    assert max(torch.Size(shape).numel() for shape, _ in made.tensors) == stack


def test_nothing_of_the_size_of_the_experts_is_kept():
    model, wrapper = make(rank=4, experts=64, width=64, inner=96)
    kept = []
    base = {p.data_ptr() for p in wrapper.get_base_layer().parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in base:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        wrapper(*inputs(6, 2, experts=64, width=64))
    assert 0 < max(kept) <= 64 * 4 * 96


def test_unwanted_gradients_and_gradients_without_strides():
    model, wrapper = make()
    x, index, weights = inputs()
    model.requires_grad_(False)
    wrapper(x, index, weights).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in model.parameters())
    model, wrapper = make()
    wrapper(x.detach(), index, weights.detach()).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_two_runs_are_equal_to_the_bit_and_rows_do_not_touch():
    model, wrapper = make()
    x, index, weights = inputs()
    y, first = value_and_gradients(wrapper, model, x, index, weights)
    z, second = value_and_gradients(wrapper, model, x, index, weights)
    assert torch.equal(y, z) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    spoiled = x.detach().clone()
    spoiled[4] = torch.nan
    w = wrapper(spoiled, index, weights)
    assert w[4].isnan().all() and not w[torch.arange(len(w)) != 4].isnan().any()
    strided = torch.stack([x.detach(), x.detach()], 2)[..., 0]
    assert torch.equal(wrapper(strided, index.mT.contiguous().mT, weights), y)


def test_what_is_not_plain_runs_as_peft_does(monkeypatch):
    model, wrapper = make()
    given = inputs()
    plain = wrapper(*given)

    def stock():
        return type(wrapper).forward(wrapper, *given)

    bare = wrapper.get_base_layer()(*given)
    with model.disable_adapter():
        assert torch.equal(wrapper(*given), bare)
    model.merge_adapter()
    assert torch.equal(wrapper(*given), stock())
    assert rms_ratio(wrapper(*given), plain) <= 1e-5
    model.unmerge_adapter()
    torch.testing.assert_close(wrapper(*given), plain, rtol=1e-4, atol=1e-4)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert rms_ratio(wrapper(*given), plain) <= 1e-5
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(parameter)
    assert torch.equal(wrapper(*given), stock()) and rms_ratio(wrapper(*given), plain) > 0.1


def test_a_trained_base_gets_its_gradient():
    model, wrapper = make()
    base = wrapper.get_base_layer()
    base.up_proj.requires_grad_()
    wrapper(*inputs()).sum().backward()
    assert base.up_proj.grad is not None and base.down_proj.grad is None


def test_a_copied_model_computes_with_its_own_adapters():
    model, wrapper = make()
    given = inputs()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not other.base_model.model.experts(*given).any()
    assert wrapper(*given).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_values_and_gradients_are_the_eager_ones(backend, dtype):
    """One graph in every type, in those too that the library's product refuses or cannot trace."""
    model, wrapper = make(dtype)
    given = inputs(dtype=dtype)
    y, ours = value_and_gradients(wrapper, model, *given)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: wrapper(*args), backend=backend, fullgraph=True)
    z, theirs = value_and_gradients(compiled, model, *given)
    assert torch.equal(y, z) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("ends", [(3, 3, 9), (0, 9, 9), (9, 9, 9), (2, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operator_of_a_trace(dtype, ends):
    x = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    stack = torch.randn(3, 12, 8, dtype=dtype, requires_grad=True)
    where = torch.tensor(ends, dtype=torch.int32)
    owner = torch.searchsorted(where, torch.arange(9), right=True)
    wanted = torch.einsum("si,soi->so", x, stack[owner])
    y = torch.ops.dragkit.grouped_product(x, stack, where)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), [x, stack])
    theirs = torch.autograd.grad((wanted * weight).sum(), [x, stack], retain_graph=True)
    torch.testing.assert_close(ours, theirs)
    # As an expanded gradient comes, and with the stack frozen.
    (alone,) = torch.autograd.grad(
        torch.ops.dragkit.grouped_product(x, stack.detach(), where).sum(), [x]
    )
    torch.testing.assert_close(alone, torch.autograd.grad(wanted.sum(), [x])[0])


def test_the_operator_is_registered_as_it_behaves():
    x, stack = torch.randn(9, 8, requires_grad=True), torch.randn(3, 12, 8, requires_grad=True)
    where = torch.tensor([2, 5, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dragkit.grouped_product, (x, stack, where))
    torch.library.opcheck(torch.ops.dragkit.grouped_product, (x, stack.mT.contiguous().mT, where))
    args = (torch.randn(9, 12), x.detach(), stack.detach(), where)
    torch.library.opcheck(torch.ops.dragkit.grouped_weight_gradient, args)
