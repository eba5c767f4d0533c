"""Our forward of Nemotron-H over packs against that of transformers, which runs one sequence."""

from __future__ import annotations

import pytest
import torch

from dragkit.generator.nemotron_h import (
    decode_step,
    hidden_at_rows,
    is_supported,
    make_pack,
    mamba_ops,
    pad_to_multiple,
    prefill,
)
from dragkit.generator.nemotron_h.attention import attention_at, packed_attention
from tests.nemotron_cases import (
    ALL_LINEAR,
    PATTERN_30B,
    ROUTED_EXPERTS,
    adapted,
    decoder_of,
    toy_model,
)

WIDTH = 32
OPS = mamba_ops("dragkit")


def make_model(
    pattern="ME*-M*-",
    dtype=torch.float32,
    rank=None,
    targets=(*ALL_LINEAR, *ROUTED_EXPERTS),
    **settings,
):
    """Random weights, and adapters with B != 0 where a rank is given."""
    model = toy_model(pattern, dtype, **settings)
    return model if rank is None else adapted(targets, rank, model, 0.3, lora_alpha=4)


def pack_of(lengths):
    return make_pack(torch.tensor(lengths), sum(lengths), max(lengths) + 3)


def run_both(model, lengths, wanted):
    """(ours, those of transformers): hidden states, gradients of embeddings and of adapters.

    The loss is a random weighted sum of the states at `wanted`, positions per sequence.
    """
    decoder = decoder_of(model)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    embeds = [torch.randn(n, WIDTH, generator=generator, dtype=dtype) for n in lengths]
    weight = [torch.randn(len(w), WIDTH, generator=generator, dtype=dtype) for w in wanted]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(leaves):
        adapters = {n: p.grad for n, p in trained.items()}
        model.zero_grad()
        return [leaf.grad for leaf in leaves], adapters

    leaves = [e.clone().requires_grad_() for e in embeds]
    pack = pack_of(lengths)
    rows = torch.cat([torch.tensor(w) + int(pack.ptr[b]) for b, w in enumerate(wanted)])
    ours = hidden_at_rows(decoder, torch.cat(leaves), pack, rows, OPS)
    (ours * torch.cat(weight)).sum().backward()
    our_gradients = gradients(leaves)

    leaves = [e.clone().requires_grad_() for e in embeds]
    theirs = []
    for leaf, positions, w in zip(leaves, wanted, weight, strict=True):
        hidden = decoder(inputs_embeds=leaf[None], use_cache=False).last_hidden_state[0]
        theirs.append(hidden[positions])
        (theirs[-1] * w).sum().backward()
    return (ours, *our_gradients), (torch.cat(theirs), *gradients(leaves))


def close(a, b, what, rtol):
    """Compares relatively to the largest entry."""
    assert (a is None) == (b is None), what
    if a is not None:
        assert (a - b).abs().max() <= rtol * b.abs().max() + 1e-7, what


def compare(ours, theirs, rtol=2e-5):
    close(ours[0], theirs[0], "hidden states", rtol)
    for i, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        close(a, b, f"embeddings of sequence {i}", rtol)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        close(gradient, theirs[2][name], name, rtol)


LENGTHS = (1, 31, 32, 33, 70, 2)
WANTED = ([0], [30, 5], [31], [0, 32], list(range(40, 70)), [1, 0])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("pattern", ["MM*-M*-", "ME*-M*", "*-M", "M", "*", "-", PATTERN_30B])
def test_states_and_gradients_equal_those_of_transformers(pattern, rank):
    model = make_model(pattern, rank=rank)
    compare(*run_both(model, LENGTHS, WANTED))


