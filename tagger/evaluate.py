"""How good a dataset's tags are: labelled texts are tagged, those in the cache for nothing, and their tags measured."""

from collections import Counter
from collections.abc import Sequence

from tagger.cache import STAND_IN_MODEL, Record
from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.exceptions import RunFailed
from tagger.labels import Label, Labels
from tagger.price import usd
from tagger.quality import Figures, Quality, Reliability, Scores, TagQuality, Value, measure, reliability
from tagger.runs import TOO_LONG
from tagger.trial import run_trial

STAND_IN = (
    "these figures are of the offline stand-in, which is no LLM: it counts words of the tags' descriptions, "
    "and says nothing about a model"
)

WORST_TAGS = 15
"""Tags shown on a screen where there are more than `TAGS_ON_SCREEN`."""

TAGS_ON_SCREEN = 25

WORST_CASES = 50

PAIRS = 8
"""Confusions on a screen."""


class LabelCounts(Figures):
    """What became of the labels; `lines` says it in words."""

    name: str
    rows: int
    used: int
    unknown_rows: int
    blank: int
    examples: int
    absent: int
    repeated: int
    disagreeing: list[list[str]]
    kept_disagreeing: bool
    over_max: int
    lines: list[str]


class Review(Figures):
    """What the dataset's `review_below` would mark for review, of the measured texts, and what it would catch."""

    below: float
    texts: int
    right: int
    """Of these texts, those that have all their tags and no other."""
    others: int
    others_right: int


class Case(Figures):
    """A text whose tags are wrong, by its row."""

    row: str
    gold: list[str]
    predicted: list[str]
    refused: str | None
    """Why it was refused; None where it was not."""
    confidence: list[float] | None = None
    """Of its tags."""


class Evaluation(Figures):
    """All figures of an evaluation."""

    dataset: str
    spec_id: str
    model: str
    stand_in: bool
    """The figures are of the offline stand-in, which is no LLM."""
    seed: int
    labels: LabelCounts
    asked: int
    """Labelled texts: `quality.texts` of them are measured, `unanswered` are left out."""
    unanswered: int
    refused: dict[str, int]
    """Refused texts by reason; they are measured as texts without a tag."""
    cached: int
    """Texts that cost nothing now."""
    requests: int
    spent_usd: float | None
    cost_per_1000_usd: float | None
    """What 1,000 such texts cost where none is cached; None where the price of one is not known."""
    quality: Quality
    reliability: Reliability | None
    """Where the dataset asks for `confidence`."""
    review: Review | None
    """Where it has `review_below`."""
    worst: list[Case]


def evaluate(
    dataset: Dataset,
    labels: Labels,
    connections: Connections,
    *,
    name: str,
    seed: int = 0,
    max_cost_usd: float | None = None,
) -> Evaluation:
    """Have labelled texts tagged, and measure the tags. `name` is what the labels are called.

    Raises:
        InputError: something is not there, or a limit is set and the price is not known.
        RunFailed: it would cost more than the limits leave, or no text got an answer.
        LLMStopped: the endpoint refuses every call.
    """
    trial = run_trial(
        dataset,
        [label.text for label in labels.labels],
        connections,
        name="evaluate",
        row_ids=[label.row for label in labels.labels],
        max_cost_usd=max_cost_usd,
    )
    answers = [_answer(dataset, each, record) for each, record in zip(labels.labels, trial.records, strict=True)]
    answered = [(label, a) for label, a in zip(labels.labels, answers, strict=True) if a is not None]
    if not answered:
        raise RunFailed(f"{dataset.dataset}: none of {len(answers):,} labelled texts got an answer: nothing to measure")
    records = [record for record in trial.records if record is not None]
    costs = [record.cost_usd for record in records if record.cost_usd is not None]
    known = bool(costs) and len(costs) == len(records)
    return Evaluation(
        dataset=dataset.dataset,
        spec_id=trial.plan.spec_id,
        model=dataset.llm.model,
        stand_in=any(model == STAND_IN_MODEL for model in (dataset.llm.model, *(each.model for each in records))),
        seed=seed,
        labels=_counts(labels, name),
        asked=len(answers),
        unanswered=len(answers) - len(answered),
        refused=dict(Counter(a.refused for _, a in answered if a.refused is not None).most_common()),
        cached=trial.plan.cached,
        requests=trial.requests,
        spent_usd=trial.spent_usd,
        cost_per_1000_usd=1000 * sum(costs) / len(costs) if known else None,
        quality=measure(
            [label.tags for label, _ in answered], [a.predicted for _, a in answered], dataset.tag_ids, seed
        ),
        reliability=_reliability(answered),
        review=_review(dataset.review_below, [case for _, case in answered]),
        worst=sorted((a for label, a in answered if label.tags != set(a.predicted)), key=_wrongness)[:WORST_CASES],
    )


