"""Prompt assembly against plain Python lists."""

from __future__ import annotations

import pytest
import torch

from dragkit.data.packed import TokenPack
from dragkit.model.prompt import PromptTemplate, assemble_prompt


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


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("limit", [1000, 24, 12])
def test_equals_lists(vectors, residual, with_target, limit):
    prefix = [[5, 6, 7], [8], [9, 9]]
    facts = [[10, 11], [12], [13, 14, 15], [16], [], [17, 18]]
    cue, target = [2, 3], [[20, 1], [21, 22, 1], [1]]
    index = [[2, 0, 1], [3, -1, -1], [5, 4, -1]]
    prompt = assemble_prompt(
        _pack(prefix),
        _pack(facts),
        torch.tensor(cue),
        _pack(target) if with_target else None,
        torch.tensor(index, dtype=torch.int32),
        max_tokens=limit,
        vectors=vectors,
        residual=residual and vectors,
    )
    wanted = _by_hand(
        prefix,
        facts,
        cue,
        target if with_target else None,
        index,
        limit,
        vectors,
        residual and vectors,
    )
    start = 0
    rows, ids = [], []
    for b, (tokens, slots, goal, kept) in enumerate(wanted):
        end = start + len(tokens)
        assert prompt.input_ids[start:end].tolist() == tokens
        assert prompt.slot[start:end].tolist() == slots
        assert prompt.position[start:end].tolist() == list(range(len(tokens)))
        assert (prompt.question[start:end] == b).all()
        assert int(prompt.length[b]) == len(tokens) and int(prompt.kept[b]) == kept
        rows += list(range(end - goal - 1, end - 1)) if goal else []
        ids += tokens[len(tokens) - goal :] if goal else []
        start = end
    assert prompt.input_ids.numel() == start
    assert prompt.target_row.tolist() == rows and prompt.target_id.tolist() == ids


def test_no_facts_at_all():
    prompt = assemble_prompt(
        _pack([[4]]),
        _pack([]),
        torch.tensor([2]),
        _pack([[7, 1]]),
        torch.full((1, 3), -1, dtype=torch.int32),
        max_tokens=50,
    )
    assert prompt.input_ids.tolist() == [4, 2, 7, 1]


def test_template_keeps_answers_in_one_list():
    template = PromptTemplate()
    assert template.target(["a", "b c"]) == " a | b c"
    assert template.fact("Paris", "country capital", "France").endswith("\n")
    assert "What?" in template.prefix("What?")
