"""What became of a plan's new texts, and so of its rows, by columns: tens of millions must fit into memory."""

import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tagger.batches import Batches
from tagger.cache import Cache, Record
from tagger.exceptions import StorageError
from tagger.keys import KEYS_A_PART, Digests, Keys, digests
from tagger.ledger import FILES_AT_ONCE, Attempt, read_attempts
from tagger.ledger import SCHEMA as BOOKS
from tagger.runs import TOO_LONG, Plan, Run, new_keys_path, read_parquet

RECORDS_A_READ = 5000
"""Cached records fetched at once: what bounds the memory where many are needed."""

SCHEMA = pa.schema(
    [
        ("status", pa.string()),
        ("answered", pa.bool_()),  # by a record, which the columns below tell of
        ("error", pa.string()),
        ("tags", pa.string()),  # a JSON array
        ("model", pa.string()),
        ("tagged_at", pa.timestamp("us", tz="UTC")),
        ("confidence", pa.float64()),  # of the tag that the LLM is least sure of
    ]
)


OF_BOOKS = ["key", "status", "tags", "model", "kind", "error", "answered_at", "confidence"]
"""Columns of the books that tell of an answer; old ones have no `confidence`."""

NEW_KEYS = pa.schema([("key", pa.string())])
"""What any plan's file of new texts has."""


class Answer(NamedTuple):
    """What a text came to, by the columns of `SCHEMA`."""

    status: str
    answered: bool = False
    error: str | None = None
    tags: list[str] | None = None
    model: str | None = None
    tagged_at: datetime | None = None
    confidence: float | None = None
    """None where the LLM was not asked how sure it is, or gave no tag."""


SKIPPED = Answer("skipped", error="not asked yet; the next run asks")
DEFERRED = Answer("deferred")
"""Left to a later run by the plan: the row stays as it is."""
PENDING = Answer("pending", error="in a batch that has not ended; a later run takes its answer")
DAMAGED = Answer("failed", error="the cache record was damaged; the next run tags the text again")

_SAME = (SKIPPED, DEFERRED, PENDING)
"""Answers that many texts may have."""


def of_record(record: Record | None) -> Answer:
    """Return the answer that the cache holds; None stands for a record that is damaged or gone."""
    if record is None:
        return DAMAGED
    tags = record.tags if record.status == "tagged" else None
    sure = min(record.confidence or (), default=None)
    return Answer(record.status, True, record.reason, tags, record.model, record.created_at, sure)


class Placed(NamedTuple):
    """Answers of some texts."""

    places: npt.NDArray[np.int64]
    """Where each text stands among the new ones; -1 for those that do not."""
    rows: pa.Table


class Answers:
    """What became of a plan's new texts."""

    def __init__(self, new: Keys, deferred: Keys) -> None:
        """Take all of the `new` texts as skipped, but for those that are `deferred`."""
        self._new = new
        self._rows = _table(_SAME)
        self._at = np.where(deferred.holds(new.digests), _SAME.index(DEFERRED), _SAME.index(SKIPPED)).astype(np.int32)
        """The row of each text."""

    @property
    def unanswered(self) -> Keys:
        """The texts that no record answers."""
        return self._new.where(~self._rows.column("answered").to_numpy()[self._at])

    def placed(self, keys: pa.Array, rows: pa.Table) -> Placed:
        """Return the answers, by `SCHEMA`, of the texts with these keys, ready to `add`; from any thread."""
        return Placed(self._new.places(keys), rows)

    def add(self, found: Placed) -> None:
        """Set the answers of some texts, the last where a text has several. Those that are not new are left out."""
        of_new = np.flatnonzero(found.places >= 0)
        self._at[found.places[of_new]] = len(self._rows) + of_new
        self._rows = pa.concat_tables([self._rows, found.rows])

    def wait_for(self, pending: Keys) -> None:
        """Set those of some texts that no record answers to be pending."""
        self._at[(self.unanswered & pending).holds(self._new.digests)] = _SAME.index(PENDING)

    def count(self) -> dict[str, int]:
        """Return the number of texts by status; those that are deferred are not asked either."""
        texts = np.bincount(self._at, minlength=len(self._rows))
        status = self._rows.column("status")
        names = ("tagged", "refused", "failed", "skipped", "pending", "deferred")
        counts = {name: int(texts[pc.equal(status, name).to_numpy()].sum()) for name in names}
        counts["skipped"] += counts.pop("deferred")
        return counts

    def staged(self, rows: pa.RecordBatch, max_chars: int) -> pa.Table:
        """Return rows of the plan with what their texts came to: `row_id`, `key` and the columns of `SCHEMA`.

        A text that was not new is `cached`, a row without a text `blank`.
        """
        key, too_long = rows.column("key"), rows.column("too_long")
        places = self._new.places(pc.if_else(too_long, None, key))
        is_new = places >= 0
        at = np.zeros(len(places), np.int32)
        at[is_new] = self._at[places[is_new]]
        known = self._rows.take(pa.array(at, mask=~is_new))
        blank = pc.is_null(key)
        status = pc.if_else(too_long, "refused", pc.fill_null(known.column("status"), "cached"))
        columns = {
            "row_id": rows.column("id"),
            "key": key,
            **dict(zip(known.column_names, known.columns, strict=True)),
            "status": pc.if_else(blank, "blank", status),
            "answered": pc.and_(pc.invert(pc.or_(blank, too_long)), pc.fill_null(known.column("answered"), True)),
            "error": pc.if_else(too_long, f"{TOO_LONG}: over {max_chars} characters", known.column("error")),
        }
        return pa.table(columns)


