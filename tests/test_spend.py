"""What the runs of a dataset spent: by the attempts' files, whatever became of the runs."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.cache import Usage
from tagger.dataset import Price
from tagger.exceptions import InputError, RunFailed, StorageError
from tagger.history import history
from tagger.ledger import SCHEMA, Ledger, read_attempts
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.rollup import rolled_up
from tagger.runs import Run
from tagger.spend import list_runs, spent_usd
from tests.databases import make_project, watch
from tests.project import Project

NOW = datetime(2026, 11, 15, 12, tzinfo=UTC)
EVER = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def put_attempt(
    run: Run, cost_usd: float | None, ended_at: datetime, *, shard: int = 1, attempt: int = 1, **about: str
) -> None:
    """Write an attempt's file directly: a text for 2 requests and 100 tokens."""
    footer = {"plan_id": "plan", "state": "done", "reason": None, "asked": "online"}
    footer |= {"started_at": ended_at.isoformat(), "ended_at": ended_at.isoformat(), **about}
    row = dict.fromkeys(SCHEMA.names) | {"key": "k", "row_id": "1", "status": "tagged", "requests": 2}
    row |= {"input_tokens": 90, "cached_input_tokens": 10, "output_tokens": 10, "cost_usd": cost_usd}
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA.with_metadata({"tagger": json.dumps(footer)})), body)
    run.storage.put(f"{run.files}shard-{shard}-{attempt}.parquet", body.getvalue())


def spent(project: Project, start: datetime = EVER[0], end: datetime = EVER[1], but_run: str | None = None) -> float:
    return spent_usd(project.open("any").storage, "notes", start, end, but_run=but_run)


def test_an_attempt_counts_where_it_ended(project: Project) -> None:
    for number, at in enumerate((NOW, NOW + timedelta(seconds=1), NOW + timedelta(days=1)), 1):
        put_attempt(project.open("one"), 10.0**number, at, attempt=number)

    assert spent(project) == 1110
    assert spent(project, NOW, NOW + timedelta(days=1)) == 110
    assert spent(project, NOW + timedelta(microseconds=1), EVER[1]) == 1100
    assert spent(project, EVER[0], NOW) == 0


def test_the_attempts_of_all_runs_and_shards_of_the_dataset_count(project: Project) -> None:
    put_attempt(project.open("scheduled__2026-11-15T00:00:00+00:00"), 1.0, NOW, shard=12)
    put_attempt(project.open("b"), 10.0, NOW, state="broken")
    put_attempt(project.open("b"), 100.0, NOW, attempt=2, state="running", asked="batch")
    put_attempt(Run(project.open("b").storage, "notes_too", "b"), 1000.0, NOW)

    assert spent(project) == 111
    assert spent(project, but_run="b") == 1
    assert spent(project, but_run="unknown") == 111


def test_a_dataset_without_runs_has_spent_nothing(project: Project) -> None:
    project.take("no-plan-yet")

    assert spent(project) == 0


def test_an_unknown_cost_counts_as_nothing(project: Project) -> None:
    put_attempt(project.open("one"), None, NOW)
    put_attempt(project.open("one"), 0.5, NOW, shard=2)

    assert spent(project) == 0.5


def test_runs_that_were_last_written_before_are_not_read(project: Project) -> None:
    put_attempt(project.open("one"), 1.0, NOW)
    requests = watch(project.open("any").storage)

    assert spent(project, datetime.now(UTC) + timedelta(days=2), EVER[1]) == 0
    assert requests.counts == {"ListObjectsV2": 1}


def test_a_clock_that_is_ahead_hides_no_money(project: Project) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=20)
    put_attempt(project.open("one"), 1.0, ahead)

    assert spent(project, ahead, EVER[1]) == 1


@pytest.mark.parametrize("body", [b"", b"PAR1", b"no parquet at all"])
def test_a_damaged_attempt_is_named(project: Project, body: bytes) -> None:
    project.open("one").storage.put("runs/notes/one/shard-1-1.parquet", body)

    with pytest.raises(StorageError, match=r"runs/notes/one/shard-1-1\.parquet: damaged; delete it"):
        spent(project)


def test_what_else_lies_there_is_no_attempt(project: Project) -> None:
    storage = project.open("any").storage
    for path in ("", "one/", "one/shard-1-1.parquet.bak", "one/rows-1.parquet", "not a run/notes.txt"):
        storage.put(f"runs/notes/{path}", b"x")

    assert list_runs(storage, "notes") == []
    assert spent(project) == 0


def test_a_bucket_that_is_not_there_is_wrong_input(project: Project) -> None:
    project.change(storage="s3://not-there")

    with pytest.raises(InputError, match="no bucket"):
        spent(project)


# The summary saves to read the files


def shards_read(project: Project) -> tuple[float, int]:
    """Return what was spent, and how many attempts' files were read to know it."""
    requests = watch(project.open("any").storage)
    return spent(project), len([key for key in requests.of("GetObject") if "shard-" in key])


def reported(project: Project, *costs: float) -> Run:
    """Return a run that was summed up, with attempts of these costs."""
    run = project.take("one")
    plan(run, project.connections)
    for number, cost in enumerate(costs, 1):
        put_attempt(run, cost, NOW, shard=number)
    with pytest.raises(RunFailed, match="load_back did not finish"):
        report(run)
    return run


def test_attempts_that_a_summary_counts_are_not_read(project: Project) -> None:
    reported(project, 1.0, 10.0, 100.0)

    assert shards_read(project) == (111, 0)


