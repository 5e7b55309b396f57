"""How good tags are, against the tags that texts should have: scikit-learn's figures, with bootstrap intervals.

A figure that has no value (the precision of a tag that was never given, the recall of one that no text has) is None. It
is left out of macro averages, as scikit-learn does with `zero_division=nan`.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # type: ignore[import-untyped]
from sklearn.preprocessing import MultiLabelBinarizer  # type: ignore[import-untyped]

from tagger.tag_cells import NO_TAG

RESAMPLES = 1000

RESAMPLES_AT_ONCE = 100
"""Bounds the memory that weights take: so many for each text."""

INTERVAL = (2.5, 97.5)
"""Percentiles of the resamples: 95 % of them lie between."""

BINS = 10
"""Of the reliability table."""

Floats = npt.NDArray[np.float64]
Tags = Sequence[Collection[str]]
"""The tags of each text."""


class Figures(BaseModel):
    """Base of what is printed as JSON."""

    model_config = ConfigDict(frozen=True)


class Value(Figures):
    """A figure and its 95 % interval; None where it has no value."""

    value: float | None
    low: float | None
    high: float | None


class Scores(Figures):
    """Precision, recall and their harmonic mean."""

    precision: Value
    recall: Value
    f1: Value


class TagQuality(Scores):
    """One tag."""

    tag: str
    support: int
    """Texts that should have it."""
    predicted: int
    """Texts that got it."""
    right: int
    """Texts that should have it, and got it."""


class Confusion(Figures):
    """A tag that texts should have and did not get, and one that they got instead; `(none)` stands for no tag."""

    gold: str
    given: str
    texts: int
    support: int
    """Texts that should have the first."""


class Quality(Figures):
    """All figures of one set of texts."""

    texts: int
    tags: list[TagQuality]
    """In the order of the dataset file."""
    micro: Scores
    macro: Scores
    exact_match: Value
    """Share of the texts that got all their tags and no other."""
    unseen: list[str]
    """Tags that no text has or got: no figure has a value for them."""
    gold_untagged: int
    """Texts that should have no tag."""
    predicted_untagged: int
    """Texts that got none."""
    both_untagged: int
    confusions: list[Confusion]
    """The most frequent first."""


@dataclass(frozen=True)
class PerText:
    """A row for each text, and a column for each tag and an empty one: which it should have, which it got, and both."""

    gold: Any
    predicted: Any
    right: Any
    exact: Floats
    """1 for each text that got all its tags and no other, else 0."""

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return len(self.exact)


@dataclass(frozen=True)
class Resampled:
    """The figures of each resample: NaN where one has no value. Rows of the tags' arrays are resamples.

    Two of equal size and seed are of the same resamples, so that their differences are paired.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    micro_precision: Floats
    micro_recall: Floats
    micro_f1: Floats
    macro_precision: Floats
    macro_recall: Floats
    macro_f1: Floats
    exact_match: Floats


def measure(gold: Tags, predicted: Tags, tag_ids: Sequence[str], seed: int) -> Quality:
    """Return the quality of the tags that texts got (`predicted`), against those that they should have (`gold`)."""
    texts = per_text(gold, predicted, tag_ids)
    drawn = resampled(texts, seed)
    figures = {"zero_division": np.nan}
    each = precision_recall_fscore_support(texts.gold, texts.predicted, average=None, **figures)
    micro = precision_recall_fscore_support(texts.gold, texts.predicted, average="micro", **figures)
    macro = precision_recall_fscore_support(texts.gold, texts.predicted, average="macro", **figures)
    given, right = (np.asarray(each.sum(axis=0)).ravel() for each in (texts.predicted, texts.right))
    support = {tag: int(count) for tag, count in zip(tag_ids, each[3], strict=False)}
    untagged = sum(not tags for tags in gold)
    tags = [
        TagQuality(
            tag=tag,
            support=support[tag],
            predicted=int(given[i]),
            right=int(right[i]),
            precision=interval(each[0][i], drawn.precision[:, i]),
            recall=interval(each[1][i], drawn.recall[:, i]),
            f1=interval(each[2][i], drawn.f1[:, i]),
        )
        for i, tag in enumerate(tag_ids)
    ]
    return Quality(
        texts=texts.texts,
        tags=tags,
        micro=Scores(
            precision=interval(micro[0], drawn.micro_precision),
            recall=interval(micro[1], drawn.micro_recall),
            f1=interval(micro[2], drawn.micro_f1),
        ),
        macro=Scores(
            precision=interval(macro[0], drawn.macro_precision),
            recall=interval(macro[1], drawn.macro_recall),
            f1=interval(macro[2], drawn.macro_f1),
        ),
        exact_match=interval(accuracy_score(texts.gold, texts.predicted), drawn.exact_match),
        unseen=[tag.tag for tag in tags if not tag.support and not tag.predicted],
        gold_untagged=untagged,
        predicted_untagged=sum(not each for each in predicted),
        both_untagged=sum(not g and not p for g, p in zip(gold, predicted, strict=True)),
        confusions=_confusions(gold, predicted, {**support, NO_TAG: untagged}),
    )


