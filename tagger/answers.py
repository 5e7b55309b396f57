"""What became of a plan's new texts, and so of its rows, as Arrow columns: tens of millions must fit into memory."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tagger.batches import Batches
from tagger.cache import Cache, Record
from tagger.ledger import latest_rows, read_attempts
from tagger.runs import TOO_LONG, Plan, Run, new_keys_path, opened_parquet

RECORDS_A_READ = 5000
"""Cached records fetched at once: what bounds the memory where many are needed."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("answered", pa.bool_()),  # by a record, which the columns below tell of
        ("error", pa.string()),
        ("tags", pa.string()),  # a JSON array
        ("model", pa.string()),
        ("tagged_at", pa.timestamp("us", tz="UTC")),
        ("confidence", pa.float64()),  # of the tag that the LLM is least sure of
    ]
)

SKIPPED = "not asked yet; the next run asks"
PENDING = "in a batch that has not ended; a later run takes its answer"
DAMAGED = "the cache record was damaged; the next run tags the text again"


class Answer(NamedTuple):
    """What a text came to, by the columns of `SCHEMA`."""

    status: str
    answered: bool
    error: str | None
    tags: list[str] | None
    model: str | None
    tagged_at: datetime | None
    confidence: float | None
    """None where the LLM was not asked how sure it is, or gave no tag."""


def of_record(record: Record | None) -> Answer:
    """Return the answer that the cache holds; None stands for a record that is damaged or gone."""
    if record is None:
        return Answer("failed", False, DAMAGED, None, None, None, None)
    tags = record.tags if record.status == "tagged" else None
    sure = min(record.confidence or (), default=None)
    return Answer(record.status, True, record.reason, tags, record.model, record.created_at, sure)


def read_answers(run: Run, planned: Plan, cache: Cache) -> pa.Table:
    """Return what became of the plan's new texts, by `SCHEMA`: by the attempts' books, and by the cache for the rest.

    The rows of `deferred` texts are left as they are, to a later run.
    """
    with opened_parquet(run.storage, new_keys_path(run, planned.plan_id)) as file:
        new = file.read()
    keys = new.column("key")
    attempts = [attempt for attempt in read_attempts(run) if attempt.plan_id == planned.plan_id]
    answers = _of_outcomes(keys, latest_rows(attempts))
    if "deferred" in new.column_names:  # plans of before there were rollouts have no such column
        deferred = new.column("deferred")
        answers = _where(deferred, answers, status="deferred", error=None)
    unanswered = pc.invert(answers.column("answered"))
    answers = _from_cache(answers, cache, keys.filter(unanswered).to_pylist())
    batches = Batches(run.storage, planned.spec_id)
    pending = pa.array(batches.keys(batches.unfinished()), pa.string())
    waits = pc.and_(pc.is_in(answers.column("key"), pending), pc.invert(answers.column("answered")))
    return _where(waits, answers, status="pending", error=PENDING)


def _of_outcomes(keys: pa.ChunkedArray, latest: pa.Table) -> pa.Table:
    """Return the answers of the texts with these keys; one without an outcome is `skipped`."""
    rows = latest.take(pc.index_in(keys, latest.column("key")))
    status = rows.column("status")
    answered = pc.is_in(status, pa.array(["tagged", "refused"]))
    failed = pc.fill_null(pc.equal(status, "failed"), False)
    of_failure = pc.binary_join_element_wise(rows.column("kind"), rows.column("error"), ": ")
    columns = [
        keys,
        pc.if_else(pc.or_(answered, failed), status, "skipped"),
        answered,
        pc.if_else(answered, rows.column("kind"), pc.if_else(failed, of_failure, SKIPPED)),
        pc.if_else(pc.fill_null(pc.equal(status, "tagged"), False), as_json(rows.column("tags")), None),
        rows.column("model"),
        rows.column("answered_at"),
        _least(rows.column("confidence")),
    ]
    return pa.table(columns, schema=SCHEMA)


