"""One question's subgraph as arrays in a canonical order, and its exchange with PyG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dragkit.data.labels import LabelRule, fact_labels
from dragkit.data.question_file import Question
from dragkit.data.relations import RelationVocab

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True, slots=True)
class Subgraph:
    """N nodes and E facts of one question.

    Nodes are sorted by name and facts by (head, relation, tail), each once, so that shuffled or
    repeated triples give the same arrays and so the same scores, bit for bit.

    Attributes:
        names: N entity names.
        head, tail: int32 [E] node rows; relation: int32 [E] rows of the vocabulary.
        topics, answers: int32 node rows of the topics and answers inside the graph.
        label: bool [E] positive facts; label_source: "shortest", "paths" or "none".
    """

    names: tuple[str, ...]
    head: np.ndarray
    tail: np.ndarray
    relation: np.ndarray
    topics: np.ndarray
    answers: np.ndarray
    label: np.ndarray
    label_source: str

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.names)

    @property
    def num_facts(self) -> int:
        """E."""
        return len(self.head)


def _canonical_facts(
    question: Question,
) -> tuple[list[str], list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Sorted entity and relation names, and head, relation, tail rows of the sorted facts."""
    if not question.triples:
        empty = np.zeros(0, dtype=np.int32)
        return [], [], empty, empty, empty
    columns = list(zip(*question.triples, strict=True))
    names, relations = sorted({*columns[0], *columns[2]}), sorted(set(columns[1]))
    node_of = {name: row for row, name in enumerate(names)}
    relation_of = {name: row for row, name in enumerate(relations)}
    facts = np.stack(
        [
            np.fromiter(map(rows.__getitem__, column), np.int32, len(column))
            for rows, column in zip((node_of, relation_of, node_of), columns, strict=True)
        ]
    )
    facts = facts[:, np.lexsort(facts[::-1])]
    first = np.ones(facts.shape[1], dtype=bool)
    first[1:] = (facts[:, 1:] != facts[:, :-1]).any(0)
    head, relation, tail = facts[:, first]
    return names, relations, head, relation, tail


def build_subgraph(
    question: Question, vocab: RelationVocab, *, label_rule: LabelRule = "auto"
) -> Subgraph:
    """Arrays and labels of a question.

    Topics and answers that no triple names are not nodes. Names are compared as they are written.

    Args:
        question: as read; vocab: takes in relations it does not know yet.
        label_rule: see `fact_labels`.

    Returns:
        The subgraph, in canonical order.
    """
    names, relations, head, relation, tail = _canonical_facts(question)
    node_of = {name: row for row, name in enumerate(names)}
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
    rows = np.array([vocab.add(name) for name in relations], dtype=np.int32)
    return Subgraph(
        names=tuple(names),
        head=head,
        tail=tail,
        relation=rows[relation] if len(rows) else relation,
        topics=np.array(topics, dtype=np.int32),
        answers=np.array(answers, dtype=np.int32),
        label=labels.positive,
        label_source=labels.source,
    )


def to_pyg(subgraph: Subgraph) -> Data:
    """A `torch_geometric.data.Data` with `edge_index`, `edge_type`, `edge_label` and node masks."""
    from torch_geometric.data import Data

    def mask(rows: np.ndarray) -> torch.Tensor:
        found = torch.zeros(subgraph.num_nodes, dtype=torch.bool)
        found[torch.from_numpy(rows.astype(np.int64))] = True
        return found

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
    """A question from a PyG graph, for graphs that were built elsewhere.

    Args:
        data: with `edge_index`, `names` (one a node), and either `relations` (one name a fact) or
            `edge_type` together with `relation_names`; optionally `topic_mask`, `answer_mask`.
        id, text: of the question; answers: those that no node stands for.

    Returns:
        A question without given paths, so its labels follow the shortest-path rule.

    Raises:
        ValueError: names or relations are missing, or their number does not fit.
    """
    names = list(getattr(data, "names", None) or ())
    relations = list(getattr(data, "relations", None) or ())
    if not relations and getattr(data, "relation_names", None) is not None:
        relations = [data.relation_names[row] for row in data.edge_type.tolist()]
    heads, tails = data.edge_index.tolist()
    if len(names) != data.num_nodes or len(relations) != len(heads):
        raise ValueError(
            f"from_pyg: {data.num_nodes} nodes and {len(heads)} facts need as many names, got "
            f"{len(names)} entity names and {len(relations)} relation names"
        )
    triples = zip((names[h] for h in heads), relations, (names[t] for t in tails), strict=True)

    def marked(mask: torch.Tensor | None) -> tuple[str, ...]:
        return (
            () if mask is None else tuple(names[row] for row in mask.nonzero().flatten().tolist())
        )

    found = marked(getattr(data, "answer_mask", None))
    return Question(
        id=id,
        text=text,
        triples=tuple(dict.fromkeys(triples)),
        topics=marked(getattr(data, "topic_mask", None)),
        paths=(),
        answers=tuple(dict.fromkeys((*answers, *found))),
        line=0,
    )
