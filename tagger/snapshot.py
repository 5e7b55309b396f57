"""The snapshot step: today's rows go out to storage as one Parquet file.

The rows are streamed (server-side cursor) and the file appears whole or not at all: `snapshot.json`, which names it,
is written last.
"""

import heapq
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from tagger.changes import GOOD, target_rows
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.mysql import abandoned_on_error
from tagger.replica import missed_rows
from tagger.runs import IdType, Run, Snapshot, taken_schema, utc_now, writing_parquet
from tagger.spec import spec_id
from tagger.tables import UtcDateTime, column, connecting, id_type, reflect
from tagger.window import Options, Selection

logger = logging.getLogger(__name__)

UNFINISHED = ("failed", "skipped", "pending")
"""Statuses of target rows whose text still waits for an answer."""

ROWS_A_FETCH = 500
"""Small enough that rows of a megabyte fit in memory."""

CHARS_A_WRITE = 4_000_000
ROWS_A_WRITE = 20_000
IDS_A_QUERY = 500

COMPRESSION = "snappy"
"""zstd makes the file a third smaller, and takes as long as all else that a snapshot does."""

Columns = tuple[Sequence[Any], Sequence[str]]
"""Ids and texts of some rows, as lists or Arrow arrays."""


def snapshot(
    dataset: Dataset, run: Run, selection: Selection, connections: Connections, options: Options | None = None
) -> Snapshot:
    """Take the selected rows out of the source into the run's snapshot, and freeze the dataset for the later steps.

    Raises:
        InputError: a table or column is missing, an id or timestamp is of no known kind, an id appears twice.
    """
    clock, started_at = time.monotonic(), utc_now()
    options = options or Options()
    if options.max_cost_usd is not None:
        limits = dataset.limits.model_copy(update={"max_cost_usd": options.max_cost_usd})
        dataset = dataset.model_copy(update={"limits": limits})
    run.storage.check()
    run.forget("snapshot.json", "plan.json", "load.json", "summary.json")
    rows_file = f"{run.texts}rows-{uuid.uuid4().hex[:8]}.parquet"
    engine = database(dataset.source.conn_id, connections)
    with connecting(engine, dataset.source.conn_id) as connection:
        source = SourceTable(connection, dataset)
        taken_at = database_time(connection)
        if missed := missed_rows(connection, dataset, taken_at, selection):
            logger.warning("snapshot: source %s: %s", dataset.source.table, missed)
        unfinished, older = _target_ids(dataset, source.id_type, selection, options, connections)
        run.freeze(dataset)
        with writing_parquet(run.storage, rows_file, taken_schema(source.id_type), COMPRESSION) as parquet:
            rows = 0
            for ids, texts in source.rows(selection, unfinished, older):
                parquet.write({"id": ids, "text": texts})
                rows += len(ids)
    taken = Snapshot(
        rows_file=rows_file,
        rows=rows,
        id_type=source.id_type,
        selection=selection,
        options=options,
        taken_at=taken_at,
        started_at=started_at,
        seconds=time.monotonic() - clock,
    )
    run.write("snapshot.json", taken)
    _forget_older(run, rows_file)
    logger.info("snapshot: %d rows (%s)", rows, selection.describe(dataset.zone))
    return taken


def _forget_older(run: Run, rows_file: str) -> None:
    for path in [path for path, _ in run.storage.list(run.texts)]:
        if path != rows_file and not path.endswith("/snapshot.json"):
            run.storage.delete(path)


def _batches(rows: Iterable[tuple[Any, str]]) -> Iterator[Columns]:
    ids, texts = list[Any](), list[str]()
    chars = 0
    for row_id, text in rows:
        ids.append(row_id)
        texts.append(text)
        chars += len(text)
        if chars >= CHARS_A_WRITE or len(ids) >= ROWS_A_WRITE:
            yield ids, texts
            ids, texts, chars = [], [], 0
    if ids:
        yield ids, texts


