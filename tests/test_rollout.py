"""A rollout: rows that hold an older spec are tagged again, some in each run, the newest first."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from tagger.load import load_back
from tagger.plan import describe, plan
from tagger.runs import Plan, Run, new_keys_path, read_parquet, writing_parquet
from tagger.spec import spec_id
from tagger.tag import tag
from tagger.window import Options
from tests.databases import make_project, put_rows
from tests.project import Project

OLD = "2020-01-01 00:00:00+00:00"


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def day(number: int) -> str:
    return f"2020-01-{number:02} 00:00:00+00:00"


def old_rows(project: Project, *days: int) -> None:
    """Puts rows 0, 1, 2 ... there, changed on these days of 2020, tags them, and changes the spec."""
    for row_id, number in enumerate(days):
        project.put(row_id, f"apple {row_id}", day(number))
    project.run()
    project.change(revision=2, source={"updated_at": "updated_at"})


def all_rows(project: Project, count: int) -> None:
    """The same without a column that tells when a row changed."""
    put_rows(project, {row_id: f"apple {row_id}" for row_id in range(count)})
    project.run()
    project.change(revision=2)


def rollout(project: Project, count: int) -> None:
    project.change(rollout={"texts_per_run": count})


def retagged(project: Project) -> list[Any]:
    """Returns the rows that hold the present spec."""
    spec = spec_id(project.dataset)
    return [row_id for row_id, row in project.target().items() if row.spec_id == spec]


def taken(run: Run) -> list[Any]:
    return [i for part in read_parquet(run.storage, run.snapshot().rows_file) for i in part.column("id").to_pylist()]


def told(planned: Plan, run: Run) -> str:
    return "\n".join(describe(planned, run.dataset(), run.snapshot()))


# Runs that take a window


def test_a_run_takes_the_newest_rows_of_an_older_spec_besides(either: Project) -> None:
    old_rows(either, 3, 5, 1, 4, 2)
    either.put(9, "zebra", "2020-01-01 00:00:00+00:00")  # not in the target, and not in the window
    rollout(either, 3)

    run = either.take()

    assert taken(run) == [1, 3, 0]


def test_rows_of_the_window_come_first_and_are_not_counted(either: Project) -> None:
    old_rows(either, 3, 5, 1, 4, 2)
    rollout(either, 2)
    now = datetime.now(UTC)
    for row_id in (1, 7):
        either.put(row_id, f"rain {row_id}", str(now - timedelta(minutes=1)))
    either.execute("UPDATE note_tags SET status = 'failed' WHERE row_id = 2")

    assert taken(either.take()) == [2, 1, 7, 3, 0]


def test_a_table_is_tagged_again_over_days(either: Project) -> None:
    old_rows(either, 1, 2, 3, 4, 5)
    rollout(either, 2)
    either.llm.script()
    before = len(either.llm.calls)

    after = []
    for _ in range(4):
        summary = either.run()
        assert summary.state == "success"
        after.append(sorted(retagged(either)))

    assert after == [[3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert len(either.llm.calls) - before == 5
    assert all(row.status == "tagged" and row.tags == ["fruit"] for row in either.target().values())


def test_the_last_of_a_table_are_told(project: Project) -> None:
    old_rows(project, 1, 2, 3, 4, 5)
    rollout(project, 2)

    run = project.take()
    planned = plan(run, project.connections)

    assert planned.why == {"new spec": 2}
    assert "5 of 5 rows hold an older spec; `rollout` tags 2 a run again, which takes 2 more runs" in told(planned, run)


def test_rows_that_are_gone_from_the_source_hold_nothing_up(either: Project) -> None:
    old_rows(either, 1, 2, 3)
    either.execute("DELETE FROM notes WHERE id = 2")
    rollout(either, 2)

    assert taken(either.take()) == [1, 0]


def test_rows_are_looked_up_in_many_queries(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.snapshot.IDS_A_QUERY", 4)
    old_rows(project, *range(1, 20))
    rollout(project, 10)

    assert taken(project.take()) == list(range(18, 8, -1))


@pytest.mark.parametrize("kind", ["backfill", "day"])
def test_a_backfill_and_a_single_day_roll_nothing_out(project: Project, kind: str) -> None:
    old_rows(project, 1, 2, 3)
    rollout(project, 2)

    if kind == "day":
        run = project.take(day=datetime(2020, 1, 2, tzinfo=UTC).date())
    else:
        run = project.take(end=datetime(2020, 1, 2, 12, tzinfo=UTC), kind="backfill")

    assert taken(run) == [1]


def test_a_dry_run_shows_it(project: Project) -> None:
    old_rows(project, 1, 2, 3)
    rollout(project, 2)

    planned = plan(project.take(options=Options(dry_run=True)), project.connections)

    assert (planned.new, planned.why, planned.shards) == (2, {"new spec": 2}, [])
    assert planned.estimate is not None and planned.estimate.texts == 2


def test_all_rows_on_demand_are_all_of_them(project: Project) -> None:
    old_rows(project, 1, 2, 3)
    rollout(project, 1)

    run = project.take(all_rows=True)
    planned = plan(run, project.connections)

    assert (planned.new, planned.deferred) == (3, 0)
    assert "this run takes them all" in told(planned, run)


def test_without_an_older_spec_a_rollout_takes_nothing(project: Project) -> None:
    project.change(source={"updated_at": "updated_at"})
    project.put(0, "apple", OLD)
    project.put(1, "zebra", None)
    rollout(project, 5)

    assert taken(project.take()) == [1]
    project.run()
    assert taken(project.take()) == [1]


def test_what_is_rolled_out_counts_toward_the_budget(project: Project) -> None:
    old_rows(project, 1, 2, 3, 4)
    rollout(project, 3)

    planned = plan(project.take(), project.connections)

    assert planned.estimate is not None and planned.estimate.texts == 3
    assert planned.estimated_usd and planned.estimated_usd > 0


# Runs that take all rows, for want of a column that tells when one changed


def test_texts_that_only_the_spec_makes_new_wait_but_for_the_newest(either: Project) -> None:
    all_rows(either, 6)
    rollout(either, 2)
    either.put(0, "apple, changed")
    either.put(8, "zebra")

    run = either.take()
    planned = plan(run, either.connections)

    assert planned.why == {"new spec": 5, "changed text": 1, "new text": 1}
    assert (planned.new, planned.deferred, [shard.texts for shard in planned.shards]) == (7, 3, [4])
    words = told(planned, run)
    assert "3 texts that only the new spec makes new wait for later runs (`rollout`)" in words
    assert "`rollout` tags 2 a run again, which takes 2 more runs" in words
    either.finish(run)
    assert sorted(retagged(either)) == [0, 4, 5, 8]


def test_what_waits_is_skipped_and_its_rows_stay_as_they_are(either: Project) -> None:
    all_rows(either, 5)
    before = either.target()
    rollout(either, 2)

    summary = either.run()

    assert (summary.texts, summary.tagged, summary.skipped, summary.cached) == (5, 2, 3, 0)
    after = either.target()
    assert [after[i] == before[i] for i in range(5)] == [True, True, True, False, False]


def test_a_whole_table_is_tagged_again_over_days_each_text_once(either: Project) -> None:
    all_rows(either, 7)
    rollout(either, 3)
    before = len(either.llm.calls)

    counts = []
    for _ in range(4):
        summary = either.run()
        counts.append((summary.tagged, summary.cached, summary.skipped))
        assert all(row.status == "tagged" for row in either.target().values())

    assert counts == [(3, 0, 4), (3, 3, 1), (1, 6, 0), (0, 7, 0)]
    assert len(either.llm.calls) - before == 7
    assert sorted(retagged(either)) == list(range(7))


def test_a_text_that_a_new_row_has_does_not_wait(project: Project) -> None:
    all_rows(project, 4)
    rollout(project, 1)
    project.put(9, "apple 0")

    project.run()

    assert sorted(retagged(project)) == [0, 3, 9]


def test_what_a_record_turned_up_for_does_not_wait(project: Project) -> None:
    all_rows(project, 4)
    rollout(project, 1)
    run = project.take()
    planned = plan(run, project.connections)
    project.change(rollout=None)
    other = project.take()
    for shard in plan(other, project.connections).shards:
        tag(other, shard.shard, project.connections)

    loaded = load_back(run, project.connections)

    assert (planned.deferred, loaded.tagged, loaded.skipped) == (3, 4, 0)
    assert sorted(retagged(project)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("limit", "asked"), [(1, [0]), (2, [0, 9]), (3, [0, 3, 9]), (9, [0, 2, 3, 9])])
def test_with_a_limit_texts_that_are_new_otherwise_come_first(project: Project, limit: int, asked: list[int]) -> None:
    all_rows(project, 4)
    rollout(project, 2)
    project.put(0, "zebra")
    project.put(9, "rain")

    project.run(options=Options(limit=limit))

    assert sorted(retagged(project)) == asked
    assert {row.status for row_id, row in project.target().items() if row_id in (1, 2, 3)} == {"tagged"}


def test_an_explicit_run_over_all_rows_leaves_nothing_out(project: Project) -> None:
    all_rows(project, 5)
    rollout(project, 2)

    planned = plan(project.take(all_rows=True), project.connections)

    assert (planned.new, planned.deferred) == (5, 0)


def test_a_backfill_leaves_nothing_out(project: Project) -> None:
    all_rows(project, 5)
    rollout(project, 2)

    assert plan(project.take(kind="backfill"), project.connections).deferred == 0


def test_the_newest_are_found_over_many_groups(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.snapshot.ROWS_A_WRITE", 3)
    put_rows(project, {i: f"apple {i % 10}" for i in range(20)})
    project.run()
    project.change(revision=2)
    rollout(project, 4)

    project.run()

    assert Counter(i % 10 for i in retagged(project)) == {6: 2, 7: 2, 8: 2, 9: 2}


def test_a_plan_of_before_there_were_rollouts_is_loaded(project: Project) -> None:
    put_rows(project, {0: "apple", 1: "zebra"})
    run = project.take()
    planned = plan(run, project.connections)
    keys = [key for part in read_parquet(run.storage, path(run)) for key in part.column("key").to_pylist()]
    with writing_parquet(run.storage, path(run), pa.schema([("key", pa.string())])) as parquet:
        parquet.write({"key": keys})
    tag(run, planned.shards[0].shard, project.connections)

    assert load_back(run, project.connections).tagged == 2


def path(run: Run) -> str:
    return new_keys_path(run, run.plan().plan_id)
