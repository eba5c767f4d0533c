"""Names and questions as a prompt writes them, so that each is one line and can be read back."""

from __future__ import annotations

import re

# Separates the answers of a target. `read_names` splits generated text at its bar.
ANSWER_DELIMITER = " | "

_BAR = re.compile(r"(\\*)\|")


def written_name(text: str) -> str:
    r"""Returns a text of the data as it stands in a prompt.

    A line ends a fact or an answer, and a bar ends an answer. So line ends become one space, and
    each bar gets a backslash: `a|b` is written `a\|b`. Backslashes before a bar are doubled. Other
    texts stay as they are.
    """
    if text.splitlines() not in ([], [text]):
        lines = (line.strip() for line in text.splitlines())
        text = " ".join(line for line in lines if line)
    return _BAR.sub(r"\1\1\\|", text) if "|" in text else text


def read_names(line: str) -> list[str]:
    """Splits a line at its bars and undoes `written_name`. Returns stripped, non-empty names."""
    names, name, end = [], "", 0
    for bar in _BAR.finditer(line):
        backslashes = len(bar[1])
        name += line[end : bar.start()] + "\\" * (backslashes // 2)
        end = bar.end()
        if backslashes % 2:
            name += "|"
        else:
            names.append(name)
            name = ""
    names.append(name + line[end:])
    return [name for name in map(str.strip, names) if name]