def test_an_attempt_that_came_after_the_summary_counts(project: Project) -> None:
    put_attempt(reported(project, 1.0, 10.0), 100.0, NOW, attempt=2)

    assert shards_read(project) == (111, 3)


def test_an_attempt_that_was_written_on_after_the_summary_counts_as_it_is_now(project: Project) -> None:
    run = reported(project, 1.0, 10.0)
    put_attempt(run, 5.0, NOW, shard=2)

    assert shards_read(project) == (6, 2)


def test_an_attempt_that_is_deleted_counts_no_more(project: Project) -> None:
    run = reported(project, 1.0, 10.0)
    run.storage.delete(f"{run.files}shard-2-1.parquet")

    assert shards_read(project) == (1, 1)


def test_a_file_that_changes_while_the_run_is_summed_up_is_read_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project.take("one")
    plan(run, project.connections)
    put_attempt(run, 1.0, NOW)

    def written_on(read: Run) -> Any:
        attempts = read_attempts(read)
        put_attempt(read, 2.0, NOW)
        put_attempt(read, 10.0, NOW, attempt=2)
        return attempts

    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        patch.setattr("tagger.report.read_attempts", written_on)
        report(run)

    assert project.summary(run).cost_usd == 1
    assert shards_read(project) == (12, 2)


def test_a_summary_that_counts_no_attempts_hides_none(project: Project) -> None:
    run = reported(project, 1.0, 10.0)
    old = project.summary(run).model_dump(mode="json", exclude={"attempts"})
    run.storage.put(f"{run.files}summary.json", json.dumps(old).encode())

    assert shards_read(project) == (11, 2)


# Nothing is forgotten


def agreed(project: Project) -> float:
    """Return what the dataset spent, on which all attempts' files, `spent_usd` and both histories agree."""
    storage = project.open("any").storage
    books = sum(
        cost for r in list_runs(storage, "notes") for a in read_attempts(r.run) for cost in a.values("cost_usd")
    )
    rollup = rolled_up(storage, project.dataset)
    days, months = history(rollup, "day"), history(rollup, "month")
    assert sum(day.figures.spent_usd or 0 for day in days) == pytest.approx(books)
    assert sum(month.figures.spent_usd or 0 for month in months) == pytest.approx(books)
    assert spent(project) == pytest.approx(books)
    return float(books)


def kill_an_attempt(run: Run, cost_usd: float) -> None:
    """Leave behind what a killed worker does: a file that says `running`."""
    put_attempt(run, cost_usd, datetime.now(UTC), attempt=1, state="running", plan_id=run.plan().plan_id)


def test_money_of_a_killed_a_cleared_and_a_repeated_run_is_never_forgotten(project: Project) -> None:
    project.put(1, "apple")
    project.put(2, "zebra")

    run = project.take("one")
    plan(run, project.connections)
    kill_an_attempt(run, 0.5)
    assert run.read("summary.json", Summary) is None
    assert agreed(project) == 0.5

    # cleared: all steps go again under the same id
    cleared = project.run("one")
    assert cleared.cost_usd == pytest.approx(agreed(project))
    assert cleared.earlier_plans_usd == 0.5
    first = agreed(project)
    assert first > 0.5

    # repeated with another text, and again with none
    project.put(1, "a tiger in the storm")
    repeated = project.run("one")
    assert repeated.tagged == 1
    assert repeated.cost_usd == pytest.approx(agreed(project))
    assert agreed(project) > first
    again = project.run("one")
    assert (again.tagged, again.cost_usd, again.earlier_plans_usd) == (0, repeated.cost_usd, repeated.cost_usd)

    # killed, and never run again
    other = project.take("two")
    plan(other, project.connections)
    kill_an_attempt(other, 0.25)
    assert agreed(project) == pytest.approx((again.cost_usd or 0) + 0.25)
    assert spent(project, but_run="one") == 0.25


def test_money_of_an_attempt_at_work_counts_as_far_as_it_is_written(project: Project) -> None:
    run = project.open("one")
    with Ledger(run, "plan", 1, Price(input=1.0, output=10.0)) as books:
        assert spent(project) == 0
        books.spend("k", "1", Usage(input=1_000_000))
    assert agreed(project) == 1.0


run_ids = (f"random-{number}" for number in count())
# in the past: no attempt ends after its file was written
instants = st.datetimes(datetime(2025, 10, 30), datetime(2025, 12, 2), timezones=st.just(UTC))
some_runs = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(st.none() | st.floats(0, 5), instants), max_size=3)), max_size=4
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_runs, instants, instants)
def test_spent_is_the_sum_over_the_attempts_that_ended_in_between(
    project: Project,
    runs: list[tuple[bool, list[tuple[float | None, datetime]]]],
    start: datetime,
    end: datetime,
) -> None:
    name = next(run_ids).replace("-", "_")
    for number, (is_reported, attempts) in enumerate(runs):
        run = Run(project.open("any").storage, name, f"run-{number}")
        for attempt, (cost, at) in enumerate(attempts, 1):
            put_attempt(run, cost, at, attempt=attempt)
        if is_reported:
            counted = next((r for r in list_runs(run.storage, name) if r.run.run_id == run.run_id), None)
            spends = [spend.model_dump(mode="json") for spend in counted.spends([])] if counted else []
            run.storage.put(f"{run.files}summary.json", json.dumps({"attempts": spends}).encode())

    expected = sum(cost or 0 for _, attempts in runs for cost, at in attempts if start <= at < end)
    assert spent_usd(project.open("any").storage, name, start, end) == pytest.approx(expected)
