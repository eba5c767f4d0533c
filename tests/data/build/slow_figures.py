"""The figures of files of questions, counted slowly: json, networkx, sets and the statistics."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import statistics
import unicodedata
from pathlib import Path

import networkx as nx


def rows_of(path: Path) -> list[dict]:
    """All rows of a valid file."""
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


def names_of(row: dict, *keys: str) -> list[str]:
    """The names of the first of some fields that has any."""
    for key in keys:
        value = row.get(key) or []
        names = [value] if isinstance(value, str) else value
        names = [name for name in dict.fromkeys(names) if name.strip()]
        if names:
            return names
    return []


def one_form(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", one_form(text))


def within(part: list[str], whole: list[str]) -> bool:
    return bool(part) and any(
        whole[start : start + len(part)] == part for start in range(len(whole))
    )


def positive_facts(graph: nx.Graph, facts: set, row: dict, topics: list, answers: list) -> set:
    """Facts between neighbours on some shortest path, else on some given path."""
    steps = set()
    for topic, answer in itertools.product(topics, answers):
        if topic in graph and answer in graph and nx.has_path(graph, topic, answer):
            for path in nx.all_shortest_paths(graph, topic, answer):
                steps |= {frozenset(pair) for pair in itertools.pairwise(path)}
    found = {fact for fact in facts if frozenset((fact[0], fact[2])) in steps}
    if found:
        return found
    steps = {
        frozenset(pair) for path in row.get("paths") or [] for pair in itertools.pairwise(path)
    }
    return {fact for fact in facts if frozenset((fact[0], fact[2])) in steps}


def slow_question(row: dict) -> dict:
    """What one question adds."""
    facts = {tuple(fact) for fact in row["triples"]}
    # A plain graph: a loop is on no shortest path, and parallel facts are one step.
    graph = nx.Graph((head, tail) for head, _, tail in facts)
    answers = names_of(row, "answer", "answers")
    topics = names_of(row, "topic_entities")
    from_paths = not topics and any(row.get("paths") or [])
    if from_paths:
        topics = list(dict.fromkeys(path[0] for path in row["paths"] if path))
    in_graph = [answer for answer in answers if answer in graph]
    hops = [
        nx.shortest_path_length(graph, topic, answer)
        for topic, answer in itertools.product(topics, in_graph)
        if topic in graph and nx.has_path(graph, topic, answer)
    ]
    forms = {one_form(name) for name in graph}
    positive = positive_facts(graph, facts, row, topics, answers)
    return {
        "counts": {
            "answers": len(answers),
            "answers_in_graph": len(in_graph),
            "answers_in_another_form": sum(
                answer not in graph and one_form(answer) in forms for answer in answers
            ),
            "with_answer_in_graph": bool(in_graph),
            "with_all_answers_in_graph": bool(answers) and len(in_graph) == len(answers),
            "with_answer_in_question": any(
                within(words(answer), words(row["question"])) for answer in answers
            ),
            "topics": len(topics),
            "topics_in_graph": sum(topic in graph for topic in topics),
            "with_topic_in_graph": any(topic in graph for topic in topics),
            "no_answer": not answers,
            "no_topic": not topics,
            "topics_from_paths": from_paths,
            "empty_graph": not facts,
            "empty_question": not row["question"].strip(),
            "duplicate_triples": len(row["triples"]) - len(facts),
            "positive_facts": len(positive),
            "labels_none": not positive,
        },
        "values": {
            "facts": len(facts),
            "entities": len(graph),
            "relations": len({relation for _, relation, _ in facts}),
            "positive_facts": len(positive),
            "answers": len(answers),
        },
        "hops": str(min(hops)) if hops else "no_path",
        "keys": {
            "id": {str(row["id"])} if row.get("id") not in (None, "") else set(),
            "text": {one_form(row["question"])} - {""},
            "text_and_graph": {(one_form(row["question"]), frozenset(facts))}
            if one_form(row["question"])
            else set(),
            "group": {str(row["group"])} if row.get("group") not in (None, "") else set(),
            "topic_and_answer": set(itertools.product(topics, answers)),
        },
    }


def slow_figures(rows: list[dict]) -> dict:
    """The figures of a file, as far as they can be counted by other means."""
    questions = [slow_question(row) for row in rows]
    counts = {
        name: sum(question["counts"][name] for question in questions)
        for name in (questions[0]["counts"] if questions else ())
    }
    relations = {relation for row in rows for _, relation, _ in row["triples"]}
    for key, name in (("text", "repeated_texts"), ("text_and_graph", "repeated_questions")):
        values = [value for question in questions for value in question["keys"][key]]
        counts[name] = len(values) - len(set(values))
    return {
        "counts": counts | {"questions": len(rows), "rows": len(rows), "relations": len(relations)},
        "hops": {
            hops: sum(question["hops"] == hops for question in questions)
            for hops in {question["hops"] for question in questions}
        },
        "per_question": {
            name: spread([question["values"][name] for question in questions])
            for name in questions[0]["values"]
        },
        "keys": {
            kind: set().union(*(question["keys"][kind] for question in questions))
            for kind in questions[0]["keys"]
        },
    }


def spread(values: list[int]) -> dict[str, float]:
    points = statistics.quantiles(values * 1, n=20, method="inclusive") if len(values) > 1 else []
    return {
        "min": min(values),
        "median": statistics.median(values),
        "p95": points[-1] if points else values[0],
        "max": max(values),
    }
