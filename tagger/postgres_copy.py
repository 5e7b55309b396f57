"""COPY of PostgreSQL: a query's rows come out, and a table's go in, as Arrow columns.

It takes a fraction of what rows do that are Python objects one by one, and memory for one batch of them.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
from adbc_driver_postgresql import StatementOptions
from psycopg.conninfo import make_conninfo

from tagger.keys import digests
from tagger.runs import IdType

T = TypeVar("T")

NOT_BLANK = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
"""A character that Python's `str.strip` leaves."""


def copied_out(
    connection: sa.Connection, query: sa.Select[Any], ids: IdType, *, size: int
) -> Generator[tuple[pa.Array, list[pa.Array]], None, None]:
    """Yield a query's first column, its ids, and the others, which are texts, in batches.

    A batch has up to about `size` bytes, or one longer row. Integer ids are int64, the others texts too. They are read
    over a connection of their own to the same database.
    """
    id_column, *texts = query.selected_columns
    if ids != "text":
        id_column = sa.cast(id_column, sa.BigInteger if ids == "integer" else sa.Text)
    compiled = query.with_only_columns(id_column, *texts).compile(dialect=connection.dialect)
    sql = psycopg.ClientCursor(_driver(connection)).mogrify(compiled.string, compiled.params)
    with (
        _adbc_errors(connection),
        adbc.connect(_conninfo(connection), autocommit=True) as server,
        server.cursor(adbc_stmt_kwargs={StatementOptions.BATCH_SIZE_HINT_BYTES.value: str(size)}) as cursor,
        ThreadPoolExecutor(1) as thread,  # where a signal does not wait for the database
    ):
        try:
            thread.submit(cursor.execute, sql).result()
            batches = cursor._results.reader  # what `fetch_record_batch` returns tells no error's code
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                row_ids, *columns = map(_stored, batch.columns)
                yield row_ids, columns
        except BaseException:
            cursor.adbc_cancel()
            raise


def _conninfo(connection: sa.Connection) -> str:
    _, arguments = connection.dialect.create_connect_args(connection.engine.url)
    del arguments["context"]  # psycopg's own
    return make_conninfo(**{**arguments, "client_encoding": "UTF8"})


def _stored(column: pa.Array) -> pa.Array:
    """Return a column whose type only the database knows, such as citext, as the text that it is."""
    return column.storage.cast(pa.string()) if isinstance(column, pa.ExtensionArray) else column


def joined(texts: list[pa.Array]) -> pa.Array:
    """Return the texts of each row joined by a blank line; NULL and blank ones are left out."""
    has_text = [pc.match_substring_regex(text, NOT_BLANK) for text in texts]
    if all(pc.all(has, skip_nulls=False).as_py() for has in has_text):  # which takes half the time
        return pc.binary_join_element_wise(*texts, "\n\n")
    first, *others = (pc.if_else(has, text, None) for has, text in zip(has_text, texts, strict=True))
    for other in others:
        first = pc.coalesce(pc.binary_join_element_wise(first, other, "\n\n"), first, other)
    return pc.fill_null(first, "")


def copies_into(connection: sa.Connection, table: sa.Table, names: list[str]) -> bool:
    """Return whether `copy_in` knows the types that these columns of a table have."""
    types = _types(connection, table)
    return all(types[name] in _FIELDS for name in names)


def copy_in(connection: sa.Connection, table: sa.Table, names: list[str], batches: Iterable[pa.Table]) -> None:
    """Append rows to a table, whose columns `names` are those of the batches."""
    prepare = connection.dialect.identifier_preparer
    into = f"{prepare.format_table(table)} ({', '.join(map(prepare.quote, names))})"
    types = _types(connection, table)
    fields = [_FIELDS[types[name]] for name in names]
    rows = (_rows(batch, fields) for batch in batches)
    with _errors(connection), _driver(connection).cursor() as cursor:
        cursor.execute("SET LOCAL client_encoding TO 'UTF8'")
        with cursor.copy(f"COPY {into} FROM STDIN (FORMAT binary)".encode()) as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for part in ahead(rows):
                copy.write(part)
            copy.write(b"\xff\xff")


def _types(connection: sa.Connection, table: sa.Table) -> dict[str, str]:
    """Return the types of a table's columns, without their lengths, as PostgreSQL calls them."""
    query = "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = CAST(:name AS regclass)"
    name = connection.dialect.identifier_preparer.format_table(table)
    return {row.attname: row.format_type for row in connection.execute(sa.text(query), {"name": name})}