def _answer(dataset: Dataset, label: Label, record: Record | None) -> Case | None:
    """Return what a text got; None where it got no answer."""
    gold = [tag for tag in dataset.tag_ids if tag in label.tags]
    if record is not None:
        refused = (record.reason or "refused") if record.status == "refused" else None
        tags = [] if refused else record.tags
        confidence = record.confidence if tags else None
        return Case(row=label.row, gold=gold, predicted=tags, refused=refused, confidence=confidence)
    if len(label.text) > dataset.source.max_chars:
        return Case(row=label.row, gold=gold, predicted=[], refused=TOO_LONG)
    return None


def _wrongness(case: Case) -> tuple[int, float]:
    """Order cases: most wrong and missing tags first, then those that the LLM was surest of."""
    return -len(set(case.gold) ^ set(case.predicted)), -max(case.confidence or [0.0])


def _reliability(answered: Sequence[tuple[Label, Case]]) -> Reliability | None:
    given = [
        (sure, tag in label.tags)
        for label, case in answered
        for tag, sure in zip(case.predicted, case.confidence or [], strict=case.confidence is not None)
    ]
    return reliability([sure for sure, _ in given], [right for _, right in given])


def _review(below: float | None, cases: list[Case]) -> Review | None:
    if below is None:
        return None
    marked = [min(case.confidence or [1.0]) < below for case in cases]
    right = [set(case.gold) == set(case.predicted) for case in cases]
    caught = sum(m and r for m, r in zip(marked, right, strict=True))
    texts = sum(marked)
    return Review(below=below, texts=texts, right=caught, others=len(cases) - texts, others_right=sum(right) - caught)


def review_line(review: Review) -> str:
    """Say what `review_below` would mark, and how right these texts are and the others."""
    marked, others = review.right / max(review.texts, 1), review.others_right / max(review.others, 1)
    return (
        f"`review_below: {review.below:g}` marks {review.texts:,} texts, {100 * marked:.0f} % of them tagged "
        f"exactly right; of the {review.others:,} others {100 * others:.0f} % are"
    )


def _counts(labels: Labels, name: str) -> LabelCounts:
    return LabelCounts(
        name=name,
        rows=labels.rows,
        used=len(labels.labels),
        unknown_rows=labels.unknown_rows,
        blank=labels.blank,
        examples=labels.examples,
        absent=len(labels.absent),
        repeated=labels.repeated,
        disagreeing=labels.disagreeing,
        kept_disagreeing=labels.kept_disagreeing,
        over_max=labels.over_max,
        lines=labels.describe(),
    )


def describe(figures: Evaluation) -> list[str]:
    """Return an evaluation as lines to read, on one screen."""
    f, q = figures, figures.quality
    return [
        title(f),
        *([f"  NOTE     {STAND_IN}"] if f.stand_in else []),
        *(f"  labels   {line}" for line in f.labels.lines),
        f"  texts    {texts_line(f)}",
        f"  cost     {cost_line(f)}",
        f"  no tag   {untagged_line(q)}",
        "",
        *_table(q),
        "",
        *_pairs(q),
        *_reliability_table(f.reliability),
        *([f"  {review_line(f.review)}"] if f.review is not None else []),
    ]


def title(f: Evaluation) -> str:
    """Say what was measured."""
    labels = f"{f.labels.used:,} of {f.labels.rows:,} labels of {f.labels.name}"
    return f"{f.dataset} · {labels} · {f.model} · spec {f.spec_id}"


