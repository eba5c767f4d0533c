"""A small joint phase, and a batch with prompts for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dragkit.config import TrainConfig
from dragkit.data.packed import TokenPack
from dragkit.generator.load import load_generator
from dragkit.joint import JointModel
from dragkit.retriever.retriever import Retriever
from dragkit.trainer.phase2 import JointPhase
from tests.retriever import retriever_cases as cases


def _rows(texts, generator):
    rows = generator.tokenize(texts)
    ptr = np.cumsum([0] + [len(r) for r in rows])
    return TokenPack(
        torch.tensor([i for r in rows for i in r], dtype=torch.int32),
        torch.tensor(ptr, dtype=torch.int32),
        max(map(len, rows)),
    )


def make(**sections):
    """A phase around the bundled generator. `sections` update the settings."""
    settings = {
        "retriever": {"hidden_dim": 8, "num_reasoning_steps": 2, "dropout": 0.0},
        "sampler": {"k_facts": 4},
        "generator": {"model": "tiny", "lora_rank": 2},
        "loss": {"ret_loss_weight": 0.0},
    }
    for name, values in sections.items():
        settings.setdefault(name, {}).update(values)
    config = TrainConfig.model_validate(settings)
    torch.manual_seed(0)
    generator = load_generator(config.generator, torch.device("cpu"), name="tiny")
    model = JointModel(config, Retriever(config.retriever, cases.TEXT), generator)
    return JointPhase(config, model)


def make_batch(generator, count=4):
    """Questions with labels and prompts. Every fourth fact is positive."""
    rng = np.random.default_rng(0)
    graphs = [cases.make_graph(rng, 5, 9, 5) for _ in range(count)]
    batch = cases.pack(graphs, dtype=torch.float32)
    label = (torch.arange(batch.graph.num_facts) % 4 == 0).float()
    facts = [f"node {i}, likes, thing {i % 3}\n" for i in range(batch.graph.num_facts)]
    return replace(
        batch,
        graph=replace(batch.graph, label=label),
        num_labelled=count,
        prefix=_rows([f"Question: who is {g}?\n" for g in range(count)], generator),
        facts=_rows(facts, generator),
        target=_rows([f" thing {g}" for g in range(count)], generator),
    )


def relation_states():
    return cases.relation_states(5, torch.float32)