def database_time(connection: sa.Connection) -> datetime:
    """Return the database's time, in UTC."""
    if connection.dialect.name == "sqlite":
        now = connection.execute(sa.text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(now).replace(tzinfo=UTC)
    if connection.dialect.name == "mysql":
        utc: datetime = connection.execute(sa.text("SELECT UTC_TIMESTAMP(6)")).scalar_one()
        return utc.replace(tzinfo=UTC)
    instant: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
    return instant.astimezone(UTC)


def _target_ids(
    dataset: Dataset, ids: IdType, selection: Selection, options: Options, connections: Connections
) -> tuple[set[Any], set[Any]]:
    """Return the ids of target rows that wait for an answer, and of those that a rollout may take to tag them again."""
    if not selection.unfinished:
        return set(), set()
    with target_rows(dataset, ids, connections) as target:
        if target is None:
            return set(), set()
        unfinished = target.ids((*UNFINISHED, "refused") if options.retry_refused else UNFINISHED)
        takes_all = selection.rollout is None or selection.rows == "all"
        return unfinished, set() if takes_all else target.ids(GOOD, but_spec=spec_id(dataset))


class SourceTable:
    """The source table or view of a dataset, checked against the dataset file."""

    def __init__(self, connection: sa.Connection, dataset: Dataset) -> None:
        source = dataset.source
        table = reflect(connection, source.table)
        if table is None:
            raise InputError(f"`source.table`: connection `{source.conn_id}` has no table or view `{source.table}`")
        self._connection = connection
        self._zone = dataset.source_zone
        self._name = source.table
        self._id = column(table, source.id_column, "source.id_column")
        self.id_type: IdType = id_type(self._id)
        self._text_names = source.text_columns
        texts = [column(table, name, "source.text_columns") for name in source.text_columns]
        self._texts = [_as_text(text, connection.dialect) for text in texts]
        self._updated_at = (
            column(table, source.updated_at, "source.updated_at") if source.updated_at is not None else None
        )
        self._query = sa.select(self._id, *self._texts).order_by(self._id)
        self._bad_time: str | None = None
        if connection.dialect.name != "sqlite":
            self._condition_for(Selection(rows="window", start=utc_now(), end=utc_now(), unfinished=False))

    def rows(self, selection: Selection, unfinished: set[Any], older: set[Any]) -> Iterator[Columns]:
        """Yield ids and texts of the `unfinished` rows, of the other selected ones, and of some of the `older` ones.

        Each in the order of the ids, but the last: these are as many as the selection's `rollout`, the newest first.

        Raises:
            InputError: an id is NULL, of another type or there twice; a timestamp is none.
        """
        if self._connection.dialect.name == "sqlite":
            self._prepare_sqlite(selection)
        yield from _batches(self._rows_of(sorted(unfinished)))
        condition = self._condition_for(selection)
        query = self._query if condition is None else self._query.where(condition)
        copies = self._connection.dialect.name == "postgresql"
        yield from (self._copied if copies else self._selected)(query, unfinished, older)
        if selection.rollout and older:
            yield from _batches(self._rows_of(self._newest(older - unfinished, selection.rollout)))

    def _selected(self, query: sa.Select[Any], unfinished: set[Any], older: set[Any]) -> Iterator[Columns]:
        """Yield what the query selects but the `unfinished` rows, and take all of it from the `older` ones."""

        def rows() -> Iterator[tuple[Any, str]]:
            for row in self._read(query):
                older.discard(row[0])
                if row[0] not in unfinished:
                    yield self._id_out(row[0]), self._join(row)

        return _batches(rows())

    def _copied(self, query: sa.Select[Any], unfinished: set[Any], older: set[Any]) -> Iterator[Columns]:
        """Do what `_selected` does, by COPY."""
        from tagger.postgres_copy import copied_out, joined

        def raw(ids: list[Any]) -> list[Any]:
            return list(map(uuid.UUID, ids)) if self.id_type == "uuid" else ids

        last: Any = None
        self._connection.rollback()  # a transaction that is idle for long may be ended by the server
        for ids, texts in copied_out(self._connection, query, self.id_type, size=CHARS_A_WRITE):
            self._check_ids(ids, last)
            last = ids[-1].as_py()
            text = joined(texts)
            if unfinished or older:
                known = raw(ids.to_pylist())
                older.difference_update(known)
                others = pa.array([row_id not in unfinished for row_id in known])
                ids, text = ids.filter(others), text.filter(others)
            for start in range(0, len(ids), ROWS_A_WRITE):
                yield ids[start : start + ROWS_A_WRITE], text[start : start + ROWS_A_WRITE]

    def _check_ids(self, ids: pa.Array, last: Any) -> None:
        """Raise InputError where one is NULL, or the one before it, which is `last` before the first."""
        if ids.null_count:
            raise InputError(f"`source.id_column`: a row of {self._name} has NULL in `{self._id.name}`")
        again = pc.equal(ids, pa.concat_arrays([pa.array([last], ids.type), ids[:-1]]))
        if pc.any(again).as_py():
            twice = ids.filter(again)[0].as_py()
            raise InputError(f"`source.id_column`: id {twice!r} appears twice in {self._name}")

    def ids(self) -> Iterator[Any]:
        """Yield the ids of all rows, in their order."""
        yield from (self._id_out(row[0]) for row in self._read(sa.select(self._id).order_by(self._id)))

    def texts(self, ids: list[Any]) -> dict[Any, str]:
        """Return the texts of those of the rows that are there, by id; uuids are given and returned as text."""
        asked = [uuid.UUID(row_id) for row_id in ids] if self.id_type == "uuid" else ids
        if self._connection.dialect.name == "sqlite":
            raw: Any = self._connection.connection.dbapi_connection
            raw.text_factory = lambda b: b.decode("utf-8", "replace")
        return dict(self._rows_of(asked))

    def _rows_of(self, ids: list[Any]) -> Iterator[tuple[Any, str]]:
        for start in range(0, len(ids), IDS_A_QUERY):
            place = {row_id: i for i, row_id in enumerate(ids[start : start + IDS_A_QUERY])}
            rows = self._read(self._query.where(self._id.in_(place)))
            # in MySQL `a` may be found as `A`, which was not asked for
            for row in sorted((row for row in rows if row[0] in place), key=lambda row: place[row[0]]):
                yield self._id_out(row[0]), self._join(row)

    def _newest(self, ids: set[Any], count: int) -> list[Any]:
        """Return the ids of the rows that changed last, the last one first."""
        changed, left = self._updated_at, iter(ids)
        if changed is None:  # all rows are taken anyway
            return []
        as_text = {"sqlite": sa.type_coerce, "mysql": sa.cast}.get(self._connection.dialect.name)
        when = changed if as_text is None else as_text(changed, sa.Text)  # there may be some that are no times
        query = sa.select(when, self._id).where(changed.is_not(None))
        parts = iter(lambda: list(islice(left, IDS_A_QUERY)), [])
        rows = (row for part in parts for row in self._connection.execute(query.where(self._id.in_(part))))
        return [row[1] for row in heapq.nlargest(count, map(tuple, rows))]

    def _read(self, query: sa.Select[Any]) -> Iterator[sa.Row[Any]]:
        last: Any = None
        try:
            rows = self._connection.execution_options(yield_per=ROWS_A_FETCH).execute(query)
            with rows, abandoned_on_error(self._connection):
                for row in rows:
                    if row[0] is None:
                        raise InputError(f"`source.id_column`: a row of {self._name} has NULL in `{self._id.name}`")
                    if row[0] == last:
                        raise InputError(f"`source.id_column`: id {last!r} appears twice in {self._name}")
                    last = row[0]
                    yield row
        except sa.exc.DBAPIError:
            if self._bad_time is not None:
                raise InputError(self._bad_time) from None
            raise

    def _id_out(self, value: Any) -> Any:
        expected = {"integer": int, "text": str, "uuid": uuid.UUID}[self.id_type]
        if not isinstance(value, expected):
            raise InputError(
                f"`source.id_column`: id {value!r} in {self._name} is {type(value).__name__}, "
                f"the column is declared {self._id.type}"
            )
        if isinstance(value, int) and value >= 2**63:
            raise InputError(f"`source.id_column`: id {value} in {self._name} is beyond {2**63 - 1}")
        return str(value) if self.id_type == "uuid" else value

    def _join(self, row: sa.Row[Any]) -> str:
        parts: list[str] = []
        for name, part in zip(self._text_names, tuple(row)[1:], strict=True):
            if isinstance(part, bytes):  # SQLite keeps them in a column of any type
                part = part.decode("utf-8", "replace")
            if part is not None and not isinstance(part, str):
                raise InputError(
                    f"`source.text_columns`: `{name}` of row {row[0]!r} is {type(part).__name__}; expected text"
                )
            if part is not None and part.strip():
                parts.append(part)
        return "\n\n".join(parts)

    def _condition_for(self, selection: Selection) -> sa.ColumnElement[bool] | None:
        changed = self._updated_at
        if selection.start is None or changed is None:
            return None
        if self._connection.dialect.name == "sqlite":
            return sa.func.tagger_takes(self._id, changed) == 1
        low: Any
        high: Any
        if _is_instant(changed, self._connection.dialect):
            low, high = (sa.literal(time, UtcDateTime()) for time in (selection.start, selection.end))
        elif isinstance(changed.type, sa.DateTime):
            low, high = selection.naive_bounds(self._zone)
        elif isinstance(changed.type, sa.Date):
            low, high = selection.date_bounds(self._zone)
        else:
            raise InputError(
                f"`source.updated_at`: `{changed.name}` is {changed.type}; expected a date or timestamp "
                "(in SQLite also ISO text)"
            )
        return sa.or_(changed.is_(None), sa.and_(changed >= low, changed < high))

    def _prepare_sqlite(self, selection: Selection) -> None:
        """SQLite has no timestamps, only what programs put in their place: read them in Python, in the query."""
        raw: Any = self._connection.connection.dbapi_connection
        raw.text_factory = lambda b: b.decode("utf-8", "replace")

        def takes(row_id: object, value: object) -> bool:
            try:
                return selection.takes(_sqlite_time(value), self._zone)
            except ValueError:
                self._bad_time = (
                    f"`source.updated_at`: `{self._updated_at.name if self._updated_at is not None else ''}` of row "
                    f"{row_id!r} is {type(value).__name__} that is no ISO date or time"
                )
                raise

        raw.create_function("tagger_takes", 2, takes)


def _as_text(text: sa.Column[Any], dialect: sa.Dialect) -> sa.ColumnElement[Any]:
    if dialect.name != "sqlite" and _is_binary(text.type):
        raise InputError(f"`source.text_columns`: `{text.name}` is {text.type}, which is no text")
    return text if isinstance(text.type, sa.String) else sa.cast(text, sa.Text).label(text.name)


def _is_binary(kind: sa.types.TypeEngine[Any]) -> bool:
    try:
        return kind.python_type is bytes
    except NotImplementedError:
        return False


def _is_instant(time: sa.Column[Any], dialect: sa.Dialect) -> bool:
    """Return whether a column holds moments, whatever the time zone: in MySQL a TIMESTAMP does, a DATETIME does not."""
    if dialect.name == "mysql":
        return isinstance(time.type, sa.TIMESTAMP)
    return isinstance(time.type, sa.DateTime) and time.type.timezone


def _sqlite_time(value: object) -> datetime | date | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError
    value = value.strip()
    return date.fromisoformat(value) if len(value) <= 10 else datetime.fromisoformat(value)
