"""load_back: what the target holds after each outcome, what is left alone, and what is deleted."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from demo.postgresql import PostgreSQL
from demo.stand_in import completion, error
from tagger.cache import Cache, Record
from tagger.connections import Connection
from tagger.exceptions import InputError, RunFailed, TaggerError
from tagger.ledger import attempt_files
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.runs import Loaded, Run
from tagger.spec import spec_id, text_key
from tagger.tables import new_target
from tagger.tag import tag
from tests.databases import DATABASES, REFUSAL, database_connection, failing_on, make_project, put_rows, teach, watch
from tests.project import Project

REJECTED = error(400, "no", "odd_text")


@pytest.fixture(params=DATABASES)
def either(request: pytest.FixtureRequest) -> Project:
    return lenient(make_project(request.param, request))


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return lenient(make_project("sqlite", request))


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Project:
    return make_project("postgresql", request)


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Project:
    return make_project(request.param, request)


def lenient(project: Project) -> Project:
    """Lets runs succeed whose texts fail."""
    project.change(limits={"max_failed_fraction": 1})
    return project


def put_all(project: Project, count: int) -> None:
    """Puts rows 1 to `count` there, all with one text."""
    put_rows(project, dict.fromkeys(range(1, count + 1), "apple"))


def tagged(project: Project, run_id: str, **selection: Any) -> Run:
    """Returns a run that is ready to be loaded."""
    run = project.take(run_id, **selection)
    for shard in plan(run, project.connections).shards:
        tag(run, shard.shard, project.connections)
    return run


def key(project: Project, text: str) -> str:
    return text_key(spec_id(project.dataset), text)


def columns_of(project: Project) -> dict[str, tuple[str, bool]]:
    """Returns type and nullability of the target's columns."""
    found = sa.inspect(project.engine).get_columns("note_tags")
    return {column["name"]: (str(column["type"]).upper(), column["nullable"]) for column in found}


# The table


@pytest.mark.parametrize(("source", "target"), [("INTEGER", "BIGINT"), ("VARCHAR(9)", "TEXT"), ("UUID", "UUID")])
def test_the_target_is_made_as_designed_on_postgresql(postgres: Project, source: str, target: str) -> None:
    postgres.execute("DROP TABLE notes")
    postgres.execute(f"CREATE TABLE notes (id {source} PRIMARY KEY, body TEXT)")

    postgres.run()

    time_type = str(sa.dialects.postgresql.TIMESTAMP(timezone=True))
    assert columns_of(postgres) == {
        "row_id": (target, False),
        "tags": ("JSONB", True),
        "status": ("TEXT", False),
        "error": ("TEXT", True),
        "cache_key": ("VARCHAR(32)", True),
        "spec_id": ("VARCHAR(12)", True),
        "model": ("TEXT", True),
        "tagged_at": (time_type, True),
        "snapshot_at": (time_type, False),
        "run_id": ("TEXT", False),
        "confidence": ("DOUBLE PRECISION", True),
        "reviewed_tags": ("JSONB", True),
        "reviewed_by": ("TEXT", True),
        "reviewed_at": (time_type, True),
    }
    assert sa.inspect(postgres.engine).get_pk_constraint("note_tags")["constrained_columns"] == ["row_id"]


def test_the_target_is_made_as_designed_on_sqlite(project: Project) -> None:
    project.run()

    assert {name: kind for name, (kind, _) in columns_of(project).items()} == {
        "row_id": "BIGINT",
        "tags": "JSON",
        "status": "TEXT",
        "error": "TEXT",
        "cache_key": "VARCHAR(32)",
        "spec_id": "VARCHAR(12)",
        "model": "TEXT",
        "tagged_at": "DATETIME",
        "snapshot_at": "DATETIME",
        "run_id": "TEXT",
        "confidence": "FLOAT",
        "reviewed_tags": "JSON",
        "reviewed_by": "TEXT",
        "reviewed_at": "DATETIME",
    }
    assert sa.inspect(project.engine).get_pk_constraint("note_tags")["constrained_columns"] == ["row_id"]


def test_the_target_may_have_a_schema(postgres: Project) -> None:
    postgres.put(1, "apple")
    postgres.execute('CREATE SCHEMA "My Tags"')
    postgres.change(target={"table": "My Tags.note_tags"})

    postgres.run()

    assert postgres.target()[1].tags == ["fruit"]


