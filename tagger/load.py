"""The load_back step: the tags go into the target table, in one transaction.

The run's rows are first put beside the target, in a temporary table, so that the database can tell which of them
changed: only for those is a cache record fetched, and only those are written. A row is never changed or deleted by a
snapshot older than its own `snapshot_at`.
"""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from tagger.answers import RECORDS_A_READ, of_record, read_answers
from tagger.cache import Cache
from tagger.connections import Connections, database
from tagger.exceptions import RunFailed
from tagger.ledger import instants
from tagger.runs import TOO_LONG, Loaded, Plan, Run, Snapshot, keyed_schema, opened_parquet, rows_path
from tagger.tables import (
    GONE,
    MYSQL_TABLE,
    REVIEW,
    connecting,
    create_target,
    existing_target,
    is_reviewed,
    only_writer,
)

logger = logging.getLogger(__name__)

ROWS_A_BATCH = 50_000
"""Rows of the plan that are staged at once."""

ROWS_A_STATEMENT = 5000
"""Of these, where they go in by statements."""

GOOD = ("tagged", "refused", REVIEW)
"""Statuses that are an answer to the present text."""

UNWRITTEN = ("cached", "deferred", "blank")
"""Statuses of staged rows that leave the target's as they are, or take them out."""


def load_back(run: Run, connections: Connections) -> Loaded:
    """Write the run's tags into the target table, which is made if it is missing.

    Raises:
        InputError: the run has no plan, or the target table has other columns.
        RunFailed: more rows would be deleted than `limits.max_deleted_fraction` allows; the tags are written, nothing
            is deleted.
    """
    clock = time.monotonic()
    dataset, taken, planned = run.dataset(), run.snapshot(), run.plan()
    run.forget("load.json", "summary.json")
    if taken.options.dry_run:
        return _nothing_loaded(run, planned)
    cache = Cache(run.storage, planned.spec_id, dataset.llm.model, dataset.tag_ids)
    answers = read_answers(run, planned, cache)
    engine = database(dataset.target_conn_id, connections)
    with (
        opened_parquet(run.storage, rows_path(run, planned.plan_id), keyed_schema(taken.id_type)) as rows,
        connecting(engine, dataset.target_conn_id) as connection,
    ):

        def batches() -> Iterator[pa.Table]:
            for batch in rows.iter_batches(ROWS_A_BATCH):
                yield answers.staged(batch, dataset.source.max_chars)

        with only_writer(connection, dataset.target.table):
            target = existing_target(connection, dataset.target.table, taken.id_type)
            if target is None:
                target = create_target(connection, dataset.target.table, taken.id_type)
            loading = Loading(connection, target, run.run_id, planned.spec_id, taken, dataset.review_below)
            groups = loading.fill(batches()) if not planned.cached else None
        if groups is not None:
            written, deleted, damaged, damaged_row, problem = sum(group.rows for group in groups), 0, 0, None, None
        else:
            loading.stage(batches())
            damaged, damaged_row = loading.resolve(cache)
            with only_writer(connection, dataset.target.table):
                written = loading.write()
                if dataset.confidence:
                    written += loading.judge_again()
                deleted, problem = loading.delete(dataset.limits.max_deleted_fraction)
                groups = loading.groups()
    loaded = Loaded(
        written=written,
        deleted=deleted,
        problem=problem,
        **answers.count(),
        damaged=damaged,
        damaged_row=damaged_row,
        tags=_by_tag(groups),
        review=sum(group.rows for group in groups if group.status == REVIEW),
        seconds=time.monotonic() - clock,
    )
    run.write("load.json", loaded)
    logger.info("load_back: %d rows written, %d deleted", written, deleted)
    if problem is not None:
        raise RunFailed(problem)
    return loaded


def _nothing_loaded(run: Run, planned: Plan) -> Loaded:
    loaded = Loaded(
        written=0,
        deleted=0,
        tagged=0,
        refused=0,
        failed=0,
        skipped=planned.new,
        pending=planned.pending,
        damaged=0,
        tags={},
        seconds=0.0,
    )
    run.write("load.json", loaded)
    logger.info("load_back: nothing is written in a dry run")
    return loaded


class Group(NamedTuple):
    """Rows of the target that have the same tags and status: few, where there are millions of rows."""

    tags: list[str] | None
    status: str
    rows: int


