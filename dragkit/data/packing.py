"""Packs questions into a folder of arrays. Many questions are sorted at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dragkit.data.arrays import FolderWriter
from dragkit.data.gaps import LabelGaps
from dragkit.data.labels import LabelRule
from dragkit.data.node_merging import MergedGraph, merge_nodes
from dragkit.data.question_file import Question
from dragkit.data.relations import RelationVocab
from dragkit.data.subgraph import Subgraph, build_subgraph
from dragkit_kernels import build_fact_index

# About this many facts are sorted at once: enough to hide the fixed cost, little memory.
_CHUNK_FACTS = 1 << 18
_CHUNK_QUESTIONS = 1 << 13

# Items of which a question has any number. Each has offsets `<name>_ptr`.
RAGGED = (
    *("fact", "node", "merged_fact", "merged_node", "merged_pair"),
    *("topic_fact", "topic_pair", "topic_node", "topic", "answer"),
)
ARRAYS: dict[str, type[np.generic]] = {
    **dict.fromkeys(("facts", "merged_facts", "merged_segments", "merged_pairs"), np.int32),
    **dict.fromkeys(("topic_facts", "topic_segments", "topic_pairs", "topic_nodes"), np.int32),
    **dict.fromkeys(("labels", "relevance", "judged"), np.uint8),
    **dict.fromkeys(("lines", "question_key"), np.int64),
}
STRINGS = ("ids", "texts", "topics", "answers", "entities")
# First rows of a block of merged facts: these fields of `FactIndex`.
PER_FACT = ("head", "tail", "tail_perm", "head_perm", "pair_perm", "fact_pair")
COUNTS = ("head_count", "tail_count")
FACT_PAIR = PER_FACT.index("fact_pair")


def question_key(name: str) -> int:
    """Returns the counter word of a question's noise: 63 bits of a hash of its id."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


class _Segments:
    """Items of some graphs end to end.

    Attributes:
        count: int [G] items of each graph.
        start: int [G] first item of each graph.
        graph: int [items] graph of each item.
    """

    def __init__(self, count: np.ndarray) -> None:
        self.count = count
        self.start = np.cumsum(count) - count
        self.graph = np.repeat(np.arange(len(count)), count)

    @classmethod
    def from_graph(cls, graph: np.ndarray, num_graphs: int) -> _Segments:
        """Segments of items whose graphs ascend."""
        return cls(np.bincount(graph, minlength=num_graphs))

    def merge(self, group: np.ndarray) -> _Segments:
        """Segments of groups of these items. `group` gives each item's group, in graph order."""
        # All members of a group are in one graph, so any of them may write it.
        graph = np.zeros(int(group.max(initial=-1)) + 1, dtype=np.int64)
        graph[group] = self.graph
        return self.from_graph(graph, len(self.count))


