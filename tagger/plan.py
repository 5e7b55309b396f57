"""The plan step: which of the snapshot's texts are new, and why, what they will cost, and which shard asks them."""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from tagger.batches import Batches
from tagger.budget import Budget, budget_of, check_price
from tagger.cache import Cache, Usage
from tagger.changes import OlderSpec, Why, frozen_dataset, newest, spec_change, target_rows, why_new
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.estimate import LEAST_SAMPLE, Lengths, estimate, example_cost, sample_size
from tagger.exceptions import InputError, StorageError
from tagger.keys import KEYS_A_PART, Digests, Keys, digests
from tagger.price import cost_usd, price_of, usd
from tagger.runs import (
    Estimate,
    File,
    ParquetFile,
    Plan,
    Run,
    Shard,
    Snapshot,
    keyed_schema,
    new_keys_path,
    opened_parquet,
    rows_path,
    taken_schema,
    utc_now,
    writing_parquet,
)
from tagger.shards import NewTexts, write_shards
from tagger.spec import normalise, spec_id, text_key
from tagger.tables import REVIEW, connecting, existing_target

logger = logging.getLogger(__name__)

NEW_KEYS_SCHEMA = pa.schema([("key", pa.string()), ("deferred", pa.bool_())])
"""The rows of `deferred` texts stay in the target as they are: a later run asks for them."""

WITHOUT_LOCK = "without `lock`, two runs or machines that ask the same text at the same time may both pay for it"

RECORDS_A_READ = 5000
"""Records fetched at once where refused texts are looked for."""


@dataclass
class Texts:
    """What the snapshot holds: rows by kind, and the keys of its distinct texts."""

    rows: int = 0
    blank: int = 0
    keys: Keys = field(default_factory=Keys)
    too_long: dict[str, str] = field(default_factory=dict)
    """Keys of the texts that are too long in all their rows, with one of these."""


class Pace(File):
    """The part of `summary.json` that tells how fast a run was."""

    mode: str
    llm_requests: int
    seconds: dict[str, float]


