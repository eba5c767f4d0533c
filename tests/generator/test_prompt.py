"""Prompt assembly against plain Python lists."""

from __future__ import annotations

import random

import pytest
import torch

from dragkit.data.packed import TokenPack
from dragkit.generator.prompt import PromptTemplate, layout_prompts


def _pack(rows):
    ptr = [0]
    for row in rows:
        ptr.append(ptr[-1] + len(row))
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
    return TokenPack(ids, torch.tensor(ptr, dtype=torch.int32), max(map(len, rows), default=0))


def _by_hand(prefix, facts, cue, target, index, limit, vectors, residual):
    capacity = len(index[0]) if index else 0
    prompts = []
    for b, chosen in enumerate(index):
        goal = target[b] if target else []
        room = limit - len(prefix[b]) - len(cue) - len(goal) - int(residual)
        ids, slots, kept = list(prefix[b]), [-1] * len(prefix[b]), 0
        for k, fact in enumerate(chosen):
            if fact < 0:
                continue
            size = len(facts[fact]) + int(vectors)
            if size > room:
                break
            room -= size
            kept += 1
            if vectors:
                ids.append(0)
                slots.append(b * capacity + k)
            ids += facts[fact]
            slots += [-1] * len(facts[fact])
        if residual:
            ids.append(0)
            slots.append(len(index) * capacity + b)
        ids += cue + goal
        slots += [-1] * (len(cue) + len(goal))
        prompts.append((ids, slots, len(goal), kept))
    return prompts


PREFIX = [[5, 6, 7], [8], [9, 9], []]
FACTS = [[10, 11], [12], [13, 14, 15], [16], [], [17, 18]]
CUE, TARGET = [2, 3], [[20, 1], [21, 22, 1], [1], []]
INDEX = [[2, 0, 1], [3, -1, -1], [5, 4, -1], [-1, -1, -1]]


def _layout(index=INDEX, limit=1000, prefix=PREFIX, facts=FACTS, target=TARGET, **options):
    return layout_prompts(
        _pack(prefix),
        _pack(facts),
        torch.tensor(CUE, dtype=torch.int32),
        _pack(target) if target else None,
        torch.tensor(index, dtype=torch.int32),
        max_tokens=limit,
        **options,
    )


def _check(prompt, wanted):
    """A prompt against (ids, slots, supervised tokens, facts kept) of its questions."""
    start, rows, ids = 0, [], []
    for place, (tokens, slots, goal, kept) in enumerate(wanted):
        end = start + len(tokens)
        assert prompt.input_ids[start:end].tolist() == tokens
        assert prompt.slot[start:end].tolist() == slots
        assert prompt.position[start:end].tolist() == list(range(len(tokens)))
        assert (prompt.question[start:end] == place).all()
        assert prompt.ptr[place : place + 2].tolist() == [start, end]
        assert (
            int(prompt.length[place]) == len(tokens) and int(prompt.num_facts_kept[place]) == kept
        )
        rows += list(range(end - goal - 1, end - 1)) if goal else []
        ids += tokens[len(tokens) - goal :] if goal else []
        start = end
    assert prompt.input_ids.numel() == start and len(prompt.length) == len(wanted)
    assert prompt.target_row.tolist() == rows and prompt.target_id.tolist() == ids
    assert prompt.longest == max((len(tokens) for tokens, *_ in wanted), default=0)


ORDERS = [[0, 1, 2, 3], [2, 3, 0], [1], [3, 2, 1, 0], []]


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("limit", [1000, 24, 12, 5, 0])
def test_equals_lists(vectors, residual, with_target, limit):
    residual = residual and vectors
    target = TARGET if with_target else None
    wanted = _by_hand(PREFIX, FACTS, CUE, target, INDEX, limit, vectors, residual)
    layout = _layout(target=target, limit=limit, vectors=vectors, residual=residual)
    lengths, supervised = layout.copy_lengths().result()
    assert lengths == [len(tokens) for tokens, *_ in wanted]
    assert supervised == [goal for _, _, goal, _ in wanted]
    for order in ORDERS:
        _check(layout.assemble(order, lengths, supervised), [wanted[i] for i in order])


def test_the_limits_above_are_where_facts_begin_to_fall_out():
    kept = {limit: _layout(limit=limit).num_facts_kept.tolist() for limit in (1000, 24, 12, 5)}
    assert kept == {1000: [3, 1, 2, 0], 24: [3, 1, 2, 0], 12: [1, 1, 2, 0], 5: [0, 0, 0, 0]}


def test_random_prompts_in_several_passes():
    draw = random.Random(0)
    for _ in range(20):
        facts = [[draw.randrange(1, 99)] * draw.randrange(4) for _ in range(12)]
        index = [draw.sample(range(12), k) + [-1] * (5 - k) for k in (5, 0, 3, 1, 5)]
        prefix = [[7] * draw.randrange(1, 6) for _ in index]
        target = [[3] * draw.randrange(4) for _ in index]
        limit = draw.randrange(5, 30)
        wanted = _by_hand(prefix, facts, CUE, target, index, limit, True, True)
        layout = _layout(index, limit, prefix, facts, target, residual=True)
        sizes = layout.copy_lengths().result()
        order = draw.sample(range(5), 5)
        for part in (order[:2], order[2:3], order[3:]):
            _check(layout.assemble(part, *sizes), [wanted[i] for i in part])


def test_no_facts_at_all():
    layout = _layout([[-1, -1, -1]], 50, [[4]], [], [[7, 1]])
    prompt = layout.assemble([0], *layout.copy_lengths().result())
    assert prompt.input_ids.tolist() == [4, *CUE, 7, 1] and int(prompt.num_facts_kept) == 0


def test_template_keeps_answers_in_one_list():
    template = PromptTemplate()
    assert template.target(["a", "b c"]) == " a | b c"
    assert template.fact("Paris", "country capital", "France").endswith("\n")
    assert "What?" in template.prefix("What?")