def _rows(batch: pa.Table, fields: list[Callable[[pa.Array], list[pa.Array]]]) -> memoryview:
    """Return rows as a binary COPY has them.

    A row is the number of its fields (2 bytes), and for each field its length (4 bytes; -1: NULL) and its content.
    """
    parts = [pa.scalar(len(fields).to_bytes(2, "big"))]
    for field, column in zip(fields, batch.columns, strict=True):
        parts += field(column.combine_chunks())
    rows = pc.binary_join_element_wise(*parts, b"")
    size = pc.sum(pc.binary_length(rows)).as_py() or 0
    return memoryview(rows.buffers()[2])[:size] if size else memoryview(b"")


def _text(column: pa.Array) -> list[pa.Array]:
    sizes = pc.fill_null(pc.binary_length(column), -1).to_numpy().astype(">i4")
    return [_of_width(sizes), pc.fill_null(column.cast(pa.binary()), b"")]


def _jsonb(column: pa.Array) -> list[pa.Array]:
    return _text(pc.binary_join_element_wise(b"\x01", column.cast(pa.binary()), b""))


def _uuid(column: pa.Array) -> list[pa.Array]:
    digits = pc.fill_null(pc.replace_substring(column, "-", ""), "0" * 32)
    return _fixed(digests(digits), "V16", column)


def _timestamp(column: pa.Array) -> list[pa.Array]:
    since_1970 = pc.fill_null(column.cast(pa.timestamp("us")).cast(pa.int64()), 0).to_numpy()
    return _fixed(since_1970 - _2000, ">i8", column)


def _number(kind: str) -> Callable[[pa.Array], list[pa.Array]]:
    def fields(column: pa.Array) -> list[pa.Array]:
        zero = pa.scalar(0).cast(column.type)
        return _fixed(pc.fill_null(column, zero).to_numpy(zero_copy_only=False), kind, column)

    return fields


def _fixed(values: npt.NDArray[Any], kind: str, column: pa.Array) -> list[pa.Array]:
    """Return the fields of a column whose values, but for the NULLs in it, are all of one size."""
    fields = np.empty(len(values), [("size", ">i4"), ("value", kind)])
    fields["size"], fields["value"] = np.dtype(kind).itemsize, values
    whole = _of_width(fields)
    return [pc.if_else(column.is_valid(), whole, b"\xff\xff\xff\xff") if column.null_count else whole]


def _of_width(values: npt.NDArray[Any]) -> pa.Array:
    kind = pa.binary(values.itemsize)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)]).cast(pa.binary())


_2000 = 946_684_800_000_000
"""The start of PostgreSQL's time, in µs since 1970."""

_FIELDS: dict[str, Callable[[pa.Array], list[pa.Array]]] = {
    "bigint": _number(">i8"),
    "boolean": _number("?"),
    "character varying": _text,
    "double precision": _number(">f8"),
    "jsonb": _jsonb,
    "text": _text,
    "timestamp with time zone": _timestamp,
    "uuid": _uuid,
}
"""What makes columns of these types of PostgreSQL the fields of rows, in parts."""


def ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """Yield the items, each of which a thread makes while the one before it is used.

    The first is made in this thread: a signal ends the wait for it, which may be long.
    """
    with closing(items), ThreadPoolExecutor(1) as thread:
        item = next(items, None)
        while item is not None:
            coming = thread.submit(next, items, None)
            yield item
            item = coming.result()


@contextmanager
def _adbc_errors(connection: sa.Connection) -> Iterator[None]:
    """Raise ADBC's errors as SQLAlchemy's of psycopg."""
    try:
        yield
    except adbc.Error as e:
        primary = dict(e.details).get(b"PG_DIAG_MESSAGE_PRIMARY")
        message = str(e) if primary is None else primary.decode(errors="replace")
        try:
            error = psycopg.errors.lookup(e.sqlstate or "")(message)
        except KeyError:
            error = psycopg.OperationalError(message)
            error.sqlstate = e.sqlstate  # one that nobody knows may still quote a row
        lost = e.sqlstate is None or e.sqlstate.startswith(("08", "57P"))
        e.args, e.details, e.__context__ = (type(error).__name__,), [], None  # it stays the context of what is raised
        raise _as_sqlalchemy(error, connection, lost=lost) from None


def _driver(connection: sa.Connection) -> psycopg.Connection[Any]:
    driver: Any = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver


@contextmanager
def _errors(connection: sa.Connection) -> Iterator[None]:
    """Raise the driver's errors as SQLAlchemy's."""
    try:
        yield
    except psycopg.Error as e:
        raise _as_sqlalchemy(e, connection, lost=_driver(connection).closed) from e


def _as_sqlalchemy(error: psycopg.Error, connection: sa.Connection, *, lost: bool) -> sa.exc.DBAPIError | Exception:
    return sa.exc.DBAPIError.instance(
        None,
        None,
        error,
        psycopg.Error,
        hide_parameters=True,
        connection_invalidated=lost,
        dialect=connection.dialect,
    )
