"""What changed since the target was written: why texts are new, and what is another in the spec."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import sqlalchemy as sa

from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.keys import Keys
from tagger.runs import TOO_LONG, IdType, Run
from tagger.spec import normalise, spec_id, spec_of, text_key
from tagger.tables import GONE, REVIEW, connecting, existing_target

ROWS_A_QUERY = 1000

GOOD = ("tagged", "refused", REVIEW)
"""Statuses of target rows that are an answer to the present text."""

PARTS = {
    "prompt": "the prompt",
    "tags": "the tags",
    "model": "the model",
    "max_tags": "`max_tags`",
    "allow_none": "`allow_none`",
    "examples": "the examples",
    "confidence": "`confidence`",
    "revision": "`revision`",
    "params": "`llm.params`",
}
"""What users call the parts of a spec."""


class Why(IntEnum):
    """Why a text is new. Where its rows differ, the highest counts: the text is asked for the sake of that row."""

    NEW_SPEC = 0
    """All of its rows hold the tags that it got under an older spec."""
    NEW_TEXT = 1
    CHANGED_TEXT = 2
    RECORD_GONE = 3
    """The target holds its answer, the cache no longer does."""
    REFUSED = 4
    UNANSWERED = 5

    @property
    def words(self) -> str:
        """How plans call it."""
        return _WORDS[self]


_WORDS = {
    Why.NEW_TEXT: "new text",
    Why.CHANGED_TEXT: "changed text",
    Why.NEW_SPEC: "new spec",
    Why.UNANSWERED: "asked before and not answered",
    Why.REFUSED: "refused before",
    Why.RECORD_GONE: "record gone from the cache",
}


class Held(NamedTuple):
    """What a row of the target holds."""

    key: str | None
    spec: str | None
    status: str


@dataclass(frozen=True)
class OlderSpec:
    """The target's rows that hold the tags of one older spec."""

    spec: str
    rows: int
    texts: int
    """Distinct ones."""
    run_id: str | None
    """A run that tagged some of them."""


def _not_too_long(columns: Any) -> sa.ColumnElement[bool]:
    """Leave rows out whose present text is never asked: no spec reaches them."""
    return sa.or_(columns.error.is_(None), ~columns.error.like(f"{TOO_LONG}%"))


class TargetRows:
    """The target table, as far as a plan has to know it."""

    def __init__(self, connection: sa.Connection, table: sa.Table, ids: IdType) -> None:
        self._connection = connection
        self._table = table
        self._ids = ids

    def count(self) -> int:
        """Return the number of rows."""
        query = sa.select(sa.func.count()).select_from(self._table).where(self._table.c.status != GONE)
        rows: int = self._connection.execute(query).scalar_one()
        return rows

    def ids(self, statuses: Collection[str], *, but_spec: str | None = None) -> set[Any]:
        """Return the ids of the rows with one of these statuses, tagged under another spec than this where one is."""
        t = self._table.c
        query = sa.select(t.row_id).where(t.status.in_(statuses))
        if but_spec is not None:
            query = query.where(t.spec_id != but_spec, _not_too_long(t))
        return set(self._connection.execute(query).scalars())

    def older_specs(self, spec: str) -> list[OlderSpec]:
        """Return the specs other than `spec` whose tags the target holds, that of most rows first."""
        t = self._table.c
        rows = sa.func.count()
        tagged_by = sa.func.max(sa.case((t.status.in_(GOOD), t.run_id)))
        query = sa.select(t.spec_id, rows, sa.func.count(t.cache_key.distinct()), tagged_by)
        query = (
            query.where(t.spec_id != spec, t.status != GONE, _not_too_long(t))
            .group_by(t.spec_id)
            .order_by(rows.desc(), t.spec_id)
        )
        return [OlderSpec(*row) for row in self._connection.execute(query)]

    def held(self, row_ids: list[Any]) -> list[Held | None]:
        """Return what each of these rows holds; None for a row that is not there."""
        t = self._table.c
        ids = [UUID(row_id) for row_id in row_ids] if self._ids == "uuid" else row_ids
        query = sa.select(t.row_id, t.cache_key, t.spec_id, t.status).where(t.row_id.in_(ids))
        found = {row_id: Held(*held) for row_id, *held in self._connection.execute(query)}
        return [found.get(row_id) for row_id in ids]

    def largest_run(self, spec: str) -> str | None:
        """Return the run that tagged most rows under `spec`."""
        t = self._table.c
        query = sa.select(t.run_id).where(t.spec_id == spec, t.status.in_(("tagged", REVIEW))).group_by(t.run_id)
        run_id: str | None = self._connection.execute(query.order_by(sa.func.count().desc()).limit(1)).scalar()
        return run_id


