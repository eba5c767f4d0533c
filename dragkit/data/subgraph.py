"""The graph of one question as arrays in a canonical order, and conversion from and to PyG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dragkit.data.evidence import FactRelevance, fact_relevance
from dragkit.data.labels import LabelRule, fact_labels
from dragkit.data.question_file import Question
from dragkit.data.relations import RelationVocab

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True, slots=True)
class Subgraph:
    """N nodes and E facts of one question.

    Nodes are sorted by name, and distinct facts by (head, relation, tail). So shuffled or repeated
    triples give the same arrays, and the same scores bit for bit.

    Attributes:
        names: N entity names.
        head, tail: int32 [E] node rows.
        relation: int32 [E] rows of the vocabulary.
        topics, answers: int32 node rows of the topics and answers in the graph.
        label: bool [E] positive facts.
        label_source: "shortest", "paths" or "none", see `FactLabels`.
        relevance: facts that others judged relevant.
    """

    names: tuple[str, ...]
    head: np.ndarray
    tail: np.ndarray
    relation: np.ndarray
    topics: np.ndarray
    answers: np.ndarray
    label: np.ndarray
    label_source: str
    relevance: FactRelevance

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.names)

    @property
    def num_facts(self) -> int:
        """E."""
        return len(self.head)


def _sort_facts(
    head: np.ndarray, relation: np.ndarray, tail: np.ndarray, num_nodes: int, num_relations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the distinct facts sorted by (head, relation, tail), int32 [E] each."""
    pair = head * num_relations + relation
    if num_nodes * num_nodes * num_relations < 2**63:
        # One number per fact: sorting numbers is many times faster than sorting their positions.
        key = np.sort(pair * num_nodes + tail)
        key = key[np.append(True, key[1:] != key[:-1])]
        pair, tail = np.divmod(key, num_nodes)
    else:
        order = np.lexsort((tail, pair))
        pair, tail = pair[order], tail[order]
        is_first = np.append(True, (pair[1:] != pair[:-1]) | (tail[1:] != tail[:-1]))
        pair, tail = pair[is_first], tail[is_first]
    head, relation = np.divmod(pair, num_relations)
    return head.astype(np.int32), relation.astype(np.int32), tail.astype(np.int32)


def build_subgraph(
    question: Question, vocab: RelationVocab, *, label_rule: LabelRule = "auto"
) -> Subgraph:
    """Builds the arrays and labels of a question.

    Topics and answers that occur in no triple are not nodes. Names are not normalised.

    Args:
        question: a question as read from a file.
        vocab: relations that it does not contain are added.
        label_rule: see `fact_labels`.
    """
    columns = list(zip(*question.triples, strict=True)) or [(), (), ()]
    names, relations = sorted({*columns[0], *columns[2]}), sorted(set(columns[1]))
    node_of = dict(zip(names, range(len(names)), strict=True))
    relation_of = dict(zip(relations, range(len(relations)), strict=True))
    head, relation, tail = (
        np.array(list(map(rows.__getitem__, column)), dtype=np.int64)
        for rows, column in zip((node_of, relation_of, node_of), columns, strict=True)
    )
    if len(head):
        head, relation, tail = _sort_facts(head, relation, tail, len(names), len(relations))
    topics = [node_of[name] for name in question.topics if name in node_of]
    answers = [node_of[name] for name in question.answers if name in node_of]
    labels = fact_labels(
        head,
        tail,
        num_nodes=len(names),
        topics=topics,
        answers=answers,
        paths=[[node_of.get(name, -1) for name in path] for path in question.paths],
        rule=label_rule,
    )
    relevance = fact_relevance(
        question,
        (head, relation, tail),
        node_of=node_of,
        relation_of=relation_of,
        topics=topics,
        answers=answers,
    )
    rows = np.array([vocab.add(name) for name in relations], dtype=np.int32)
    return Subgraph(
        names=tuple(names),
        head=head.astype(np.int32),
        tail=tail.astype(np.int32),
        relation=rows[relation],
        topics=np.array(topics, dtype=np.int32),
        answers=np.array(answers, dtype=np.int32),
        label=labels.positive,
        label_source=labels.source,
        relevance=relevance,
    )


def to_pyg(subgraph: Subgraph) -> Data:
    """Converts to PyG: `edge_index`, `edge_type`, `edge_label`, `names` and masks of the nodes."""
    from torch_geometric.data import Data

    def mask(rows: np.ndarray) -> torch.Tensor:
        is_marked = torch.zeros(subgraph.num_nodes, dtype=torch.bool)
        is_marked[torch.from_numpy(rows.astype(np.int64))] = True
        return is_marked

    return Data(
        edge_index=torch.from_numpy(np.stack([subgraph.head, subgraph.tail]).astype(np.int64)),
        edge_type=torch.from_numpy(subgraph.relation.astype(np.int64)),
        edge_label=torch.from_numpy(subgraph.label.astype(np.float32)),
        topic_mask=mask(subgraph.topics),
        answer_mask=mask(subgraph.answers),
        num_nodes=subgraph.num_nodes,
        names=list(subgraph.names),
    )


def from_pyg(data: Data, *, id: str, text: str, answers: tuple[str, ...] = ()) -> Question:
    """Makes a question from a PyG graph. It has no paths, so shortest paths give its labels.

    Args:
        data: has `edge_index`, `names` (one per node), and either `relations` (one name per fact)
            or `edge_type` and `relation_names`. `topic_mask` and `answer_mask` are optional.
        id: id of the question.
        text: text of the question.
        answers: further answers, which may be outside the graph.

    Raises:
        ValueError: the numbers of names, relations, nodes and facts do not fit.
    """
    names = list(getattr(data, "names", None) or ())
    relations = list(getattr(data, "relations", None) or ())
    if not relations and getattr(data, "relation_names", None) is not None:
        relations = [data.relation_names[row] for row in data.edge_type.tolist()]
    heads, tails = data.edge_index.tolist()
    if len(names) != data.num_nodes or len(relations) != len(heads):
        raise ValueError(
            f"from_pyg: a graph of {data.num_nodes} nodes and {len(heads)} facts needs one name "
            f"each, got {len(names)} entity names and {len(relations)} relation names"
        )
    triples = zip((names[h] for h in heads), relations, (names[t] for t in tails), strict=True)

    def marked(mask: torch.Tensor | None) -> tuple[str, ...]:
        rows = [] if mask is None else mask.nonzero().flatten().tolist()
        return tuple(names[row] for row in rows)

    return Question(
        id=id,
        text=text,
        triples=tuple(dict.fromkeys(triples)),
        topics=marked(getattr(data, "topic_mask", None)),
        paths=(),
        answers=tuple(dict.fromkeys((*answers, *marked(getattr(data, "answer_mask", None))))),
        line=0,
    )
