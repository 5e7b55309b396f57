"""load_back: what the target holds after each outcome, what is left alone, and what is deleted."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from demo.stand_in import StandIn, completion, error
from tagger.cache import Cache
from tagger.connections import Connection
from tagger.exceptions import InputError, RunFailed, TaggerError
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.runs import Loaded, Run
from tagger.spec import spec_id, text_key
from tagger.tables import new_target
from tagger.tag import tag
from tests.databases import DATABASES, database_connection, make_project, postgresql_project, teach, watch
from tests.project import Project
from tests.servers import PostgreSQL, S3Store

REFUSAL = completion(None, refusal="I will not.")
REJECTED = error(400, "no", "odd_text")


@pytest.fixture(params=DATABASES)
def project(request: pytest.FixtureRequest, tmp_path: Path, s3_bucket: S3Store, llm: StandIn) -> Project:
    project = make_project(request.param, tmp_path, s3_bucket, llm, lambda: request.getfixturevalue("postgresql"))
    project.change(limits={"max_failed_fraction": 1})
    return project


@pytest.fixture
def postgres(postgresql: PostgreSQL, s3_bucket: S3Store, llm: StandIn) -> Project:
    return postgresql_project(postgresql, s3_bucket, llm)


@pytest.fixture
def sqlite(tmp_path: Path, s3_bucket: S3Store, llm: StandIn) -> Project:
    return make_project("sqlite", tmp_path, s3_bucket, llm, lambda: pytest.fail("no server is needed"))


def put_all(project: Project, count: int) -> None:
    """Puts rows 1 to `count` there, all with one text."""
    for row_id in range(1, count + 1):
        project.put(row_id, "apple")


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
    }
    assert sa.inspect(postgres.engine).get_pk_constraint("note_tags")["constrained_columns"] == ["row_id"]


def test_the_target_is_made_as_designed_on_sqlite(sqlite: Project) -> None:
    sqlite.run()

    assert {name: kind for name, (kind, _) in columns_of(sqlite).items()} == {
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
    }
    assert sa.inspect(sqlite.engine).get_pk_constraint("note_tags")["constrained_columns"] == ["row_id"]


def test_the_target_may_have_a_schema(postgres: Project) -> None:
    postgres.put(1, "apple")
    postgres.execute('CREATE SCHEMA "My Tags"')
    postgres.change(target={"table": "My Tags.note_tags"})

    postgres.run()

    assert postgres.target()[1].tags == ["fruit"]


def test_the_target_may_have_further_columns(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    project.execute("ALTER TABLE note_tags ADD COLUMN reviewed TEXT DEFAULT 'no'")
    project.put(1, "zebra")

    project.run()

    assert project.target()[1].tags == ["animal"]


@pytest.mark.parametrize(
    "columns",
    [
        "row_id BIGINT PRIMARY KEY, tags JSON",
        "id BIGINT PRIMARY KEY, tags JSON, status TEXT, error TEXT, cache_key TEXT, spec_id TEXT, model TEXT, "
        "tagged_at TIMESTAMP, snapshot_at TIMESTAMP, run_id TEXT",
    ],
    ids=["few-columns", "another-id"],
)
def test_a_table_that_is_no_target_is_refused(project: Project, columns: str) -> None:
    project.put(1, "apple")
    run = tagged(project, "one")
    project.execute(f"CREATE TABLE note_tags ({columns})")

    with pytest.raises(InputError, match=r"`target\.table`: table note_tags exists, but has no column"):
        load_back(run, project.connections)


def test_a_target_with_ids_of_another_type_is_refused(postgres: Project) -> None:
    postgres.put(1, "apple")
    run = tagged(postgres, "one")
    with postgres.engine.begin() as connection:
        new_target("note_tags", "text").create(connection)

    with pytest.raises(InputError, match=r"`target\.table`: .*`row_id`"):
        load_back(run, postgres.connections)


def test_a_target_whose_ids_are_not_unique_is_refused(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    project.execute("CREATE TABLE copied AS SELECT * FROM note_tags")
    run = tagged(project, "one")
    project.execute("DROP TABLE note_tags")
    project.execute("ALTER TABLE copied RENAME TO note_tags")

    with pytest.raises(InputError, match=r"`target\.table`: .*`row_id`"):
        load_back(run, project.connections)


def test_without_a_plan_nothing_is_loaded(project: Project) -> None:
    run = project.take("one")

    with pytest.raises(InputError, match=r"run `one` of `notes` has no plan\.json"):
        load_back(run, project.connections)


@pytest.mark.parametrize("row_id", ["it's", 'a "b"', "two\nlines", "記事 🍎", "a,b;c--", " ", "%(x)s :y"])
def test_any_text_may_be_an_id(project: Project, row_id: str) -> None:
    project.execute("DROP TABLE notes")
    project.execute("CREATE TABLE notes (id TEXT PRIMARY KEY, body TEXT, updated_at TEXT)")
    project.put(row_id, "apple")

    project.run()

    assert project.target()[row_id].tags == ["fruit"]


def test_uuids_are_ids(postgres: Project) -> None:
    row_id = uuid.uuid4()
    postgres.execute("DROP TABLE notes")
    postgres.execute("CREATE TABLE notes (id UUID PRIMARY KEY, body TEXT, updated_at TEXT)")
    postgres.put(row_id, "apple")

    postgres.run()
    again = postgres.run()

    assert {found: row.tags for found, row in postgres.target().items()} == {row_id: ["fruit"]}
    assert (again.cached, again.tags) == (1, {"fruit": 1})


def test_the_target_may_be_in_another_database(sqlite: Project, postgresql: PostgreSQL) -> None:
    database = postgresql.create_database(f"test_{uuid.uuid4().hex}")
    sqlite.put(1, "apple")
    run = tagged(sqlite, "one")
    sqlite.change(target={"conn_id": "other"})
    run.freeze(sqlite.dataset)

    def connections(conn_id: str) -> Connection | None:
        return database_connection(database, "other") if conn_id == "other" else sqlite.connections(conn_id)

    load_back(run, connections)

    assert sqlite.target() == {}
    with sa.create_engine(database.url, poolclass=sa.NullPool).connect() as connection:
        assert connection.execute(sa.text("SELECT row_id, tags FROM note_tags")).all() == [(1, ["fruit"])]


# Outcomes


def test_a_tagged_row(project: Project) -> None:
    before = datetime.now(UTC)
    project.put(1, "a zebra in the rain")

    project.run("one")

    row = project.target()[1]
    assert (row.tags, row.status, row.error) == (["animal", "weather"], "tagged", None)
    assert (row.cache_key, row.spec_id) == (key(project, "a zebra in the rain"), spec_id(project.dataset))
    assert (row.model, row.run_id) == ("offline-stand-in", "one")
    assert before <= row.tagged_at <= datetime.now(UTC)
    assert row.snapshot_at == project.open("one").snapshot().taken_at


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


def test_a_row_whose_new_text_fails_keeps_the_tags_of_the_old_one(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")
    good = project.target()[1]
    project.put(1, "a weird zebra")
    teach(project.llm, weird=REJECTED)

    project.run("two")

    row = project.target()[1]
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
        "not asked: the shard ended early; the next run asks"
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


def test_tags_are_counted_in_the_target(project: Project) -> None:
    for row_id, text in enumerate(["apple", "apple", "a zebra in the rain", "nothing", "rain"]):
        project.put(row_id, text)
    project.run()
    project.execute("UPDATE note_tags SET run_id = 'of long ago'")

    assert project.run().tags == {"fruit": 2, "weather": 2, "animal": 1}
    assert list(project.run().tags) == ["fruit", "weather", "animal"]


def test_japanese_tags_stand_readable_in_the_target(project: Project) -> None:
    project.put(1, "林檎")
    project.change(tags=[{"id": "果物", "description": "林檎"}, {"id": '動物 "いぬ"', "description": "柴犬"}])
    project.put(2, "柴犬")

    assert project.run().tags == {"果物": 1, '動物 "いぬ"': 1}

    with project.engine.connect() as connection:
        raw = connection.execute(sa.text("SELECT CAST(tags AS TEXT) FROM note_tags ORDER BY row_id")).scalars().all()
    assert raw == ['["果物"]', '["動物 \\"いぬ\\""]']


# What is left alone


def test_rows_that_did_not_change_are_not_written(project: Project) -> None:
    project.put(1, "apple")
    project.put(2, "zebra")
    project.run("one")
    before = project.target()
    project.put(2, "rain")

    project.run("two")

    after = project.target()
    assert after[1] == before[1]
    assert (after[2].run_id, after[2].snapshot_at > before[2].snapshot_at) == ("two", True)
    written = project.open("two").read("load.json", Loaded)
    assert written is not None
    assert written.written == 1


def test_a_failed_row_that_fails_again_is_not_written(project: Project) -> None:
    project.put(1, "a weird apple")
    teach(project.llm, weird=REJECTED)
    project.run("one")
    before = project.target()

    project.run("two")

    assert project.target() == before


def test_loading_twice_changes_nothing(project: Project) -> None:
    put_all(project, 2)
    project.put(3, None)
    run = tagged(project, "one")
    first = load_back(run, project.connections)
    before = project.target()

    second = load_back(run, project.connections)

    assert (first.written, second.written, second.deleted) == (2, 0, 0)
    assert (first.tagged, first.tags) == (second.tagged, second.tags)
    assert project.target() == before


def test_an_older_snapshot_changes_nothing_newer(project: Project) -> None:
    project.put(1, "apple")
    older = tagged(project, "older")
    project.put(1, "zebra")
    newer = tagged(project, "newer")

    load_back(newer, project.connections)
    load_back(older, project.connections)

    row = project.target()[1]
    assert (row.tags, row.run_id) == (["animal"], "newer")


def test_an_older_snapshot_deletes_nothing_newer(project: Project) -> None:
    put_all(project, 20)
    project.put(1, None)
    older = tagged(project, "older")
    project.put(1, "zebra")
    project.put(21, "rain")
    newer = tagged(project, "newer")

    load_back(newer, project.connections)
    loaded = load_back(older, project.connections)

    assert loaded.deleted == 0
    assert len(project.target()) == 21
    assert project.target()[1].tags == ["animal"]


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


def test_a_row_whose_text_becomes_blank_leaves(project: Project) -> None:
    put_all(project, 2)
    project.run()
    project.put(1, " \n")

    summary = project.run()

    assert sorted(project.target()) == [2]
    assert (summary.rows, summary.blank) == (1, 1)


def test_a_row_whose_text_becomes_blank_leaves_in_a_window_too(project: Project) -> None:
    put_all(project, 2)
    project.run()
    project.put(1, None)
    project.change(source={"updated_at": "updated_at"})

    project.run()

    assert sorted(project.target()) == [2]


def test_rows_gone_from_the_source_leave(project: Project) -> None:
    put_all(project, 10)
    project.run()
    project.execute("DELETE FROM notes WHERE id = 4")

    project.run()

    assert sorted(project.target()) == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_an_empty_source_deletes_nothing(project: Project) -> None:
    put_all(project, 3)
    project.run()
    project.execute("DELETE FROM notes")

    summary = project.run()

    assert (summary.state, summary.rows, summary.texts) == ("success", 0, 0)
    assert sorted(project.target()) == [1, 2, 3]


def test_more_rows_than_allowed_are_not_deleted_and_the_run_fails(project: Project) -> None:
    put_all(project, 10)
    project.run()
    project.execute("DELETE FROM notes WHERE id <= 2")
    project.put(11, "zebra")
    run = tagged(project, "two")

    with pytest.raises(RunFailed, match=r"2 of 11 rows of note_tags are gone.*`limits\.max_deleted_fraction` 0\.1"):
        load_back(run, project.connections)
    with pytest.raises(RunFailed, match="2 of 11 rows"):
        report(run)

    assert sorted(project.target()) == list(range(1, 12))
    assert project.target()[11].tags == ["animal"]


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


def test_a_cached_text_that_the_target_lacks_needs_its_record_once(project: Project) -> None:
    put_all(project, 2)
    project.run()
    for row_id in (3, 4, 5):
        project.put(row_id, "apple")
    run = tagged(project, "two")
    requests = watch(run.storage)

    load_back(run, project.connections)

    assert len(requests.of("GetObject", "cache/")) == 1
    assert project.target()[5].tags == ["fruit"]
    assert project.target()[5].tagged_at == project.target()[1].tagged_at


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


def test_a_damaged_record_fails_its_rows_until_the_next_run(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    project.put(1, "apple")
    project.run()
    project.put(2, "apple")
    damage(project, "apple")

    second = project.run("two")

    row = project.target()[2]
    assert (row.status, row.tags) == ("failed", None)
    assert row.error == "the cache record was damaged; the next run tags the text again"
    assert (second.texts, second.cached, second.failed) == (1, 0, 1)
    assert project.target()[1].tags == ["fruit"]
    assert "damaged cache record deleted" in caplog.text

    third = project.run("three")

    assert (third.tagged, third.llm_requests) == (1, 1)
    assert (project.target()[2].status, project.target()[2].tags) == ("tagged", ["fruit"])


def test_what_a_killed_attempt_answered_is_taken_from_the_cache(project: Project) -> None:
    project.put(1, "apple")
    run = tagged(project, "one")
    [books] = [path for path, _ in run.storage.list(run.files) if "/shard-1-" in path]
    run.storage.delete(books)

    loaded = load_back(run, project.connections)

    assert loaded.tagged == 1
    assert project.target()[1].tags == ["fruit"]


# Failures and rivals


def test_a_load_that_fails_writes_nothing(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    project.put(1, "zebra")
    project.put(2, "rain")
    run = tagged(project, "two")
    before = project.target()
    with failing_on(project, row_id=2), pytest.raises(TaggerError) as caught:
        load_back(run, project.connections)

    assert len(str(caught.value).splitlines()) == 1
    assert project.target() == before
    assert run.read("load.json", Loaded) is None

    load_back(run, project.connections)
    assert {row_id: row.tags for row_id, row in project.target().items()} == {1: ["animal"], 2: ["weather"]}


@contextmanager
def failing_on(project: Project, row_id: int) -> Iterator[None]:
    """Lets the database refuse one row of the target."""
    if project.engine.dialect.name == "sqlite":
        project.execute(
            f"CREATE TRIGGER refuse BEFORE INSERT ON note_tags WHEN NEW.row_id = {row_id} "
            r"BEGIN SELECT RAISE(ABORT, 'not this row'); END"
        )
        yield
        project.execute("DROP TRIGGER refuse")
    else:
        project.execute(f"ALTER TABLE note_tags ADD CONSTRAINT refuse CHECK (row_id <> {row_id})")
        yield
        project.execute("ALTER TABLE note_tags DROP CONSTRAINT refuse")


def test_two_loads_at_once_both_end_well(project: Project) -> None:
    put_all(project, 1)
    project.run()
    runs = []
    for run_id in ("one", "two"):
        for row_id in range(1, 30):
            project.put(row_id, "apple" if run_id == "one" else "zebra")
        runs.append(tagged(project, run_id))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda run: load_back(run, project.connections), runs))

    assert {tuple(row.tags) for row in project.target().values()} == {("animal",)}


def wait_until_blocked(project: Project) -> None:
    """Waits until a query of the database waits for another's lock."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    until = time.monotonic() + 10
    with project.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.execute(waiting).scalar_one():
            assert time.monotonic() < until, "nothing waits"
            time.sleep(0.02)


