"""Erasure: nothing of a forgotten row is left anywhere, and nothing of the other rows is lost."""

import gzip
import io
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import Fate, StandIn, error
from tagger.batch import shard_batches, wait_for_shards
from tagger.batch_api import BatchAPI
from tagger.batches import Batches, HandedOver
from tagger.cache import Cache
from tagger.clean import clean, find_overdue
from tagger.dataset import Dataset
from tagger.exceptions import InputError, LLMStopped, RunFailed, StorageError
from tagger.forget import Erasure
from tagger.history import as_rows, history
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.rollup import rolled_up
from tagger.runs import Run, opened_parquet, read_parquet, rows_path, shard_path, utc_now, writing_parquet
from tagger.spec import normalise, spec_id, text_key
from tagger.spend import spent_usd
from tagger.storage import Storage
from tagger.stored_runs import active_runs, stored_runs
from tagger.tag import tag
from tagger.trial import run_trial
from tests.databases import QuickProject, put_rows, shared_client
from tests.project import Project, merged, sqlite_project
from tests.servers import S3Store
from tests.test_cli import Shell, assert_complains, shell  # noqa: F401 - a fixture

NOTHING = "  nothing is left"


def stored(project: Project) -> Iterator[tuple[str, str]]:
    """Yield path and content of all objects, Parquet files decoded."""
    for path in _paths(project):
        body = _client(project).get_object(Bucket=project.store.bucket, Key=path)["Body"].read()
        if path.endswith(".parquet"):
            with pq.ParquetFile(io.BytesIO(body)) as file:
                yield path, f"{file.read().to_pylist()} {file.schema_arrow.metadata}"
        else:
            yield path, (gzip.decompress(body) if path.endswith(".gz") else body).decode()


def everywhere(project: Project) -> dict[str, str]:
    """Return all that is kept, by place: in storage, in the target, and at the provider."""
    at_provider = {file.filename: file.content.decode() for file in project.llm.files if not file.deleted}
    return {**dict(stored(project)), "target": str(project.target()), **at_provider}


def places_of(project: Project, *words: str) -> list[str]:
    """Return where any of the words is kept."""
    return [place for place, content in everywhere(project).items() if any(word in place + content for word in words)]


def keys_of(project: Project, *texts: str) -> list[str]:
    return [text_key(spec_id(project.dataset), normalise(text)) for text in texts]


def forget(project: Project, *ids: Any, dataset: Dataset | None = None) -> list[str]:
    """Forget rows, and return what was said of it."""
    erasure = Erasure(dataset or project.dataset, [str(row_id) for row_id in ids], project.connections)
    found = erasure.find()
    told = list(erasure.describe(found))
    erasure.remove(found)
    return told


def delete(project: Project, *ids: Any) -> None:
    for row_id in ids:
        project.execute("DELETE FROM notes WHERE id = :id", id=row_id)


def figures(project: Project, run: Run) -> tuple[Any, ...]:
    """Return what the runs did and cost, as history, the month's budget and the run's summary have it."""
    days = as_rows(history(rolled_up(run.storage, project.dataset), "day"), "day")
    spent = spent_usd(run.storage, "notes", datetime(2000, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC))
    return days, spent, project.summary(run).model_dump(exclude={"errors", "attempts", "seconds"})


def lines(run: Run, path: str) -> list[dict[str, Any]]:
    return [line for batch in read_parquet(run.storage, path) for line in batch.to_pylist()]


@dataclass(frozen=True)
class Template:
    """What runs left, to be copied into other projects: that is quicker than to run them again."""

    project: Project
    objects: dict[str, bytes]
    database: bytes

    @classmethod
    def of(cls, project: Project) -> "Template":
        client, bucket = _client(project), project.store.bucket
        objects = {path: client.get_object(Bucket=bucket, Key=path)["Body"].read() for path in _paths(project)}
        return cls(project, objects, Path(project.database_connection.host or "").read_bytes())

    def copy_to(self, project: Project) -> Project:
        """Replace all that a project has in its bucket and its database."""
        client, bucket = _client(project), project.store.bucket
        for path in _paths(project):
            client.delete_object(Bucket=bucket, Key=path)
        for path, body in self.objects.items():
            if path.endswith("/dataset.json"):
                body = body.replace(self.project.store.bucket.encode(), bucket.encode())
            client.put_object(Bucket=bucket, Key=path, Body=body)
        Path(project.database_connection.host or "").write_bytes(self.database)
        project.content = merged(self.project.content, {"storage": f"s3://{bucket}"})
        return project