def test_the_target_may_have_further_columns(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    either.execute("ALTER TABLE note_tags ADD COLUMN reviewed VARCHAR(9) DEFAULT 'no'")
    either.put(1, "zebra")

    either.run()

    assert either.target()[1].tags == ["animal"]


@pytest.mark.parametrize(
    "columns",
    [
        "row_id BIGINT PRIMARY KEY, tags JSON",
        "id BIGINT PRIMARY KEY, tags JSON, status TEXT, error TEXT, cache_key TEXT, spec_id TEXT, model TEXT, "
        "tagged_at TIMESTAMP, snapshot_at TIMESTAMP, run_id TEXT",
    ],
    ids=["few-columns", "another-id"],
)
def test_a_table_that_is_no_target_is_refused(either: Project, columns: str) -> None:
    either.put(1, "apple")
    run = tagged(either, "one")
    either.execute(f"CREATE TABLE note_tags ({columns})")

    with pytest.raises(InputError, match=r"`target\.table`: table note_tags exists, but has no column"):
        load_back(run, either.connections)


def test_a_target_with_ids_of_another_type_is_refused(postgres: Project) -> None:
    postgres.put(1, "apple")
    run = tagged(postgres, "one")
    with postgres.engine.begin() as connection:
        new_target("note_tags", "text").create(connection)

    with pytest.raises(InputError, match=r"`target\.table`: .*`row_id`"):
        load_back(run, postgres.connections)


def test_a_target_whose_ids_are_not_unique_is_refused(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    either.execute("CREATE TABLE copied AS SELECT * FROM note_tags")
    run = tagged(either, "one")
    either.execute("DROP VIEW note_tags_effective")
    either.execute("DROP TABLE note_tags")
    either.execute("ALTER TABLE copied RENAME TO note_tags")

    with pytest.raises(InputError, match=r"`target\.table`: .*`row_id`"):
        load_back(run, either.connections)


def test_without_a_plan_nothing_is_loaded(project: Project) -> None:
    run = project.take("one")

    with pytest.raises(InputError, match=r"run `one` of `notes` has no plan\.json"):
        load_back(run, project.connections)


def test_any_text_may_be_an_id(either: Project) -> None:
    row_ids = ["it's", 'a "b"', "two\nlines", "記事 🍎", "a,b;c--", " ", "%(x)s :y"]
    either.execute("DROP TABLE notes")
    either.execute("CREATE TABLE notes (id TEXT PRIMARY KEY, body TEXT, updated_at TEXT)")
    for row_id in row_ids:
        either.put(row_id, "apple")

    either.run()
    either.put("it's", "zebra")
    either.run()

    assert {row_id: row.tags for row_id, row in either.target().items()} == {
        row_id: ["animal" if row_id == "it's" else "fruit"] for row_id in row_ids
    }


def test_uuids_are_ids(postgres: Project) -> None:
    row_id = uuid.uuid4()
    postgres.execute("DROP TABLE notes")
    postgres.execute("CREATE TABLE notes (id UUID PRIMARY KEY, body TEXT, updated_at TEXT)")
    postgres.put(row_id, "apple")

    postgres.run()
    again = postgres.run()

    assert {found: row.tags for found, row in postgres.target().items()} == {row_id: ["fruit"]}
    assert (again.cached, again.tags) == (1, {"fruit": 1})


def test_the_target_may_be_in_another_database(project: Project, postgresql: PostgreSQL) -> None:
    database = postgresql.create_database(f"test_{uuid.uuid4().hex}")
    project.put(1, "apple")
    run = tagged(project, "one")
    project.change(target={"conn_id": "other"})
    run.freeze(project.dataset)

    def connections(conn_id: str) -> Connection | None:
        return database_connection(database, "other") if conn_id == "other" else project.connections(conn_id)

    load_back(run, connections)

    assert project.target() == {}
    with sa.create_engine(database.url, poolclass=sa.NullPool).connect() as connection:
        assert connection.execute(sa.text("SELECT row_id, tags FROM note_tags")).all() == [(1, ["fruit"])]


# Outcomes


def test_a_tagged_row(either: Project) -> None:
    before = datetime.now(UTC)
    either.put(1, "a zebra in the rain")

    either.run("one")

    row = either.target()[1]
    assert (row.tags, row.status, row.error) == (["animal", "weather"], "tagged", None)
    assert (row.cache_key, row.spec_id) == (key(either, "a zebra in the rain"), spec_id(either.dataset))
    assert (row.model, row.run_id) == ("offline-stand-in", "one")
    assert before <= row.tagged_at <= datetime.now(UTC)
    assert row.snapshot_at == either.open("one").snapshot().taken_at


def test_a_row_that_no_tag_fits_is_tagged_with_none(project: Project) -> None:
    project.put(1, "nothing of interest")

    project.run()

    assert (project.target()[1].status, project.target()[1].tags) == ("tagged", [])


def test_a_refused_row(project: Project) -> None:
    project.put(1, "apple, secretly")
    teach(project.llm, secretly=REFUSAL)

    project.run()

    row = project.target()[1]
    assert (row.status, row.error, row.tags) == ("refused", "refusal", None)
    assert row.cache_key == key(project, "apple, secretly")


def test_a_refused_text_is_refused_in_its_later_rows_too(project: Project) -> None:
    project.put(1, "apple, secretly")
    teach(project.llm, secretly=REFUSAL)
    project.run()
    project.put(2, "apple, secretly")

    second = project.run()

    assert (second.cached, second.llm_requests) == (1, 0)
    row = project.target()[2]
    assert (row.status, row.error, row.tags) == ("refused", "refusal", None)


def test_a_row_that_fails_at_first_has_no_tags(project: Project) -> None:
    project.put(1, "a weird apple")
    teach(project.llm, weird=REJECTED)

    project.run("one")

    row = project.target()[1]
    assert (row.status, row.error) == ("failed", "rejected: HTTP 400, odd_text")
    assert (row.tags, row.cache_key, row.spec_id, row.model, row.tagged_at) == (None, None, None, None, None)
    assert row.run_id == "one"


def test_a_row_whose_new_text_fails_keeps_the_tags_of_the_old_one(either: Project) -> None:
    either.put(1, "apple")
    either.run("one")
    good = either.target()[1]
    either.put(1, "a weird zebra")
    teach(either.llm, weird=REJECTED)

    either.run("two")

    row = either.target()[1]
    assert (row.status, row.error, row.run_id) == ("failed", "rejected: HTTP 400, odd_text", "two")
    assert row.snapshot_at > good.snapshot_at
    assert (row.tags, row.cache_key, row.spec_id, row.model, row.tagged_at) == (
        (good.tags, good.cache_key, good.spec_id, good.model, good.tagged_at)
    )


def test_a_row_that_goes_back_to_its_old_text_is_tagged_again(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    project.put(1, "a weird zebra")
    teach(project.llm, weird=REJECTED)
    project.run()
    project.put(1, "apple")

    third = project.run()

    assert third.llm_requests == 0
    row = project.target()[1]
    assert (row.status, row.error, row.tags) == ("tagged", None, ["fruit"])


def test_texts_that_were_not_asked_are_skipped(project: Project) -> None:
    for row_id, text in enumerate(["apple", "zebra", "rain"]):
        project.put(row_id, text)
    project.change(llm={"concurrency": 1})
    project.llm.script(completion('{"tags": ["fruit"]}'), error(401, "no", "invalid_api_key"))

    with pytest.raises(RunFailed):
        project.run()

    statuses = sorted(row.status for row in project.target().values())
    assert statuses == ["skipped", "skipped", "tagged"]
    assert {row.error for row in project.target().values() if row.status == "skipped"} == {
        "not asked yet; the next run asks"
    }


def test_texts_of_a_shard_that_never_started_are_skipped(project: Project) -> None:
    project.put(1, "apple")
    run = project.take()
    plan(run, project.connections)

    loaded = load_back(run, project.connections)

    assert (loaded.skipped, loaded.written) == (1, 1)
    assert project.target()[1].status == "skipped"


def test_a_text_that_is_too_long_is_refused(project: Project) -> None:
    project.put(1, "apple " * 10)
    project.change(source={"max_chars": 50})

    summary = project.run()

    assert (summary.refused, summary.llm_requests) == (1, 0)
    assert (project.target()[1].status, project.target()[1].error) == ("refused", "too_long: over 50 characters")


def test_a_text_that_is_no_longer_too_long_has_its_tags(project: Project) -> None:
    project.put(1, "apple " * 10)
    project.run()
    project.change(source={"max_chars": 50})
    project.run()
    project.change(source={"max_chars": 100})

    last = project.run()

    assert last.llm_requests == 0
    assert (project.target()[1].status, project.target()[1].tags) == ("tagged", ["fruit"])


def test_all_rows_of_a_text_get_its_outcome(project: Project) -> None:
    put_all(project, 3)
    project.put(4, "ａｐｐｌｅ ")

    assert project.run().llm_requests == 1

    assert {row_id: row.tags for row_id, row in project.target().items()} == {i: ["fruit"] for i in (1, 2, 3, 4)}


def test_a_new_spec_reaches_the_rows(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")
    old = spec_id(project.dataset)
    project.change(tags=[{"id": "food", "description": "apple, banana"}])

    project.run("two")

    row = project.target()[1]
    assert (row.tags, row.spec_id, row.run_id) == (["food"], spec_id(project.dataset), "two")
    assert row.spec_id != old
    assert row.cache_key == key(project, "apple")


# Tags


def test_tags_are_counted_in_the_target(either: Project) -> None:
    for row_id, text in enumerate(["apple", "apple", "a zebra in the rain", "nothing", "rain"]):
        either.put(row_id, text)

    first = either.run().tags

    assert first == {"fruit": 2, "weather": 2, "animal": 1}
    either.execute("UPDATE note_tags SET run_id = 'of long ago'")
    assert either.run().tags == first
    assert list(either.run().tags) == ["fruit", "weather", "animal"]


def test_japanese_tags_stand_readable_in_the_target(either: Project) -> None:
    either.put(1, "林檎")
    either.change(tags=[{"id": "果物", "description": "林檎"}, {"id": '動物 "いぬ"', "description": "柴犬"}])
    either.put(2, "柴犬")

    assert either.run().tags == {"果物": 1, '動物 "いぬ"': 1}

    with either.engine.connect() as connection:
        tags = sa.cast(sa.column("tags"), sa.Text)
        query = sa.select(tags).select_from(sa.table("note_tags")).order_by(sa.column("row_id"))
        raw = connection.execute(query).scalars().all()
    assert raw == ['["果物"]', '["動物 \\"いぬ\\""]']


# What is left alone


def test_rows_that_did_not_change_are_not_written(either: Project) -> None:
    either.put(1, "apple")
    either.put(2, "zebra")
    either.run("one")
    before = either.target()
    either.put(2, "rain")

    either.run("two")

    after = either.target()
    assert after[1] == before[1]
    assert (after[2].run_id, after[2].snapshot_at > before[2].snapshot_at) == ("two", True)
    written = either.open("two").read("load.json", Loaded)
    assert written is not None
    assert written.written == 1


def test_a_failed_row_that_fails_again_is_not_written(project: Project) -> None:
    project.put(1, "a weird apple")
    teach(project.llm, weird=REJECTED)
    project.run("one")
    before = project.target()

    project.run("two")

    assert project.target() == before


def test_loading_twice_changes_nothing(either: Project) -> None:
    put_all(either, 2)
    either.put(3, None)
    run = tagged(either, "one")
    first = load_back(run, either.connections)
    before = either.target()

    second = load_back(run, either.connections)

    assert (first.written, second.written, second.deleted) == (2, 0, 0)
    assert (first.tagged, first.tags) == (second.tagged, second.tags)
    assert either.target() == before


def test_an_older_snapshot_changes_nothing_newer(either: Project) -> None:
    either.put(1, "apple")
    older = tagged(either, "older")
    either.put(1, "zebra")
    newer = tagged(either, "newer")

    load_back(newer, either.connections)
    load_back(older, either.connections)

    row = either.target()[1]
    assert (row.tags, row.run_id) == (["animal"], "newer")


def test_an_older_snapshot_deletes_nothing_newer(either: Project) -> None:
    put_all(either, 20)
    either.put(1, None)
    older = tagged(either, "older")
    either.put(1, "zebra")
    either.put(21, "rain")
    newer = tagged(either, "newer")

    load_back(newer, either.connections)
    loaded = load_back(older, either.connections)

    assert loaded.deleted == 0
    assert len(either.target()) == 21
    assert either.target()[1].tags == ["animal"]


def test_a_run_that_is_loaded_again_changes_no_newer_row(project: Project) -> None:
    project.put(1, "apple")
    project.put(2, "apple")
    project.run("one")
    project.put(1, "zebra")
    project.run("two")

    load_back(project.open("one"), project.connections)

    assert {row_id: (row.tags, row.run_id) for row_id, row in project.target().items()} == {
        1: (["animal"], "two"),
        2: (["fruit"], "one"),
    }


def test_other_peoples_rows_stay_where_only_a_window_is_taken(project: Project) -> None:
    put_all(project, 3)
    project.run()
    project.execute("DELETE FROM notes")
    now = datetime.now(UTC)
    project.put(4, "zebra", (now - timedelta(hours=1)).isoformat())
    project.change(source={"updated_at": "updated_at"})

    project.run(end=now)

    assert sorted(project.target()) == [1, 2, 3, 4]


# What is deleted


def test_a_row_whose_text_becomes_blank_leaves(either: Project) -> None:
    put_all(either, 2)
    either.run()
    either.put(1, " \n")

    summary = either.run()

    assert sorted(either.target()) == [2]
    assert (summary.rows, summary.blank) == (1, 1)


def test_a_row_whose_text_becomes_blank_leaves_in_a_window_too(project: Project) -> None:
    put_all(project, 2)
    project.run()
    project.put(1, None)
    project.change(source={"updated_at": "updated_at"})

    project.run()

    assert sorted(project.target()) == [2]


def test_rows_gone_from_the_source_leave(either: Project) -> None:
    put_all(either, 10)
    either.run()
    either.execute("DELETE FROM notes WHERE id = 4")

    either.run()

    assert sorted(either.target()) == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_an_empty_source_deletes_nothing(project: Project) -> None:
    put_all(project, 3)
    project.run()
    project.execute("DELETE FROM notes")

    summary = project.run()

    assert (summary.state, summary.rows, summary.texts) == ("success", 0, 0)
    assert sorted(project.target()) == [1, 2, 3]


def test_more_rows_than_allowed_are_not_deleted_and_the_run_fails(either: Project) -> None:
    put_all(either, 10)
    either.run()
    either.execute("DELETE FROM notes WHERE id <= 2")
    either.put(11, "zebra")
    run = tagged(either, "two")

    with pytest.raises(RunFailed, match=r"2 of 11 rows of note_tags are gone.*`limits\.max_deleted_fraction` 0\.1"):
        load_back(run, either.connections)
    with pytest.raises(RunFailed, match="2 of 11 rows"):
        report(run)

    assert sorted(either.target()) == list(range(1, 12))
    assert either.target()[11].tags == ["animal"]


def test_the_limit_of_deletions_can_be_raised(project: Project) -> None:
    put_all(project, 10)
    project.run()
    project.execute("DELETE FROM notes WHERE id <= 9")
    project.change(limits={"max_deleted_fraction": 1})

    project.run()

    assert sorted(project.target()) == [10]


# Requests


def test_rows_that_the_target_has_need_no_record(project: Project) -> None:
    put_all(project, 5)
    project.run()
    run = tagged(project, "two")
    requests = watch(run.storage)

    load_back(run, project.connections)

    assert requests.of("GetObject", "cache/") == []
    assert requests.of("HeadObject", "cache/") == []


def test_new_answers_need_no_record(project: Project) -> None:
    put_all(project, 5)
    run = tagged(project, "one")
    requests = watch(run.storage)

    load_back(run, project.connections)

    assert [key for _, key in requests.made if key.startswith("cache/")] == []


def test_a_cached_text_that_the_target_lacks_needs_its_record_once(either: Project) -> None:
    put_all(either, 2)
    either.run()
    for row_id in (3, 4, 5):
        either.put(row_id, "apple")
    run = tagged(either, "two")
    requests = watch(run.storage)

    load_back(run, either.connections)

    assert len(requests.of("GetObject", "cache/")) == 1
    assert either.target()[5].tags == ["fruit"]
    assert either.target()[5].tagged_at == either.target()[1].tagged_at


def test_a_target_that_is_lost_comes_back_from_the_cache(project: Project) -> None:
    for row_id, text in enumerate(["apple", "a zebra in the rain", "nothing"]):
        project.put(row_id, text)
    project.run()
    before = {row_id: (row.tags, row.status, row.tagged_at) for row_id, row in project.target().items()}
    project.execute("DROP TABLE note_tags")

    again = project.run()

    assert again.llm_requests == 0
    assert {row_id: (row.tags, row.status, row.tagged_at) for row_id, row in project.target().items()} == before


def damage(project: Project, text: str) -> None:
    cache = Cache(project.open("any").storage, spec_id(project.dataset), "offline-stand-in")
    project.open("any").storage.put(cache.path(key(project, text)), b"garbage " * 30)


def test_a_damaged_record_fails_its_rows_until_the_next_run(either: Project, caplog: pytest.LogCaptureFixture) -> None:
    either.put(1, "apple")
    either.run()
    either.put(2, "apple")
    damage(either, "apple")

    second = either.run("two")

    row = either.target()[2]
    assert (row.status, row.tags) == ("failed", None)
    assert row.error == "the cache record was damaged; the next run tags the text again"
    assert (second.texts, second.cached, second.failed) == (1, 0, 1)
    assert either.target()[1].tags == ["fruit"]
    assert "damaged cache record deleted" in caplog.text

    third = either.run("three")

    assert (third.tagged, third.llm_requests) == (1, 1)
    assert (either.target()[2].status, either.target()[2].tags) == ("tagged", ["fruit"])


def test_a_record_with_a_tag_that_the_spec_has_not_is_damaged(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    either.put(2, "apple")
    cache = Cache(either.open("any").storage, spec_id(either.dataset), "offline-stand-in")
    record = cache.read(key(either, "apple"))
    assert record is not None
    cache.write(key(either, "apple"), record.model_copy(update={"tags": ["hacked"]}))

    either.run("two")

    assert (either.target()[2].status, either.target()[2].tags) == ("failed", None)
    either.run("three")
    assert (either.target()[2].status, either.target()[2].tags) == ("tagged", ["fruit"])


def test_tags_that_somebody_put_into_the_books_do_not_reach_the_target(either: Project) -> None:
    either.put(1, "apple")
    run = either.take()
    plan(run, either.connections)
    tag(run, 1, either.connections)
    [(_, path)] = attempt_files(run)
    books = pq.read_table(io.BytesIO(run.storage.get(path) or b""))
    forged = pa.array([["hacked", "fruit"]], pa.list_(pa.string()))
    body = io.BytesIO()
    pq.write_table(books.set_column(books.column_names.index("tags"), "tags", forged), body)
    run.storage.put(path, body.getvalue())

    load_back(run, either.connections)

    assert (either.target()[1].status, either.target()[1].tags) == ("tagged", ["fruit"])


def test_a_target_is_filled_from_the_cache_a_part_at_a_time(either: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.load.RECORDS_A_READ", 2)
    put_rows(either, {number: f"apple {number % 5}" for number in range(7)})
    either.run()
    either.execute("DROP VIEW note_tags_effective")
    either.execute("DROP TABLE note_tags")
    damage(either, "apple 3")

    second = either.run("two")

    assert (second.texts, second.cached, second.failed) == (5, 4, 1)
    assert {row_id: row.tags for row_id, row in either.target().items()} == {
        number: None if number == 3 else ["fruit"] for number in range(7)
    }


def test_what_a_killed_attempt_answered_is_taken_from_the_cache(project: Project) -> None:
    project.put(1, "apple")
    run = tagged(project, "one")
    [books] = [path for path, _ in run.storage.list(run.files) if "/shard-1-" in path]
    run.storage.delete(books)

    loaded = load_back(run, project.connections)

    assert loaded.tagged == 1
    assert project.target()[1].tags == ["fruit"]


def test_what_killed_attempts_answered_is_taken_from_the_cache_a_part_at_a_time(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.answers.RECORDS_A_READ", 2)
    put_rows(project, {number: f"apple {number}" for number in range(5)} | {5: "apple, secretly", 6: "nothing"})
    teach(project.llm, secretly=REFUSAL)
    run = tagged(project, "one")
    [books] = [path for path, _ in run.storage.list(run.files) if "/shard-1-" in path]
    run.storage.delete(books)
    damage(project, "apple 3")
    parts = []
    read_many = Cache.read_many

    def watched(cache: Cache, keys: Iterable[str]) -> dict[str, Record]:
        parts.append(len(list(keys)))
        return read_many(cache, keys)

    monkeypatch.setattr(Cache, "read_many", watched)

    loaded = load_back(run, project.connections)

    assert (loaded.tagged, loaded.refused, loaded.skipped, loaded.damaged) == (5, 1, 1, 0)
    assert sorted(parts) == [1, 2, 2, 2]
    target = project.target()
    assert {row_id: (row.status, row.error, row.tags) for row_id, row in target.items()} == {
        **{number: ("tagged", None, ["fruit"]) for number in (0, 1, 2, 4)},
        3: ("skipped", "not asked yet; the next run asks", None),
        5: ("refused", "refusal", None),
        6: ("tagged", None, []),
    }
    assert {target[row_id].model for row_id in (0, 5)} == {"offline-stand-in"}
    assert (target[3].cache_key, target[5].cache_key) == (None, key(project, "apple, secretly"))
    assert target[0].tagged_at <= target[0].snapshot_at + timedelta(minutes=1)


# Failures and rivals


def test_a_load_that_fails_writes_nothing(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    either.put(1, "zebra")
    either.put(2, "rain")
    run = tagged(either, "two")
    before = either.target()
    with failing_on(either, row_id=2, run_id="two"), pytest.raises(TaggerError) as caught:
        load_back(run, either.connections)

    assert len(str(caught.value).splitlines()) == 1
    assert either.target() == before
    assert run.read("load.json", Loaded) is None

    load_back(run, either.connections)
    assert {row_id: row.tags for row_id, row in either.target().items()} == {1: ["animal"], 2: ["weather"]}


def test_two_loads_at_once_both_end_well(either: Project) -> None:
    put_all(either, 1)
    either.run()
    runs = []
    for run_id, text in (("one", "rain"), ("two", "zebra")):
        either.execute("DELETE FROM notes")
        put_rows(either, dict.fromkeys(range(1, 30), text))
        runs.append(tagged(either, run_id))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda run: load_back(run, either.connections), runs))

    assert {tuple(row.tags) for row in either.target().values()} == {("animal",)}


def wait_until_blocked(project: Project) -> None:
    """Waits until a query of the database waits for another's lock."""
    waiting = sa.text(
        "SELECT count(*) FROM information_schema.processlist WHERE state = 'User lock' AND db = database()"
        if project.engine.dialect.name == "mysql"
        else "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    until = time.monotonic() + 10
    with project.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.execute(waiting).scalar_one():
            assert time.monotonic() < until, "nothing waits"
            time.sleep(0.02)


@contextmanager
def at_statement(moment: str, start: str, thread: str, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` before or after a thread's first statement that starts so, with its transaction open."""
    pending = [act]

    def watch_statement(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if pending and threading.current_thread().name == thread and statement.strip().startswith(start):
            pending.pop()()

    sa.event.listen(sa.Engine, f"{moment}_cursor_execute", watch_statement)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, f"{moment}_cursor_execute", watch_statement)


def test_two_loads_that_both_make_the_target_both_end_well(server: Project) -> None:
    server.put(1, "apple")
    runs = [tagged(server, run_id) for run_id in ("one", "two")]
    rival: list[Future[Loaded]] = []

    with ThreadPoolExecutor(1, "first") as threads, ThreadPoolExecutor(1, "second") as rivals:

        def let_the_rival_in() -> None:
            rival.append(rivals.submit(load_back, runs[1], server.connections))
            wait_until_blocked(server)

        with at_statement("after", "CREATE TABLE note_tags", "first_0", let_the_rival_in):
            threads.submit(load_back, runs[0], server.connections).result()
            rival[0].result()

    assert server.target()[1].tags == ["fruit"]


def test_two_loads_that_write_and_delete_each_others_rows_both_end_well(server: Project) -> None:
    put_all(server, 5)
    server.run()
    server.put(1, None)
    server.put(5, "zebra")
    older = tagged(server, "older")
    server.put(1, "rain")
    server.put(5, "rain")
    newer = tagged(server, "newer")
    rival: list[Future[Loaded]] = []

    with ThreadPoolExecutor(1, "older") as threads, ThreadPoolExecutor(1, "newer") as rivals:

        def let_the_rival_in() -> None:
            rival.append(rivals.submit(load_back, newer, server.connections))
            wait_until_blocked(server)

        with at_statement("before", "DELETE FROM note_tags", "older_0", let_the_rival_in):
            threads.submit(load_back, older, server.connections).result()
            rival[0].result()

    assert {row_id: row.tags for row_id, row in server.target().items() if row_id in (1, 5)} == {
        1: ["weather"],
        5: ["weather"],
    }
