"""Tables of the source and target databases, as SQLAlchemy Core reads them."""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, NoSuchTableError, SQLAlchemyError, UnreflectableTableError
from sqlalchemy.types import TypeDecorator

from tagger.exceptions import InputError, TaggerError, Unreachable
from tagger.mysql import SPEAKING_ERRORS, abandoned_on_error, check_version, is_mariadb, only_session, server_error
from tagger.runs import IdType


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: TIMESTAMP WITH TIME ZONE where the database has it, else naive UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Return the database's type; MySQL's has no microseconds unless they are asked for."""
        if dialect.name == "mysql":
            from sqlalchemy.dialects import mysql

            return mysql.DATETIME(fsp=6)
        return self.impl_instance

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert to what the database stores."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert back to an aware time."""
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class TextId(TypeDecorator[str]):
    """A text that is an id: in MySQL, where a TEXT can be no key, as long as a key may be.

    Ids are the same there where all of their characters are: no case, accent or space at the end is overlooked.
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Return the database's type."""
        if dialect.name == "mysql":
            from sqlalchemy.dialects import mysql

            exact = "utf8mb4_nopad_bin" if is_mariadb(dialect) else "utf8mb4_0900_bin"
            return mysql.VARCHAR(768, charset="utf8mb4", collation=exact)
        return self.impl_instance


class UuidId(TypeDecorator[uuid.UUID]):
    """A uuid that is an id: in MySQL, which has no such type, its text."""

    impl = sa.Uuid
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Return the database's type."""
        return sa.CHAR(36) if dialect.name == "mysql" else self.impl_instance

    def process_bind_param(self, value: uuid.UUID | None, dialect: sa.Dialect) -> Any:
        """Convert to what the database's type takes."""
        return str(value) if dialect.name == "mysql" and value is not None else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> uuid.UUID | None:
        """Convert back."""
        return uuid.UUID(value) if isinstance(value, str) else value


@contextmanager
def connecting(engine: sa.Engine, conn_id: str) -> Iterator[sa.Connection]:
    """Connect to a database; what goes wrong in the block is one error without a statement or a value.

    Raises:
        Unreachable: the database does not answer.
        TaggerError: it answered with an error.
    """
    try:
        connection = engine.connect()
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA schema_version")  # connecting alone does not read the file
            connection.rollback()
    except SQLAlchemyError as e:
        cause = getattr(e, "orig", None) or e
        number, message = server_error(cause) or (None, first_line(cause))
        reason = message if number is None else f"{message} ({number})"
        raise Unreachable(f"connection `{conn_id}`: the database does not answer: {reason}") from None
    with _closed_at_the_end(connection):
        if connection.dialect.name == "mysql":
            check_version(connection.dialect, conn_id)
        try:
            with abandoned_on_error(connection):
                yield connection
        except DBAPIError as e:
            lost, reason = e.connection_invalidated, _reason(e)
            for error in (e, e.orig):  # they may quote a row, and stay the context of what is raised here
                if error is not None:
                    error.args = (reason,)
        else:
            return
    if lost:
        raise Unreachable(f"connection `{conn_id}`: the connection was lost: {reason}")
    raise TaggerError(f"connection `{conn_id}`: the database answered: {reason}")


@contextmanager
def _closed_at_the_end(connection: sa.Connection) -> Iterator[None]:
    """Close a connection; where that fails, nothing is lost, for what counts is committed."""
    try:
        yield
    finally:
        with suppress(DBAPIError):
            connection.close()