def _client(project: Project) -> Any:
    return shared_client(project.store.endpoint, project.store.access_key, project.store.secret_key)


def _paths(project: Project) -> list[str]:
    pages = _client(project).get_paginator("list_objects_v2").paginate(Bucket=project.store.bucket)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def new_project(folder: Path, server: S3Store, llm: StandIn) -> Project:
    store = replace(server, bucket=f"test-{uuid.uuid4().hex}")
    project = sqlite_project(folder, store, llm)
    _client(project).create_bucket(Bucket=store.bucket)
    return QuickProject(store, llm, project.database_connection, project.engine, project.content)


@pytest.fixture(autouse=True)
def _one_client(monkeypatch: pytest.MonkeyPatch, moto_server: S3Store) -> None:
    """Let all storages share a client: making one takes longer than all else that most of these tests do."""
    client = shared_client(moto_server.endpoint, moto_server.access_key, moto_server.secret_key)
    monkeypatch.setattr(Storage, "connect", staticmethod(lambda url, conn_id, connections: Storage(url, client)))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, moto_server: S3Store) -> Template:
    """Rows 1 to 5: between two runs 2 got the text of 3, and 4 another one."""
    with StandIn() as llm:
        project = new_project(tmp_path_factory.mktemp("two_runs"), moto_server, llm)
        project.change(limits={"max_deleted_fraction": 1, "max_failed_fraction": 1})
        texts = {1: "an apple one", 2: "a needle zebra", 3: "rain and rain", 4: "needle pie four", 5: "a tiger"}
        put_rows(project, texts)
        project.run("first", all_rows=True)
        project.put(2, texts[3])
        project.put(4, "a needle in a storm")
        project.run("second", all_rows=True)
        return Template.of(project)


@pytest.fixture
def told(two_runs: Template, tmp_path: Path, moto_server: S3Store, llm: StandIn) -> Project:
    """A project in which these two runs were made."""
    return two_runs.copy_to(new_project(tmp_path, moto_server, llm))


# What goes, and what stays


def test_nothing_of_a_row_is_left(told: Project) -> None:
    theirs = keys_of(told, "a needle zebra", "a needle in a storm", "needle pie four")
    delete(told, 2, 4)

    said = forget(told, 2, 4)

    assert places_of(told, "needle", *theirs, "'row_id': '2'", "'id': 2,", "'row_id': '4'") == []
    assert set(told.target()) == {1, 3, 5}
    assert said[0] == "notes: rows 2, 4"
    assert "  target: 2 rows" in said
    assert "  cache: 3 records" in said
    assert "  left alone: 1 record, for other rows have the same text" in said
    assert forget(told, 2, 4) == ["notes: rows 2, 4", NOTHING]


def test_the_other_rows_lose_nothing(told: Project) -> None:
    before, calls = told.target(), len(told.llm.calls)
    delete(told, 2)

    forget(told, 2)
    summary = told.run("third", all_rows=True)

    assert len(told.llm.calls) == calls
    assert (summary.texts, summary.cached) == (4, 4)
    assert told.target() == {row_id: row for row_id, row in before.items() if row_id != 2}


def test_a_text_that_another_row_of_the_run_has_stays_as_that_rows(either: Project) -> None:
    put_rows(either, {1: "the same apple", 2: "a zebra", 3: "the same apple"})
    run = either.open("first")
    either.run("first", all_rows=True)
    delete(either, 1)

    forget(either, 1)

    texts, books = lines(run, shard_path(run, run.plan().plan_id, 1)), lines(run, f"{run.files}shard-1-1.parquet")
    assert {(line["row_id"], line["text"]) for line in texts} == {("3", "the same apple"), ("2", "a zebra")}
    assert {(line["row_id"], line["key"], *line["tags"]) for line in books} == {
        ("3", *keys_of(either, "the same apple"), "fruit"),
        ("2", *keys_of(either, "a zebra"), "animal"),
    }