@contextmanager
def target_rows(dataset: Dataset, ids: IdType, connections: Connections) -> Iterator[TargetRows | None]:
    """Yield the dataset's target; None where it is not made yet."""
    with connecting(database(dataset.target_conn_id, connections), dataset.target_conn_id) as connection:
        table = existing_target(connection, dataset.target.table, ids)
        yield None if table is None else TargetRows(connection, table, ids)


def why_new(
    new: Keys, refused: Keys, rows: pq.ParquetFile, snapshot: pq.ParquetFile, target: TargetRows
) -> npt.NDArray[np.int8]:
    """Return why each of the new texts is new, in their order. `refused` are those asked again after a refusal.

    The target is read in parts, by the ids of the rows that have these texts; `rows` are the plan's.
    """
    found = np.full(len(new), Why.NEW_SPEC, np.int8)
    for group in range(rows.num_row_groups):
        known = rows.read_row_group(group)
        places = new.places(known.column("key").combine_chunks())
        picked = np.flatnonzero((places >= 0) & ~known.column("too_long").to_numpy())
        texts = None
        for start in range(0, len(picked), ROWS_A_QUERY):
            part = picked[start : start + ROWS_A_QUERY]
            some = known.take(part)
            again = refused.places(some.column("key").combine_chunks()) >= 0
            of_rows = zip(part, some.column("key").to_pylist(), target.held(some.column("id").to_pylist()), strict=True)
            for is_again, (i, key, held) in zip(again, of_rows, strict=True):
                if is_again:
                    why = Why.REFUSED
                elif held is None or held.status == GONE:
                    why = Why.NEW_TEXT
                elif held.status not in GOOD:
                    why = Why.UNANSWERED
                elif held.key == key:
                    why = Why.RECORD_GONE
                else:
                    texts = texts or snapshot.read_row_group(group, ["text"]).column("text")
                    why = Why.NEW_SPEC if _is_of(held, texts[i].as_py()) else Why.CHANGED_TEXT
                found[places[i]] = max(why, found[places[i]])
    return found


def _is_of(held: Held, text: str) -> bool:
    """Return whether what a row of the target holds is the answer to this text, under whatever spec."""
    return held.spec is not None and held.key == text_key(held.spec, normalise(text))


def newest(keys: Keys, count: int, rows: pq.ParquetFile) -> Keys:
    """Return the `count` keys of the plan's rows with the highest ids."""
    is_found = np.zeros(len(keys), bool)
    left = count
    for group in reversed(range(rows.num_row_groups)):
        places = keys.places(rows.read_row_group(group, ["key"]).column("key").combine_chunks())
        for place in places[places >= 0][::-1]:
            if not left:
                break
            left -= not is_found[place]
            is_found[place] = True
    return keys.where(is_found)


def frozen_dataset(run: Run, older: OlderSpec) -> Dataset | None:
    """Return the dataset under which older tags were made, as their run froze it; None where that is gone."""
    if older.run_id is None:
        return None
    try:
        return Run(run.storage, run.dataset_name, older.run_id).dataset()
    except InputError:
        return None


def spec_change(older: OlderSpec, before: Dataset | None, now: Dataset) -> str:
    """Return in words what changed since the older spec."""
    if before is None:
        return "the prompt, the tags or the model changed"
    old, new = spec_of(before), spec_of(now)
    changed = [name for part, name in PARTS.items() if old.get(part) != new.get(part)]
    if spec_id(before) != older.spec:  # as this version of tagger has it
        changed.append("the instructions of tagger")
    return f"{' and '.join(changed)} changed"