def as_json(lists: pa.ChunkedArray) -> pa.Array:
    """Return lists of a few distinct texts as JSON arrays."""
    array = lists.combine_chunks()
    texts = array.flatten().dictionary_encode()
    quoted = pa.array([json.dumps(text, ensure_ascii=False) for text in texts.dictionary.to_pylist()], pa.string())
    sizes = pc.fill_null(pc.list_value_length(array), 0)
    bounds = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(sizes)])
    joined = pc.binary_join(pa.ListArray.from_arrays(bounds, quoted.take(texts.indices)), ", ")
    return pc.if_else(pc.is_valid(array), pc.binary_join_element_wise("[", joined, "]", ""), None)


def _least(lists: pa.ChunkedArray) -> pa.Array:
    """Return the least number of each list, NULL where it has none."""
    array = lists.combine_chunks()
    numbers = pa.table({"row": pc.list_parent_indices(array), "number": array.flatten()})
    least = numbers.group_by("row").aggregate([("number", "min")])
    rows = pa.array(range(len(array)) if least.num_rows else [], pa.int64())
    if not least.num_rows:
        return pa.nulls(len(array), pa.float64())
    return least.column("number_min").take(pc.index_in(rows, least.column("row"))).combine_chunks()


def _where(mask: Any, answers: pa.Table, **values: str | None) -> pa.Table:
    """Set columns of the answers that a mask picks."""
    for name, value in values.items():
        changed = pc.if_else(mask, pa.scalar(value, pa.string()), answers.column(name))
        answers = answers.set_column(answers.column_names.index(name), name, changed)
    return answers


def _from_cache(answers: pa.Table, cache: Cache, unanswered: list[str]) -> pa.Table:
    """Put what the cache holds in the place of answers that are none."""
    there = list(cache.find(unanswered))
    found: list[pa.Table] = []
    for start in range(0, len(there), RECORDS_A_READ):
        records = cache.read_many(there[start : start + RECORDS_A_READ])
        found.append(_table({key: of_record(record) for key, record in records.items()}))
    if not found:
        return answers
    better = pa.concat_tables(found)
    others = pc.invert(pc.is_in(answers.column("key"), better.column("key").combine_chunks()))
    return pa.concat_tables([answers.filter(others), better])


def _table(answers: Mapping[str, Answer]) -> pa.Table:
    rows = [
        {
            "key": key,
            **answer._asdict(),
            "tags": None if answer.tags is None else json.dumps(answer.tags, ensure_ascii=False),
        }
        for key, answer in answers.items()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def staged(rows: pa.Table, answers: pa.Table, max_chars: int) -> pa.Table:
    """Return rows of the plan with what their texts came to: `row_id` and the columns of `SCHEMA`.

    A text that was not new is `cached`, a row without a text `blank`.
    """
    key, too_long = rows.column("key"), rows.column("too_long")
    known = answers.take(pc.index_in(pc.if_else(too_long, None, key), answers.column("key")))
    blank = pc.is_null(key)
    status = pc.if_else(blank, "blank", pc.if_else(too_long, "refused", pc.fill_null(known.column("status"), "cached")))
    no_record = pc.or_(blank, too_long)
    answered = pc.if_else(no_record, False, pc.fill_null(known.column("answered"), True))
    refused = pa.scalar(f"{TOO_LONG}: over {max_chars} characters")
    error = pc.if_else(too_long, refused, known.column("error"))
    of_record = [known.column(name) for name in ("tags", "model", "tagged_at", "confidence")]
    return pa.table([rows.column("id"), key, status, answered, error, *of_record], ["row_id", *SCHEMA.names])


def count(answers: pa.Table) -> dict[str, int]:
    """Return the number of texts by status; those that are deferred are not asked either."""
    counts = {each["values"]: each["counts"] for each in pc.value_counts(answers.column("status")).to_pylist()}
    counts["skipped"] = counts.get("skipped", 0) + counts.pop("deferred", 0)
    return {status: counts.get(status, 0) for status in ("tagged", "refused", "failed", "skipped", "pending")}