def read_answers(run: Run, planned: Plan, cache: Cache) -> Answers:
    """Return what became of the plan's new texts: by the attempts' books, and by the cache for the rest."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        reading = threads.submit(read_attempts, run)
        answers = Answers(*_new_keys(run, planned))
        attempts = [attempt for attempt in reading.result() if attempt.plan_id == planned.plan_id]
        booked = list(threads.map(partial(_booked, answers, cache.tags), attempts))
    for of_attempts in zip(*booked, strict=True):  # an answer counts more than a failure, later more than earlier
        for found in of_attempts:
            answers.add(found)
    unanswered = answers.unanswered
    for part in (unanswered - cache.missing(unanswered)).parts(RECORDS_A_READ):
        records = cache.read_many(part)
        answers.add(answers.placed(pa.array(records, pa.string()), _table(map(of_record, records.values()))))
    batches = Batches(run.storage, planned.spec_id)
    answers.wait_for(Keys.of(batches.keys(batches.unfinished())))
    return answers


def _booked(answers: Answers, tags: Collection[str] | None, attempt: Attempt) -> list[Placed]:
    """Return the failures, and the answers, that an attempt's books tell of."""
    books = attempt.file.read(columns=OF_BOOKS)
    books = pa.concat_tables([BOOKS.empty_table().select(OF_BOOKS), books], promote_options="default")
    if tags is not None:
        books = _where(books, pc.invert(_hold_others(books.column("tags").combine_chunks(), tags)))
    found = []
    for outcomes in (["failed"], ["tagged", "refused"]):
        rows = _where(books, pc.is_in(books.column("status"), pa.array(outcomes)))
        found.append(answers.placed(rows.column("key").combine_chunks(), _of_outcomes(rows)))
    return found


def _new_keys(run: Run, planned: Plan) -> tuple[Keys, Keys]:
    """Return the plan's new texts, and those of them that are deferred."""
    new, deferred = list[Digests](), list[Digests]()
    path = new_keys_path(run, planned.plan_id)
    for batch in read_parquet(run.storage, path, NEW_KEYS, batch_size=KEYS_A_PART):
        keys = digests(batch.column("key"))
        new.append(keys)
        if "deferred" in batch.schema.names:  # plans of before there were rollouts have no such column
            if batch.column("deferred").type != pa.bool_():
                raise StorageError(f"{run.storage.url}/{path}: damaged: run its step again")
            deferred.append(keys[batch.column("deferred").to_numpy(zero_copy_only=False)])
    return Keys(*new), Keys(*deferred)


def _where(books: pa.Table, picked: pa.Array) -> pa.Table:
    """Return the rows of books that are picked, most often all or none; to filter lists takes long."""
    if pc.all(picked).as_py():
        return books
    return books.filter(picked) if pc.any(picked).as_py() else books.slice(0, 0)


def _of_outcomes(rows: pa.Table) -> pa.Table:
    """Return the answers that the attempts' books tell of."""
    status, kind = rows.column("status"), rows.column("kind")
    failed = pc.equal(status, "failed")
    columns = [
        status,
        pc.invert(failed),
        pc.if_else(failed, pc.binary_join_element_wise(kind, rows.column("error"), ": "), kind),
        pc.if_else(pc.equal(status, "tagged"), _as_json(rows.column("tags").combine_chunks()), None),
        rows.column("model"),
        rows.column("answered_at"),
        _least(rows.column("confidence").combine_chunks()),
    ]
    return pa.table(columns, schema=SCHEMA)


def _hold_others(lists: pa.ListArray, tags: Collection[str]) -> pa.Array:
    """Return which of some lists hold anything but these tags: somebody changed the file."""
    others = pc.invert(pc.is_in(lists.flatten(), pa.array(list(tags), pa.string())))
    return pc.is_in(pa.array(np.arange(len(lists))), pc.list_parent_indices(lists).filter(others))


def _as_json(lists: pa.ListArray) -> pa.Array:
    """Return lists of texts, few of which are distinct, as JSON."""
    texts = lists.flatten().dictionary_encode()
    quoted = pa.array([json.dumps(text, ensure_ascii=False) for text in texts.dictionary.to_pylist()], pa.string())
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), dtype=np.int32)
    bounds = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
    joined = pc.binary_join(pa.ListArray.from_arrays(bounds, quoted.take(texts.indices)), ", ")
    return pc.if_else(pc.is_valid(lists), pc.binary_join_element_wise("[", joined, "]", ""), None)


def _least(lists: pa.ListArray) -> pa.Array:
    """Return the least number of each list, NULL where it has none."""
    numbers = pa.table({"row": pc.list_parent_indices(lists), "number": lists.flatten()})
    least = numbers.group_by("row").aggregate([("number", "min")]).combine_chunks()
    places = pc.index_in(pa.array(np.arange(len(lists))), least.column("row").combine_chunks())
    return least.column("number_min").combine_chunks().take(places)


def _table(answers: Iterable[Answer]) -> pa.Table:
    rows = [answer._asdict() for answer in answers]
    for row in rows:
        row["tags"] = None if row["tags"] is None else json.dumps(row["tags"], ensure_ascii=False)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
