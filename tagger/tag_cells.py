"""Tags in the cell of a table: `a; b`, a JSON array where an id has a `;`, or `(none)`."""

import json
from collections.abc import Sequence
from typing import Any

NO_TAG = "(none)"
"""How a cell, and every figure, says that no tag fits."""


def tags_in_cell(tags: Sequence[str]) -> str:
    """Return tags as they stand in a cell: `a; b`, or as JSON where that would not come back the same."""
    if not tags:
        return NO_TAG
    plain = "; ".join(tags)
    reads_the_same = not plain.startswith("[") and tags_of_cell(plain) == list(tags)
    return plain if reads_the_same else json.dumps(list(tags), ensure_ascii=False)


def tags_of_cell(cell: str) -> list[str]:
    """Return the tags that stand in a cell; none in an empty one.

    Raises:
        ValueError: it begins like a JSON array, and is no array of texts.
    """
    cell = cell.strip()
    if cell == NO_TAG:
        return []
    if not cell.startswith("["):
        return [tag.strip() for tag in cell.split(";") if tag.strip()]
    try:
        tags = json.loads(cell)
    except RecursionError:
        raise ValueError from None
    if not are_tags(tags):
        raise ValueError
    return list(tags)


def are_tags(value: Any) -> bool:
    """Return whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(tag, str) for tag in value)