def per_text(gold: Tags, predicted: Tags, tag_ids: Sequence[str]) -> PerText:
    """Return the tags as matrices."""
    # one column more, always empty: scikit-learn takes a single one for no matrix of labels
    binarizer = MultiLabelBinarizer(classes=[*tag_ids, ""], sparse_output=True)
    binarizer.fit([])
    should, got = (sp.csr_matrix(binarizer.transform(tags), dtype=np.int64) for tags in (gold, predicted))
    exact = np.fromiter((set(g) == set(p) for g, p in zip(gold, predicted, strict=True)), dtype=np.float64)
    return PerText(should, got, should.multiply(got).tocsr(), exact)


def weights(texts: int, seed: int, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Yield how often each text stands in each resample, some resamples (rows) at a time."""
    chance = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - start)
        yield chance.multinomial(texts, np.full(texts, 1 / texts), size=size).astype(np.float64)


def resampled(texts: PerText, seed: int, resamples: int = RESAMPLES) -> Resampled:
    """Return the figures of resamples: as many texts, drawn with replacement."""
    parts = [weighted(texts, part) for part in weights(texts.texts, seed, resamples)]
    names = Resampled.__dataclass_fields__
    return Resampled(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def weighted(texts: PerText, weight: Floats) -> Resampled:
    """Return the figures where texts count so often; one row of weights a resample."""
    right, gold, predicted = ((each.T @ weight.T).T for each in (texts.right, texts.gold, texts.predicted))
    precision, recall, f1 = _divide(right, predicted), _divide(right, gold), _divide(2 * right, gold + predicted)
    right_sum, gold_sum, predicted_sum = right.sum(axis=1), gold.sum(axis=1), predicted.sum(axis=1)
    return Resampled(
        precision=precision,
        recall=recall,
        f1=f1,
        micro_precision=_divide(right_sum, predicted_sum),
        micro_recall=_divide(right_sum, gold_sum),
        micro_f1=_divide(2 * right_sum, gold_sum + predicted_sum),
        macro_precision=_mean(precision),
        macro_recall=_mean(recall),
        macro_f1=_mean(f1),
        exact_match=weight @ texts.exact / weight.sum(axis=1),
    )


def _divide(above: Floats, below: Floats) -> Floats:
    result: Floats = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _mean(values: Floats) -> Floats:
    """Return each row's mean over what has a value."""
    there = ~np.isnan(values)
    return _divide(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))


def interval(value: float, draws: Floats) -> Value:
    """Return a figure with the percentile interval of its resamples, those without a value aside."""
    draws = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(draws):
        return Value(value=None, low=None, high=None)
    low, high = np.percentile(draws, INTERVAL)
    return Value(value=float(value), low=float(low), high=float(high))


def _confusions(gold: Tags, predicted: Tags, support: dict[str, int]) -> list[Confusion]:
    """Count the pairs of a missing tag and a wrong one; a text without any tag has `(none)` in place of one."""
    pairs: Counter[tuple[str, str]] = Counter()
    for should, got in zip(gold, predicted, strict=True):
        missing = set(should) - set(got) if should else {NO_TAG}
        wrong = set(got) - set(should) if got else {NO_TAG}
        pairs.update((m, w) for m in missing for w in wrong if m != w)
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return [Confusion(gold=m, given=w, texts=count, support=support[m]) for (m, w), count in ordered]


class Bin(Figures):
    """Tags whose confidence lies above `low` and up to `high`."""

    low: float
    high: float
    tags: int
    mean_confidence: float
    right: float
    """Share of the tags that the text should have."""


class Reliability(Figures):
    """What the values of `confidence` are worth: those of all tags given."""

    tags: int
    mean_confidence: float
    right: float
    bins: list[Bin]
    """Those that have a tag."""
    ece: float
    """Expected calibration error: the mean distance between confidence and share right, by the bins' sizes."""


def reliability(confidence: Sequence[float], right: Sequence[bool]) -> Reliability | None:
    """Return the reliability table of tags, given how sure the LLM was of each; None where there is none."""
    if not confidence:
        return None
    from sklearn.calibration import calibration_curve  # type: ignore[import-untyped]

    sure, truth = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.int64)
    share, mean = calibration_curve(truth, sure, n_bins=BINS, strategy="uniform", pos_label=1)
    edges = np.linspace(0, 1, BINS + 1)
    sizes = np.bincount(np.searchsorted(edges[1:-1], sure), minlength=BINS)  # its bins
    bins = [
        Bin(
            low=round(float(edges[place]), 3),
            high=round(float(edges[place + 1]), 3),
            tags=int(sizes[place]),
            mean_confidence=float(mean[i]),
            right=float(share[i]),
        )
        for i, place in enumerate(np.flatnonzero(sizes))
    ]
    return Reliability(
        tags=len(sure),
        mean_confidence=float(sure.mean()),
        right=float(truth.mean()),
        bins=bins,
        ece=sum(each.tags * abs(each.mean_confidence - each.right) for each in bins) / len(sure),
    )
