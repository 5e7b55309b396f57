"""COPY of PostgreSQL: what goes out and in is what SQLAlchemy reads and writes, whatever stands in the cells."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.postgresql import PostgreSQL
from tagger.postgres_copy import copied_out, copy_in, joined
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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        for ids, texts in copied_out(connection, query, "integer", rows=batch, size=size):
            assert len(ids) <= batch
            found += zip(ids.to_pylist(), *(text.to_pylist() for text in texts), joined(texts).to_pylist(), strict=True)
    assert sorted(map(repr, found)) == sorted(repr((*row, python_join(list(row[1:])))) for row in rows)


def test_blank_is_what_python_strips() -> None:
    every = [chr(number) for number in range(1, 0x110000) if not 0xD800 <= number < 0xE000]

    assert joined([pa.array(every)]).to_pylist() == [character if character.strip() else "" for character in every]


@pytest.mark.parametrize(
    ("declared", "values"),
    [
        ("TEXT", ["a", "林檎\n", '"', "\\."]),
        ("CHAR(3)", ["a", "bb"]),
        ("UUID", ["8D8AC610-566D-4EF0-9C22-186B2A5ED793", "00000000-0000-0000-0000-000000000001"]),
        ("SMALLINT", ["-3", "7"]),
    ],
)
def test_both_ways_read_the_same_rows(project: Project, declared: str, values: list[str]) -> None:
    project.execute("DROP TABLE notes")
    project.execute(f"CREATE TABLE notes (id {declared}, title CHAR(3), body JSONB, kind VARCHAR(5))")
    for value in values:
        project.execute(f"""INSERT INTO notes VALUES (CAST('{value}' AS {declared}), 'x', '{{"a": "林檎"}}', NULL)""")
    project.change(source={"text_columns": ["title", "body", "kind"]})
    with project.engine.connect() as connection:
        source = SourceTable(connection, project.dataset)
        query = source._query

        copied = list(source._copied(query, set(), set()))
        selected = list(source._selected(query, set(), set()))

    as_python = [tuple(pa.array(column).to_pylist() for column in columns) for columns in copied]
    assert as_python == [(list(ids), list(texts)) for ids, texts in selected]
    assert len(copied[0][0]) == len(values)


def test_a_database_of_another_encoding(postgresql: PostgreSQL) -> None:
    name = f"test_{uuid.uuid4().hex}"
    with sa.create_engine(postgresql.url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING 'EUC_JP' TEMPLATE template0")
    engine = sa.create_engine(postgresql.url.rpartition("/")[0] + f"/{name}", poolclass=sa.NullPool)
    table = table_of(sa.BigInteger, "a")
    with engine.connect() as connection:
        table.create(connection)
        copy_in(connection, table, ["id", "a"], [pa.table({"id": [1], "a": ["林檎 and ｶﾅ"]})])

        [(ids, [texts])] = copied_out(connection, sa.select(table), "integer", rows=9, size=9)

    assert (ids.to_pylist(), texts.to_pylist()) == ([1], ["林檎 and ｶﾅ"])


def test_a_cell_of_100_mb_is_a_batch_of_its_own(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 3).table_valued("n").render_derived()
    text = sa.case((series.c.n == 2, sa.func.repeat("本文", 17_000_000)), else_="short")
    with engine.connect() as connection:
        batches = copied_out(connection, sa.select(series.c.n, text), "integer", rows=100, size=1_000_000)
        found = [(ids.to_pylist(), joined(texts).cast(pa.large_string())) for ids, texts in batches]

    assert [ids for ids, _ in found] == [[1, 2], [3]]
    assert found[0][1][1].as_py() == "本文" * 17_000_000


def test_an_error_of_the_database_in_the_middle_is_its_own(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 20_000).table_valued("n").render_derived()
    query = sa.select(series.c.n, sa.cast(10 / (15_000 - series.c.n), sa.Text))
    with engine.connect() as connection:
        connection.begin()
        with pytest.raises(sa.exc.DBAPIError, match="division by zero"):
            list(copied_out(connection, query, "integer", rows=100, size=100_000))
        connection.rollback()

        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_a_copy_that_is_given_up_leaves_the_connection_usable(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 1_000_000).table_valued("n").render_derived()
    with engine.connect() as connection:
        connection.begin()
        rows = copied_out(connection, sa.select(series.c.n, sa.literal("x" * 100)), "integer", rows=10, size=10**6)
        next(rows)
        rows.close()
        connection.rollback()

        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_a_server_that_goes_away_is_a_lost_connection(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 3_000_000).table_valued("n").render_derived()
    with engine.connect() as connection, engine.connect() as other:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        rows = copied_out(connection, sa.select(series.c.n, sa.literal("x" * 100)), "integer", rows=10, size=10**6)
        next(rows)
        other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(sa.exc.DBAPIError) as caught:
            list(rows)
        connection.invalidate()

    assert caught.value.connection_invalidated


def test_instants_are_what_they_are_in_whatever_zone_the_database_lives(engine: sa.Engine) -> None:
    at = datetime(2026, 7, 1, 23, 59, 59, 999999, tzinfo=UTC)
    table = sa.Table("times", sa.MetaData(), sa.Column("at", sa.DateTime(timezone=True)), prefixes=["TEMPORARY"])
    with engine.connect() as connection:
        connection.exec_driver_sql("SET timezone TO 'Asia/Tokyo'")
        table.create(connection)

        copy_in(connection, table, ["at"], [pa.table({"at": pa.array([at, None], pa.timestamp("us", tz="UTC"))})])

        assert list(connection.execute(sa.select(table.c.at)).scalars()) == [at, None]
