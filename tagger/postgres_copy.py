"""COPY of PostgreSQL: a query's rows come out, and a table's go in, as Arrow columns.

It takes a fraction of what rows do that are Python objects one by one, and memory for one batch of them.
"""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import sqlalchemy as sa

from tagger.runs import IdType

T = TypeVar("T")

_HEADER_BYTES = 19
"""Signature, flags and extension before the first row of a binary COPY."""

_END_BYTES = 2
"""Size of what follows the last row; no row is so small."""

NOT_BLANK = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
"""A character that Python's `str.strip` leaves."""


def copied_out(
    connection: sa.Connection, query: sa.Select[Any], ids: IdType, *, rows: int, size: int
) -> Generator[tuple[pa.Array, list[pa.Array]], None, None]:
    """Yield a query's first column, its ids, and the others, which are texts, in batches.

    A batch has up to `rows` rows, and ends with the row with which it has `size` bytes, be that row longer. Integer ids
    are int64, the others texts too.
    """
    id_column, *texts = query.selected_columns
    if ids != "text":
        id_column = sa.cast(id_column, sa.BigInteger if ids == "integer" else sa.Text)
    wanted = query.with_only_columns(id_column, *texts)
    compiled = wanted.compile(dialect=connection.dialect)
    with _errors(connection), _driver(connection).cursor() as cursor:
        cursor.execute("SET LOCAL client_encoding TO 'UTF8'")
        with cursor.copy(f"COPY ({compiled}) TO STDOUT (FORMAT binary)".encode(), compiled.params) as copy:
            data, sizes = bytearray(), list[int]()
            for row in _rows(copy):
                data += row
                sizes.append(len(row))
                if len(data) >= size or len(sizes) >= rows:
                    yield _columns(data, sizes, ids)
                    data, sizes = bytearray(), []
            if sizes:
                yield _columns(data, sizes, ids)


def _rows(copy: psycopg.Copy) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the rows of a binary COPY, which PostgreSQL sends as a message each.

    `Copy.read`, which waits for one, takes longer than to receive it: what is there already is read past it.
    """
    server = copy.connection.pgconn
    row: bytes | bytearray | memoryview = copy.read()[_HEADER_BYTES:]
    while len(row) != _END_BYTES:
        yield row
        found, row = server.get_copy_data(1)
        if found == 0:
            row = copy.read()
        elif found < 0:
            while (result := server.get_result()) is not None:
                failure = psycopg.errors.error_from_result(result)
            raise failure
    copy.read()  # ends it


def _columns(data: bytearray, sizes: list[int], ids: IdType) -> tuple[pa.Array, list[pa.Array]]:
    """Return the columns of rows as a binary COPY has them; `sizes` are those of the rows.

    A row is the number of its fields (2 bytes), and for each field its length (4 bytes; -1: NULL) and its content.
    """
    raw = np.frombuffer(data, np.uint8)
    of_rows = np.array(sizes, np.int64)
    at: npt.NDArray[np.int64] = np.cumsum(of_rows) - of_rows + 2
    row_ids, at = _field(raw, at, pa.int64() if ids == "integer" else pa.string())
    texts = []
    for _ in range(int.from_bytes(data[:2], "big") - 1):
        text, at = _field(raw, at, pa.string())
        texts.append(text)
    return row_ids, texts


def _field(
    raw: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], kind: pa.DataType
) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Return the field that starts at `at` in each row, and where the next one starts."""
    sizes = raw[at[:, None] + np.arange(4)].view(">i4").ravel().astype(np.int64)
    nulls = sizes < 0
    start = at + 4
    end = start + np.where(nulls, 0, sizes)
    if pa.types.is_integer(kind):
        there = np.where(nulls, 0, start)  # a NULL may be the last there is
        values = raw[there[:, None] + np.arange(8)].view(">i8").ravel().astype(np.int64)
        return pa.array(values, kind, mask=nulls), end
    # the values, and between them what stands between them, are one Arrow array: no copy is made but of the values
    bounds = np.stack([start, end], axis=1).ravel().astype(np.int32)  # a row has less than 1 GiB
    both = pa.Array.from_buffers(pa.string(), len(bounds) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(raw)])
    return both.take(pa.array(np.arange(0, len(bounds), 2), mask=nulls)), end


def joined(texts: list[pa.Array]) -> pa.Array:
    """Return the texts of each row joined by a blank line; NULL and blank ones are left out."""
    first, *others = (pc.if_else(pc.match_substring_regex(text, NOT_BLANK), text, None) for text in texts)
    for other in others:
        first = pc.coalesce(pc.binary_join_element_wise(first, other, "\n\n"), first, other)
    return pc.fill_null(first, "")


def copy_in(connection: sa.Connection, table: sa.Table, names: list[str], batches: Iterable[pa.Table]) -> int:
    """Append rows to a table, whose columns `names` are those of the batches; return how many."""
    prepare = connection.dialect.identifier_preparer
    into = f"{prepare.format_table(table)} ({', '.join(map(prepare.quote, names))})"
    with _errors(connection), _driver(connection).cursor() as cursor:
        cursor.execute("SET LOCAL client_encoding TO 'UTF8'; SET LOCAL timezone TO 'UTC'")
        with cursor.copy(f"COPY {into} FROM STDIN (FORMAT csv)".encode()) as copy:
            for lines in ahead(_lines(batches)):
                copy.write(lines)
        return cursor.rowcount


def _lines(batches: Iterable[pa.Table]) -> Generator[memoryview, None, None]:
    for batch in batches:
        # Arrow writes instants thirty times slower than times without a zone
        fields = [field.with_type(pa.timestamp("us")) if _is_instant(field) else field for field in batch.schema]
        lines = pa.BufferOutputStream()
        without_header = pyarrow.csv.WriteOptions(include_header=False)
        pyarrow.csv.write_csv(batch.cast(pa.schema(fields)), lines, without_header)
        yield memoryview(lines.getvalue())


def _is_instant(field: pa.Field) -> bool:
    return bool(pa.types.is_timestamp(field.type))


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
        raise sa.exc.DBAPIError.instance(
            None,
            None,
            e,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=_driver(connection).closed,
            dialect=connection.dialect,
        ) from e