SPEAKING_STATES = ("08", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58")
"""Classes of PostgreSQL's error codes whose messages name tables, roles and the like, never a row's values."""


def _reason(error: DBAPIError) -> str:
    """Return a database's error in one line, its message only where that quotes no value of a row."""
    if (of_mysql := server_error(error.orig)) is not None:
        number, told = of_mysql
        return f"{told if number in SPEAKING_ERRORS else type(error.orig).__name__} ({number})"
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return first_line(error.orig)
    told = first_line(error.orig) if state.startswith(SPEAKING_STATES) else type(error.orig).__name__
    return f"{told} ({state})"


def split_name(table: str) -> tuple[str | None, str]:
    """Return schema and name of a `schema.table` or `table`."""
    schema, _, name = table.rpartition(".")
    return schema or None, name


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reflect(connection: sa.Connection, table: str) -> sa.Table | None:
    """Return a table or view with its columns, or None where there is none."""
    schema, name = split_name(table)
    try:
        return sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection, resolve_fks=False)
    except NoSuchTableError:
        return None
    except UnreflectableTableError:
        raise InputError(f"table {table} cannot be read: it is a view of tables or columns that are gone") from None
    except DBAPIError as e:
        if e.connection_invalidated:  # which is no fault of the table's, and may pass
            raise
        raise InputError(f"table {table} cannot be read: {_reason(e)}") from None


def column(table: sa.Table, name: str, key: str) -> sa.Column[Any]:
    """Return a column of a table; `key` is the dataset file's key that names it.

    Raises:
        InputError: there is no such column.
    """
    if name not in table.columns:
        raise InputError(
            f"`{key}`: table {table.fullname} has no column `{name}` (it has {', '.join(table.columns.keys())})"
        )
    return table.columns[name]


def id_type(id_column: sa.Column[Any]) -> IdType:
    """Return what kind of id a column holds.

    Raises:
        InputError: one that cannot be kept.
    """
    if isinstance(id_column.type, sa.Integer):
        return "integer"
    if isinstance(id_column.type, sa.Uuid):
        return "uuid"
    if isinstance(id_column.type, sa.String):
        return "text"
    raise InputError(f"`source.id_column`: `{id_column.name}` is {id_column.type}; expected integer, text or uuid")


ID_TYPES: dict[IdType, Any] = {"integer": sa.BigInteger(), "text": TextId(), "uuid": UuidId()}

MYSQL_TABLE: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
"""What our tables are in MySQL whatever the database's defaults: with transactions, and texts compared as they are."""


def new_target(table: str, ids: IdType) -> sa.Table:
    """Return the target table as tagger makes it."""
    schema, name = split_name(table)
    json_type = sa.JSON(none_as_null=True).with_variant(_jsonb(), "postgresql")
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("row_id", ID_TYPES[ids], primary_key=True, autoincrement=False),
        sa.Column("tags", json_type),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("cache_key", sa.String(32)),
        sa.Column("spec_id", sa.String(12)),
        sa.Column("model", sa.Text),
        sa.Column("tagged_at", UtcDateTime),
        sa.Column("snapshot_at", UtcDateTime, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("confidence", sa.Float(53)),
        sa.Column("reviewed_tags", json_type),
        sa.Column("reviewed_by", sa.Text),
        sa.Column("reviewed_at", UtcDateTime),
        schema=schema,
        **MYSQL_TABLE,
    )


ADDED = ("confidence", "reviewed_tags", "reviewed_by", "reviewed_at")
"""Columns that targets of before there were reviews lack."""

REVIEW = "review"
"""Status of a row whose tags the LLM was less sure of than `review_below`, until somebody reviewed it."""

GONE = "gone"
"""Status of a row that is gone from the source and stays for its review."""


def has_reviewed_tags(target: sa.Table) -> sa.ColumnElement[bool]:
    """Return whether a row of the target holds tags by a reviewer: `[]` are such; JSON's `null` is none."""
    null: sa.ColumnElement[str] = sa.literal_column("'null'")
    held: sa.ColumnElement[bool] = sa.func.coalesce(sa.cast(target.c.reviewed_tags, sa.Text), null) != null
    return held


def is_reviewed(target: sa.Table) -> sa.ColumnElement[bool]:
    """Return whether a row of the target holds a review: with no tags of its own, one that leaves the LLM's."""
    return sa.or_(has_reviewed_tags(target), target.c.reviewed_at.is_not(None))


def create_target(connection: sa.Connection, table: str, ids: IdType) -> sa.Table:
    """Make the target table and its view; return the table."""
    target = new_target(table, ids)
    target.create(connection)
    _create_view(connection, target)
    return target


