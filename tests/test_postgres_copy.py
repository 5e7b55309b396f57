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
from sqlalchemy.dialects.postgresql import JSONB

from demo.postgresql import PostgreSQL
from tagger.exceptions import TaggerError
from tagger.postgres_copy import copied_out, copies_into, copy_in, joined
from tagger.snapshot import SourceTable
from tagger.tables import connecting
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
    return sa.Table(f"cells_{uuid.uuid4().hex}", sa.MetaData(), sa.Column("id", ids), *columns)


def python_join(texts: list[str | None]) -> str:
    """Return what the other databases' rows become."""
    return "\n\n".join(text for text in texts if text is not None and text.strip())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), TEXTS, TEXTS, TEXTS), max_size=12),
    size=st.integers(1, 200),
)
def test_rows_go_in_and_come_out_as_they_are(
    engine: sa.Engine, rows: list[tuple[int, str | None, str | None, str | None]], size: int
) -> None:
    names = ["id", "a", "b", "c"]
    table = table_of(sa.BigInteger, "a", "b", "c")
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 4
    types = [pa.int64(), pa.string(), pa.string(), pa.string()]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    with engine.connect() as connection:
        table.create(connection)

        copy_in(connection, table, names, [pa.table(arrays, names)])
        connection.commit()

        query = sa.select(table).order_by(table.c.id)
        assert sorted(map(repr, connection.execute(query))) == sorted(map(repr, rows))
        found: list[tuple[Any, ...]] = []
        for ids, texts in copied_out(connection, query, "integer", size=size):
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
    server = sa.create_engine(postgresql.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING 'EUC_JP' TEMPLATE template0")
    engine = sa.create_engine(postgresql.url.rpartition("/")[0] + f"/{name}", poolclass=sa.NullPool)
    table = table_of(sa.BigInteger, "a")
    with engine.connect() as connection:
        table.create(connection)
        copy_in(connection, table, ["id", "a"], [pa.table({"id": [1], "a": ["林檎 and ｶﾅ"]})])
        connection.commit()

        [(ids, [texts])] = copied_out(connection, sa.select(table), "integer", size=9)

    assert (ids.to_pylist(), texts.to_pylist()) == ([1], ["林檎 and ｶﾅ"])


def test_a_cell_of_100_mb_is_a_batch_of_its_own(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 3).table_valued("n").render_derived()
    text = sa.case((series.c.n == 2, sa.func.repeat("本文", 17_000_000)), else_="short")
    with engine.connect() as connection:
        batches = copied_out(connection, sa.select(series.c.n, text), "integer", size=1_000_000)
        found = [(ids.to_pylist(), joined(texts).cast(pa.large_string())) for ids, texts in batches]

    assert [ids for ids, _ in found] == [[1], [2], [3]]
    assert found[1][1][0].as_py() == "本文" * 17_000_000


def test_an_error_of_the_database_in_the_middle_is_its_own(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 20_000).table_valued("n").render_derived()
    query = sa.select(series.c.n, sa.cast(10 / (15_000 - series.c.n), sa.Text))
    with engine.connect() as connection:
        connection.begin()
        with pytest.raises(sa.exc.DBAPIError, match=r"^\(psycopg.errors.DivisionByZero\) division by zero\n"):
            list(copied_out(connection, query, "integer", size=100_000))
        connection.rollback()

        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_an_error_that_quotes_a_cell_is_told_without_it(engine: sa.Engine) -> None:
    number = sa.cast(sa.func.concat("a secret ", "text"), sa.Integer)
    cells: list[sa.ColumnElement[Any]] = [sa.literal(1), sa.cast(number, sa.Text)]
    with (
        pytest.raises(
            TaggerError, match=r"^connection `c`: the database answered: InvalidTextRepresentation \(22P02\)$"
        ),
        connecting(engine, "c") as connection,
    ):
        list(copied_out(connection, sa.select(*cells), "integer", size=100))


def test_an_error_of_the_databases_own_is_told_without_its_message(engine: sa.Engine) -> None:
    body = "BEGIN RAISE EXCEPTION 'a secret text' USING ERRCODE = 'ZZ001'; END"
    cells: list[sa.ColumnElement[Any]] = [sa.literal(1), sa.literal_column("quotes()")]
    told = r"^connection `c`: the database answered: OperationalError \(ZZ001\)$"
    with pytest.raises(TaggerError, match=told), connecting(engine, "c") as connection:
        connection.exec_driver_sql(f"CREATE FUNCTION quotes() RETURNS text LANGUAGE plpgsql AS $$ {body} $$")
        connection.commit()
        list(copied_out(connection, sa.select(*cells), "integer", size=100))


@pytest.mark.parametrize("kind", ["CITEXT", "a_domain", "an_enum", "NAME"])
def test_texts_of_other_types(engine: sa.Engine, kind: str) -> None:
    with engine.connect() as connection:
        for statement in (
            "CREATE EXTENSION IF NOT EXISTS citext",
            "DROP TYPE IF EXISTS a_domain, an_enum",
            "CREATE DOMAIN a_domain AS text",
            "CREATE TYPE an_enum AS ENUM ('林檎')",
        ):
            connection.exec_driver_sql(statement)
        connection.commit()
        cells: list[sa.ColumnElement[Any]] = [
            sa.literal_column(f"CAST({cell} AS {kind})") for cell in ("'林檎'", "NULL")
        ]
        query = sa.select(*cells)

        [(ids, [texts])] = copied_out(connection, query, "text", size=100)

    assert (ids.type, texts.type) == (pa.string(), pa.string())
    assert (ids.to_pylist(), texts.to_pylist()) == (["林檎"], [None])


def test_columns_of_all_types_that_a_target_has(engine: sa.Engine) -> None:
    at = datetime(1969, 7, 20, 20, 17, 40, 1, tzinfo=UTC)
    row_id = uuid.UUID("8d8ac610-566d-4ef0-9c22-186b2a5ed793")
    columns = [
        sa.Column("a", sa.BigInteger),
        sa.Column("b", sa.Uuid),
        sa.Column("c", sa.String(9)),
        sa.Column("d", JSONB(none_as_null=True)),
        sa.Column("e", sa.Boolean),
        sa.Column("f", sa.Float(53)),
        sa.Column("g", sa.DateTime(timezone=True)),
        sa.Column("h", sa.Text),
    ]
    table = sa.Table("of_all_types", sa.MetaData(), *columns, prefixes=["TEMPORARY"])
    given = {
        "a": pa.array([-(2**63), None]),
        "b": pa.array([str(row_id), None]),
        "c": pa.array(["林檎", None]),
        "d": pa.array(['["林檎", 1]', None]),
        "e": pa.array([True, None]),
        "f": pa.array([-0.5, None]),
        "g": pa.array([at, None], pa.timestamp("us", tz="UTC")),
        "h": pa.array(["", None]),
    }
    with engine.connect() as connection:
        table.create(connection)
        assert copies_into(connection, table, list(given))

        copy_in(connection, table, list(given), [pa.table(given)])

        rows = list(connection.execute(sa.select(table)))
        connection.exec_driver_sql("ALTER TABLE of_all_types ALTER c TYPE CHAR(9)")
        assert not copies_into(connection, table, ["c"])
    assert rows == [(-(2**63), row_id, "林檎", ["林檎", 1], True, -0.5, at, ""), (None,) * 8]


def test_a_copy_that_is_given_up_leaves_the_connection_usable(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 1_000_000).table_valued("n").render_derived()
    with engine.connect() as connection:
        connection.begin()
        rows = copied_out(connection, sa.select(series.c.n, sa.literal("x" * 100)), "integer", size=10**6)
        next(rows)
        rows.close()
        connection.rollback()

        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


def test_a_server_that_goes_away_is_a_lost_connection(engine: sa.Engine) -> None:
    series = sa.func.generate_series(1, 3_000_000).table_valued("n").render_derived()
    reads = "query LIKE 'COPY%' AND datname = current_database()"
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {reads}"
    with engine.connect() as connection, engine.connect() as other:
        rows = copied_out(connection, sa.select(series.c.n, sa.literal("x" * 100)), "integer", size=10**6)
        next(rows)
        other.execute(sa.text(end))
        with pytest.raises(sa.exc.DBAPIError) as caught:
            list(rows)

    assert caught.value.connection_invalidated


def test_instants_are_what_they_are_in_whatever_zone_the_database_lives(engine: sa.Engine) -> None:
    at = datetime(2026, 7, 1, 23, 59, 59, 999999, tzinfo=UTC)
    table = sa.Table("times", sa.MetaData(), sa.Column("at", sa.DateTime(timezone=True)), prefixes=["TEMPORARY"])
    with engine.connect() as connection:
        connection.exec_driver_sql("SET timezone TO 'Asia/Tokyo'")
        table.create(connection)

        copy_in(connection, table, ["at"], [pa.table({"at": pa.array([at, None], pa.timestamp("us", tz="UTC"))})])

        assert list(connection.execute(sa.select(table.c.at)).scalars()) == [at, None]
