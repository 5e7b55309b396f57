"""How far two taggings of the same texts agree, tag by tag, and where the tags of one go in the other."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from tagger.tag_cells import NO_TAG

Tags = Sequence[Collection[str]]
"""The tags of each text."""


class Part(BaseModel):
    """Base of what is printed as JSON."""

    model_config = ConfigDict(frozen=True)


class TagAgreement(Part):
    """One tag: how many texts have it in A, in B, in both, in B alone (gained) and in A alone (lost)."""

    tag: str
    a: int
    b: int
    both: int
    gained: int
    lost: int
    kappa: float | None
    """Cohen's kappa; None where neither or both give it to every text."""


class Move(Part):
    """A tag that texts lost, and one that they gained instead; `(none)` where nothing was lost or gained."""

    a: str
    b: str
    texts: int


class Agreement(Part):
    """All figures of texts that both A and B answered."""

    texts: int
    changed: int
    """Texts whose tags differ in any way."""
    same: float
    """Share of the texts with the same tags."""
    changed_low: float
    changed_high: float
    """95 % interval (Wilson's) of the share that differs."""
    jaccard: float
    """Mean Jaccard index of a text's tags in A and in B; 1 where both give none."""
    tags: list[TagAgreement]
    """Those that changed for most texts first."""
    moves: list[Move]
    """The most frequent first."""


def agreement(a: Tags, b: Tags, tag_ids: Sequence[str]) -> Agreement:
    """Return how far A and B agree on texts, of which there is at least one."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]
    from sklearn.metrics import jaccard_score  # type: ignore[import-untyped]

    in_a, in_b = _matrix(a, tag_ids), _matrix(b, tag_ids)
    changed = int((in_a != in_b).any(axis=1).sum())
    wilson = binomtest(changed, len(a)).proportion_ci(method="wilson")
    tags = [_of_tag(tag, in_a[:, i], in_b[:, i]) for i, tag in enumerate(tag_ids)]
    return Agreement(
        texts=len(a),
        changed=changed,
        same=1 - changed / len(a),
        changed_low=float(wilson.low),
        changed_high=float(wilson.high),
        jaccard=float(jaccard_score(in_a, in_b, average="samples", zero_division=1.0)),
        tags=sorted(tags, key=lambda each: -(each.gained + each.lost)),
        moves=_moves(a, b),
    )


def _matrix(tags: Tags, tag_ids: Sequence[str]) -> Any:
    import numpy as np

    place = {tag: i for i, tag in enumerate(tag_ids)}
    matrix = np.zeros((len(tags), len(tag_ids)), dtype=np.int8)
    for text, each in enumerate(tags):
        matrix[text, [place[tag] for tag in each]] = 1
    return matrix


def _of_tag(tag: str, in_a: Any, in_b: Any) -> TagAgreement:
    from sklearn.metrics import cohen_kappa_score

    a, b, both = int(in_a.sum()), int(in_b.sum()), int((in_a & in_b).sum())
    is_constant = a == b == both and a in (0, len(in_a))  # 0/0
    kappa = None if is_constant else float(cohen_kappa_score(in_a, in_b, labels=[0, 1]))
    return TagAgreement(tag=tag, a=a, b=b, both=both, gained=b - both, lost=a - both, kappa=kappa)


def _moves(a: Tags, b: Tags) -> list[Move]:
    pairs: Counter[tuple[str, str]] = Counter()
    for before, after in zip(a, b, strict=True):
        lost, gained = set(before) - set(after), set(after) - set(before)
        if lost or gained:
            pairs.update((old, new) for old in lost or {NO_TAG} for new in gained or {NO_TAG})
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return [Move(a=old, b=new, texts=texts) for (old, new), texts in ordered]


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the p-value of McNemar's exact test: of texts that A alone has right, and B alone."""
    from scipy.stats import binomtest

    return float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
