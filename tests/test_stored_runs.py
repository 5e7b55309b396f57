"""The runs of a dataset as a listing shows them: how old they are, and which may be at work."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tagger.batches import Batch, Batches
from tagger.plan import plan
from tagger.runs import TRIAL, Run
from tagger.stored_runs import SILENCE, active_runs, stored_runs
from tagger.trial import run_trial
from tests.databases import make_project, watch
from tests.project import Project
from tests.servers import written_at
from tests.test_spend import put_attempt

NOW = datetime.now(UTC)
LONG_AGO = NOW - SILENCE - timedelta(minutes=1)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def put_batch(run: Run, *, collected: bool = False, spec: str = "0123456789ab") -> None:
    """Leave a batch of a run as one that was handed over does."""
    whose = {"dataset": run.dataset_name, "run_id": run.run_id, "plan_id": "p", "shard": 1}
    about = {"conn_id": "openai_default", "requests": 1, "price": None, "books": "", "intended_at": NOW}
    batch = Batch.model_validate({"batch": f"b-{run.run_id}", "collected": collected} | whose | about)
    Batches(run.storage, spec).write(batch)


def active(project: Project) -> list[str]:
    return active_runs(project.open("any").storage, "notes")


def test_nothing_is_active_where_there_is_nothing(project: Project) -> None:
    assert active(project) == []


def test_a_run_is_active_from_its_snapshot_to_its_summary(project: Project) -> None:
    project.put(1, "apple")
    run = project.take("one")
    assert active(project) == ["one"]
    plan(run, project.connections)
    assert active(project) == ["one"]

    project.finish(run)

    assert active(project) == []


def test_a_run_that_was_killed_is_active_until_it_was_silent_for_so_long(project: Project) -> None:
    run = project.take("one")
    written_at(project.store, run.texts, LONG_AGO)
    assert active(project) == ["one"]

    written_at(project.store, run.files, LONG_AGO)
    assert active(project) == []

    put_attempt(run, 1.0, NOW)
    assert active(project) == ["one"]


def test_a_run_that_is_taken_up_again_is_active(project: Project) -> None:
    project.run("one")
    for prefix in ("runs/", "snapshots/"):
        written_at(project.store, prefix, LONG_AGO)
    assert active(project) == []

    project.take("one")

    assert active(project) == ["one"]


def test_a_run_whose_tag_step_alone_is_done_again_is_active_while_that_runs(project: Project) -> None:
    project.put(1, "apple")
    run = Run(project.open("one").storage, "notes", "one")
    project.run("one")
    written_at(project.store, "runs/", NOW - timedelta(hours=1))

    put_attempt(run, 1.0, NOW, attempt=2, state="running")
    assert active(project) == ["one"]

    put_attempt(run, 1.0, NOW, attempt=2)
    assert active(project) == []


@pytest.mark.parametrize("has_files", [True, False])
def test_a_run_with_a_batch_that_is_not_collected_is_active_however_old_it_is(
    project: Project, has_files: bool
) -> None:
    if has_files:
        project.run("one")
        written_at(project.store, "", LONG_AGO)
    run = project.open("one")
    put_batch(run)
    assert active(project) == ["one"]

    put_batch(run, collected=True)
    assert active(project) == []


def test_batches_and_runs_of_other_datasets_do_not_count(project: Project) -> None:
    storage = project.open("any").storage
    put_batch(Run(storage, "notes_too", "two"))
    project.take("one")

    assert active(project) == ["one"]
    assert active_runs(storage, "notes_too") == ["two"]


def test_a_trial_is_active_as_long_as_it_holds_texts(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def look(*args: object, **kwargs: object) -> None:
        seen.append(active(project))
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("tagger.trial.plan", look)
        run_trial(project.dataset, ["apple"], project.connections, name="killed")
    run_trial(project.dataset, ["apple"], project.connections, name="ended")

    assert [[run_id.startswith(f"{TRIAL}killed") for run_id in active] for active in seen] == [[True]]
    assert active(project) == []


def test_a_run_that_left_nothing_but_what_it_spent_has_no_age_and_is_not_active(project: Project) -> None:
    run = project.open("one")
    run.storage.put(f"{run.files}cleaned-1.json", b"{}")

    [stored] = stored_runs(run.storage, "notes")

    assert (stored.written_at, stored.is_active) == (None, False)


def test_what_is_no_run_is_left_out(project: Project) -> None:
    storage = project.open("any").storage
    for path in ("runs/notes/file", "runs/notes/not a run/summary.json", "snapshots/notes/x/"):
        storage.put(path, b"x")

    assert stored_runs(storage, "notes") == []


def test_runs_are_listed_with_what_they_hold_in_one_request_a_folder(project: Project) -> None:
    project.put(1, "apple")
    run = project.take("one")
    plan(run, project.connections)
    requests = watch(run.storage)

    [stored] = stored_runs(run.storage, "notes")

    assert requests.counts == {"ListObjectsV2": 3}
    for held, prefix in ((stored.texts, run.texts), (stored.files, run.files)):
        there = list(run.storage.list(prefix))
        assert (held.objects, held.bytes) == (len(there), sum(size for _, size in there))
        assert held.newest == max(version.written_at for version in run.storage.list_versions(prefix))
