"""What holds for whatever comes in."""

from collections.abc import Sequence

from tagger.dataset import Dataset
from tests.fuzz.hostile import MARKER

LONGEST_LINE = 1500
"""Characters of a line that is to be read."""


def assert_clear(error: BaseException, *, lines: int = 1, may_show: bool = False) -> None:
    """Assert that an error is so many lines to read and, unless it `may_show` them, shows no text, answer or secret."""
    told = str(error).split("\n")
    assert len(told) == lines, f"{len(told)} lines"
    assert all(line.strip() and line.isprintable() and len(line) < LONGEST_LINE for line in told), "a line"
    assert may_show or MARKER not in str(error), "it shows the marker"
    assert error.__cause__ is None, "it keeps its cause"


def assert_allowed(dataset: Dataset, tags: Sequence[str] | None) -> None:
    """Assert that tags are an answer that the dataset allows."""
    assert tags is not None, "no list of tags"
    assert set(tags) <= set(dataset.tag_ids), "a tag outside the enum"
    assert len(set(tags)) == len(tags), "a tag twice"
    assert len(tags) <= dataset.max_tags, "too many tags"
    assert tags or dataset.allow_none, "no tag"
