"""The snapshot: which rows go out, how ids and texts come back, and what is left when it fails."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import IO, Any

import psutil
import pytest
import sqlalchemy as sa

from demo.postgresql import PostgreSQL
from tagger.connections import Connection
from tagger.exceptions import InputError, StorageError, TaggerError, Unreachable
from tagger.runs import Run, read_parquet
from tagger.snapshot import snapshot
from tagger.storage import Storage
from tagger.tables import new_target
from tagger.window import Selection
from tests.databases import DATABASES, database_connection, make_project, put_rows
from tests.project import Project

MIDNIGHT = datetime(2026, 7, 2, tzinfo=UTC)
DAY = Selection(rows="day", start=MIDNIGHT - timedelta(days=1), end=MIDNIGHT, unfinished=False)
"""1 July 2026, UTC."""


@pytest.fixture(params=DATABASES)
def project(request: pytest.FixtureRequest) -> Project:
    return make_project(request.param, request)


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Project:
    return make_project("postgresql", request)


@pytest.fixture
def sqlite(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def rows(run: Run) -> list[tuple[Any, str]]:
    found: list[tuple[Any, str]] = []
    for batch in read_parquet(run.storage, run.snapshot().rows_file):
        found += zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
    return found


def ids(run: Run) -> set[Any]:
    return {row_id for row_id, _ in rows(run)}


def take(project: Project, selection: Selection = DAY, run_id: str = "one") -> Run:
    run = project.open(run_id)
    snapshot(project.dataset, run, selection, project.connections)
    return run


def new_notes(project: Project, columns: str, *values: str) -> None:
    """Makes the source table anew, with rows given as SQL."""
    project.execute("DROP TABLE notes")
    project.execute(f"CREATE TABLE notes ({columns})")
    for row in values:
        project.execute(f"INSERT INTO notes VALUES ({row})")


def refused(project: Project, *words: str, selection: Selection = DAY) -> None:
    """Expects the snapshot to be refused with one line that has all the words."""
    with pytest.raises(InputError) as caught:
        take(project, selection)
    assert len(str(caught.value).splitlines()) == 1
    assert [word for word in words if word not in str(caught.value)] == []


# Ids


def test_all_rows_go_out_in_id_order(project: Project) -> None:
    for row_id in (3, 1, 2):
        project.put(row_id, f"apple {row_id}")

    run = project.take()

    assert rows(run) == [(1, "apple 1"), (2, "apple 2"), (3, "apple 3")]
    assert run.snapshot().rows == 3


@pytest.mark.parametrize(
    ("database", "declared", "value", "kind", "row_id"),
    [
        ("sqlite", "INTEGER", "-7", "integer", -7),
        ("sqlite", "BIGINT", "9223372036854775807", "integer", 2**63 - 1),
        ("sqlite", "TEXT", "'00042'", "text", "00042"),
        ("sqlite", "VARCHAR(20)", "'記事 1'", "text", "記事 1"),
        ("postgresql", "SMALLINT", "-7", "integer", -7),
        ("postgresql", "INTEGER", "42", "integer", 42),
        ("postgresql", "BIGINT", "9223372036854775807", "integer", 2**63 - 1),
        ("postgresql", "TEXT", "'00042'", "text", "00042"),
        ("postgresql", "VARCHAR(20)", "'記事 1'", "text", "記事 1"),
        (
            "postgresql",
            "UUID",
            "'8D8AC610-566D-4EF0-9C22-186B2A5ED793'",
            "uuid",
            "8d8ac610-566d-4ef0-9c22-186b2a5ed793",
        ),
    ],
)
def test_an_id_comes_back_as_it_went(
    request: pytest.FixtureRequest, database: str, declared: str, value: str, kind: str, row_id: object
) -> None:
    project: Project = request.getfixturevalue("sqlite" if database == "sqlite" else "postgres")
    new_notes(project, f"id {declared} PRIMARY KEY, body TEXT", f"{value}, 'apple'")

    run = project.take()

    assert rows(run) == [(row_id, "apple")]
    assert run.snapshot().id_type == kind


def test_an_id_of_another_kind_is_refused(project: Project) -> None:
    new_notes(project, "id NUMERIC(10, 2), body TEXT")

    refused(project, "`source.id_column`", "`id` is ", "(10, 2)", "integer, text or uuid")


def test_a_null_id_is_refused(project: Project) -> None:
    new_notes(project, "id TEXT, body TEXT", "'1', 'apple'", "NULL, 'apple'")

    refused(project, "`source.id_column`", "NULL")


def test_an_id_that_a_view_has_twice_is_refused_and_named(project: Project) -> None:
    for row_id in (1, 2, 3):
        project.put(row_id, "apple")
    project.execute("CREATE VIEW joined AS SELECT n.id, n.body FROM notes n JOIN notes m ON n.id = 2 OR m.id = n.id")
    project.change(source={"table": "joined"})

    refused(project, "`source.id_column`", "id 2 appears twice in joined")


def test_an_id_that_is_not_of_its_columns_type_is_refused(sqlite: Project) -> None:
    new_notes(sqlite, "id INTEGER, body TEXT", "1, 'apple'", "'two', 'apple'")

    refused(sqlite, "`source.id_column`", "'two'", "str", "INTEGER")


def test_a_refused_snapshot_is_none(project: Project) -> None:
    new_notes(project, "id TEXT, body TEXT", "NULL, 'apple'")

    refused(project)

    with pytest.raises(InputError, match="`tagger snapshot` has not succeeded"):
        project.open("one").snapshot()
    assert list(project.open("one").storage.list("snapshots/")) == []


# Texts


@pytest.mark.parametrize(
    ("title", "body", "text"),
    [
        ("'Title'", "'Body'", "Title\n\nBody"),
        ("NULL", "'Body'", "Body"),
        ("'Title'", "NULL", "Title"),
        ("''", "'Body'", "Body"),
        ("'  '", "'Body'", "Body"),
        ("'Title'", "'\u3000'", "Title"),
        ("NULL", "''", ""),
        ("' Title '", "' Body\n'", " Title \n\n Body\n"),
    ],
)
def test_text_columns_are_joined_by_a_blank_line_without_blank_parts(
    project: Project, title: str, body: str, text: str
) -> None:
    new_notes(project, "id INTEGER, title TEXT, body TEXT", f"1, {title}, {body}")
    project.change(source={"text_columns": ["title", "body"]})

    assert rows(project.take()) == [(1, text)]


def test_texts_go_out_in_the_files_order_of_columns(project: Project) -> None:
    new_notes(project, "id INTEGER, a TEXT, b TEXT", "1, 'first', 'second'")
    project.change(source={"text_columns": ["b", "a"]})

    assert rows(project.take()) == [(1, "second\n\nfirst")]


def test_columns_that_are_no_text_are_written_out(project: Project) -> None:
    new_notes(project, "id INTEGER, stars INTEGER, body TEXT", "1, 5, 'apple'")
    project.change(source={"text_columns": ["body", "stars"]})

    assert rows(project.take()) == [(1, "apple\n\n5")]


def test_json_columns_are_written_out(postgres: Project) -> None:
    new_notes(postgres, "id INTEGER, body JSONB, kind CHAR(3)", """1, '{"a": "林檎"}', 'x'""")

    assert rows(postgres.take()) == [(1, '{"a": "林檎"}')]


@pytest.mark.parametrize("text", ["a\x00b", "\U0001f34e" * 3, "a\r\nb", "'; DROP TABLE notes; --", "x" * 3_000_000])
def test_a_text_goes_out_as_it_stands(sqlite: Project, text: str) -> None:
    sqlite.put(1, text)

    assert rows(sqlite.take()) == [(1, text)]


def test_broken_utf8_in_sqlite_does_not_stop_the_run(sqlite: Project) -> None:
    sqlite.execute("INSERT INTO notes VALUES (1, CAST(x'6170ff6c65' AS TEXT), NULL)")
    sqlite.put(2, "banana")

    assert rows(sqlite.take()) == [(1, "ap\ufffdle"), (2, "banana")]


def test_bytes_in_a_text_column_are_read_as_utf8(sqlite: Project) -> None:
    sqlite.execute("INSERT INTO notes VALUES (7, x'6170ff6c65', NULL)")
    sqlite.put(8, "banana")

    assert rows(sqlite.take()) == [(7, "ap\ufffdle"), (8, "banana")]


# Names


@pytest.mark.parametrize(
    "name",
    ["select", "Order", "two words", 'quo"te', "it's", "本文", "100%", "a:b", "semi;colon", "b)r(acket", "%(x)s"],
)
def test_names_are_quoted(project: Project, name: str) -> None:
    quoted = '"' + name.replace('"', '""').replace(":", r"\:") + '"'
    project.execute(f'CREATE TABLE {quoted} ({quoted} INTEGER, {quoted[:-1]}2" TEXT, {quoted[:-1]}3" TIMESTAMP)')
    project.execute(f"INSERT INTO {quoted} VALUES (1, 'apple', '2026-07-01 12:00:00')")
    columns = {"id_column": name, "text_columns": [f"{name}2"], "updated_at": f"{name}3"}
    project.change(source={"table": name, **columns})

    assert rows(take(project)) == [(1, "apple")]


def test_a_view_serves(project: Project) -> None:
    project.put(1, "apple")
    project.execute("CREATE VIEW shouted AS SELECT id, upper(body) AS body FROM notes")
    project.change(source={"table": "shouted"})

    assert rows(project.take()) == [(1, "APPLE")]


def test_a_table_may_be_given_with_its_schema(postgres: Project) -> None:
    postgres.execute('CREATE SCHEMA "My Press"')
    postgres.execute('CREATE TABLE "My Press".notes (id INTEGER, body TEXT)')
    postgres.execute("""INSERT INTO "My Press".notes VALUES (1, 'apple')""")
    postgres.put(2, "of another schema")
    postgres.change(source={"table": "My Press.notes"})

    assert rows(postgres.take()) == [(1, "apple")]


def test_sqlite_has_a_schema_too(sqlite: Project) -> None:
    sqlite.put(1, "apple")
    sqlite.change(source={"table": "main.notes"})

    assert rows(sqlite.take()) == [(1, "apple")]


def test_a_materialized_view_serves(postgres: Project) -> None:
    postgres.put(1, "apple")
    postgres.execute("CREATE MATERIALIZED VIEW kept AS SELECT * FROM notes")
    postgres.change(source={"table": "kept"})

    assert rows(postgres.take()) == [(1, "apple")]


def test_a_missing_table_is_named(project: Project) -> None:
    project.change(source={"table": "nots"})

    refused(project, "`source.table`", "`db`", "`nots`")


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("source.id_column", {"id_column": "nope"}),
        ("source.text_columns", {"text_columns": ["body", "nope"]}),
        ("source.updated_at", {"updated_at": "nope"}),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(project: Project, key: str, setting: dict[str, Any]) -> None:
    project.change(source=setting)

    refused(project, f"`{key}`", "no column `nope`", "id, body, updated_at")


@pytest.mark.parametrize("gone", ["id", "body", "updated_at"])
def test_a_column_that_is_gone_is_one_error_before_anything_is_written(project: Project, gone: str) -> None:
    project.put(1, "apple")
    project.change(source={"updated_at": "updated_at"})
    project.run("one", all_rows=True)
    target, stored = project.target(), project.everything_stored(but="nothing")
    project.execute(f"ALTER TABLE notes RENAME COLUMN {gone} TO moved")

    with pytest.raises(InputError, match=rf"table notes has no column `{gone}`") as caught:
        project.run("two", all_rows=True)

    assert len(str(caught.value).splitlines()) == 1
    assert (project.target(), project.everything_stored(but="nothing")) == (target, stored)


def test_a_column_that_goes_after_the_snapshot_is_not_missed(project: Project) -> None:
    project.put(1, "apple")
    run = project.take()
    project.execute("ALTER TABLE notes RENAME COLUMN body TO moved")

    project.finish(run)

    assert project.target()[1].tags == ["fruit"]


# Times


def test_the_window_holds_its_start_and_not_its_end(project: Project) -> None:
    times = ["2026-06-30 23:59:59.999999", "2026-07-01 00:00:00", "2026-07-01 23:59:59.999999", "2026-07-02 00:00:00"]
    new_notes(
        project, "id INTEGER, body TEXT, updated_at TIMESTAMP", *(f"{i}, 'x', '{t}'" for i, t in enumerate(times))
    )
    project.change(source={"updated_at": "updated_at"})

    assert ids(take(project)) == {1, 2}


def test_a_null_time_is_taken_every_time(project: Project) -> None:
    project.put(1, "apple", None)
    project.put(2, "apple", "2020-01-01 00:00:00+00:00")
    project.change(source={"updated_at": "updated_at"})

    assert ids(take(project)) == {1}


def times_taken(project: Project, declared: str, zone: str, times: Iterable[str]) -> list[str]:
    """Returns those of the times whose rows are taken on 1 July, UTC, where naive times are of `zone`."""
    values = (f"{i}, '{time}', '{time}'" for i, time in enumerate(times))
    new_notes(project, f"id INTEGER, body TEXT, updated_at {declared}", *values)
    project.change(source={"updated_at": "updated_at", "timezone": zone})
    return [time for _, time in rows(take(project))]


# In Asia/Tokyo the day ends at nine in the morning of the next one.
@pytest.mark.parametrize(
    ("declared", "zone", "inside", "outside"),
    [
        ("TIMESTAMPTZ", "UTC", ["2026-07-01 23:00:00+00", "2026-07-02 08:59:00+09"], ["2026-07-02 09:00:00+09"]),
        ("TIMESTAMPTZ", "Asia/Tokyo", ["2026-07-01 23:00:00+00"], ["2026-07-02 00:00:00+00", "infinity"]),
        ("TIMESTAMP", "UTC", ["2026-07-01 00:00:00", "2026-07-01 23:59:59"], ["2026-07-02 00:00:00", "infinity"]),
        ("TIMESTAMP", "Asia/Tokyo", ["2026-07-02 08:59:00"], ["2026-07-02 09:00:00", "2026-07-01 08:59:00"]),
        ("TIMESTAMP", "America/New_York", ["2026-07-01 00:00:00"], ["9999-12-31 23:59:59", "-infinity"]),
        ("DATE", "UTC", ["2026-07-01"], ["2026-06-30", "2026-07-02", "infinity"]),
        ("DATE", "Asia/Tokyo", ["2026-07-01", "2026-07-02"], ["2026-06-30", "2026-07-03"]),
    ],
)
def test_times_of_postgresql(
    postgres: Project, declared: str, zone: str, inside: list[str], outside: list[str]
) -> None:
    assert times_taken(postgres, declared, zone, inside + outside) == inside


SQLITE_UTC = [
    "2026-07-01 00:00:00",
    "2026-07-01T23:00:00",
    "2026-07-01 23:00",
    "2026-07-01 23:59:59.999",
    "2026-07-01T23:59:59.999999Z",
    "2026-07-02T08:59:59+09:00",
    " 2026-07-01 23:00:00 ",
    "2026-07-01",
]


@pytest.mark.parametrize(
    ("zone", "inside", "outside"),
    [
        ("UTC", SQLITE_UTC, ["2026-07-02T00:00:00Z", "2026-07-02T09:00:00+09:00", "2026-06-30", "2026-07-02"]),
        (
            "Asia/Tokyo",
            ["2026-07-01 09:00:00", "2026-07-02 08:59:59", "2026-07-01T23:00:00Z", "2026-07-01", "2026-07-02"],
            ["2026-07-01 08:59:59", "2026-07-02T09:00:00", "2026-06-30", "2026-07-03"],
        ),
    ],
)
@pytest.mark.parametrize("declared", ["", "TEXT", "TIMESTAMP", "DATE"])
def test_times_of_sqlite(sqlite: Project, declared: str, zone: str, inside: list[str], outside: list[str]) -> None:
    assert times_taken(sqlite, declared, zone, inside + outside) == inside


@pytest.mark.parametrize(
    ("zone", "time"), [("Asia/Tokyo", "0001-01-01 00:00:00"), ("America/New_York", "9999-12-31 23:59:59")]
)
def test_the_first_and_last_times_there_are_lie_outside(project: Project, zone: str, time: str) -> None:
    assert times_taken(project, "TIMESTAMP", zone, [time]) == []


def test_naive_times_are_of_the_datasets_zone_unless_the_source_has_its_own(sqlite: Project) -> None:
    sqlite.put(1, "apple", "2026-07-02 08:00:00")
    sqlite.change(timezone="Asia/Tokyo", source={"updated_at": "updated_at"})

    assert ids(take(sqlite)) == {1}

    sqlite.change(source={"timezone": "UTC"})
    assert ids(take(sqlite)) == set()


@pytest.mark.parametrize(("value", "kind"), [("1751328000", "int"), ("1751328000.5", "float"), ("'last week'", "str")])
def test_in_sqlite_what_is_no_iso_time_is_refused(sqlite: Project, value: str, kind: str) -> None:
    new_notes(sqlite, "id INTEGER, body TEXT, updated_at", f"1, 'apple', {value}")
    sqlite.change(source={"updated_at": "updated_at"})

    refused(sqlite, "`source.updated_at`", "row 1", kind, "ISO")


@pytest.mark.parametrize("declared", ["BIGINT", "TEXT", "TIME"])
def test_in_postgresql_other_types_are_refused(postgres: Project, declared: str) -> None:
    new_notes(postgres, f"id INTEGER, body TEXT, updated_at {declared}")
    postgres.change(source={"updated_at": "updated_at"})

    refused(postgres, "`source.updated_at`", f"`updated_at` is {declared}", "timestamp")
    refused(postgres, "`source.updated_at`", selection=Selection(rows="all", unfinished=False))


def test_a_run_looks_back_before_its_window(project: Project) -> None:
    for row_id, at in enumerate(["2026-06-28 23:00", "2026-06-29 01:00", "2026-06-30 01:00", "2026-07-02 01:00"]):
        project.put(row_id, "apple", f"{at}:00+00:00")
    project.change(schedule="0 0 * * *", source={"updated_at": "updated_at", "lookback": "2d"})

    assert ids(project.take(end=MIDNIGHT)) == {1, 2}
    assert ids(project.take(end=MIDNIGHT, kind="backfill")) == set()


# Rows that wait for an answer


@pytest.fixture
def waiting(project: Project) -> Project:
    """Old rows of each status, and one in the window that failed."""
    statuses = ["tagged", "refused", "failed", "skipped", "pending", "failed"]
    table = new_target("note_tags", "integer")
    with project.engine.begin() as connection:
        table.create(connection)
        for row_id, status in enumerate(statuses):
            values = {"row_id": row_id, "status": status, "snapshot_at": MIDNIGHT, "run_id": "before"}
            connection.execute(table.insert().values(values))
    put_rows(project, {row_id: f"text {row_id}" for row_id in range(5)}, "2020-01-01 00:00:00+00:00")
    project.put(5, "text 5", "2026-07-01 12:00:00+00:00")
    project.change(schedule="0 0 * * *", source={"updated_at": "updated_at"})
    return project


def test_unfinished_rows_are_taken_whenever_they_changed(waiting: Project) -> None:
    run = waiting.take(end=MIDNIGHT)

    assert sorted(rows(run)) == [(i, f"text {i}") for i in (2, 3, 4, 5)]
    assert run.snapshot().rows == 4


def test_a_backfill_takes_no_unfinished_rows(waiting: Project) -> None:
    assert ids(waiting.take(end=MIDNIGHT, kind="backfill")) == {5}


def test_a_single_day_takes_no_unfinished_rows(waiting: Project) -> None:
    assert ids(waiting.take(day=MIDNIGHT.date() - timedelta(days=1))) == {5}


def test_all_rows_are_taken_once_each_and_those_that_wait_come_first(waiting: Project) -> None:
    assert [row_id for row_id, _ in rows(waiting.take(all_rows=True))] == [2, 3, 4, 5, 0, 1]


def test_rows_that_wait_come_before_those_of_the_window(waiting: Project) -> None:
    for row_id in (0, 7):
        waiting.put(row_id, "apple", "2026-07-01 12:00:00+00:00")

    assert [row_id for row_id, _ in rows(waiting.take(end=MIDNIGHT))] == [2, 3, 4, 5, 0, 7]


def test_an_unfinished_row_that_is_gone_is_left_alone(waiting: Project) -> None:
    waiting.execute("DELETE FROM notes WHERE id IN (2, 3)")

    assert ids(waiting.take(end=MIDNIGHT)) == {4, 5}


def test_many_unfinished_rows_are_taken(project: Project) -> None:
    count = 1300
    table = new_target("note_tags", "integer")
    some = [{"row_id": i, "status": "failed", "snapshot_at": MIDNIGHT, "run_id": "before"} for i in range(count)]
    with project.engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), some)
    put_rows(project, dict.fromkeys(range(count), "x"), "2020-01-01 00:00:00+00:00")
    project.change(source={"updated_at": "updated_at"})

    assert [row_id for row_id, _ in rows(project.take(end=MIDNIGHT))] == list(range(count))


def test_unfinished_rows_with_uuids_are_taken(postgres: Project) -> None:
    row_id = uuid.uuid4()
    new_notes(postgres, "id UUID, body TEXT, updated_at TIMESTAMPTZ", f"'{row_id}', 'apple', '2020-01-01 00:00:00+00'")
    with postgres.engine.begin() as connection:
        table = new_target("note_tags", "uuid")
        table.create(connection)
        values = {"row_id": row_id, "status": "failed", "snapshot_at": MIDNIGHT, "run_id": "before"}
        connection.execute(table.insert().values(values))
    postgres.change(source={"updated_at": "updated_at"})

    assert rows(postgres.take(end=MIDNIGHT)) == [(str(row_id), "apple")]


def test_the_target_may_be_in_another_database(
    waiting: Project, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = postgresql.create_database(f"test_{uuid.uuid4().hex}")
    engine = sa.create_engine(other.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        table = new_target("note_tags", "integer")
        table.create(connection)
        values = {"row_id": 0, "status": "skipped", "snapshot_at": MIDNIGHT, "run_id": "before"}
        connection.execute(table.insert().values(values))
    waiting.change(target={"conn_id": "other"})
    run = waiting.open("one")
    selection = Selection(rows="window", start=DAY.start, end=DAY.end, unfinished=True)

    def connections(conn_id: str) -> Connection | None:
        return database_connection(other, "other") if conn_id == "other" else waiting.connections(conn_id)

    snapshot(waiting.dataset, run, selection, connections)

    assert ids(run) == {0, 5}


def test_a_target_of_another_form_is_refused(project: Project) -> None:
    project.execute("CREATE TABLE note_tags (row_id INTEGER, tags TEXT)")
    selection = Selection(rows="all", unfinished=True)

    refused(project, "`target.table`", "note_tags", "`status`", selection=selection)


# Whole or not at all


def test_an_empty_table_is_a_snapshot_of_no_rows(project: Project) -> None:
    run = project.take()

    assert rows(run) == []
    assert run.snapshot().rows == 0


def test_the_snapshot_has_the_databases_time(project: Project) -> None:
    before = datetime.now(UTC)

    taken = project.take().snapshot()

    assert abs((taken.taken_at - before).total_seconds()) < 5


def test_texts_lie_below_snapshots_only(project: Project) -> None:
    project.put(1, "a distinctive apple")

    run = project.take()

    assert b"distinctive" not in project.everything_stored()
    assert {path.split("/")[0] for path, _ in run.storage.list("")} == {"snapshots", "runs"}
    assert rows(run) == [(1, "a distinctive apple")]


def test_the_dataset_is_frozen_without_secrets(postgres: Project) -> None:
    frozen = postgres.take().dataset()
    password = postgres.database_connection.password or ""

    assert frozen == postgres.dataset
    assert password.encode() not in postgres.everything_stored(but="nothing")


def test_a_snapshot_taken_again_replaces_the_first(project: Project) -> None:
    project.put(1, "apple")
    first = project.take("one").snapshot()
    project.put(1, "banana")

    run = project.take("one")

    assert rows(run) == [(1, "banana")]
    assert run.storage.size(first.rows_file) is None
    assert len(list(run.storage.list(run.texts))) == 2


class FailingStorage(Storage):
    """A storage on which an upload fails."""

    def upload(self, path: str, file: IO[bytes]) -> None:
        raise StorageError(f"{self.url}: writing {path}: S3 answered SlowDown")


def failing(project: Project) -> Run:
    storage = project.open("one").storage
    return Run(FailingStorage(storage.url, storage._client), "notes", "one")


def test_without_its_rows_there_is_no_snapshot(project: Project) -> None:
    project.put(1, "apple")
    run = failing(project)

    with pytest.raises(StorageError):
        snapshot(project.dataset, run, DAY, project.connections)

    assert list(run.storage.list("snapshots/")) == []
    with pytest.raises(InputError):
        run.snapshot()


def test_a_rerun_that_fails_does_not_mix_with_the_snapshot_before(project: Project) -> None:
    project.put(1, "apple")
    project.take("one")
    project.put(1, "banana")
    run = failing(project)

    with pytest.raises(StorageError):
        snapshot(project.dataset, run, DAY, project.connections)

    with pytest.raises(InputError, match=r"no snapshot\.json"):
        run.snapshot()


def test_a_rerun_forgets_the_plan_of_the_snapshot_before(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")

    run = project.take("one")

    with pytest.raises(InputError, match=r"no plan\.json"):
        run.plan()


def test_a_database_that_does_not_answer_is_unreachable_and_shows_no_password(postgres: Project) -> None:
    gone = Connection("db", "postgres", "127.0.0.1", 1, "tagger", "a-password", schema="none")

    with pytest.raises(Unreachable, match="connection `db`") as caught:
        snapshot(postgres.dataset, postgres.open("one"), DAY, lambda i: gone if i == "db" else postgres.connections(i))

    assert len(str(caught.value).splitlines()) == 1
    assert "a-password" not in str(caught.value)


def test_a_wrong_password_is_not_shown(postgres: Project) -> None:
    known = postgres.database_connection
    wrong = Connection("db", "postgres", known.host, known.port, known.login, "a-password", schema=known.schema)

    with pytest.raises(Unreachable, match="password authentication failed") as caught:
        snapshot(postgres.dataset, postgres.open("one"), DAY, lambda i: wrong if i == "db" else postgres.connections(i))

    assert "a-password" not in str(caught.value)


def test_an_error_in_the_middle_of_a_query_shows_no_values(postgres: Project) -> None:
    postgres.put(1, "apple")
    postgres.put(2, "a distinctive zebra")
    postgres.execute("CREATE VIEW bad AS SELECT id, body, CASE WHEN id = 2 THEN CAST(body AS INT) END AS n FROM notes")
    postgres.change(source={"table": "bad", "text_columns": ["body", "n"]})

    with pytest.raises(TaggerError, match="connection `db`: the database answered") as caught:
        take(postgres)

    assert len(str(caught.value).splitlines()) == 1
    assert "distinctive" not in str(caught.value)


@pytest.fixture
def many(sqlite: Project) -> Iterator[Project]:
    """200,000 rows of 1,500 characters, of which SQLite makes the text when it reads."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000) SELECT i FROM n"
    sqlite.execute("CREATE TABLE numbers (id INTEGER PRIMARY KEY)")
    sqlite.execute(f"INSERT INTO numbers {numbers}")
    sqlite.execute("CREATE VIEW wide AS SELECT id, printf('%01500d', id) AS body FROM numbers")
    sqlite.change(source={"table": "wide"})
    yield sqlite


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(many: Project) -> None:
    many.put(1, "apple")
    many.change(source={"table": "notes"})
    many.take()
    process, grown = psutil.Process(), 0
    before = process.memory_info().rss

    class Watched(Storage):
        def upload(self, path: str, file: IO[bytes]) -> None:
            nonlocal grown
            grown = process.memory_info().rss - before
            super().upload(path, file)

    many.change(source={"table": "wide"})
    storage = many.open("one").storage
    run = Run(Watched(storage.url, storage._client), "notes", "one")

    taken = snapshot(many.dataset, run, DAY, many.connections)

    assert taken.rows == 200_000
    assert grown < 150_000_000