def complete_target(connection: sa.Connection, table: str, ids: IdType) -> list[str]:
    """Add to an existing target what it lacks of columns that came later, and its view; return what was added.

    Raises:
        InputError: a table of that name exists, but it is no target.
    """
    found = reflect(connection, table)
    if found is None:
        return []
    wanted = new_target(table, ids)
    _check_target(connection, found, wanted, ids)
    prepare = connection.dialect.identifier_preparer
    added = [name for name in ADDED if name not in found.columns]
    for name in added:
        definition = wanted.c[name].type.compile(connection.dialect)
        name_in_sql = f"{prepare.format_table(found)} ADD COLUMN {prepare.quote(name)} {definition}"
        connection.exec_driver_sql(f"ALTER TABLE {name_in_sql}")
    made = [f"column {name}" for name in added]
    if not has_view(connection, table):
        _create_view(connection, wanted)
        made.append(f"view {table}_effective")
    return made


def has_view(connection: sa.Connection, table: str) -> bool:
    """Return whether the view of a target is there."""
    schema, name = split_name(table)
    return sa.inspect(connection).has_table(f"{name}_effective", schema)


def _create_view(connection: sa.Connection, target: sa.Table) -> None:
    """Make the view of the tags that count: a review's, else the LLM's."""
    t = target.c
    query = sa.select(
        t.row_id,
        sa.case((has_reviewed_tags(target), t.reviewed_tags), else_=t.tags).label("tags"),
        sa.case((is_reviewed(target), sa.literal_column("'reviewed'")), else_=t.status).label("status"),
        t.confidence,
        t.model,
        t.tagged_at,
        t.reviewed_by,
        t.reviewed_at,
    ).where(t.status != sa.literal_column(f"'{GONE}'"))
    view = sa.Table(f"{target.name}_effective", sa.MetaData(), schema=target.schema)
    name = connection.dialect.identifier_preparer.format_table(view)
    connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")  # SQLite keeps it when the table is dropped
    connection.exec_driver_sql(f"CREATE VIEW {name} AS {query.compile(connection)}")


def _jsonb() -> Any:
    from sqlalchemy.dialects.postgresql import JSONB

    return JSONB(none_as_null=True)


def existing_target(connection: sa.Connection, table: str, ids: IdType) -> sa.Table | None:
    """Return the target table if it exists, in the form of `new_target`.

    Raises:
        InputError: a table of that name exists, but it has not the target's columns, or its `row_id` holds other ids
            than the source's or is not its primary key.
    """
    found = reflect(connection, table)
    if found is None:
        return None
    wanted = new_target(table, ids)
    _check_target(connection, found, wanted, ids)
    if missing := _missing(found, ADDED):
        raise InputError(
            f"`target.table`: table {table} has no column {missing}: `tagger check DATASET --create` adds what later "
            "versions have"
        )
    return wanted


def _missing(table: sa.Table, names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names if name not in table.columns)


def _check_target(connection: sa.Connection, found: sa.Table, wanted: sa.Table, ids: IdType) -> None:
    """Raise InputError where a table is no target, be it of an earlier version."""
    problem = None
    if missing := _missing(found, [name for name in wanted.columns.keys() if name not in ADDED]):
        problem = f"has no column {missing}"
    elif [column.name for column in found.primary_key] != ["row_id"]:
        problem = "has another primary key than `row_id`"
    elif id_type(found.c.row_id) != id_type_in(connection, ids):
        problem = f"has a `row_id` of type {found.c.row_id.type}, but the source's ids are {ids}"
    if problem is not None:
        raise InputError(
            f"`target.table`: table {found.fullname} exists, but {problem}: name another table, or drop it"
        )


def id_type_in(connection: sa.Connection, ids: IdType) -> IdType:
    """Return as what kind of id a database shows a column made for `ids`: only PostgreSQL's uuids are such."""
    return "text" if ids == "uuid" and connection.dialect.name != "postgresql" else ids


@contextmanager
def only_writer(connection: sa.Connection, table: str) -> Iterator[None]:
    """Run a transaction that no other load into the same table runs beside; readers are not kept waiting."""
    is_mysql = connection.dialect.name == "mysql"
    alone = only_session(connection, *split_name(table)) if is_mysql else nullcontext()
    with alone, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"tagger {table}"))))
        yield
