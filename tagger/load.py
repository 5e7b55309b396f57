"""The load_back step: the tags go into the target table, in one transaction.

The run's rows are first put beside the target, in a temporary table, so that the database can tell which of them
changed: only for those is a cache record fetched, and only those are written. A row is never changed or deleted by a
snapshot older than its own `snapshot_at`.
"""

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from sys import intern
from typing import Any, NamedTuple

import sqlalchemy as sa

from tagger.batches import Batches
from tagger.cache import Cache, Record
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import RunFailed
from tagger.ledger import Latest, latest_outcomes, read_attempts
from tagger.runs import TOO_LONG, IdType, Loaded, Plan, Run, Snapshot, new_keys_path, read_parquet, rows_path
from tagger.tables import GONE, REVIEW, connecting, create_target, existing_target, is_reviewed, only_writer

logger = logging.getLogger(__name__)

RECORDS_A_READ = 5000
"""Cached records fetched at once: what bounds the memory where many are needed."""

GOOD = ("tagged", "refused", REVIEW)
"""Statuses that are an answer to the present text."""


class Answer(NamedTuple):
    """What a row's text came to, by the stage's columns. The answers to a million texts must fit into memory."""

    status: str
    answered: bool = False
    """Whether it is by a record, which the columns below tell of."""
    error: str | None = None
    tags: tuple[str, ...] | None = None
    model: str | None = None
    tagged_at: datetime | None = None
    confidence: float | None = None
    """Of the tag that the LLM is least sure of; None where it was not asked, or gave no tag."""