def test_what_runs_did_and_spent_stays(told: Project) -> None:
    run = told.open("first")
    before = figures(told, run)
    assert before[1] > 0
    delete(told, 2, 5)

    forget(told, 2, 5)

    assert figures(told, run) == before
    books = lines(run, f"{run.files}shard-1-1.parquet")
    scrubbed = [line for line in books if line["row_id"] == "forgotten"]
    assert [(line["status"], line["tags"], line["answered_at"], line["requests"]) for line in scrubbed] == [
        ("tagged", None, None, 1)
    ] * 2
    report(run)
    days, spent, summary = figures(told, run)
    assert (days, spent) == before[:2]
    assert [name for name, value in summary.items() if value != before[2][name]] == ["answered_tags"]


def test_a_cleared_run_works_and_does_not_bring_the_row_back(told: Project) -> None:
    run, before, calls = told.open("first"), told.target(), len(told.llm.calls)
    delete(told, 2)
    forget(told, 2)

    tag(run, 1, told.connections)
    load_back(run, told.connections)
    report(run)
    told.finish(run)

    assert told.target() == {row_id: row for row_id, row in before.items() if row_id != 2}
    assert len(told.llm.calls) == calls
    assert places_of(told, "needle zebra") == []


def test_a_run_of_forgotten_rows_alone_can_be_cleared(either: Project) -> None:
    put_rows(either, {1: "a needle"})
    either.run("first", all_rows=True)
    delete(either, 1)
    forget(either, 1)
    run = either.open("first")

    tag(run, 1, either.connections)
    load_back(run, either.connections)
    summary = report(run)

    assert (summary.texts, summary.tagged, bool(summary.cost_usd)) == (1, 1, True)
    assert either.finish(run).texts == 0
    assert either.target() == {}
    assert len(either.llm.calls) == 1