def untagged_line(q: Quality) -> str:
    """Say how many texts have no tag."""

    def share(texts: int) -> str:
        return f"{texts:,} ({100 * texts / q.texts:.1f} %)"

    should, got = share(q.gold_untagged), share(q.predicted_untagged)
    return f"{should} of the texts should have none, {got} got none, {q.both_untagged:,} of these rightly"


def texts_line(f: Evaluation) -> str:
    """Say what became of the texts, and how it counts."""
    told = f"{f.quality.texts:,} measured"
    if f.refused:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in f.refused.items())
        told += f"; {sum(f.refused.values()):,} of them refused ({reasons}), which counts as no tag"
    if f.unanswered:
        told += f"; {f.unanswered:,} more got no answer and are left out"
    return told


def cost_line(f: Evaluation) -> str:
    """Say what was spent, and what the texts cost."""
    per_1000 = "unknown" if f.cost_per_1000_usd is None else usd(f.cost_per_1000_usd)
    now = f"{usd(f.spent_usd)} spent now for {f.requests:,} requests, {f.cached:,} texts cached"
    return f"{now}; {per_1000} for 1,000 texts"


def worst_first(tags: list[TagQuality]) -> list[TagQuality]:
    """Order tags by F1, the lowest first; those without a value last."""
    return sorted(tags, key=lambda tag: (tag.f1.value is None, tag.f1.value or 0.0, -tag.support))


def macro_line(q: Quality) -> str:
    """Say what the macro averages leave out; nothing where they leave out nothing."""
    valueless = [tag.tag for tag in q.tags if None in (tag.precision.value, tag.recall.value)]
    if not valueless:
        return ""
    told = f"a figure without a value is `-` and left out of its macro average ({len(valueless):,} tags have one"
    return told + (f"; {len(q.unseen):,} no text has or got)" if q.unseen else ")")


def _table(q: Quality) -> list[str]:
    ordered = worst_first(q.tags)
    shown = ordered if len(ordered) <= TAGS_ON_SCREEN else ordered[:WORST_TAGS]
    width = min(max(len(tag.tag) for tag in shown), 32)
    width = max(width, len("exact match"))
    head = f"  {'tag':<{width}} {'texts':>6} {'given':>6}  " + "".join(
        f"{x:<22}" for x in ("precision", "recall", "F1")
    )

    def line(name: str, texts: str, given: str, scores: Scores) -> str:
        values = "".join(f"{shown_value(x):<22}" for x in (scores.precision, scores.recall, scores.f1))
        return f"  {name[:width]:<{width}} {texts:>6} {given:>6}  {values}".rstrip()

    lines = [head.rstrip(), line("micro", "", "", q.micro), line("macro", "", "", q.macro)]
    lines.append(f"  {'exact match':<{width}} {'':>6} {'':>6}  {shown_value(q.exact_match)}")
    lines += [line(tag.tag, f"{tag.support:,}", f"{tag.predicted:,}", tag) for tag in shown]
    if len(shown) < len(ordered):
        lines.append(f"  the {len(shown)} worst of {len(ordered)} tags; `--json` and `--html` have all")
    if told := macro_line(q):
        lines.append(f"  {told}")
    return lines


def shown_value(value: Value) -> str:
    """Return `0.812 [0.790, 0.833]`; the brackets hold the 95 % interval."""
    return "-" if value.value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _pairs(q: Quality) -> list[str]:
    if not q.confusions:
        return ["  no tag was given instead of another"]
    lines = ["  most often confused: should have → got instead"]
    for pair in q.confusions[:PAIRS]:
        lines.append(f"  {pair.texts:>6,} of {pair.support:>6,}  {pair.gold} → {pair.given}")
    return lines


def _reliability_table(table: Reliability | None) -> list[str]:
    if table is None:
        return []
    lines = ["", f"  confidence: {table.tags:,} tags, expected calibration error {table.ece:.3f}"]
    lines.append(f"  {'from':>6} {'to':>6} {'tags':>8} {'mean':>6} {'right':>6}")
    for each in table.bins:
        values = f"{each.tags:>8,} {each.mean_confidence:>6.2f} {100 * each.right:>4.0f} %"
        lines.append(f"  {each.low:>6.1f} {each.high:>6.1f} {values}")
    return lines