SHARED = ("in_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("M*-M*", {"n_groups": 1}),
        ("M*-M*", {"n_groups": 4}),
        ("M*-M*", {"conv_kernel": 2}),
        ("M*-M*", {"conv_kernel": 6, "use_conv_bias": False}),
        ("M*-M*", {"num_key_value_heads": 4, "use_bias": True, "mlp_bias": True}),
        ("M*-M*", {"num_key_value_heads": 1, "head_dim": 20}),
        ("EM*E", {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "num_experts_per_tok": 4}),
        ("EM*E", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
        ("EM*E", {"mlp_bias": True, "moe_latent_size": 16}),
        ("EM*E", {"n_routed_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 5}),
    ],
    ids=str,
)
def test_settings_of_the_configuration(pattern, settings, dtype):
    """As by default, shared experts have adapters and routed ones do not."""
    targets = SHARED if "E" in pattern else ALL_LINEAR
    settings = settings | {"experts_implementation": "eager"}
    model = make_model(pattern, dtype, 3, targets, **settings)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.3)
    compare(*run_both(model, LENGTHS, WANTED), rtol=2e-5 if dtype == torch.float32 else 1e-6)


def test_shared_experts_save_nothing_in_float32(made):
    """PEFT's forward would save inputs that it casts to the dtype of its adapters."""
    model = make_model("EM", torch.bfloat16, 2, SHARED[1:])
    embeds = torch.randn(70, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with made:
        hidden_at_rows(decoder_of(model), embeds, pack_of((70,)), torch.tensor([69]), OPS)
    assert ((70, 24), torch.bfloat16) in made.tensors
    assert ((70, 24), torch.float32) not in made.tensors


def test_one_sequence_and_rows_in_any_order():
    model = make_model()
    compare(*run_both(model, (45,), ([44, 3, 17, 3],)))
    decoder, embeds, pack = decoder_of(model), torch.randn(60, WIDTH), pack_of((20, 9, 31))
    rows = torch.tensor([33, 19, 20, 0, 59, 59])
    mixed = hidden_at_rows(decoder, embeds, pack, rows, OPS)
    for i, row in enumerate(rows.tolist()):
        start = max(p for p in (0, 20, 29) if p <= row)
        alone = embeds[start : row + 1]
        single = pack_of((len(alone),))
        last = hidden_at_rows(decoder, alone, single, torch.tensor([len(alone) - 1]), OPS)
        assert (mixed[i] - last[0]).abs().max() < 1e-5, row


def test_every_sequence_of_a_pack_runs_as_if_alone():
    """Neighbours, their order and padding change nothing in the 30B's 52 blocks at toy widths."""
    model = make_model(PATTERN_30B, rank=2)
    decoder = decoder_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 16, 1, 33, 17, 2)
    embeds = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    weight = [torch.randn(n, WIDTH, generator=generator) for n in lengths]

    def run(chosen, multiple=1):
        leaves = [embeds[i].clone().requires_grad_() for i in chosen]
        sizes = [lengths[i] for i in chosen]
        buffer, pack = pad_to_multiple(torch.cat(leaves), pack_of(sizes), multiple)
        rows = torch.arange(sum(sizes))
        hidden = hidden_at_rows(decoder, buffer, pack, rows, OPS)
        loss = (hidden * torch.cat([weight[i] for i in chosen])).sum()
        gradients = torch.autograd.grad(loss, [*leaves, *trained])
        sequences = zip(hidden.split(sizes), gradients, strict=False)
        return dict(zip(chosen, sequences, strict=True)), gradients[len(chosen) :]

    alone = {i: run([i]) for i in range(len(lengths))}
    for chosen, multiple in ((range(6), 1), ((3, 2, 0), 1), ((5, 4, 3, 2, 1, 0), 64)):
        sequences, adapters = run(list(chosen), multiple)
        for i, (hidden, gradient) in sequences.items():
            wanted, wanted_gradient = alone[i][0][i]
            close(hidden, wanted, f"hidden states of {i} in {list(chosen)}", 1e-5)
            close(gradient, wanted_gradient, f"embeddings of {i} in {list(chosen)}", 1e-5)
        for k, gradient in enumerate(adapters):
            close(gradient, sum(alone[i][1][k] for i in chosen), f"adapter {k}", 1e-5)


@pytest.mark.parametrize("pattern", [PATTERN_30B, "ME*-M*", "*", "M", "-"])
def test_cached_decoding_equals_a_forward_over_all_tokens(pattern):
    model = make_model(pattern, rank=2)
    decoder = decoder_of(model)
    lengths, num_new = (1, 17, 3, 40), 5
    new = torch.randn(len(lengths), num_new, WIDTH)
    embeds = [torch.randn(n, WIDTH) for n in lengths]
    with torch.no_grad():
        hidden, states = prefill(decoder, torch.cat(embeds), pack_of(lengths), OPS, num_new)
        for t in range(num_new + 1):
            whole = [torch.cat([e, n[:t]]) for e, n in zip(embeds, new, strict=True)]
            pack = pack_of([len(w) for w in whole])
            rows = pack.ptr[1:].long() - 1
            wanted = hidden_at_rows(decoder, torch.cat(whole), pack, rows, OPS)
            close(hidden, wanted, f"after {t} tokens", 2e-5)
            if t < num_new:
                hidden = decode_step(decoder, new[:, t], states)


def test_every_block_is_called_as_a_module():
    model, called = decoder_of(make_model("ME*-*", rank=2)), []
    for index, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda *_, index=index: called.append(index))
    embeds, pack, rows = torch.randn(9, WIDTH, requires_grad=True), pack_of((9,)), torch.tensor([8])
    hidden = hidden_at_rows(model, embeds, pack, rows, OPS)
    assert called == [0, 1, 2, 3, 4]
    with torch.no_grad():
        wanted = model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, 8]
        close(hidden[0].detach(), wanted, "forward of transformers", 2e-5)
        called.clear()
        _, states = prefill(model, embeds, pack, OPS, 1)
        decode_step(model, embeds[:1], states)
    assert called == [0, 1, 2, 3, 4] * 2