def _by_tag(groups: Iterable[Group]) -> dict[str, int]:
    """Return the number of rows by tag, most frequent first."""
    counts: Counter[str] = Counter()
    for group in groups:
        for tag in group.tags or ():
            counts[tag] += group.rows
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class Loading:
    """One load into a target table over one connection."""

    def __init__(
        self,
        connection: sa.Connection,
        target: sa.Table,
        run_id: str,
        spec: str,
        taken: Snapshot,
        review_below: float | None,
    ) -> None:
        self._review_below = review_below
        self._connection = connection
        self._copies = connection.dialect.name == "postgresql"
        self._target = target
        self._run_id = run_id
        self._spec = spec
        self._taken = taken
        self._stage = sa.Table(
            "tagger_stage",
            sa.MetaData(),
            # PostgreSQL goes through all rows at once, without an index
            sa.Column("row_id", target.c.row_id.type, primary_key=not self._copies, autoincrement=False),
            sa.Column("key", sa.String(32)),
            sa.Column("status", sa.Text),
            sa.Column("answered", sa.Boolean),
            sa.Column("error", sa.Text),
            sa.Column("tags", target.c.tags.type),
            sa.Column("model", sa.Text),
            sa.Column("tagged_at", target.c.tagged_at.type),
            sa.Column("confidence", target.c.confidence.type),
            prefixes=["TEMPORARY"],
            **MYSQL_TABLE,
        )

    def fill(self, batches: Iterable[pa.Table]) -> list[Group] | None:
        """Copy the run's rows, none of them `cached`, into the target, if it is empty and on PostgreSQL.

        Returns what went in; None where it is another target, or somebody changed the types of its columns.
        """
        if not self._copies or self._connection.execute(sa.select(sa.select(self._target).exists())).scalar_one():
            return None
        from tagger.postgres_copy import copies_into, copy_in

        names = [name for name in self._target.columns.keys() if not name.startswith("reviewed_")]
        if not copies_into(self._connection, self._target, names):
            return None
        counts: Counter[tuple[str | None, str]] = Counter()

        def counted() -> Iterator[pa.Table]:
            for batch in batches:
                rows = self._in_target(batch)
                for group in rows.group_by(["tags", "status"]).aggregate([([], "count_all")]).to_pylist():
                    counts[group["tags"], group["status"]] += group["count_all"]
                yield rows.select(names)

        copy_in(self._connection, self._target, names, counted())
        return [Group(json.loads(tags or "null"), status, rows) for (tags, status), rows in counts.items()]

    def _in_target(self, staged: pa.Table) -> pa.Table:
        """Return staged rows as `write` puts them into a target that has none of them."""
        rows = staged.filter(pc.invert(pc.is_in(staged.column("status"), pa.array(UNWRITTEN))))
        status, answered, confidence = (rows.column(name) for name in ("status", "answered", "confidence"))
        if self._review_below is not None:
            unsure = pc.and_(pc.equal(status, "tagged"), pc.less(confidence, self._review_below))
            status = pc.if_else(pc.fill_null(unsure, False), REVIEW, status)
        same = {"snapshot_at": self._taken.taken_at, "run_id": self._run_id}
        columns = {
            "status": status,
            "cache_key": pc.if_else(answered, rows.column("key"), None),
            "spec_id": pc.if_else(answered, self._spec, None),
            **{name: pa.repeat(pa.scalar(value), rows.num_rows) for name, value in same.items()},
        }
        of_stage = ("row_id", "tags", "error", "model", "tagged_at", "confidence")
        return pa.table({**{name: rows.column(name) for name in of_stage}, **columns})

    def stage(self, batches: Iterable[pa.Table]) -> None:
        """Put the run's rows beside the target."""
        with self._connection.begin():
            self._stage.create(self._connection, checkfirst=False)
            if self._copies:
                from tagger.postgres_copy import copy_in

                copy_in(self._connection, self._stage, self._stage.columns.keys(), batches)
                self._connection.exec_driver_sql(f"ANALYZE {self._stage.name}")
            else:
                for batch in batches:
                    for part in batch.to_batches(ROWS_A_STATEMENT):
                        self._connection.execute(self._stage.insert(), self._as_rows(part))

    def _as_rows(self, staged: pa.RecordBatch) -> list[dict[str, Any]]:
        """Return staged rows as SQLAlchemy takes them."""
        columns: dict[str, list[Any]] = {
            name: instants(staged[name]) if name == "tagged_at" else staged[name].to_pylist()
            for name in staged.schema.names
        }
        columns["tags"] = [None if tags is None else json.loads(tags) for tags in columns["tags"]]
        if self._taken.id_type == "uuid":
            columns["row_id"] = list(map(uuid.UUID, columns["row_id"]))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def resolve(self, cache: Cache) -> tuple[int, str | None]:
        """Fetch the records of those cached texts that the target does not have.

        Returns how many of them are damaged, and a row that has such a text.
        """
        stage, target = self._stage, self._target
        query = (
            sa.select(stage.c.key, sa.func.min(sa.cast(stage.c.row_id, sa.Text)))
            .group_by(stage.c.key)
            .select_from(stage.outerjoin(target, stage.c.row_id == target.c.row_id))
            .where(
                stage.c.status == "cached",
                sa.or_(
                    target.c.row_id.is_(None),
                    target.c.cache_key.is_distinct_from(stage.c.key),
                    target.c.status.not_in(GOOD),
                    target.c.error.like(f"{TOO_LONG}%"),
                ),
            )
        )
        with self._connection.begin():
            lacking = [(str(key), str(row_id)) for key, row_id in self._connection.execute(query)]
            if lacking:
                sa.Index("tagger_stage_key", stage.c.key).create(self._connection)
        wanted = iter(lacking)
        update = stage.update().where(stage.c.key == sa.bindparam("wanted"), stage.c.status == "cached")
        damaged: list[str] = []
        while rows := dict(islice(wanted, RECORDS_A_READ)):
            records = cache.read_many(rows)  # no transaction is open while S3 is read
            found = {key: of_record(records.get(key)) for key in rows}
            with self._connection.begin():
                self._connection.execute(update, [{"wanted": key, **found[key]._asdict()} for key in rows])
            damaged += [row_id for key, row_id in rows.items() if key not in records]
        return len(damaged), next(iter(damaged), None)

    def write(self) -> int:
        """Insert and update the rows that changed; return how many."""
        from sqlalchemy.dialects import postgresql, sqlite

        stage, target = self._stage, self._target
        names = [name for name in target.columns.keys() if not name.startswith("reviewed_")]
        answers = (
            stage.c.row_id,
            stage.c.tags,
            sa.case((sa.and_(stage.c.status == "tagged", self._is_unsure(stage)), REVIEW), else_=stage.c.status),
            stage.c.error,
            sa.case((stage.c.answered, stage.c.key)),
            sa.case((stage.c.answered, sa.literal(self._spec))),
            stage.c.model,
            stage.c.tagged_at,
            sa.literal(self._taken.taken_at, target.c.snapshot_at.type),
            sa.literal(self._run_id),
            stage.c.confidence,
        )
        columns = [answer.label(name) for name, answer in zip(names, answers, strict=True)]
        rows = sa.select(*columns).where(stage.c.status.not_in(UNWRITTEN))
        if self._connection.dialect.name == "mysql":
            return self._update_and_insert(names, rows)
        insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[self._connection.dialect.name](target)
        upsert = insert.from_select(names, rows.order_by(stage.c.row_id))
        values, is_changed = self._changes(upsert.excluded)
        upsert = upsert.on_conflict_do_update(index_elements=[target.c.row_id], set_=values, where=is_changed)
        return self._connection.execute(upsert.execution_options(preserve_rowcount=True)).rowcount

    def _update_and_insert(self, names: list[str], rows: sa.Select[Any]) -> int:
        """Do what the upsert does: MySQL's has no condition, and sees what it has set before in the same row."""
        target = self._target
        new = rows.subquery("new").c
        values, is_changed = self._changes(new)
        update = target.update().where(target.c.row_id == new.row_id, is_changed).values(values)
        is_new = ~sa.exists().where(target.c.row_id == self._stage.c.row_id)
        insert = target.insert().from_select(names, rows.where(is_new))
        return sum(self._connection.execute(each).rowcount for each in (update, insert))

    def _changes(self, new: Any) -> tuple[dict[str, Any], sa.ColumnElement[bool]]:
        """Return what a row of the target becomes by a new answer, and whether that is to be written."""
        target = self._target
        answered = new.cache_key.is_not(None)
        of_last_answer = ("tags", "cache_key", "spec_id", "model", "tagged_at", "confidence")
        # what somebody reviewed is in no doubt
        status = sa.case((sa.and_(new.status == REVIEW, is_reviewed(target)), "tagged"), else_=new.status)
        values = {
            "status": status,
            **{name: new[name] for name in ("error", "snapshot_at", "run_id")},
            **{name: sa.case((answered, new[name]), else_=target.c[name]) for name in of_last_answer},
        }
        differs = sa.or_(
            target.c.status != status,
            target.c.error.is_distinct_from(new.error),
            sa.and_(answered, target.c.cache_key.is_distinct_from(new.cache_key)),
        )
        return values, sa.and_(self._not_newer(), differs)

    def judge_again(self) -> int:
        """Move rows whose answer the target has between `tagged` and `review`, as `review_below` says now.

        Returns how many were moved.
        """
        stage, target = self._stage, self._target
        unchanged = sa.select(stage.c.row_id).where(stage.c.status == "cached")
        status = sa.case((sa.and_(self._is_unsure(target), ~is_reviewed(target)), REVIEW), else_="tagged")
        moved = target.update().where(
            target.c.row_id.in_(unchanged),
            target.c.status.in_(("tagged", REVIEW)),
            target.c.status != status,
            self._not_newer(),
        )
        return self._connection.execute(moved.values(status=status, **self._written())).rowcount

    def _is_unsure(self, table: sa.Table) -> sa.ColumnElement[bool]:
        if self._review_below is None:
            return sa.false()
        unsure: sa.ColumnElement[bool] = table.c.confidence < self._review_below
        return unsure

    def _not_newer(self) -> sa.ColumnElement[bool]:
        not_newer: sa.ColumnElement[bool] = self._target.c.snapshot_at <= self._taken.taken_at
        return not_newer

    def _written(self) -> dict[str, Any]:
        return {"snapshot_at": self._taken.taken_at, "run_id": self._run_id}

    def delete(self, max_fraction: float) -> tuple[int, str | None]:
        """Take out the rows whose text is blank, and with all rows taken those that are gone from the source.

        They are deleted, but for those that were reviewed, which become `gone`. Returns the number of rows taken out,
        and the problem if too many would have been: then only blank ones were.
        """
        target, stage = self._target, self._stage
        there = target.c.status != GONE
        # whose review was taken back
        self._connection.execute(target.delete().where(~there, ~is_reviewed(target), self._not_newer()))
        blank = target.c.row_id.in_(sa.select(stage.c.row_id).where(stage.c.status == "blank"))
        deleted = self._take_out(sa.and_(blank, there, self._not_newer()))
        if self._taken.selection.rows != "all" or self._taken.rows == 0 or self._taken.options.limit is not None:
            return deleted, None
        gone = sa.and_(~sa.exists().where(stage.c.row_id == target.c.row_id), there, self._not_newer())
        count = self._connection.execute(sa.select(sa.func.count()).select_from(target).where(gone)).scalar_one()
        if not count:
            return deleted, None
        total = self._connection.execute(sa.select(sa.func.count()).select_from(target).where(there)).scalar_one()
        if count > max_fraction * total:
            return deleted, (
                f"{count} of {total} rows of {target.fullname} are gone from the source, more than "
                f"`limits.max_deleted_fraction` {max_fraction:g} allows: none of them was deleted; raise the limit for "
                "one run if they are meant to go"
            )
        return deleted + self._take_out(gone), None

    def _take_out(self, rows: sa.ColumnElement[bool]) -> int:
        """Delete these rows, or if they hold a review, mark them as `gone`; return how many there were."""
        target = self._target
        marked = target.update().where(rows, is_reviewed(target)).values(status=GONE, error=None, **self._written())
        kept = self._connection.execute(marked).rowcount
        return kept + self._connection.execute(target.delete().where(rows, ~is_reviewed(target))).rowcount

    def groups(self) -> list[Group]:
        """Return what rows the target has now, but for those that are gone."""
        target = self._target
        alike = (target.c.tags, target.c.status)
        query = sa.select(*alike, sa.func.count()).where(target.c.status != GONE).group_by(*alike)
        return [Group(*row) for row in self._connection.execute(query)]
