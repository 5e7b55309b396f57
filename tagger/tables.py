"""Tables of the source and target databases, as SQLAlchemy Core reads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, NoSuchTableError, SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from tagger.connections import unreachable_database
from tagger.exceptions import InputError, TaggerError
from tagger.runs import IdType


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: TIMESTAMP WITH TIME ZONE where the database has it, else naive UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert to what the database stores."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert back to an aware time."""
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


@contextmanager
def connecting(engine: sa.Engine, conn_id: str) -> Iterator[sa.Connection]:
    """Connect to a database; what goes wrong in the block is one error without a statement or a value.

    Raises:
        Unreachable: the database does not answer.
        TaggerError: it answered with an error.
    """
    try:
        connection = engine.connect()
    except SQLAlchemyError as e:
        raise unreachable_database(conn_id, e) from None
    with connection:
        try:
            yield connection
        except DBAPIError as e:
            if e.connection_invalidated:
                raise unreachable_database(conn_id, e) from None
            raise TaggerError(f"connection `{conn_id}`: the database answered: {_reason(e)}") from None


def _reason(error: DBAPIError) -> str:
    """Return a database's error without its detail lines, which may quote a row's values."""
    diagnostic = getattr(error.orig, "diag", None)
    message = getattr(diagnostic, "message_primary", None) or str(error.orig)
    return str(message).strip().splitlines()[0] if str(message).strip() else type(error.orig).__name__


def split_name(table: str) -> tuple[str | None, str]:
    """Return schema and name of a `schema.table` or `table`."""
    schema, _, name = table.rpartition(".")
    return schema or None, name


def reflect(connection: sa.Connection, table: str) -> sa.Table | None:
    """Return a table or view with its columns, or None where there is none."""
    schema, name = split_name(table)
    try:
        return sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection, resolve_fks=False)
    except NoSuchTableError:
        return None


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


ID_TYPES: dict[IdType, Any] = {"integer": sa.BigInteger(), "text": sa.Text(), "uuid": sa.Uuid()}


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
        schema=schema,
    )


def _jsonb() -> Any:
    from sqlalchemy.dialects.postgresql import JSONB

    return JSONB(none_as_null=True)


def existing_target(connection: sa.Connection, table: str, ids: IdType) -> sa.Table | None:
    """Return the target table if it exists, in the form of `new_target`.

    Raises:
        InputError: a table of that name exists, but it has not the target's columns.
    """
    found = reflect(connection, table)
    if found is None:
        return None
    wanted = new_target(table, ids)
    missing = [name for name in wanted.columns.keys() if name not in found.columns]
    if missing:
        raise InputError(
            f"`target.table`: table {table} exists, but has no column {', '.join(f'`{m}`' for m in missing)}: "
            "name another table, or drop it"
        )
    return wanted
