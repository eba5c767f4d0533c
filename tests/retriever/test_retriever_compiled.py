"""The compiled retriever equals the eager one and compiles a few graphs for packs of all sizes."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch._dynamo.testing import CompileCounter

from tests.retriever.retriever_cases import double_retriever, make_graph, pack, relation_states


def test_compiled_equals_eager_with_gradients(compile_with):
    model, relations = double_retriever(num_instructions=1), relation_states(5)
    twin = copy.deepcopy(model)
    compiled = compile_with(twin, "aot_eager")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        batch = pack([make_graph(rng, 5 + seed, 11 + seed, 5) for _ in range(2 + seed)])
        for net, call in ((model, model), (twin, compiled)):
            net.zero_grad()
            call(batch, relations).fact_logits.pow(2).sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                a.grad if a.grad is not None else torch.zeros_like(a),
                b.grad if b.grad is not None else torch.zeros_like(b),
                msg=name,
            )


def test_per_instruction_with_dropout_compiles_and_draws_new_masks(compile_with):
    model, relations = double_retriever(message="per_instruction"), relation_states(5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = pack([make_graph(np.random.default_rng(0), 9, 31, 5) for _ in range(2)])
    compiled = compile_with(model, "aot_eager")
    results = []
    for call, seed in ((model, 1), (compiled, 1), (model, 2)):
        torch.manual_seed(seed)
        model.zero_grad()
        logits = call(batch, relations).fact_logits
        logits.pow(2).sum().backward()
        results.append((logits.detach(), model.instructions.attend.grad.clone()))
    for eager, compiled_result, other_seed in zip(*results, strict=True):
        torch.testing.assert_close(compiled_result, eager)
        assert not torch.allclose(other_seed, eager)
    model.eval()
    with torch.no_grad():
        first = model(batch, relations).fact_logits
        assert torch.equal(first, model(batch, relations).fact_logits)


def test_packs_of_all_sizes_share_a_few_graphs(compile_with):
    # (questions, nodes, facts, relations, tokens). torch.compile specialises on equal sizes and on
    # sizes of one, so the list has all of these.
    sizes = [
        (2, 11, 30, 3, 2),
        (3, 17, 41, 3, 6),
        (2, 19, 37, 3, 3),
        (4, 13, 29, 2, 5),
        (2, 8, 23, 3, 7),
        (6, 21, 33, 4, 8),
        (1, 7, 31, 3, 7),
        (4, 10, 27, 3, 1),
    ]
    model, relations = double_retriever(num_instructions=1), relation_states(5)
    counter = CompileCounter()
    compiled = compile_with(model, counter)
    for seed, (questions, nodes, facts, num_relations, tokens) in enumerate(sizes):
        rng = np.random.default_rng(seed)
        graphs = [make_graph(rng, nodes, facts, num_relations, tokens) for _ in range(questions)]
        batch = pack(graphs)
        torch.testing.assert_close(
            compiled(batch, relations).fact_logits, model(batch, relations).fact_logits
        )
    # One graph for general sizes, one for a single question, one for a single token.
    assert 1 <= counter.frame_count <= 3
