"""What differs in the spec of two dataset files, in words."""

from tagger.dataset import Dataset
from tagger.spec import spec_of

NAMED = 8
"""Tags named where there may be many."""


def spec_difference(a: Dataset, b: Dataset) -> list[str]:
    """Return what differs in the spec, in words, with the values where they are short."""
    from tagger.changes import PARTS

    old, new = spec_of(a), spec_of(b)
    lines = []
    for part in dict.fromkeys([*PARTS, *old, *new]):
        before, after = old.get(part), new.get(part)
        name = PARTS.get(part, f"`{part}`")
        if before == after:
            continue
        if part == "tags":
            lines.append(f"{name}: {_changed_tags(a, b)}")
        elif isinstance(after or before, str | int | float) and part != "prompt":
            lines.append(f"{name}: {before} → {after}")
        else:
            lines.append(name)
    return lines


def _changed_tags(a: Dataset, b: Dataset) -> str:
    old, new = ({tag.id: tag.description.strip() for tag in each.tags} for each in (a, b))
    groups = {
        "only in A": [tag for tag in old if tag not in new],
        "only in B": [tag for tag in new if tag not in old],
        "another description": [tag for tag in old if tag in new and old[tag] != new[tag]],
    }
    return "; ".join(f"{words} {_some(tags)}" for words, tags in groups.items() if tags) or "another order"


def _some(tags: list[str]) -> str:
    more = f" and {len(tags) - NAMED:,} more" if len(tags) > NAMED else ""
    return ", ".join(f"`{tag}`" for tag in tags[:NAMED]) + more
