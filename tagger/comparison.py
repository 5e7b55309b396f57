"""What `tagger compare` finds, in figures: both sides, their difference, and what moving to B takes."""

from typing import Literal

from tagger.agreement import Agreement, Part
from tagger.quality import Value


class Side(Part):
    """What one of the two did. Tokens and cost are means over the distinct texts; None where they are not known."""

    file: str
    spec_id: str
    model: str
    refused: int
    """Texts that are too long among them."""
    unanswered: int
    untagged: float
    """Share of the answered texts that no tag fits; refused ones are not among them."""
    requests: int
    """Made now."""
    spent_usd: float | None
    """Now."""
    cost_a_text_usd: float | None
    """At today's price, asked online."""
    input_tokens_a_text: float | None
    output_tokens_a_text: float | None
    seconds_a_text: float | None
    """From request to answer; None where all was cached."""
    exact_match: Value | None = None
    micro_f1: Value | None = None
    macro_f1: Value | None = None


class Difference(Part):
    """The quality of B minus that of A, over the same texts, with paired bootstrap intervals."""

    exact_match: Value
    micro_f1: Value
    macro_f1: Value
    only_a_right: int
    """Texts that got all their tags and no other in A alone."""
    only_b_right: int
    p_value: float
    """McNemar's exact test of these two."""


class Moving(Part):
    """What it takes to have the whole table tagged as B does."""

    texts: int | None = None
    of: Literal["target", "source"] = "target"
    """Where they are counted: distinct texts of `target` that another spec tagged, or rows of `source`."""
    usd: float | None = None
    batch: bool = False
    problem: str | None = None
    """Why it is not known."""


class Example(Part):
    """A row whose tags differ."""

    row: str
    a: list[str]
    b: list[str]


class Comparison(Part):
    """Everything that `tagger compare` found."""

    dataset: str
    a: Side
    b: Side
    changed: list[str]
    """What differs in the spec, in words."""
    tags_only_in_a: list[str]
    tags_only_in_b: list[str]
    origin: str
    seed: int
    left_out: list[str]
    is_stand_in: bool
    """The offline stand-in answered, which is no LLM."""
    agreement: Agreement
    difference: Difference | None
    """None without labels."""
    moving: Moving
    examples: list[Example]