def test_the_row_groups_of_a_snapshot_and_the_waves_of_a_shard_stay(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.snapshot.ROWS_A_WRITE", 4)
    monkeypatch.setattr("tagger.shards.WAVE_TEXTS", 3)
    put_rows(project, {i: f"apple number {i}" for i in range(10)})
    project.run("first", all_rows=True)
    run = project.open("first")
    delete(project, 1, 4, 5)

    forget(project, 1, 4, 5)

    def sizes(path: str) -> list[int]:
        with opened_parquet(run.storage, path) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    assert sizes(run.snapshot().rows_file) == [3, 2, 2]
    assert sizes(shard_path(run, run.plan().plan_id, 1)) == [2, 1, 3, 1]


def test_rows_that_a_run_names_as_examples_are_not_named_any_more(told: Project) -> None:
    told.change(source={"max_chars": 30}, limits={"max_failed_fraction": 0})
    put_rows(told, {770077: "too long " * 10, 880088: "a fault"})
    told.llm.script(*[error(400, "No.")] * 2)
    with pytest.raises(RunFailed, match="row 880088"):
        told.run("third", all_rows=True)
    run = told.open("third")
    before = figures(told, run)
    assert len(places_of(told, "(row 880088)")) == 2, "the summary and the rollup"
    delete(told, 770077, 880088)

    forget(told, 770077, 880088)

    assert places_of(told, "880088", "770077") == []
    summary = told.summary(run)
    assert {kind: each.row_id for kind, each in summary.errors.items()} == dict.fromkeys(summary.errors, "forgotten")
    assert summary.reason is not None
    assert "(row forgotten)" in summary.reason
    assert figures(told, run)[1] == before[1]
    assert forget(told, 770077, 880088)[1:] == [NOTHING]


def test_reviews_and_rows_that_are_gone_from_the_source_go_too(told: Project) -> None:
    told.execute("UPDATE note_tags SET reviewed_by = 'aya', reviewed_at = snapshot_at WHERE row_id = 2")
    delete(told, 2)
    told.run("third", all_rows=True)
    assert told.target()[2].status == "gone"

    said = forget(told, 2)

    assert "  target: 1 row, 1 with a review" in said
    assert set(told.target()) == {1, 3, 4, 5}


def test_a_run_looks_as_old_and_as_quiet_as_it_is(told: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    told.change(retention={"snapshots": "14d"})
    killed = told.take("killed", all_rows=True)
    plan(killed, told.connections)
    monkeypatch.setattr("tagger.stored_runs.SILENCE", timedelta(0))
    before = {stored.run.run_id: stored.written_at for stored in stored_runs(killed.storage, "notes")}
    delete(told, 2)
    time.sleep(1)  # the resolution of S3's times

    forget(told, 2)
    delete(told, 5)
    forget(told, 5)

    after = stored_runs(killed.storage, "notes")
    assert {stored.run.run_id: stored.written_at for stored in after} == before
    monkeypatch.setattr("tagger.stored_runs.SILENCE", utc_now() - (before["killed"] or utc_now()))
    assert active_runs(killed.storage, "notes") == []
    monkeypatch.setattr("tagger.clean.utc_now", lambda: utc_now() + timedelta(days=15))
    overdue = find_overdue(killed.storage, told.dataset)
    clean(overdue)
    assert list(killed.storage.list("snapshots/")) == []


# Ids


def test_uuids_are_understood_however_they_are_written(either: Project) -> None:
    if either.engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has uuids")
    first, second = uuid.uuid4(), uuid.uuid4()
    either.execute("DROP TABLE notes")
    either.execute("CREATE TABLE notes (id UUID PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    put_rows(either, {first: "a needle", second: "a zebra"})
    either.run("first", all_rows=True)
    delete(either, first)

    forget(either, str(first).upper())

    assert places_of(either, "needle", str(first)) == []
    assert set(either.target()) == {second}


def test_text_ids_may_be_anything(project: Project) -> None:
    ids = ["-1", "a b", "o'neil@example.com", "ひと", "(row 1)"]
    project.execute("DROP TABLE notes")
    project.execute("CREATE TABLE notes (id TEXT PRIMARY KEY, body TEXT, updated_at TEXT)")
    put_rows(project, {row_id: f"needle {i}" for i, row_id in enumerate(ids)} | {"stays": "a zebra"})
    project.run("first", all_rows=True)
    delete(project, *ids)

    forget(project, *ids)

    assert places_of(project, "needle", *ids[2:]) == []
    assert set(project.target()) == {"stays"}
    with pytest.raises(InputError, match="no id of the source"):
        forget(project, "not UTF-8: \udcff")


def test_many_rows_at_once(project: Project) -> None:
    put_rows(project, {i: f"needle {i}" for i in range(700)} | {700: "a zebra"})
    project.run("first", all_rows=True)
    project.execute("DELETE FROM notes WHERE id < 700")

    said = forget(project, *range(700), 5, "007")

    assert said[0] == "notes: rows 0, 1, 2, 3, 4 and 695 more"
    assert "  cache: 700 records" in said
    assert places_of(project, "needle") == []
    assert set(project.target()) == {700}


# Refusals


def refused(project: Project, *ids: Any) -> str:
    before = everywhere(project)
    with pytest.raises(InputError) as caught:
        forget(project, *ids)
    assert everywhere(project) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row_id", ["x", "", "1.5", "9" * 20, "1 OR 1=1", "\udcff"])
def test_ids_of_another_kind_are_refused(told: Project, row_id: str) -> None:
    assert "no id of the source, whose ids are integer" in refused(told, 2, row_id)


def test_a_row_that_is_still_in_the_source_is_refused(told: Project) -> None:
    delete(told, 2)

    said = refused(told, 2, 4, 3)

    assert said.startswith("rows 4, 3 of `notes`: still in the source `notes`")
    assert said.endswith("delete it there first")


def test_a_dataset_at_work_is_refused(told: Project) -> None:
    delete(told, 2)
    told.take("third", all_rows=True)

    assert refused(told, 2).startswith("run `third` of `notes` may be at work")


def test_a_missing_source_or_storage_is_refused(told: Project) -> None:
    delete(told, 2)
    told.execute("ALTER TABLE notes RENAME TO elsewhere")

    assert "no table or view `notes`" in refused(told, 2)


def test_a_damaged_file_stops_the_search_before_anything_is_removed(told: Project) -> None:
    run = told.open("first")
    delete(told, 2)
    run.storage.put(run.snapshot().rows_file, b"PAR1 and no more")

    with pytest.raises(StorageError, match="damaged"):
        forget(told, 2)
    assert 2 in told.target()


# Datasets that share a storage


def other_dataset(project: Project, name: str = "others", **changes: Any) -> Project:
    """Return another dataset over the same source, in the same storage."""
    content = merged(project.content, {"dataset": name, "target": {"table": f"{name}_tags"}, **changes})
    return type(project)(project.store, project.llm, project.database_connection, project.engine, content)


def test_a_record_that_another_dataset_uses_stays_until_it_forgets_too(told: Project) -> None:
    other = other_dataset(told)
    other.run("first", all_rows=True)
    [key] = keys_of(told, "a needle in a storm")
    delete(told, 4)

    said = forget(told, 4)

    assert "  left alone: 1 record, for other rows, rows of `others` have the same text" in said
    assert {place.split("/")[1] for place in places_of(told, "needle in a", key) if "/others/" in place} == {"others"}
    assert [place for place in places_of(told, "needle in a") if "/notes/" in place] == []
    assert len(places_of(told, f"tag_{key}")) == 1

    forget(told, 4, dataset=other.dataset)

    assert places_of(told, "needle in a", key) == []


def test_a_dataset_with_another_prompt_keeps_its_own_records(told: Project) -> None:
    other = other_dataset(told, prompt="Another one.")
    other.run("first", all_rows=True)
    [key] = keys_of(other, "a needle in a storm")
    delete(told, 4)

    forget(told, 4)

    assert Cache(other.open("first").storage, spec_id(other.dataset), "offline-stand-in").exists(key)
    assert other.run("second", all_rows=True).cached == 3


# Trials


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_trials_forget_the_text_whatever_they_called_it(told: Project, name: str) -> None:
    other = other_dataset(told, "notes", prompt="Another one.")
    texts = ["a needle in a storm", "a tiger", "some other label"]
    trial = run_trial(other.dataset, texts, told.connections, name=name, row_ids=["3", "2", "1"])
    key, *stay = keys_of(other, *texts)
    assert len(places_of(told, key)) == 4, "its record, its row, its new key, its books"
    delete(told, 4)

    forget(told, 4)

    assert places_of(told, key, "needle in") == []
    assert Cache(told.open("x").storage, trial.plan.spec_id, "offline-stand-in").find(stay) == set(stay)


def test_an_evaluation_that_has_the_rows_id_tells_of_its_record(told: Project) -> None:
    other = other_dataset(told, "notes", prompt="Another one.")
    run_trial(other.dataset, ["a needle in a storm"], told.connections, name="evaluate", row_ids=["4"])
    [key] = keys_of(other, "a needle in a storm")
    storage = told.open("x").storage
    for path in [path for path, _ in storage.list("snapshots/")]:  # past their retention
        storage.delete(path)
    delete(told, 4)

    forget(told, 4)

    assert places_of(told, key) == []


def test_texts_that_a_killed_trial_left_go(told: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.stored_runs.SILENCE", timedelta(0))
    storage, left = told.open("x").storage, "snapshots/notes/trial__compare_x/rows.parquet"
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with writing_parquet(storage, left, schema) as parquet:
        parquet.write({"id": ["0", "1"], "text": ["a tiger", " a needle in a storm"]})
    delete(told, 4)

    forget(told, 4)

    assert storage.get(left) is None


# Batches, and files at the provider


@pytest.fixture
def batches(tmp_path: Path, moto_server: S3Store, llm: StandIn, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr("tagger.batch.FIRST_POLL_SECONDS", 0.05)
    monkeypatch.setattr("tagger.batch_api.TRIES", 0)
    return with_batches(new_project(tmp_path, moto_server, llm))


def with_batches(project: Project) -> Project:
    project.change(llm={"mode": "batch"}, limits={"max_deleted_fraction": 1})
    put_rows(project, {1: "a needle in batches", 2: "a zebra", 3: "an apple"})
    return project


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory, moto_server: S3Store) -> Template:
    """A run by the Batch API."""
    with StandIn() as llm:
        project = with_batches(new_project(tmp_path_factory.mktemp("one_batch"), moto_server, llm))
        by_batch(project, "first")
        return Template.of(project)


@pytest.fixture
def batched(one_batch: Template, batches: Project) -> Project:
    """A project in which this run was made; the provider has none of its files any more."""
    return one_batch.copy_to(batches)


def by_batch(project: Project, run_id: str) -> Run:
    """Go through the steps of a run by the Batch API."""
    run = project.take(run_id, all_rows=True)
    for shard in plan(run, project.connections).shards:
        wait_for_shards(run, [shard.shard], project.connections)
        tag(run, shard.shard, project.connections)
    load_back(run, project.connections)
    report(run)
    return run


def left_at_provider(project: Project) -> int:
    return sum(not file.deleted for file in project.llm.files)


def test_files_that_the_provider_did_not_delete_go(batches: Project) -> None:
    batches.llm.script_route("DELETE /v1/files/{id}", *[error(403, "No.")] * 2)
    by_batch(batches, "first")
    assert left_at_provider(batches) == 2, "the requests and the answers"
    delete(batches, 1)

    said = forget(batches, 1)

    assert "  provider: 2 files" in said
    assert left_at_provider(batches) == 0
    assert places_of(batches, "needle") == []
    assert forget(batches, 1)[1:] == [NOTHING]


def test_files_without_the_row_stay(batches: Project) -> None:
    batches.llm.script_route("DELETE /v1/files/{id}", *[error(403, "No.")] * 2)
    by_batch(batches, "first")
    put_rows(batches, {4: "a needle alone"})
    by_batch(batches, "second")
    delete(batches, 4)

    forget(batches, 4)

    assert left_at_provider(batches) == 2
    assert places_of(batches, "needle alone") == []


def hand_over_elsewhere(project: Project) -> None:
    """Hand the text of row 1, gone from the source by then, over to a batch of another installation."""
    elsewhere = other_dataset(project, storage=f"{project.dataset.storage}/elsewhere")
    run = elsewhere.take("theirs", all_rows=True)
    plan(run, elsewhere.connections)
    with shard_batches(run, 1, elsewhere.connections) as theirs:
        theirs.hand_over()


def test_files_of_another_installations_batch_stay_while_it_runs(batched: Project) -> None:
    batched.llm.script_batches(Fate(delay=60))
    hand_over_elsewhere(batched)
    delete(batched, 1)

    assert "provider" not in "".join(forget(batched, 1))

    assert left_at_provider(batched) == 1


def test_answers_that_another_installation_is_yet_to_collect_stay(
    batched: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.leftovers.SAME_BATCH", timedelta(0))
    hand_over_elsewhere(batched)
    delete(batched, 1)

    forget(batched, 1)

    assert [file.purpose for file in batched.llm.files if not file.deleted] == ["batch_output"]


def test_a_text_in_a_batch_that_is_not_collected_is_refused(batches: Project) -> None:
    batches.llm.script_batches(Fate(delay=60))
    run = batches.take("first", all_rows=True)
    plan(run, batches.connections)
    with shard_batches(run, 1, batches.connections) as mine:
        mine.hand_over()
        [(batch, _)] = mine.waiting()
    delete(batches, 1)

    said = refused(batches, 1)

    ends = f"{batch.intended_at + timedelta(hours=24):%Y-%m-%d %H:%M} UTC"
    assert said.startswith(f"row 1 of `notes`: in batch {batch.remote} of run `first`, which is not collected")
    assert f"it ends by {ends}" in said


def test_what_is_remembered_of_a_collected_batch_forgets_the_row(batches: Project) -> None:
    run = batches.take("first", all_rows=True)
    plan(run, batches.connections)
    with shard_batches(run, 1, batches.connections) as mine:
        mine.hand_over()
    other = batches.take("second", all_rows=True)
    plan(other, batches.connections)  # which collects it
    spec = Batches(run.storage, spec_id(batches.dataset))
    [batch] = spec.all()
    assert batch.collected
    for each in (run, other):
        batches.finish(each)
    spec.add(
        batch.model_copy(update={"batch": "0" * 16}),
        {k: HandedOver("1", 1, 0) for k in keys_of(batches, "a needle in batches")},
    )
    delete(batches, 1)

    said = forget(batches, 1)

    assert "  batches: 2 lines in 2 files" in said
    assert places_of(batches, "needle", *keys_of(batches, "a needle in batches")) == []


def test_an_endpoint_without_batches_is_no_error(batched: Project) -> None:
    delete(batched, 1)
    with StandIn(batches=False) as without:
        batched.llm = without

        assert "  provider" not in "".join(forget(batched, 1))


def test_a_provider_that_does_not_answer_stops_all_before_anything_is_removed(batched: Project) -> None:
    delete(batched, 1)
    batched.llm.script_route("GET /v1/files", error(500, "No."))
    before = everywhere(batched)

    with pytest.raises(LLMStopped):
        forget(batched, 1)

    assert everywhere(batched) == before


def test_a_connection_that_is_gone_is_told_of(batched: Project) -> None:
    batched.change(llm={"mode": "online"})
    delete(batched, 1)
    known = batched.connections
    erasure = Erasure(batched.dataset, ["1"], lambda conn_id: None if conn_id == "openai_default" else known(conn_id))

    found = erasure.find()
    erasure.remove(found)

    assert "  not looked at: the files of batches by connection `openai_default`, which is not there any more" in list(
        erasure.describe(found)
    )
    assert places_of(batched, "needle") == []


# Kills


WRITES: list[tuple[Any, str]] = [
    (Storage, "put"),
    (Storage, "upload"),
    (Storage, "delete"),
    (BatchAPI, "delete"),
    (sa.Connection, "commit"),
]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def state(project: Project) -> dict[str, Any]:
    """Return what is kept, with the random keys of forgotten lines as one, but for what was rewritten when."""
    return {
        place: re.sub(r"[0-9a-f]{32}", "KEY", content)
        for place, content in everywhere(project).items()
        if not place.startswith("history/") and not place.endswith("/rewritten.json")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wherever_it_is_killed_the_next_try_ends_the_same(batches: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    batches.llm.script_route("DELETE /v1/files/{id}", *[error(403, "No.")] * 2)
    by_batch(batches, "first")
    batches.put(1, "a needle again")
    by_batch(batches, "second")
    other = other_dataset(batches, "notes", prompt="Another one.", llm={"mode": "online"})
    run_trial(other.dataset, ["a needle again"], batches.connections, name="compare")
    delete(batches, 1)
    template = Template.of(batches)
    files = {file.id: file.content for file in batches.llm.files if not file.deleted}

    def restore() -> None:
        template.copy_to(batches)
        for file in batches.llm.files:
            if file.id in files:
                file.deleted, file.content = False, files[file.id]

    moments, kill_at = 0, -1

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal moments
            result = method(*args, **kwargs)
            moments += 1
            if moments == kill_at:
                raise Killed
            return result

        return call

    for owner, name in WRITES:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    moments = 0
    forget(batches, 1)
    expected, writes = state(batches), moments
    assert places_of(batches, "needle") == []
    assert writes > 10

    for moment in range(1, writes):
        restore()
        moments, kill_at = 0, moment
        with pytest.raises(Killed):
            forget(batches, 1)
        kill_at = -1
        forget(batches, 1)
        assert state(batches) == expected, moment


def test_what_is_written_meanwhile_is_noticed(told: Project) -> None:
    delete(told, 2)
    erasure = Erasure(told.dataset, ["2"], told.connections)
    found = erasure.find()
    run = told.open("first")
    path = rows_path(run, run.plan().plan_id)
    body = run.storage.get(path)
    assert body is not None
    remove = found.traces[-1].remove

    def written() -> None:
        remove()
        run.storage.put(path, body)

    found.traces[-1] = found.traces[-1]._replace(remove=written)

    with pytest.raises(RunFailed, match=r"something is left \(runs\): run it again"):
        erasure.remove(found)


# The command


def test_the_command_lists_first(shell: Shell) -> None:  # noqa: F811
    project = shell.project
    assert shell.run("run", "notes", "--all") == 0
    delete(project, 1)
    before = everywhere(project)

    assert shell.run("forget", "notes", "1") == 0

    assert everywhere(project) == before
    assert shell.out.splitlines()[0] == "notes: row 1"
    assert "cache: 1 record" in shell.out
    assert shell.out.splitlines()[-1] == "nothing is removed without `--yes`"

    assert shell.run("forget", "notes", "1", "--yes") == 0
    assert "cache: 1 record" in shell.out
    assert shell.out.splitlines()[-1] == "removed, and looked for again: nothing is left"
    assert places_of(project, "apple pie") == []

    for yes in ([], ["--yes"]):
        assert shell.run("forget", "notes", "1", *yes) == 0
        assert shell.out.splitlines() == ["notes: row 1", NOTHING]


def test_the_commands_refusals_are_one_line(shell: Shell) -> None:  # noqa: F811
    assert shell.run("run", "notes", "--all") == 0

    assert shell.run("forget", "notes", "1", "--yes") == 2
    assert_complains(shell, "row 1 of `notes`: still in the source `notes`")
    assert shell.run("forget", "notes", "apple", "--yes") == 2
    assert_complains(shell, "`apple` is no id of the source, whose ids are integer")
    assert shell.run("forget", "others", "1") == 2
    assert_complains(shell, "no dataset `others`")
    assert shell.run("forget", "notes") == 2


def test_an_id_may_begin_with_a_dash(shell: Shell) -> None:  # noqa: F811
    project = shell.project
    project.put(-5, "below zero")
    assert shell.run("run", "notes", "--all") == 0
    delete(project, -5)

    assert shell.run("forget", "notes", "-5", "--yes") == 0
    assert set(project.target()) == {1, 2}
    assert shell.run("forget", "notes", "--yes", "--", "-6") == 0
    assert shell.out.splitlines() == ["notes: row -6", NOTHING]


def test_old_versions_are_told_of(shell: Shell) -> None:  # noqa: F811
    project = shell.project
    project.store.client().put_bucket_versioning(
        Bucket=project.store.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    assert shell.run("run", "notes", "--all") == 0
    delete(project, 1)

    assert shell.run("forget", "notes", "1", "--yes") == 0

    assert "beyond reach: old versions, which the bucket keeps until a lifecycle rule deletes them" in shell.out


# Any rows, any texts


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_any_runs(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, moto_server: S3Store, llm: StandIn
) -> None:
    project = new_project(tmp_path_factory.mktemp("any"), moto_server, llm)
    project.change(limits={"max_deleted_fraction": 1, "max_failed_fraction": 1}, shards={"texts_per_shard": 2})
    other = other_dataset(project, source={"table": "others"})
    project.execute("CREATE TABLE others (id INTEGER PRIMARY KEY, body TEXT, updated_at TEXT)")
    rows: dict[str, dict[int, str]] = {"notes": {}, "others": {}}
    had: dict[str, dict[int, set[str]]] = {"notes": {}, "others": {}}
    words = st.integers(0, 5)
    for number in range(data.draw(st.integers(1, 3), "runs")):
        for table, each in (("notes", project), ("others", other)):
            changed = data.draw(st.dictionaries(st.integers(0, 5), words), f"rows of {table}")
            for row_id, word in changed.items():
                text = f"needle{word}x"
                rows[table][row_id] = text
                had[table].setdefault(row_id, set()).add(text)
                project.execute(f"DELETE FROM {table} WHERE id = :id", id=row_id)
                project.execute(f"INSERT INTO {table} (id, body) VALUES (:id, :body)", id=row_id, body=text)
            each.run(f"run-{number}", all_rows=True)
    ids = data.draw(st.sets(st.integers(0, 5), min_size=1), "forgotten")
    for row_id in ids:
        project.execute("DELETE FROM notes WHERE id = :id", id=row_id)
    calls = len(project.llm.calls)

    forget(project, *sorted(ids))

    kept = {text for row_id, texts in had["notes"].items() if row_id not in ids for text in texts}
    kept |= {text for texts in had["others"].values() for text in texts}
    for text in {text for row_id in ids for text in had["notes"].get(row_id, ())} - kept:
        assert places_of(project, text, *keys_of(project, text)) == []
    cache = Cache(project.open("x").storage, spec_id(project.dataset), "offline-stand-in")
    assert cache.find(keys_of(project, *kept)) == set(keys_of(project, *kept))
    for each in (project, other):
        assert each.run("after", all_rows=True).cached == len(set(rows_left(each)))
    assert len(project.llm.calls) == calls
    assert set(project.target()) == rows["notes"].keys() - ids


def rows_left(project: Project) -> list[str]:
    with project.engine.connect() as connection:
        return list(connection.execute(sa.text(f"SELECT body FROM {project.dataset.source.table}")).scalars())
