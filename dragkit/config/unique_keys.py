"""JSON objects whose keys are unique."""

from __future__ import annotations

from collections import Counter


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Makes the dictionary of a JSON object, as an `object_pairs_hook` of the json module.

    Raises:
        ValueError: a key is given twice. The module would silently keep its last value.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} is given twice")
    return row
