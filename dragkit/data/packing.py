"""Writes a heuristics file into a folder of arrays: many questions are sorted in one go."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dragkit.data.arrays import FolderWriter, seal_folder
from dragkit.data.heuristics import HeuristicsReader, Question
from dragkit.data.labels import LabelRule
from dragkit.data.lines import copy_lines
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import Subgraph, build_subgraph
from dragkit_kernels import build_fact_orders

logger = logging.getLogger(__name__)

# One sort for about this many facts: its fixed cost vanishes, its memory stays small.
_CHUNK_FACTS = 1 << 18
_CHUNK_QUESTIONS = 1 << 13


def question_key(name: str) -> int:
    """The counter word of a question's noise: 63 bits of a hash of its id."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


class Packer:
    """Takes questions one by one and appends them to the arrays of a folder.

    Every question gets the blocks `facts` [6, E] (head, tail, tail_fact, head_fact, pair_fact,
    fact_pair), `nodes` [2, N] (end of each node's tail and head segment) and `pairs` [2, P] (end of
    each pair's segment, relation row), all counted from the question's own zero, so that a pack is
    made by adding offsets to whole blocks.
    """

    def __init__(self, folder: Path, label_rule: LabelRule) -> None:
        self.vocab = RelationVocab()
        self.summary: Counter[str] = Counter()
        self.label_rule = label_rule
        self._writer = FolderWriter(folder)
        self._waiting: list[Subgraph] = []
        self._waiting_facts = 0
        for name in ("fact", "node", "pair", "topic", "topic_node", "answer", "answer_node"):
            self._writer.array(f"{name}_ptr", np.int64).append([0])
        self._ends: Counter[str] = Counter()

    def _extend(self, name: str, counts: list[int]) -> None:
        """Appends rows of `counts` items to the offsets `<name>_ptr`."""
        ends = np.cumsum(counts, dtype=np.int64) + self._ends[name]
        self._writer.array(f"{name}_ptr", np.int64).append(ends)
        self._ends[name] += sum(counts)

    def add(self, question: Question, *, named: bool) -> None:
        """Appends one question; `named` says that its id stood in the file.

        A made-up id holds the file's name, which is no part of the content: it is stored as an
        empty string and its noise key comes from the line number alone.
        """
        graph = build_subgraph(question, self.vocab, label_rule=self.label_rule)
        writer = self._writer
        writer.strings("ids").append([question.id if named else ""])
        writer.strings("texts").append([question.text])
        writer.strings("topics").append(question.topics)
        writer.strings("answers").append(question.answers)
        writer.strings("entities").append(graph.names)
        writer.array("lines", np.int64).append([question.line])
        key = question_key(question.id if named else f"\n{question.line}")
        writer.array("question_key", np.int64).append([key])
        writer.array("topic_nodes", np.int32).append(graph.topics)
        writer.array("answer_nodes", np.int32).append(graph.answers)
        self._extend("topic", [len(question.topics)])
        self._extend("answer", [len(question.answers)])
        self._extend("topic_node", [len(graph.topics)])
        self._extend("answer_node", [len(graph.answers)])
        self._note(graph)
        self._waiting.append(graph)
        self._waiting_facts += graph.num_facts
        if self._waiting_facts >= _CHUNK_FACTS or len(self._waiting) >= _CHUNK_QUESTIONS:
            self._flush()

    def _note(self, graph: Subgraph) -> None:
        for name, amount in (
            ("nodes", graph.num_nodes),
            ("facts", graph.num_facts),
            ("positive_facts", int(graph.label.sum())),
            ("answer_in_graph", len(graph.answers) > 0),
            ("topic_missing", graph.num_nodes > 0 and len(graph.topics) == 0),
            ("labels_shortest", graph.label_source == "shortest"),
            ("labels_paths", graph.label_source == "paths"),
            ("labels_none", graph.label_source == "none"),
        ):
            self.summary[name] += int(amount)

    def _flush(self) -> None:
        """Sorts the waiting subgraphs as one pack, then takes the offsets out again."""
        graphs, self._waiting, self._waiting_facts = self._waiting, [], 0
        if not graphs:
            return
        nodes = np.array([graph.num_nodes for graph in graphs])
        facts = np.array([graph.num_facts for graph in graphs])
        node_base, fact_base = np.cumsum(nodes) - nodes, np.cumsum(facts) - facts
        graph_of_fact = np.repeat(np.arange(len(graphs)), facts)
        shift = node_base[graph_of_fact]
        orders = build_fact_orders(
            torch.from_numpy(np.concatenate([graph.head for graph in graphs]) + shift),
            torch.from_numpy(np.concatenate([graph.tail for graph in graphs]) + shift),
            torch.from_numpy(np.concatenate([graph.relation for graph in graphs])),
            int(nodes.sum()),
            torch.from_numpy(graph_of_fact),
        )
        pair_graph = orders.pair_graph.numpy()
        pairs = np.bincount(pair_graph, minlength=len(graphs))
        pair_base = np.cumsum(pairs) - pairs
        # Segments of a graph's nodes and pairs cover exactly its own facts, so a row of the sorted
        # orders belongs to the graph of the fact that stands in the same place.
        from_fact, from_pair = fact_base[graph_of_fact], pair_base[graph_of_fact]
        fact_block = np.stack(
            [
                orders.head.numpy() - shift,
                orders.tail.numpy() - shift,
                orders.tail_fact.numpy() - from_fact,
                orders.head_fact.numpy() - from_fact,
                orders.pair_fact.numpy() - from_fact,
                orders.fact_pair.numpy() - from_pair,
            ]
        ).astype(np.int32)
        from_node = np.repeat(fact_base, nodes)
        node_block = np.stack(
            [orders.tail_ptr.numpy()[1:] - from_node, orders.head_ptr.numpy()[1:] - from_node]
        ).astype(np.int32)
        pair_end = orders.pair_ptr.numpy()[1:] - fact_base[pair_graph]
        pair_block = np.stack([pair_end, orders.pair_relation.numpy()]).astype(np.int32)
        for name, block, base, count in (
            ("fact", fact_block, fact_base, facts),
            ("node", node_block, node_base, nodes),
            ("pair", pair_block, pair_base, pairs),
        ):
            pieces = [
                block[:, first : first + size].ravel()
                for first, size in zip(base.tolist(), count.tolist(), strict=True)
            ]
            self._writer.array(f"{name}s", np.int32).append(np.concatenate(pieces))
            self._extend(name, count.tolist())
        labels = np.concatenate([graph.label for graph in graphs])
        self._writer.array("labels", np.uint8).append(labels)

    def close(self) -> None:
        """Writes what is waiting and finishes the files."""
        self._flush()
        self._writer.strings("relations").append(self.vocab.names)
        self._writer.close()


def pack_file(path: Path, folder: Path, *, label_rule: LabelRule, max_bad: float) -> None:
    """Reads, labels, sorts and seals a heuristics file.

    Args:
        path: the file; folder: an empty one to fill.
        label_rule: see `fact_labels`; max_bad: share of unusable rows to leave out.

    Raises:
        DataError, MissingInputError: as `read_heuristics`.
    """
    reader = HeuristicsReader(path)
    packer = Packer(folder, label_rule)
    for question in reader:
        # A file that will be refused is still read to its end, for the whole list of faults.
        if max_bad > 0 or not reader.rejects:
            packer.add(question, named=question.line not in reader.unnamed)
    packer.close()
    reader.check(max_bad)
    rejected = {problem.line for problem in reader.rejects}
    if rejected:
        copy_lines(path, rejected, folder / "rejects.jsonl")
        reasons = "".join(f"{p.line}: {p.path}: {p.reason}\n" for p in reader.rejects)
        (folder / "rejects.txt").write_text(reasons)
    summary = {**reader.notes, **packer.summary}
    summary |= {"relations": len(packer.vocab), "rejects": len(rejected), "rows": reader.rows}
    seal_folder(folder, {"summary": summary})