def test_two_loads_that_both_make_the_target_both_end_well(postgres: Project) -> None:
    postgres.put(1, "apple")
    run = tagged(postgres, "one")

    with ThreadPoolExecutor(1) as threads:
        with postgres.engine.begin() as rival:
            new_target("note_tags", "integer").create(rival)
            loading = threads.submit(load_back, run, postgres.connections)
            wait_until_blocked(postgres)
        loading.result()

    assert postgres.target()[1].tags == ["fruit"]


@contextmanager
def before_statement(start: str, thread: str, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` before a thread's first statement that starts so."""
    pending = [act]

    def watch_statement(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if pending and threading.current_thread().name == thread and statement.startswith(start):
            pending.pop()()

    sa.event.listen(sa.Engine, "before_cursor_execute", watch_statement)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", watch_statement)


def test_two_loads_that_write_and_delete_each_others_rows_both_end_well(postgres: Project) -> None:
    put_all(postgres, 5)
    postgres.run()
    postgres.put(1, None)
    postgres.put(5, "zebra")
    older = tagged(postgres, "older")
    postgres.put(1, "rain")
    postgres.put(5, "rain")
    newer = tagged(postgres, "newer")

    with ThreadPoolExecutor(1, "older") as threads, ThreadPoolExecutor(1, "newer") as rivals:

        def let_the_rival_in() -> None:
            rival.append(rivals.submit(load_back, newer, postgres.connections))
            wait_until_blocked(postgres)

        rival: list[Any] = []
        with before_statement("DELETE FROM note_tags", "older_0", let_the_rival_in):
            threads.submit(load_back, older, postgres.connections).result()
            rival[0].result()

    assert {row_id: row.tags for row_id, row in postgres.target().items() if row_id in (1, 5)} == {
        1: ["weather"],
        5: ["weather"],
    }