def test_padding_of_a_pack():
    embeds, pack = torch.ones(7, WIDTH), pack_of((3, 4))
    same, untouched = pad_to_multiple(embeds, pack, 7)
    assert same is embeds and untouched is pack
    padded, longer = pad_to_multiple(embeds, pack, 16)
    assert padded.shape == (16, WIDTH) and not padded[7:].any()
    assert longer.position.tolist() == [0, 1, 2, 0, 1, 2, 3, *range(9)]
    assert longer.sequence.tolist() == [0] * 3 + [1] * 4 + [2] * 9
    assert longer.ptr.tolist() == [0, 3, 7, 16] and longer.longest == 9


def test_which_configurations_are_supported():
    config = make_model("M").config
    assert is_supported(config)
    config.attention_dropout = 0.1
    assert not is_supported(config)
    assert not is_supported(object())


def test_gradients_reach_only_the_wanted_sequence_and_the_adapters():
    model, embeds = make_model(rank=2), torch.randn(18, WIDTH, requires_grad=True)
    pack = pack_of((9, 9))
    hidden_at_rows(decoder_of(model), embeds, pack, torch.tensor([14]), OPS).sum().backward()
    assert not embeds.grad[:9].any() and not embeds.grad[15:].any() and embeds.grad[9:15].any()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("tokens", [0, 4])
def test_without_wanted_rows(tokens):
    pack = make_pack(torch.tensor([tokens] * (tokens > 0), dtype=torch.int64), tokens, 4)
    none = torch.zeros(0, dtype=torch.int64)
    embeds = torch.randn(tokens, WIDTH)
    assert hidden_at_rows(decoder_of(make_model()), embeds, pack, none, OPS).shape == (0, WIDTH)


@pytest.mark.parametrize("lengths", [(1,), (63, 64, 2), (65,), (3, 130, 1)])
def test_attention_equals_that_of_torch(lengths):
    torch.manual_seed(4)
    pack = pack_of(lengths)
    query = torch.randn(sum(lengths), 4, 6, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(sum(lengths), 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    leaves = (query, key, value)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in one), is_causal=True, enable_gqa=True, scale=0.3
        )[0].transpose(0, 1)
        for one in zip(*(x.split(list(lengths)) for x in leaves), strict=True)
    ]
    wanted = torch.cat(parts)
    y = packed_attention(*leaves, pack, 0.3)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(wanted)
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    rows = torch.randint(sum(lengths), (9,))
    torch.testing.assert_close(attention_at(query[rows], key, value, pack, rows, 0.3), wanted[rows])