class Packer:
    """Appends questions to the arrays of a folder.

    Each question is stored as blocks whose indices start at 0, so the collator adds offsets to
    whole blocks and sorts nothing. Its E facts on N nodes become Q merged facts with P (graph,
    relation) pairs on M merged nodes (see `merge_nodes`). S of the merged facts touch a topic. Only
    they carry a message in the first layer of a stage, because p is 0 at the other nodes.

        facts [4, E]: head node, tail node, merged fact, facts sorted by merged fact
        merged_facts [9, Q]: `FactIndex.{head, tail, tail_perm, head_perm, pair_perm, fact_pair,
            head_count, tail_count}`, end of the facts of each merged fact
        merged_segments [3, M]: ends in tail_perm and head_perm of each merged node, its node count
        merged_pairs [2, P]: end in pair_perm, relation row
        topic_facts [8, S], topic_segments [2, M], topic_pairs [2, P']: the same, of the S facts
        topic_nodes: merged nodes that hold a topic, or all of them where the graph has no topic
    """

    def __init__(self, folder: Path, label_rule: LabelRule, *, merge: bool = True) -> None:
        self.vocab = RelationVocab()
        self.summary: Counter[str] = Counter()
        self.gaps = LabelGaps()
        self.label_rule: LabelRule = label_rule
        self.merge = merge
        self._writer = FolderWriter(folder)
        self._graphs: list[Subgraph] = []
        for name in RAGGED:
            self._writer.offsets(f"{name}_ptr")
        # A part without questions has all files too.
        for name, dtype in ARRAYS.items():
            self._writer.array(name, dtype)
        for name in STRINGS:
            self._writer.strings(name)

    def _extend_ptr(self, name: str, counts: np.ndarray | list[int]) -> None:
        """Appends questions with `counts` items to the offsets `<name>_ptr`."""
        self._writer.offsets(f"{name}_ptr").extend(counts)

    def add(self, question: Question, *, has_id: bool) -> None:
        """Appends one question. `has_id` tells whether the file gives its id.

        A default id contains the file name, which must not influence the packed content. It is
        stored as an empty string, and the noise key is made from the line number.
        """
        graph = build_subgraph(question, self.vocab, label_rule=self.label_rule)
        writer = self._writer
        writer.strings("ids").append([question.id if has_id else ""])
        writer.strings("texts").append([question.text])
        writer.strings("topics").append(question.topics)
        writer.strings("answers").append(question.answers)
        writer.strings("entities").append(graph.names)
        writer.array("lines", np.int64).append([question.line])
        key = question_key(question.id if has_id else f"\n{question.line}")
        writer.array("question_key", np.int64).append([key])
        writer.array("judged", np.uint8).append([graph.relevance.judged])
        self._extend_ptr("topic", [len(question.topics)])
        self._extend_ptr("answer", [len(question.answers)])
        self._update_summary(graph)
        self.gaps.add(question, graph)
        self._graphs.append(graph)

    def _update_summary(self, graph: Subgraph) -> None:
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

    def _chunks(self) -> Iterator[list[Subgraph]]:
        chunk: list[Subgraph] = []
        num_facts = 0
        for graph in self._graphs:
            chunk.append(graph)
            num_facts += graph.num_facts
            if num_facts >= _CHUNK_FACTS or len(chunk) >= _CHUNK_QUESTIONS:
                yield chunk
                chunk, num_facts = [], 0
        if chunk:
            yield chunk

    def _write(self, graphs: list[Subgraph], relation_rows: np.ndarray) -> None:
        """Merges and sorts subgraphs as one pack, then writes each one's blocks."""
        nodes = _Segments(np.array([graph.num_nodes for graph in graphs]))
        facts = _Segments(np.array([graph.num_facts for graph in graphs]))
        head, tail, topics = (
            np.concatenate([getattr(g, end) + i for g, i in zip(graphs, nodes.start, strict=True)])
            for end in ("head", "tail", "topics")
        )
        topic = np.zeros(len(nodes.graph), dtype=bool)
        topic[topics] = True
        relation = relation_rows[np.concatenate([graph.relation for graph in graphs])]
        merged = merge_nodes(head, tail, relation, nodes.graph, topic, merge=self.merge)
        merged_nodes, merged_facts = (
            nodes.merge(merged.merged_node),
            facts.merge(merged.merged_fact),
        )
        self._blocks(
            "facts",
            [
                head - nodes.start[facts.graph],
                tail - nodes.start[facts.graph],
                merged.merged_fact - merged_facts.start[facts.graph],
                np.argsort(merged.merged_fact, kind="stable") - facts.start[facts.graph],
            ],
            facts,
        )
        self._extend_ptr("fact", facts.count)
        self._extend_ptr("node", nodes.count)
        self._extend_ptr("merged_node", merged_nodes.count)
        member_ends = np.cumsum(np.bincount(merged.merged_fact, minlength=len(merged.head)))
        self._index_blocks(
            "merged",
            merged,
            np.ones(len(merged.head), dtype=bool),
            merged_nodes,
            fact_rows=(member_ends - facts.start[merged_facts.graph],),
            node_rows=(merged.node_count,),
        )
        # A graph without a topic starts with the same probability at every node.
        topic |= ~np.isin(nodes.graph, nodes.graph[topics])
        has_topic = np.zeros(len(merged_nodes.graph), dtype=bool)
        has_topic[merged.merged_node[topic]] = True
        near_topic = has_topic[merged.head] | has_topic[merged.tail]
        self._index_blocks("topic", merged, near_topic, merged_nodes)
        topic_nodes = np.flatnonzero(has_topic)
        graph = merged_nodes.graph[topic_nodes]
        self._writer.array("topic_nodes", np.int32).append(topic_nodes - merged_nodes.start[graph])
        self._extend_ptr("topic_node", np.bincount(graph, minlength=len(graphs)))
        labels = np.concatenate([graph.label for graph in graphs])
        self._writer.array("labels", np.uint8).append(labels)
        relevance = np.concatenate([graph.relevance.bits for graph in graphs])
        self._writer.array("relevance", np.uint8).append(relevance)
        self.summary["classes"] += len(merged_nodes.graph)
        self.summary["merged_facts"] += len(merged_facts.graph)

    def _index_blocks(
        self,
        prefix: str,
        merged: MergedGraph,
        chosen: np.ndarray,
        nodes: _Segments,
        *,
        fact_rows: tuple[np.ndarray, ...] = (),
        node_rows: tuple[np.ndarray, ...] = (),
    ) -> None:
        """Sorts the chosen merged facts and writes the blocks of their `FactIndex`.

        `fact_rows` and `node_rows` are further rows of the blocks.
        """
        head, tail, relation, *counts = (torch.from_numpy(x[chosen]) for x in merged[3:])
        fact_graph = nodes.graph[merged.head[chosen]]
        facts = _Segments.from_graph(fact_graph, len(nodes.count))
        index = build_fact_index(
            head,
            tail,
            relation,
            len(nodes.graph),
            torch.from_numpy(facts.graph),
            **dict(zip(COUNTS, counts, strict=True)),
        )
        fields = {name: tensor.numpy() for name, tensor in index._asdict().items()}
        pairs = _Segments.from_graph(fields["pair_graph"], len(nodes.count))
        # The segments of a graph's nodes and pairs cover exactly its own facts. So entry i of a
        # permutation belongs to the same graph as fact i.
        starts = {"head": nodes, "tail": nodes, "fact_pair": pairs}
        columns = [fields[name] - starts.get(name, facts).start[facts.graph] for name in PER_FACT]
        columns += [fields[name] for name in COUNTS]
        self._blocks(f"{prefix}_facts", [*columns, *fact_rows], facts)
        self._extend_ptr(f"{prefix}_fact", facts.count)
        ends = [fields[name][1:] - facts.start[nodes.graph] for name in ("tail_ptr", "head_ptr")]
        self._blocks(f"{prefix}_segments", [*ends, *node_rows], nodes)
        pair_ends = fields["pair_ptr"][1:] - facts.start[pairs.graph]
        self._blocks(f"{prefix}_pairs", [pair_ends, fields["pair_relation"]], pairs)
        self._extend_ptr(f"{prefix}_pair", pairs.count)

    def _blocks(self, name: str, rows: list[np.ndarray], segments: _Segments) -> None:
        """Appends one block per graph: its slice of all `rows`."""
        stacked = np.stack(rows).astype(np.int32)
        blocks = [
            stacked[:, start : start + count].ravel()
            for start, count in zip(segments.start.tolist(), segments.count.tolist(), strict=True)
        ]
        self._writer.array(name, np.int32).append(np.concatenate(blocks))

    def close(self, relation_rows: Callable[[Sequence[str]], Sequence[int]]) -> None:
        """Sorts the questions, writes them and closes the files.

        Args:
            relation_rows: returns the rows that the data set gives to the relations. The order of
                a question's pairs follows from them.
        """
        rows = np.array(relation_rows(self.vocab.names), dtype=np.int32)
        for chunk in self._chunks():
            self._write(chunk, rows)
        self._writer.strings("relations").append(self.vocab.names)
        self._writer.close()