def plan(run: Run, connections: Connections) -> Plan:
    """Find out which texts of the snapshot the cache lacks, and write them out by shard.

    Where they would cost more than the budget leaves, the plan has a `problem` and no shard.

    Raises:
        InputError: the run has no snapshot, or a budget is set and the price is not known.
    """
    clock = time.monotonic()
    dataset, taken = run.dataset(), run.snapshot()
    options = taken.options
    check_price(dataset)
    run.forget("plan.json", "load.json", "summary.json")
    plan_id, spec = uuid.uuid4().hex[:8], spec_id(dataset)
    cache = Cache(run.storage, spec, dataset.llm.model, dataset.tag_ids)
    refused, deferred, shards = Keys(), Keys(), list[Shard]()
    why = np.empty(0, np.int8)
    fastest = None
    with opened_parquet(run.storage, taken.rows_file, taken_schema(taken.id_type)) as snapshot, ExitStack() as stack:
        with writing_parquet(run.storage, rows_path(run, plan_id), keyed_schema(taken.id_type)) as parquet:
            texts = _write_rows(snapshot, parquet, spec, dataset.source.max_chars)
        waiting, ended = _batches(run, spec, connections)
        new = cache.missing(texts.keys)
        settled, pending = len((ended & texts.keys) - new), waiting & new
        if options.retry_refused:
            refused = _refused(cache, texts.keys - new, dataset, taken, connections)
            new |= refused
        cached = len(texts.keys) - len(new)
        unanswered = new - pending
        with nullcontext() if taken.is_trial else target_rows(dataset, taken.id_type, connections) as target:
            target_count, older = (target.count(), target.older_specs(spec)) if target else (0, [])
            if unanswered:
                rows = stack.enter_context(opened_parquet(run.storage, rows_path(run, plan_id)))
                why = np.full(len(unanswered), Why.NEW_TEXT, np.int8)
                if target:
                    why = why_new(unanswered, refused, rows, snapshot, target)
                deferred = _deferred(taken, unanswered, why, rows)
                fastest = target.largest_run(spec) if target else None
        asked = NewTexts(snapshot, unanswered - deferred, options.limit, Lengths(dataset.llm))
        if asked.size and options.dry_run:
            asked.count(rows)
        elif asked.size:
            shards = write_shards(run, plan_id, asked, rows, dataset.shards)
    expected = _estimate(run, dataset, cache, asked.lengths, fastest)
    budget = budget_of(run, dataset) if asked.size else Budget(dataset.limits.max_cost_usd)
    over = budget.problem(expected, is_trial=taken.is_trial)
    unasked = deferred
    if over and not options.dry_run:
        shards, unasked = [], deferred | _left_as_they_are(taken, unanswered, why)
    with writing_parquet(run.storage, new_keys_path(run, plan_id), NEW_KEYS_SCHEMA) as parquet:
        for keys in new.parts(KEYS_A_PART):
            parquet.write({"key": keys, "deferred": unasked.holds(digests(keys))})
    before = frozen_dataset(run, older[0]) if older else None
    planned = Plan(
        plan_id=plan_id,
        spec_id=spec,
        rows=texts.rows,
        blank=texts.blank,
        texts=len(texts.keys) + len(texts.too_long),
        cached=cached,
        settled=settled,
        too_long=len(texts.too_long),
        too_long_row=next(iter(texts.too_long.values()), None),
        new=len(texts.keys) - cached - len(pending),
        pending=len(pending),
        asked_again=len(refused),
        why={Why(reason).words: count for reason, count in Counter(why.tolist()).most_common()},
        deferred=len(deferred),
        estimate=expected,
        estimated_usd=expected.usd,
        budget_usd=budget.total,
        problem=None if options.dry_run else over,
        shards=shards,
        target_rows=target_count,
        older_spec_rows=sum(each.rows for each in older),
        older_spec_texts=sum(each.texts for each in older),
        spec_change=spec_change(older[0], before, dataset) if older else None,
        older_spec_usd=_cost_of_older(run, dataset, cache, expected, older, before) if older else None,
        planned_at=utc_now(),
        seconds=time.monotonic() - clock,
    )
    for line in describe(planned, dataset, taken):
        logger.info("plan: %s", line)
    if over:
        logger.warning("plan: %s", over)
    elif not options.dry_run:
        for key in refused - asked.left:  # what has a record is not asked
            cache.remove(key)
    run.write("plan.json", planned)
    return planned


def _batches(run: Run, spec: str, connections: Connections) -> tuple[Keys, Keys]:
    """Collect what has ended of the spec's batches; return the keys of the texts in the others, and in these."""
    batches = Batches(run.storage, spec)
    unfinished = batches.unfinished()
    if not unfinished:
        return Keys(), Keys()
    from tagger.batch import settle  # imports the SDK

    before = Keys.of(batches.keys(unfinished))
    waiting = Keys.of(batches.keys([batch for batch, _ in settle(run, connections)]))
    return waiting, before - waiting


def describe(planned: Plan, dataset: Dataset, taken: Snapshot) -> list[str]:
    """Return the plan in words."""
    return [
        f"{planned.rows:,} rows ({planned.blank:,} more are blank), {planned.texts:,} distinct texts: "
        f"{planned.cached:,} cached, {planned.new:,} new"
        + (f", {planned.pending:,} in batches that have not ended" if planned.pending else "")
        + (f", {planned.too_long:,} over {dataset.source.max_chars} characters" if planned.too_long else "")
        + f"; {len(planned.shards)} shards; spec {planned.spec_id}",
        *_new_in_words(planned, taken),
        *_estimate_in_words(planned.estimate, dataset),
        *_examples_in_words(dataset),
        *(["dry run: no text is asked, nothing is written to the target"] if taken.options.dry_run else []),
        *_older_in_words(planned, taken),
        *([WITHOUT_LOCK] if planned.shards and dataset.lock is None else []),
    ]


