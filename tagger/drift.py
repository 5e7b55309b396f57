"""Drift: whether the texts that a run newly had answered differ from those of the 28 days before.

Shares are compared: of each tag, of refusals, and of texts without a tag. `docs/drift.md` has the test.
"""

import logging
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from tagger.dataset import Dataset
from tagger.exceptions import InputError, StorageError
from tagger.ledger import Latest
from tagger.rollup import SummaryFigures, read_rollup
from tagger.runs import File, is_trial
from tagger.storage import Storage

logger = logging.getLogger(__name__)

DAYS_BEFORE = 28

FALSE_ALARMS = 0.01
"""At most this part of the reports names a jump though nothing changed: of whole reports, not of single tags."""

LEAST_TEXTS = 30
"""A run with fewer is not compared; earlier ones are taken together until they have as many."""

LEAST_GROUPS = 5
"""With fewer of them before, how much runs differ by themselves is not known, and nothing is compared."""

LEAST_POINTS = 0.05
LEAST_FACTOR = 2.0
"""A jump is told of where it is as large as one of the two, however sure it is."""


class Drift(File):
    """A share that jumped."""

    what: Literal["tag", "refused", "none"]
    tag: str | None
    """The tag's id; None for the other two."""
    share: float
    """Of the texts newly answered in the run."""
    before: float
    """Of those in the runs of the 28 days before."""
    p: float
    """How often a report would have such a jump if nothing had changed, all its shares being compared."""
    texts: int
    """Newly answered in the run."""
    spec_changed: bool
    """Whether one of the runs before had another spec."""

    @property
    def name(self) -> str:
        """What jumped, as "tag cardiology"."""
        return {"tag": f"tag {self.tag}", "refused": "refusals", "none": "no tag"}[self.what]

    def __str__(self) -> str:
        """Return "tag cardiology on 31 % of 210 new texts, 12 % in the 28 days before (p = 0.0003)"."""
        p = "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.1g}"
        return (
            f"{self.name} on {_percent(self.share)} of {self.texts:,} new texts, {_percent(self.before)} "
            f"in the {DAYS_BEFORE} days before ({p})" + ("; the spec changed since" if self.spec_changed else "")
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.0995 else f"{100 * share:.2g} %"


class Count(NamedTuple):
    """How many of so many texts have something. Of a run that counts as a smaller one they are no whole numbers."""

    having: float
    texts: float


class Answers(NamedTuple):
    """Counts of the texts newly answered in a run, as its summary has them."""

    answered: int
    answered_refused: int
    answered_none: int
    answered_tags: dict[str, int]


def answers_of(outcomes: Iterable[Latest], tag_ids: Sequence[str]) -> Answers:
    """Count the texts that got an answer, of what became of all texts that were asked."""
    refused = none = tagged = 0
    tags: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.status == "refused":
            refused += 1
        elif outcome.status == "tagged":
            tagged += 1
            none += outcome.tags is not None and not outcome.tags  # of a row that was forgotten nobody knows
            tags.update(outcome.tags or ())
    return Answers(tagged + refused, refused, none, {tag: tags[tag] for tag in tag_ids if tags[tag]})


def find_drift(storage: Storage, dataset: Dataset, summary: SummaryFigures) -> list[Drift]:
    """Return the shares of a run that jumped, tags in file order; none where there is too little to compare with.

    What went before is read from the dataset's rollup, in one request. Where that is missing or damaged nothing is
    compared.
    """
    if not _is_comparable(summary):
        return []
    try:
        rollup = read_rollup(storage, dataset.dataset)
    except (InputError, StorageError) as e:
        logger.warning("%s: tag shares are not compared with those of earlier runs: %s", dataset.dataset, e)
        return []
    earlier = [run.summary for run in rollup.runs if run.summary is not None] if rollup else []
    return drift_of(summary, _before(summary, earlier), dataset.tag_ids)


def _is_comparable(summary: SummaryFigures) -> bool:
    return bool(summary.answered) and not summary.dry_run and not is_trial(summary.run_id)


def _before(summary: SummaryFigures, others: Iterable[SummaryFigures]) -> list[SummaryFigures]:
    """Return the runs that a run is compared with, oldest first."""
    start = summary.finished_at - timedelta(days=DAYS_BEFORE)
    return [
        other
        for other in others
        if _is_comparable(other) and other.run_id != summary.run_id and start <= other.finished_at < summary.finished_at
    ]


def drift_of(now: SummaryFigures, before: Sequence[SummaryFigures], tag_ids: Sequence[str]) -> list[Drift]:
    """Return the shares that jumped between earlier runs, oldest first, and this one."""
    things: list[tuple[Literal["tag", "refused", "none"], str | None]] = [("tag", tag) for tag in tag_ids]
    things += [("refused", None), ("none", None)]
    if (now.answered or 0) < LEAST_TEXTS:
        return []
    found: list[Drift] = []
    of_now = [_count(now, *thing) for thing in things]
    of_before = [_groups(_count(run, *thing) for run in before) for thing in things]
    if len(of_before[0]) < LEAST_GROUPS:
        return []
    chances = p_values(of_now, of_before)
    spec_changed = any(run.spec_id != now.spec_id for run in before)
    for (what, tag), count, groups, p in zip(things, of_now, of_before, chances, strict=True):
        share, earlier = count.having / count.texts, _share(groups)
        if p <= FALSE_ALARMS and _is_large(share, earlier):
            found.append(
                Drift(
                    what=what,
                    tag=tag,
                    share=share,
                    before=earlier,
                    p=p,
                    texts=int(count.texts),
                    spec_changed=spec_changed,
                )
            )
    return found


def _count(run: SummaryFigures, what: str, tag: str | None) -> Count:
    having = {"tag": run.answered_tags.get(tag or "", 0), "refused": run.answered_refused, "none": run.answered_none}
    return Count(having[what], run.answered or 0)


def _groups(runs: Iterable[Count]) -> list[Count]:
    """Take small runs together, in their order, so that each group has enough texts; a rest joins the last group."""
    groups: list[Count] = []
    rest = Count(0, 0)
    for run in runs:
        rest = Count(rest.having + run.having, rest.texts + run.texts)
        if rest.texts >= LEAST_TEXTS:
            groups.append(rest)
            rest = Count(0, 0)
    if rest.texts and groups:
        groups[-1] = Count(groups[-1].having + rest.having, groups[-1].texts + rest.texts)
    return groups


def _share(counts: Collection[Count]) -> float:
    return sum(count.having for count in counts) / sum(count.texts for count in counts)


def _is_large(share: float, before: float) -> bool:
    low, high = sorted((share, before))
    return high - low >= LEAST_POINTS or high >= LEAST_FACTOR * low


def p_values(now: Sequence[Count], before: Sequence[Sequence[Count]]) -> list[float]:
    """Return for each share, given as its count now and its counts before, how likely such a jump is by chance.

    They are corrected for their number (Holm). A run larger than the middle one of those before counts as one of its
    size: the texts of one run are alike, and more of them do not tell as much more. The dispersion of a share is its
    own or that of all shares together, whichever is larger: a rare tag's own is hardly known.
    """
    middle = statistics.median(run.texts for run in before[0])
    runs = [[_at_most(run, middle) for run in of_one] for of_one in before]
    own = [_dispersion(of_one) for of_one in runs]
    known = [dispersion for dispersion in own if dispersion is not None]
    common = max(1.0, statistics.fmean(known)) if known else 1.0
    return _holm(
        [
            _p_value(_at_most(count, middle), of_one, max(common, dispersion or 0))
            for count, of_one, dispersion in zip(now, runs, own, strict=True)
        ]
    )


def _p_value(now: Count, before: Sequence[Count], dispersion: float) -> float:
    """Return the largest p-value of three tests, each right where another is not.

    A quasi-binomial t-test knows that the dispersion is an estimate. Fisher's exact test, on counts divided by the
    dispersion, is right for rare tags; the beta-binomial's tail for rare tags that come in bursts.
    """
    from scipy.stats import betabinom, hypergeom, t  # type: ignore[import-untyped]

    earlier = Count(sum(run.having for run in before), sum(run.texts for run in before))
    overall = _share([now, earlier])
    if not 0 < overall < 1:
        return 1.0
    error = (dispersion * overall * (1 - overall) * (1 / now.texts + 1 / earlier.texts)) ** 0.5
    quasi = 2 * float(t.sf(abs(_share([now]) - _share([earlier])) / error, len(before) - 1))
    drawn, marked = round(now.texts / dispersion), round(now.having / dispersion)
    marked_of_all = marked + round(earlier.having / dispersion)
    exact = _both_sides(hypergeom, marked, drawn + round(earlier.texts / dispersion), marked_of_all, drawn)
    if dispersion == 1:
        return max(quasi, exact)
    texts_a_run = earlier.texts / len(before)
    alike = 1 / min(0.9, (dispersion - 1) / (texts_a_run - 1)) - 1
    texts, having = round(now.texts), round(now.having)
    return max(quasi, exact, _both_sides(betabinom, having, texts, overall * alike, (1 - overall) * alike))


def _both_sides(distribution: Any, count: int, *shape: float) -> float:
    return min(1.0, 2 * float(min(distribution.cdf(count, *shape), distribution.sf(count - 1, *shape))))


def _at_most(run: Count, texts: float) -> Count:
    return run if run.texts <= texts else Count(run.having * texts / run.texts, texts)


def _dispersion(runs: Sequence[Count]) -> float | None:
    """Return how much more runs vary than binomial counts do: Pearson's statistic a degree of freedom."""
    share = _share(runs)
    if not 0 < share < 1:
        return None
    pearson = sum((run.having - run.texts * share) ** 2 / (run.texts * share * (1 - share)) for run in runs)
    return pearson / (len(runs) - 1)


def _holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm), in the order given."""
    corrected = [1.0] * len(chances)
    so_far = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        so_far = max(so_far, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = so_far
    return corrected
