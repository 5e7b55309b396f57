"""`tagger compare`: two dataset files tag the same texts, and what that changes is measured, priced and judged."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import sqlalchemy as sa

from tagger.agreement import agreement, mcnemar
from tagger.cache import STAND_IN_MODEL, Record, Usage
from tagger.changes import PARTS, target_rows
from tagger.comparison import Comparison, Difference, Example, Moving, Side
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, InputError, RunFailed
from tagger.labels import read_labels
from tagger.price import cost_usd, price_of, usd
from tagger.quality import Value, interval, measure, per_text, resampled
from tagger.snapshot import SourceTable
from tagger.spec import normalise, spec_id
from tagger.spec_difference import spec_difference
from tagger.tables import connecting, reflect
from tagger.trial import Trial, run_trial, sample_of_source

logger = logging.getLogger(__name__)

EXAMPLES = 10

LEAST_USD = 1e-9
"""A limit that leaves nothing: a limit of 0 is none."""


@dataclass(frozen=True)
class Candidate:
    """One of the two files."""

    file: str
    dataset: Dataset

    @property
    def spec(self) -> str:
        """Its spec id."""
        return spec_id(self.dataset)


class Row(NamedTuple):
    """A text that both are asked for, and its gold tags where there are labels."""

    name: str
    text: str
    gold: frozenset[str] | None

    def __repr__(self) -> str:
        return f"Row({self.name})"


class Answer(NamedTuple):
    """What a text got; a refused one has no tag."""

    tags: list[str]
    is_refused: bool


class Pair(NamedTuple):
    """A text that both answered."""

    row: Row
    a: Answer
    b: Answer


@dataclass(frozen=True)
class Rows:
    """The texts that both are asked for, and where they come from."""

    rows: list[Row]
    origin: str
    """In words."""
    of_source: bool
    """Whether they are rows of the source for certain: a text in labels may stand nowhere else."""
    left_out: list[str]
    """What became of labels that are not used, in words."""


def compare(
    a: Candidate,
    b: Candidate,
    connections: Connections,
    *,
    labels: Path | None = None,
    sample: int = 200,
    seed: int = 0,
    max_cost_usd: float | None = None,
    ignore_unknown: bool = False,
    keep_disagreeing: bool = False,
) -> Comparison:
    """Ask A and B for the tags of the same texts, those that the cache has aside, and compare the answers.

    What both will cost is known before the first call, and `max_cost_usd` is for both together. Without it they are
    held to the lower limit of the two files.

    Raises:
        InputError: A and B have one spec or not one source, or there is no text to compare by.
        RunFailed: they would cost more than the limit leaves, or not one text was answered by both.
    """
    _check(a, b, sample)
    if labels is None:
        rows = _sampled(a, sample, seed, connections)
    else:
        rows = _labelled(a, b, labels, sample, seed, connections, ignore_unknown, keep_disagreeing)
    trials = _ask(a, b, [row.text for row in rows.rows], connections, max_cost_usd)
    return _compared(a, b, rows, trials, seed, connections)


def _check(a: Candidate, b: Candidate, sample: int) -> None:
    if sample < 1:
        raise InputError(f"`--sample`: found {sample}, expected at least 1")
    if a.spec == b.spec:
        raise InputError(
            f"{a.file} and {b.file} have the same spec ({a.spec}): nothing in them changes an answer, so there is "
            f"nothing to compare; expected another {', '.join(name.removeprefix('the ') for name in PARTS.values())}"
        )
    for name in ("conn_id", "table", "id_column", "text_columns"):
        in_a, in_b = getattr(a.dataset.source, name), getattr(b.dataset.source, name)
        if in_a != in_b:
            raise InputError(
                f"`source.{name}`: found {in_a!r} in {a.file} and {in_b!r} in {b.file}; expected one source, "
                "for both are asked for the same texts"
            )


def _sampled(a: Candidate, size: int, seed: int, connections: Connections) -> Rows:
    table = a.dataset.source.table
    found = sample_of_source(a.dataset, size, seed, connections)
    rows = [Row(str(row_id), text, None) for row_id, text in found.items() if normalise(text)]
    if not rows:
        raise InputError(f"`source.table`: {table} has no row with a text in a sample of {size}; nothing to compare by")
    return Rows(rows, f"{len(rows):,} rows of `{table}`, drawn at random (seed {seed})", True, [])


def _labelled(
    a: Candidate,
    b: Candidate,
    labels: Path,
    size: int,
    seed: int,
    connections: Connections,
    ignore_unknown: bool,
    keep_disagreeing: bool,
) -> Rows:
    """Read labels that both can meet: their tags are in both files."""
    common = set(b.dataset.tag_ids)
    either = {
        "tags": [tag for tag in a.dataset.tags if tag.id in common],
        "max_tags": max(a.dataset.max_tags, b.dataset.max_tags),
        "allow_none": a.dataset.allow_none or b.dataset.allow_none,
        "examples": [*a.dataset.examples, *b.dataset.examples],
    }
    try:
        read = read_labels(
            labels,
            a.dataset.model_copy(update=either),
            connections,
            ignore_unknown=ignore_unknown,
            keep_disagreeing=keep_disagreeing,
        )
    except InputError as e:
        if common == set(a.dataset.tag_ids):
            raise
        raise InputError(f"{e} (only tags that both {a.file} and {b.file} have can be compared)") from None
    drawn = read.sample(size, seed).labels
    rows = [Row(label.row, label.text, label.tags) for label in drawn]
    of = f" of {len(read.labels):,}, drawn at random (seed {seed})" if len(rows) < len(read.labels) else ""
    return Rows(rows, f"{len(rows):,} labels{of}, from {labels.name}", False, read.describe())


def _ask(
    a: Candidate, b: Candidate, texts: Sequence[str], connections: Connections, max_cost_usd: float | None
) -> tuple[Trial, Trial]:
    planned = [
        run_trial(each.dataset, texts, connections, name="compare", max_cost_usd=max_cost_usd, dry_run=True)
        for each in (a, b)
    ]
    budget = _budget(a, b, planned)
    of_a = run_trial(a.dataset, texts, connections, name="compare", max_cost_usd=budget)
    left = None if budget is None else max(budget - (of_a.spent_usd or 0.0), LEAST_USD)
    return of_a, run_trial(b.dataset, texts, connections, name="compare", max_cost_usd=left)


def _budget(a: Candidate, b: Candidate, planned: Sequence[Trial]) -> float | None:
    """Return what both may cost together, having said what they will."""
    expected = [trial.plan.estimate for trial in planned]
    costs = [0.0 if each is None else each.usd for each in expected]
    texts = [0 if each is None else each.texts for each in expected]
    in_all = None if None in costs else sum(cost or 0.0 for cost in costs)
    said = (
        f"A would ask {texts[0]:,} texts for about {usd(costs[0])}, B {texts[1]:,} for about {usd(costs[1])}: "
        f"{usd(in_all)} in all"
    )
    logger.info("compare: %s", said)
    budget = min((each.plan.budget_usd for each in planned if each.plan.budget_usd is not None), default=None)
    if budget is None:
        return None
    if in_all is None:
        unknown = a if costs[0] is None else b
        raise InputError(
            f"{unknown.file}: a limit is set, but the price of `{unknown.dataset.llm.model}` is not known: "
            "set `llm.price` (0 for a local model)"
        )
    if in_all > budget:
        raise RunFailed(
            f"{BUDGET_REACHED}: {said}, and both together may cost {usd(budget)}: nothing was asked. "
            "Raise `--max-cost-usd` (or the files' `limits`), or ask fewer texts (`--sample`)"
        )
    return budget


def _answers(candidate: Candidate, rows: Rows, trial: Trial) -> list[Answer | None]:
    """Return what each text got: None for no answer. Texts that are too long are refused, as in the target."""
    longest = candidate.dataset.source.max_chars
    answers: list[Answer | None] = []
    for row, record in zip(rows.rows, trial.records, strict=True):
        if record is not None:
            answers.append(Answer(record.tags if record.status == "tagged" else [], record.status == "refused"))
        else:
            answers.append(Answer([], True) if len(row.text) > longest else None)
    return answers


def _compared(
    a: Candidate, b: Candidate, rows: Rows, trials: tuple[Trial, Trial], seed: int, connections: Connections
) -> Comparison:
    answers_a, answers_b = _answers(a, rows, trials[0]), _answers(b, rows, trials[1])
    pairs = [
        Pair(row, x, y)
        for row, x, y in zip(rows.rows, answers_a, answers_b, strict=True)
        if x is not None and y is not None
    ]
    if not pairs:
        raise RunFailed(
            f"not one of the {len(rows.rows):,} texts was answered by both: see the log for what the endpoints said"
        )
    tags_a, tags_b = [pair.a.tags for pair in pairs], [pair.b.tags for pair in pairs]
    tag_ids = list(dict.fromkeys([*a.dataset.tag_ids, *b.dataset.tag_ids]))
    gold = [pair.row.gold for pair in pairs if pair.row.gold is not None]
    quality_a, quality_b, difference = _qualities(gold, tags_a, tags_b, tag_ids, seed) if gold else ({}, {}, None)
    differing = [pair for pair in pairs if set(pair.a.tags) != set(pair.b.tags)]
    return Comparison(
        dataset=a.dataset.dataset,
        a=_side(a, rows, trials[0], answers_a, quality_a),
        b=_side(b, rows, trials[1], answers_b, quality_b),
        changed=spec_difference(a.dataset, b.dataset),
        tags_only_in_a=[tag for tag in a.dataset.tag_ids if tag not in b.dataset.tag_ids],
        tags_only_in_b=[tag for tag in b.dataset.tag_ids if tag not in a.dataset.tag_ids],
        origin=rows.origin,
        seed=seed,
        left_out=rows.left_out,
        is_stand_in=any(r is not None and r.model == STAND_IN_MODEL for each in trials for r in each.records),
        agreement=agreement(tags_a, tags_b, tag_ids),
        difference=difference,
        moving=_moving(a, b, rows, trials[1], connections),
        examples=[Example(row=pair.row.name, a=pair.a.tags, b=pair.b.tags) for pair in differing[:EXAMPLES]],
    )


Values = dict[str, Value]
"""Figures of `Side` by name."""


def _qualities(
    gold: Sequence[frozenset[str]],
    tags_a: Sequence[list[str]],
    tags_b: Sequence[list[str]],
    tag_ids: Sequence[str],
    seed: int,
) -> tuple[Values, Values, Difference]:
    """Return the quality of A, that of B, and what they differ by."""
    a, b = _quality(gold, tags_a, tag_ids, seed), _quality(gold, tags_b, tag_ids, seed)
    texts_a, texts_b = per_text(gold, tags_a, tag_ids), per_text(gold, tags_b, tag_ids)
    drawn_a, drawn_b = resampled(texts_a, seed), resampled(texts_b, seed)

    def minus(name: str) -> Value:
        x, y = a[name].value, b[name].value
        difference = float("nan") if x is None or y is None else y - x
        return interval(difference, getattr(drawn_b, name) - getattr(drawn_a, name))

    only_a, only_b = (int((x.exact > y.exact).sum()) for x, y in ((texts_a, texts_b), (texts_b, texts_a)))
    changes = {name: minus(name) for name in ("exact_match", "micro_f1", "macro_f1")}
    return a, b, Difference(**changes, only_a_right=only_a, only_b_right=only_b, p_value=mcnemar(only_a, only_b))


def _quality(gold: Sequence[frozenset[str]], tags: Sequence[list[str]], tag_ids: Sequence[str], seed: int) -> Values:
    quality = measure(gold, tags, tag_ids, seed)
    return {"exact_match": quality.exact_match, "micro_f1": quality.micro.f1, "macro_f1": quality.macro.f1}


def _side(candidate: Candidate, rows: Rows, trial: Trial, answers: Sequence[Answer | None], quality: Values) -> Side:
    records = _distinct(rows, trial)
    texts = max(len(records), 1)
    used = sum((record.usage for record in records), Usage())
    cost = cost_usd(used, price_of(candidate.dataset.llm)) if records else None
    in_flight = min(candidate.dataset.llm.concurrency, trial.requests)
    given = [answer for answer in answers if answer is not None]
    return Side(
        file=candidate.file,
        spec_id=candidate.spec,
        model=candidate.dataset.llm.model,
        refused=sum(answer.is_refused for answer in given),
        unanswered=len(answers) - len(given),
        untagged=sum(not answer.tags and not answer.is_refused for answer in given) / len(given),
        requests=trial.requests,
        spent_usd=trial.spent_usd,
        cost_a_text_usd=None if cost is None else cost / texts,
        input_tokens_a_text=used.input / texts if records else None,
        output_tokens_a_text=used.output / texts if records else None,
        seconds_a_text=trial.tag_seconds * in_flight / trial.requests if trial.requests else None,
        **quality,
    )


def _distinct(rows: Rows, trial: Trial) -> list[Record]:
    """Return the records of the distinct texts."""
    texts = (normalise(row.text) for row in rows.rows)
    return list({text: record for text, record in zip(texts, trial.records, strict=True) if record}.values())


def _moving(a: Candidate, b: Candidate, rows: Rows, trial: Trial, connections: Connections) -> Moving:
    """Return what moving the table from A to B costs, by the mean cost of B's texts; those just asked are paid for."""
    batch = b.dataset.llm.mode == "batch"
    answered = _distinct(rows, trial)
    try:
        texts, of = _texts_to_move(a.dataset, b.spec, connections)
    except InputError as e:  # labels may have texts of their own, and no source
        return Moving(batch=batch, problem=str(e))
    left = max(texts - len(answered), 0) if rows.of_source else texts
    used = sum((record.usage for record in answered), Usage())
    cost = cost_usd(used, price_of(b.dataset.llm, batch=batch)) if answered else None
    return Moving(texts=left, of=of, usd=None if cost is None else cost / len(answered) * left, batch=batch)


def _texts_to_move(dataset: Dataset, spec: str, connections: Connections) -> tuple[int, Literal["target", "source"]]:
    """Return how many texts of the target are not of this spec; where it has no row yet, how many rows the source."""
    conn_id = dataset.source.conn_id
    with connecting(database(conn_id, connections), conn_id) as connection:
        ids = SourceTable(connection, dataset).id_type
        with target_rows(dataset, ids, connections) as target:
            if target is not None and target.count():
                return sum(older.texts for older in target.older_specs(spec)), "target"
        table = reflect(connection, dataset.source.table)
        assert table is not None  # as SourceTable found it
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one(), "source"