def _new_in_words(planned: Plan, taken: Snapshot) -> Iterator[str]:
    if planned.why:
        yield "why new: " + ", ".join(f"{count:,} {words}" for words, count in planned.why.items())
    if planned.deferred:
        yield f"{planned.deferred:,} texts that only the new spec makes new wait for later runs (`rollout`)"
    limit = taken.options.limit
    if limit is not None and limit < planned.new - planned.deferred:
        yield f"only the first {limit:,} new texts are asked (`limit`); the others are skipped until the next run"


def _estimate_in_words(expected: Estimate | None, dataset: Dataset) -> Iterator[str]:
    if expected is None or not expected.texts:
        return
    by = {
        "records": "by what records of this spec used",
        "lengths": "a guess by the texts' lengths, for the spec has no records yet",
    }
    yield (
        f"estimated tokens: {expected.input_tokens:,} in ({expected.cached_input_tokens:,} cached by the endpoint), "
        f"{expected.output_tokens:,} out; {by[expected.basis]}"
    )
    if expected.usd is None:
        yield f"estimated cost: unknown, for the price of `{dataset.llm.model}` is; `llm.price` sets it"
    else:
        yield f"estimated cost: {usd(expected.usd)} (from {usd(expected.low_usd)} to {usd(expected.high_usd)})"
    if dataset.llm.mode == "batch":
        yield "time at the limits: up to 24 hours (Batch API)"
    else:
        yield f"time at the limits: {_duration(expected.seconds)}"


def _examples_in_words(dataset: Dataset) -> Iterator[str]:
    if not dataset.examples:
        return
    tokens, cost = example_cost(dataset)
    adds = "as many to each request" if cost is None else f"up to {usd(cost)} per 1,000 requests"
    yield (
        f"examples: {len(dataset.examples):,} in the prompt, about {tokens:,} tokens each; one more would add {adds}, "
        "and make all texts new once"
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown, for no rate is set and no run of this spec tells of one"
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.1f} {unit}"
    return f"about {max(seconds, 1):.0f} seconds"


def _older_in_words(planned: Plan, taken: Snapshot) -> Iterator[str]:
    if not planned.older_spec_rows:
        return
    rollout = taken.selection.rollout
    cost = "" if planned.older_spec_usd is None else f"about {usd(planned.older_spec_usd)}"
    if rollout is not None:
        left = planned.deferred if taken.selection.rows == "all" else max(planned.older_spec_rows - rollout, 0)
        what = f"`rollout` tags {rollout:,} a run again, which takes {-(-left // rollout):,} more runs"
        what += f" and {cost} in all" if cost else ""
    elif taken.selection.rows == "all":
        what = "this run takes them all"
    else:
        what = f"`rows: all` (--all) would cost {cost}" if cost else "`rows: all` (--all) would tag them all again"
    yield (
        f"{planned.spec_change}: {planned.older_spec_rows:,} of {planned.target_rows:,} rows hold an older spec; {what}"
    )


def _refused(cache: Cache, cached: Keys, dataset: Dataset, taken: Snapshot, connections: Connections) -> Keys:
    """Return which of the cached texts are refused. Records of texts that the target has as tagged are not read."""
    engine = database(dataset.target_conn_id, connections)
    with connecting(engine, dataset.target_conn_id) as connection:
        target = existing_target(connection, dataset.target.table, taken.id_type)
        if target is not None:
            tagged = sa.select(target.c.cache_key).where(
                target.c.status.in_(("tagged", REVIEW)), target.c.cache_key.is_not(None)
            )
            cached -= Keys.of(connection.execution_options(yield_per=KEYS_A_PART).execute(tagged).scalars())
    refused: list[str] = []
    for part in cached.parts(RECORDS_A_READ):
        refused += (key for key, record in cache.read_many(part).items() if record.status == "refused")
    return Keys.of(refused)


