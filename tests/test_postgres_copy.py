"""COPY of PostgreSQL: what goes out and in is what SQLAlchemy reads and writes, whatever stands in the cells."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.postgresql import PostgreSQL
from tagger.exceptions import InputError, TaggerError
from tagger.postgres_copy import copied_out, copy_in, joined
from tagger.runs import Run, read_parquet
from tagger.snapshot import SourceTable

from tagger.window import Selection
from tests.databases import make_project
from tests.project import Project

ALL = Selection(rows="all", unfinished=False)

ODD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\x0b\x1c\x85\u2028",
    "\u3000",
    "\u200b",
    '"',
    '""',
    "\\",
    "\\N",
    "\\.",
    ",",
    "a,b",
    "\t",
    "林檎",
    "🍎",
]
"""What CSV, COPY or a test for blanks may stumble over."""

TEXTS = st.none() | st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


@pytest.fixture(scope="module")
def engine(postgresql: PostgreSQL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(postgresql.create_database(f"test_{uuid.uuid4().hex}").url)
    yield engine
    engine.dispose()


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("postgresql", request)


def table_of(ids: Any, *texts: str) -> sa.Table:
    columns = [sa.Column(name, sa.Text) for name in texts]
    return sa.Table("cells", sa.MetaData(), sa.Column("id", ids), *columns, prefixes=["TEMPORARY"])


def python_join(texts: list[str | None]) -> str:
    """Return what the other databases' rows become."""
    return "\n\n".join(text for text in texts if text is not None and text.strip())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), TEXTS, TEXTS, TEXTS), max_size=12),
    batch=st.integers(1, 5),
    size=st.integers(1, 200),
)
def test_rows_go_in_and_come_out_as_they_are(
    engine: sa.Engine, rows: list[tuple[int, str | None, str | None, str | None]], batch: int, size: int
) -> None:
    names = ["id", "a", "b", "c"]
    table = table_of(sa.BigInteger, "a", "b", "c")
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 4
    types = [pa.int64(), pa.string(), pa.string(), pa.string()]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    with engine.connect() as connection:
        table.create(connection)

        assert copy_in(connection, table, names, [pa.table(arrays, names)]) == len(rows)

        query = sa.select(table).order_by(table.c.id)
        assert sorted(map(repr, connection.execute(query))) == sorted(map(repr, rows))
        found: list[tuple[Any, ...]] = []
        for ids, texts in copied_out(connection, query, integers=True, rows=batch, size=size):
            assert len(ids) <= batch
            found += zip(ids.to_pylist(), *(text.to_pylist() for text in texts), joined(texts).to_pylist(), strict=True)
    assert sorted(map(repr, found)) == sorted(repr((*row, python_join(list(row[1:])))) for row in rows)


def test_blank_is_what_python_strips() -> None:
    every = [chr(number) for number in range(1, 0x110000) if not 0xD800 <= number < 0xE000]

    assert joined([pa.array(every)]).to_pylist() == [character if character.strip() else "" for character in every]
