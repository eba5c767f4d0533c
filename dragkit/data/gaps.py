"""What the questions of a file lack to learn from: counted while packing, said when opened."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from dragkit.data.question_file import Question
from dragkit.data.subgraph import Subgraph

_MAX_SHOWN = 60
# A search for a similar name takes about 50 microseconds for each.
_MAX_COMPARED = 10_000
# Why a question has no positive fact.
REASONS = {
    "no_fact": "{} without facts",
    "no_answer": "{} without an answer",
    "other_form": "{} whose answer differs from an entity in letter case or Unicode form alone",
    "not_in_graph": "{} with no answer among the entities of the graph",
    "topic_not_in_graph": "{} with no topic among the entities of the graph",
    "no_path": "{} without a path from a topic to an answer",
}


def _shown(text: str) -> str:
    # Escapes tell two Unicode forms of one name apart.
    text = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return repr(text) if unicodedata.is_normalized("NFC", text) else ascii(text)


def folded(name: str) -> str:
    """Returns a name without differences of letter case, Unicode form and spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


class LabelGaps:
    """Counts the questions without a positive fact by reason, with an example of each.

    Attributes:
        counts: number of questions by reason, see `REASONS`.
        examples: what the first question of a reason shows, by reason.
    """

    def __init__(
        self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None
    ) -> None:
        self.counts = Counter(counts or {})
        self.examples = dict(examples or {})

    def add(self, question: Question, graph: Subgraph) -> None:
        """Counts a question if it has no positive fact."""
        if graph.label_source != "none":
            return
        reason = _reason(question, graph)
        self.counts[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = f"line {question.line}{_example(reason, question, graph)}"

    def update(self, later: LabelGaps) -> None:
        """Adds the questions of later lines."""
        self.counts.update(later.counts)
        self.examples = later.examples | self.examples

    def __str__(self) -> str:
        """All reasons with their counts and examples, the most frequent first."""
        return "; ".join(
            f"{REASONS[reason].format(count)} ({self.examples[reason]})"
            for reason, count in self.counts.most_common()
        )


def other_forms(question: Question, graph: Subgraph) -> Iterator[tuple[str, str]]:
    """Yields the answers that are no entity but another form of one, each with that entity."""
    if len(graph.answers) == len(question.answers):
        return
    names = set(graph.names)
    entity_of = {folded(name): name for name in graph.names}
    for answer in question.answers:
        if answer not in names and (entity := entity_of.get(folded(answer))) is not None:
            yield answer, entity


def _reason(question: Question, graph: Subgraph) -> str:
    if not graph.num_facts:
        return "no_fact"
    if not question.answers:
        return "no_answer"
    if not len(graph.answers):
        return "other_form" if any(other_forms(question, graph)) else "not_in_graph"
    return "no_path" if len(graph.topics) else "topic_not_in_graph"


def _example(reason: str, question: Question, graph: Subgraph) -> str:
    if reason == "other_form":
        answer, entity = next(other_forms(question, graph))
        return f": answer {_shown(answer)}, entity {_shown(entity)}"
    kind, names = {
        "not_in_graph": ("answer", question.answers),
        "topic_not_in_graph": ("topic", question.topics),
    }.get(reason, ("", ()))
    if not names:
        return ""
    near = difflib.get_close_matches(names[0], graph.names[:_MAX_COMPARED], n=1) or graph.names[:2]
    return f": {kind} {_shown(names[0])}, entities such as {', '.join(map(_shown, near))}"


def describe_unread(unread: Iterable[tuple[str, str, int]], *, all_keys: bool = False) -> str:
    """Names the keys that are not read and seem to mean one that is missing, with their counts.

    Args:
        unread: key, the field that it seems to mean ("" for none), number of questions.
        all_keys: also name the keys that mean no field.

    Returns:
        An empty text if there are none.
    """
    return ", ".join(
        f"`{key}`{f' for `{field}`' if field else ''} ({count} questions)"
        for key, field, count in sorted(unread, key=lambda entry: (not entry[1], -entry[2]))[:8]
        if field or all_keys
    )