BLANK = Answer("blank")
CACHED = Answer("cached", answered=True)
SKIPPED = Answer("skipped", error="not asked yet; the next run asks")
DEFERRED = Answer("deferred")
"""Left to a later run by the plan: the row stays as it is."""
PENDING = Answer("pending", error="in a batch that has not ended; a later run takes its answer")
DAMAGED = Answer("failed", error="the cache record was damaged; the next run tags the text again")


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
    cache = Cache(run.storage, planned.spec_id, dataset.llm.model)
    answers = _answers(run, planned, cache)
    engine = database(dataset.target_conn_id, connections)
    with connecting(engine, dataset.target_conn_id) as connection:
        with only_writer(connection, dataset.target.table):
            target = existing_target(connection, dataset.target.table, taken.id_type)
            if target is None:
                target = create_target(connection, dataset.target.table, taken.id_type)
        loading = Loading(connection, target, run.run_id, planned.spec_id, taken, dataset.review_below)
        loading.stage(_staged(run, dataset, planned, taken.id_type, answers))
        damaged, damaged_row = loading.resolve(cache)
        with only_writer(connection, dataset.target.table):
            written = loading.write()
            if dataset.confidence:
                written += loading.judge_again()
            deleted, problem = loading.delete(dataset.limits.max_deleted_fraction)
            tags = loading.tag_counts()
            to_review = loading.count(REVIEW)
    statuses = Counter("skipped" if answer is DEFERRED else answer.status for answer in answers.values())
    counts = {status: statuses[status] for status in ("tagged", "refused", "failed", "skipped", "pending")}
    loaded = Loaded(
        written=written,
        deleted=deleted,
        problem=problem,
        **counts,
        damaged=damaged,
        damaged_row=damaged_row,
        tags=tags,
        review=to_review,
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


def _answers(run: Run, planned: Plan, cache: Cache) -> dict[str, Answer]:
    """Return what became of the plan's new texts, by key: from the attempts' books, and from the cache for the rest."""
    outcomes = latest_outcomes(a for a in read_attempts(run) if a.plan_id == planned.plan_id)
    answers: dict[str, Answer] = {}
    for batch in read_parquet(run.storage, new_keys_path(run, planned.plan_id)):
        # plans of before there were rollouts have no such column
        deferred = batch.column("deferred").to_pylist() if "deferred" in batch.schema.names else [False] * len(batch)
        for key, is_deferred in zip(batch.column("key").to_pylist(), deferred, strict=True):
            answers[key] = DEFERRED if is_deferred else _of_outcome(outcomes.pop(key, None))
    unanswered = iter(cache.find(key for key, answer in answers.items() if not answer.answered))
    while keys := list(islice(unanswered, RECORDS_A_READ)):
        answers.update((key, _of_record(record)) for key, record in cache.read_many(keys).items())
    batches = Batches(run.storage, planned.spec_id)
    pending = batches.keys(batches.unfinished())
    answers.update((key, PENDING) for key in pending & answers.keys() if not answers[key].answered)
    return answers


def _of_outcome(outcome: Latest | None) -> Answer:
    if outcome is None or outcome.status == "asked":
        return SKIPPED
    if outcome.status == "failed":
        return Answer("failed", error=intern(f"{outcome.kind}: {outcome.error}"))
    tags = outcome.tags if outcome.status == "tagged" else None
    sure = min(outcome.confidence or (), default=None)
    return Answer(outcome.status, True, outcome.kind, tags, outcome.model, outcome.answered_at, sure)


def _of_record(record: Record) -> Answer:
    tags = tuple(map(intern, record.tags)) if record.status == "tagged" else None
    reason = None if record.reason is None else intern(record.reason)
    sure = min(record.confidence or (), default=None)
    return Answer(record.status, True, reason, tags, intern(record.model), record.created_at, sure)


def _staged(
    run: Run, dataset: Dataset, planned: Plan, ids: IdType, answers: dict[str, Answer]
) -> Iterable[list[dict[str, Any]]]:
    refused = Answer("refused", error=f"{TOO_LONG}: over {dataset.source.max_chars} characters")
    for batch in read_parquet(run.storage, rows_path(run, planned.plan_id)):
        columns = (batch.column(name).to_pylist() for name in ("id", "key", "too_long"))
        staged = []
        for row_id, key, is_too_long in zip(*columns, strict=True):
            answer = BLANK if key is None else refused if is_too_long else answers.get(key, CACHED)
            staged.append({"row_id": uuid.UUID(row_id) if ids == "uuid" else row_id, "key": key, **answer._asdict()})
        yield staged


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
        self._target = target
        self._run_id = run_id
        self._spec = spec
        self._taken = taken
        self._stage = sa.Table(
            "tagger_stage",
            sa.MetaData(),
            sa.Column("row_id", target.c.row_id.type, primary_key=True, autoincrement=False),
            sa.Column("key", sa.String(32), index=True),
            sa.Column("status", sa.Text),
            sa.Column("answered", sa.Boolean),
            sa.Column("error", sa.Text),
            sa.Column("tags", target.c.tags.type),
            sa.Column("model", sa.Text),
            sa.Column("tagged_at", target.c.tagged_at.type),
            sa.Column("confidence", target.c.confidence.type),
            prefixes=["TEMPORARY"],
        )

    def stage(self, batches: Iterable[list[dict[str, Any]]]) -> None:
        """Put the run's rows beside the target."""
        with self._connection.begin():
            self._stage.create(self._connection, checkfirst=False)
            for batch in batches:
                self._connection.execute(self._stage.insert(), batch)

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
            wanted = iter([(str(key), str(row_id)) for key, row_id in self._connection.execute(query)])
        update = stage.update().where(stage.c.key == sa.bindparam("wanted"), stage.c.status == "cached")
        damaged: list[str] = []
        while rows := dict(islice(wanted, RECORDS_A_READ)):
            records = cache.read_many(rows)  # no transaction is open while S3 is read
            found = {key: _of_record(records[key]) if key in records else DAMAGED for key in rows}
            with self._connection.begin():
                self._connection.execute(update, [{"wanted": key, **found[key]._asdict()} for key in rows])
            damaged += [row_id for key, row_id in rows.items() if key not in records]
        return len(damaged), next(iter(damaged), None)

    def write(self) -> int:
        """Insert and update the rows that changed; return how many."""
        from sqlalchemy.dialects import postgresql, sqlite

        stage, target = self._stage, self._target
        insert: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}[self._connection.dialect.name](target)
        names = [name for name in target.columns.keys() if not name.startswith("reviewed_")]
        rows = (
            sa.select(
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
            .where(stage.c.status.not_in(("cached", "deferred", "blank")))
            .order_by(stage.c.row_id)
        )
        upsert = insert.from_select(names, rows)
        new = upsert.excluded
        answered = new.cache_key.is_not(None)
        of_last_answer = ("tags", "cache_key", "spec_id", "model", "tagged_at", "confidence")
        # what somebody reviewed is in no doubt
        status = sa.case((sa.and_(new.status == REVIEW, is_reviewed(target)), "tagged"), else_=new.status)
        upsert = upsert.on_conflict_do_update(
            index_elements=[target.c.row_id],
            set_={
                "status": status,
                **{name: new[name] for name in ("error", "snapshot_at", "run_id")},
                **{name: sa.case((answered, new[name]), else_=target.c[name]) for name in of_last_answer},
            },
            where=sa.and_(
                target.c.snapshot_at <= new.snapshot_at,
                sa.or_(
                    target.c.status != status,
                    target.c.error.is_distinct_from(new.error),
                    sa.and_(answered, target.c.cache_key.is_distinct_from(new.cache_key)),
                ),
            ),
        )
        return self._connection.execute(upsert.execution_options(preserve_rowcount=True)).rowcount

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

    def count(self, status: str) -> int:
        """Return the number of the target's rows with a status."""
        query = sa.select(sa.func.count()).select_from(self._target).where(self._target.c.status == status)
        rows: int = self._connection.execute(query).scalar_one()
        return rows

    def tag_counts(self) -> dict[str, int]:
        """Return the number of the target's rows by tag, most frequent first."""
        each = {"postgresql": sa.func.jsonb_array_elements_text, "sqlite": sa.func.json_each}
        tags = each[self._connection.dialect.name](self._target.c.tags).table_valued("value")
        count = sa.func.count()
        query = sa.select(tags.c.value, count).select_from(self._target.join(tags, sa.true()))
        query = query.where(self._target.c.status != GONE).group_by(tags.c.value)
        rows = self._connection.execute(query.order_by(count.desc(), tags.c.value))
        return {str(tag): int(n) for tag, n in rows}