def _write_rows(snapshot: pq.ParquetFile, parquet: ParquetFile, spec: str, max_chars: int) -> Texts:
    """Write the snapshot's ids and keys, a row group for each of its own, and return what it holds."""
    texts, parts = Texts(), list[Digests]()
    for group in range(snapshot.num_row_groups):
        rows = snapshot.read_row_group(group)
        ids, bodies = rows.column("id"), rows.column("text").to_pylist()
        keys = [text_key(spec, normalised) if (normalised := normalise(text)) else None for text in bodies]
        too_long = [key is not None and len(text) > max_chars for key, text in zip(keys, bodies, strict=True)]
        parquet.write({"id": ids, "key": keys, "too_long": too_long})
        blank = keys.count(None)
        texts.blank += blank
        texts.rows += len(keys) - blank
        parts.append(digests([key for key, long in zip(keys, too_long, strict=True) if key is not None and not long]))
        if any(too_long):
            texts.too_long.update(
                (key, str(row_id))
                for row_id, key, long in zip(ids.to_pylist(), keys, too_long, strict=True)
                if key is not None and long
            )
    texts.keys = Keys(*parts)
    # a text may be too long in one row and, with less white space around it, short enough in another
    for key in Keys.of(texts.too_long) & texts.keys:
        del texts.too_long[key]
    return texts


def _deferred(taken: Snapshot, new: Keys, why: npt.NDArray[np.int8], rows: pq.ParquetFile) -> Keys:
    """Return which of the new texts a rollout leaves to later runs.

    A run over a window has no more of them than it asks. With a `limit`, the other new texts come first.
    """
    most = taken.selection.rollout
    if most is None or taken.selection.rows != "all":
        return Keys()
    waiting = new.where(why == Why.NEW_SPEC)
    if taken.options.limit is not None:
        most = min(most, max(taken.options.limit - len(new) + len(waiting), 0))
    return waiting - newest(waiting, most, rows) if len(waiting) > most else Keys()


def _left_as_they_are(taken: Snapshot, new: Keys, why: npt.NDArray[np.int8]) -> Keys:
    """Return which of the texts that are too dear to ask leave their rows in the target as they are.

    The others' become `skipped`, so that later runs take them when they have left the window. What a run takes beyond
    its window was not in sight before it either, and must not make every later run too dear.
    """
    if taken.selection.rows == "window" and taken.selection.unfinished:
        return new.where(why == Why.NEW_SPEC)
    return new


def _estimate(run: Run, dataset: Dataset, cache: Cache, lengths: Lengths, fastest: str | None) -> Estimate:
    """Return what the texts will take; `fastest` is a run that shows how fast the endpoint is."""
    if not lengths.texts:
        return estimate(dataset, lengths, [])
    pace = None
    if fastest:
        with suppress(InputError, StorageError):  # it only tells the time
            pace = Run(run.storage, run.dataset_name, fastest).read("summary.json", Pace)
    rate = None
    if (
        pace is not None and pace.mode == "online" and pace.llm_requests >= dataset.llm.concurrency
    ):  # else it was over before it was fast
        rate = pace.llm_requests / max(pace.seconds["tag"], 1e-3)
    return estimate(dataset, lengths, cache.sample(sample_size(lengths.texts)), requests_per_second=rate)


def _cost_of_older(
    run: Run, dataset: Dataset, cache: Cache, expected: Estimate, older: list[OlderSpec], before: Dataset | None
) -> float | None:
    """Return what the texts of older specs would cost: like those of this run, else of this spec, else of the older."""
    texts = sum(each.texts for each in older)
    if expected.texts:
        return None if expected.usd is None else expected.usd / expected.texts * texts
    records = cache.sample(LEAST_SAMPLE)
    if not records and before is not None:
        records = Cache(run.storage, older[0].spec, before.llm.model).sample(LEAST_SAMPLE)
    if not records:
        return None
    used = sum((record.usage for record in records), Usage())
    cost = cost_usd(used, price_of(dataset.llm, batch=dataset.llm.mode == "batch"))
    return None if cost is None else cost / len(records) * texts
