"""Word lists and question wordings of the invented questions."""

from __future__ import annotations


def _split(text: str, mark: str | None = None) -> tuple[str, ...]:
    """Splits a text at a mark, or at white space without one, and joins broken lines."""
    return tuple(" ".join(part.split()) for part in text.split(mark))


NOUNS = _split(
    """
    capital language currency spouse author director sibling parent founder birthplace
    employer genre location river mountain team coach sponsor school mentor editor producer
    neighbor partner rival owner tenant member leader hometown album actor award character
    child college composer continent country county film flag government industry instrument
    label mayor nationality party people place player position profession religion series song
    sport starring state student subject writer
    """
)
DOMAINS = _split(
    """
    people person location country film sports team music artist book work award organization
    military
    """
)
PARTICIPLES = _split(
    """
    written by | directed by | born in | located in | founded by | owned by | married to |
    played by | made by | based in | part of | member of | contained by | preceded by | used
    in | spoken in | works for | plays for | won by | named after
    """,
    "|",
)
FORWARD_NOUN = _split(
    """
    what is the {r} of {x}? | who is the {r} of {x}? | what is {x}'s {r}? | which {r} does {x}
    have? | what {r} did {x} have | name the {r} of {x}. | what was the {r} of {x}? | who was
    {x} {r} | where is the {r} of {x}? | for {x}, what is the {r}? | {x} {r}?
    """,
    "|",
)
INVERSE_NOUN = _split(
    """
    which has {r} {x}? | what has {x} as its {r}? | who has the {r} {x}? | whose {r} is {x}? |
    {x} is the {r} of what? | of which is {x} the {r}?
    """,
    "|",
)
FORWARD_PARTICIPLE = _split(
    """
    what is {x} {r}? | {x} is {r} what? | who was {x} {r}? | where is {x} {r} | {x} was {r}
    which one?
    """,
    "|",
)
INVERSE_PARTICIPLE = _split(
    """
    what is {r} {x}? | which one is {r} {x}? | who was {r} {x}? | name what is {r} {x}. | what
    are the ones {r} {x}
    """,
    "|",
)
