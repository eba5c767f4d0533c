"""The own training forward of Nemotron-H against the library's, and its parts against definitions.

The library's model runs one question at a time on all tokens; the recurrence and the convolution
are written token by token in float64.
"""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.model.nemotron_h.attention import attention_at, causal_attention
from dragkit.model.nemotron_h.decoder import computes, hidden_at_rows
from dragkit.model.nemotron_h.lora import adapted_linear
from dragkit.model.nemotron_h.mixer import causal_conv
from dragkit.model.nemotron_h.norm import rms_norm
from dragkit.model.nemotron_h.scan import chunk_scan

WIDTH = 32


def make_model(pattern="ME*-M*-", dtype=torch.float64, rank=None, **settings):
    """Random weights; adapters with random B where a rank is given."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    }
    config = NemotronHConfig(hybrid_override_pattern=pattern, use_cache=False, **shape | settings)
    model = NemotronHForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def decoder_of(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def run_both(model, lengths, wanted):
    """(ours, library's): hidden states, gradients of embeddings and adapters, for random weights.

    `wanted` are places per question.
    """
    decoder = decoder_of(model)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    embeds = [torch.randn(n, WIDTH, generator=generator, dtype=dtype) for n in lengths]
    weight = [torch.randn(len(w), WIDTH, generator=generator, dtype=dtype) for w in wanted]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(leaves):
        found = {n: p.grad for n, p in trained.items()}
        model.zero_grad()
        return [leaf.grad for leaf in leaves], found

    leaves = [e.clone().requires_grad_() for e in embeds]
    padded = torch.nn.utils.rnn.pad_sequence(leaves, batch_first=True)
    row = torch.tensor([b for b, w in enumerate(wanted) for _ in w])
    place = torch.tensor([p for w in wanted for p in w])
    ours = hidden_at_rows(decoder, padded, row, place)
    (ours * torch.cat(weight)).sum().backward()
    our_gradients = gradients(leaves)

    leaves = [e.clone().requires_grad_() for e in embeds]
    theirs = []
    for leaf, places, w in zip(leaves, wanted, weight, strict=True):
        hidden = decoder(inputs_embeds=leaf[None], use_cache=False).last_hidden_state[0]
        theirs.append(hidden[places])
        (theirs[-1] * w).sum().backward()
    return (ours, *our_gradients), (torch.cat(theirs), *gradients(leaves))


def compare(ours, theirs, rtol=2e-5):
    """Relative to the largest entry of each tensor."""

    def close(a, b, what):
        assert (a is None) == (b is None), what
        if a is not None:
            assert (a - b).abs().max() <= rtol * b.abs().max() + 1e-7, what

    close(ours[0], theirs[0], "hidden states")
    for i, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        close(a, b, f"embeddings of question {i}")
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        close(gradient, theirs[2][name], name)


LENGTHS = (1, 31, 32, 33, 70, 2)
WANTED = ([0], [30, 5], [31], [0, 32], list(range(40, 70)), [1, 0])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("pattern", ["MM*-M*-", "ME*-M*", "*-M", "M", "*", "-"])
def test_states_and_gradients_equal_the_librarys_one_by_one(pattern, rank):
    model = make_model(pattern, torch.float32, rank)
    compare(*run_both(model, LENGTHS, WANTED))


@pytest.mark.parametrize(
    "settings",
    [
        {"n_groups": 1},
        {"n_groups": 4},
        {"conv_kernel": 2},
        {"conv_kernel": 6, "use_conv_bias": False},
        {"num_key_value_heads": 4, "use_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "head_dim": 20},
    ],
)
def test_shapes_of_the_configuration(settings):
    compare(*run_both(make_model("M*-M*", torch.float32, 3, **settings), LENGTHS, WANTED))


def test_one_question_and_rows_in_any_order():
    model = make_model(dtype=torch.float32)
    compare(*run_both(model, (45,), ([44, 3, 17, 3],)))
    decoder, embeds = decoder_of(model), torch.randn(3, 20, WIDTH)
    row, place = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([4, 19, 0, 7, 3])
    mixed = hidden_at_rows(decoder, embeds, row, place)
    for i, (b, p) in enumerate(zip(row.tolist(), place.tolist(), strict=True)):
        alone = hidden_at_rows(decoder, embeds[b : b + 1], torch.tensor([0]), place[i : i + 1])
        assert (mixed[i] - alone[0]).abs().max() < 1e-5, (b, p)


def test_what_is_computed_here():
    config = make_model("M").config
    assert computes(config)
    config.attention_dropout = 0.1
    assert not computes(config)
    assert not computes(object())


def test_a_question_without_rows_gets_no_gradient():
    embeds = torch.randn(2, 9, WIDTH, requires_grad=True)
    model = decoder_of(make_model(dtype=torch.float32))
    hidden_at_rows(model, embeds, torch.tensor([1]), torch.tensor([5])).sum().backward()
    assert not embeds.grad[0].any() and not embeds.grad[1, 6:].any() and embeds.grad[1, :6].any()


def test_frozen_weights_get_no_gradient_and_none_is_kept():
    model = make_model(dtype=torch.float32, rank=2)
    embeds = torch.randn(2, 9, WIDTH, requires_grad=True)
    hidden_at_rows(
        decoder_of(model), embeds, torch.tensor([0, 1]), torch.tensor([8, 8])
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 16, 25])
def test_scan_equals_the_recurrence(length, groups):
    torch.manual_seed(2)
    batch, heads, width, states = 2, 4, 3, 5
    x = torch.randn(batch, length, heads, width, dtype=torch.float64, requires_grad=True)
    dt = torch.rand(batch, length, heads, dtype=torch.float64) * 3
    dt.requires_grad_()
    rate = -torch.tensor([0.01, 0.5, 3.0, 200.0], dtype=torch.float64)
    rate.requires_grad_()
    into, out_of = (
        torch.randn(batch, length, groups, states, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    skip = torch.randn(heads, dtype=torch.float64, requires_grad=True)
    y = chunk_scan(x, dt, rate, into, out_of, skip, chunk=8)
    state, steps = torch.zeros(batch, heads, width, states, dtype=torch.float64), []
    for t in range(length):
        b, c = (m[:, t].repeat_interleave(heads // groups, 1) for m in (into, out_of))
        state = state * (rate * dt[:, t]).exp()[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        steps.append((state * c[:, :, None]).sum(-1) + skip[:, None] * x[:, t])
    wanted = torch.stack(steps, 1)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(wanted)
    leaves = (x, dt, rate, into, out_of, skip)
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_convolution(length, taps, trained):
    torch.manual_seed(3)
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, taps, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(3, dtype=torch.float64)
    y = causal_conv(x, weight, bias)
    for t in range(length):
        past = [x[:, t - k] * weight[:, taps - 1 - k] for k in range(taps) if t >= k]
        torch.testing.assert_close(y[:, t], sum(past) + bias)
    leaves = [x, weight] if trained else [x]
    assert torch.autograd.gradcheck(lambda *_: causal_conv(x, weight, bias), leaves)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_attention(length):
    torch.manual_seed(4)
    query = torch.randn(2, length, 4, 6, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, length, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    leaves = (query, key, value)
    by_head = [x.transpose(1, 2) for x in leaves]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *by_head, is_causal=True, enable_gqa=True, scale=0.3
    ).transpose(1, 2)
    y = causal_attention(*leaves, 0.3)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(wanted)
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    place = torch.randint(length, (5,))
    few = attention_at(query[1, place], key[1], value[1], place, 0.3)
    torch.testing.assert_close(few, wanted[1, place])


@pytest.mark.parametrize("groups", [1, 3])
def test_norm(groups):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64)
    parts = x.view(4, groups, -1)
    wanted = (parts / (parts.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()).reshape(4, 6) * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.1, groups), wanted)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 0.1, groups), (x,))


def adapted(dtype=torch.float64, **settings):
    """Three layers of width 5 with adapters, as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    names = ("a", "b", "c")
    layers = {n: torch.nn.Linear(5, w) for n, w in zip(names, (4, 7, 2), strict=True)}
    inner = torch.nn.ModuleDict(layers).requires_grad_(False)
    model = get_peft_model(inner, LoraConfig(r=2, target_modules=[*names], **settings)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model, [model.base_model.model[n] for n in names]


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_dora": True}])
@pytest.mark.parametrize("sizes", [None, [4, 7, 2], [1, 12], [13]])
def test_adapted_layers_side_by_side(settings, sizes):
    model, layers = adapted(**settings)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    parts = adapted_linear(x, layers, sizes)
    assert sizes is None or [part.shape[-1] for part in parts] == sizes
    y = torch.cat(parts, dim=-1)
    wanted = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(wanted)
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_whatever_is_not_plain_lora_computes_itself():
    model, layers = adapted(lora_dropout=0.5)
    x = torch.randn(40, 5, dtype=torch.float64)
    model.eval()
    torch.testing.assert_close(adapted_linear(x, layers[:1])[0], layers[0](x))
    model.train()
    torch.manual_seed(0)
    first = adapted_linear(x, layers[:1])[0]
    torch.manual_seed(0)
    assert torch.equal(first, layers[0](x)), "dropout has to be at work"
    with model.disable_adapter():
        bare = layers[0].base_layer(x)
        assert torch.equal(adapted_linear(x, layers[:1])[0], bare)
    plain = torch.nn.Linear(5, 3)
    assert torch.equal(adapted_linear(x.float(), [plain])[0], plain(x.float()))
