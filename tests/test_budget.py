"""The budget at the plan: a run that would cost more than its own or the month's limit stops before its first call."""

from __future__ import annotations

import logging
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from tagger.budget import month_of
from tagger.exceptions import BUDGET_REACHED, RunFailed
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.runs import Plan, Run
from tagger.tag import tag
from tagger.window import Options
from tests.databases import make_project, put_rows
from tests.project import Project


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def put_texts(project: Project, *numbers: int) -> None:
    put_rows(project, {number: f"apple {number}" for number in numbers})


def limited(project: Project, amount: float | None, name: str = "max_cost_usd") -> None:
    project.change(limits={name: amount})


def take(project: Project, **options: Any) -> Run:
    return project.take(all_rows=True, options=Options(**options))


def estimated(project: Project) -> float:
    """Returns the estimate of a run over all rows."""
    planned = plan(take(project, dry_run=True), project.connections)
    assert planned.estimated_usd
    return planned.estimated_usd


def refusal(run: Run, project: Project) -> str:
    """Returns why the plan of a run is refused."""
    planned = plan(run, project.connections)
    assert planned.problem is not None and planned.shards == []
    return planned.problem


def test_a_plan_beyond_the_limit_stops_before_the_first_call(project: Project) -> None:
    put_texts(project, *range(20))
    amount = estimated(project) / 20  # like $1 under a cap of $0.05
    limited(project, amount)
    run = take(project)

    told = refusal(run, project)

    assert told.startswith(BUDGET_REACHED)
    assert "20 new texts" in told and f"`limits.max_cost_usd` leaves this run ${amount:.4f}" in told
    assert "Raise `limits.max_cost_usd`" in told and "--max-cost-usd" in told
    load_back(run, project.connections)
    assert (project.llm.calls, project.target()) == ([], {})
    with pytest.raises(RunFailed, match=BUDGET_REACHED):
        report(run)
    summary = project.summary(run)
    assert (summary.texts, summary.skipped, summary.cost_usd) == (20, 20, 0.0)


def test_what_the_refusal_names_as_a_limit_fits(project: Project) -> None:
    put_texts(project, *range(20))
    limited(project, estimated(project) * 0.52)

    told = refusal(take(project), project)

    [number] = set(re.findall(r"(?:limit`|--limit) (\d+)", told))
    planned = plan(take(project, limit=int(number)), project.connections)
    assert sum(shard.texts for shard in planned.shards) == int(number) == 10


def test_a_limit_that_holds_not_even_one_text_names_no_number(project: Project) -> None:
    put_texts(project, 1, 2)
    limited(project, estimated(project) / 100)

    assert "--limit" not in refusal(take(project), project)


def test_a_plan_within_the_limit_hands_it_on(project: Project) -> None:
    put_texts(project, *range(20))
    amount = estimated(project) * 1.01
    limited(project, amount)

    planned = plan(take(project), project.connections)

    assert (planned.budget_usd, len(planned.shards)) == (amount, 1)


def test_without_a_limit_there_is_no_budget(project: Project) -> None:
    put_texts(project, 1)

    assert plan(take(project), project.connections).budget_usd is None


def test_one_run_may_be_given_a_limit_of_its_own(project: Project) -> None:
    put_texts(project, *range(20))
    amount = estimated(project)
    limited(project, amount / 10)

    planned = plan(take(project, max_cost_usd=amount * 2), project.connections)

    assert planned.budget_usd == amount * 2


def test_a_dry_run_says_so_and_goes_on(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    put_texts(project, *range(20))
    limited(project, estimated(project) / 10)

    with caplog.at_level(logging.INFO, "tagger.plan"):
        planned = plan(take(project, dry_run=True), project.connections)

    assert (planned.new, planned.problem) == (20, None)
    assert any(record.getMessage().startswith(f"plan: {BUDGET_REACHED}") for record in caplog.records)


def test_cached_texts_cost_nothing_under_any_limit(project: Project) -> None:
    put_texts(project, *range(5))
    project.run()
    limited(project, 1e-9)

    assert plan(take(project), project.connections).new == 0


def test_a_run_planned_again_may_spend_what_its_earlier_attempts_left(project: Project) -> None:
    put_texts(project, *range(10))
    project.run()  # so that the estimate is right
    put_texts(project, *range(10, 30))
    each = estimated(project) / 20
    limited(project, each * 25)
    run = take(project)
    tag(run, plan(run, project.connections).shards[0].shard, project.connections)
    put_texts(project, *range(30, 40))

    project.take(run.run_id, all_rows=True)

    told = refusal(run, project)
    assert "10 new texts" in told
    [left] = re.findall(r"leaves this run \$([0-9.]+):", told)
    assert float(left) == pytest.approx(each * 5, rel=0.1)


def test_texts_that_a_refused_plan_would_ask_again_keep_their_records(project: Project) -> None:
    put_texts(project, 1)
    project.llm.refusals = 1
    project.run()
    limited(project, 1e-9)

    refusal(take(project, retry_refused=True), project)

    limited(project, None)
    assert plan(take(project), project.connections).cached == 1


# What becomes of the rows of a plan beyond the limit


WINDOW_END = datetime(2026, 11, 22, tzinfo=UTC)


def changed_rows(project: Project, texts: dict[int, str], at: str = "2026-11-21 12:00:00") -> None:
    put_rows(project, texts, at)
    project.change(source={"updated_at": "updated_at"})


def failing_run(project: Project, **selection: Any) -> None:
    with pytest.raises(RunFailed, match=BUDGET_REACHED):
        project.run(**selection)


def test_rows_of_a_window_are_taken_by_the_run_that_can_afford_them(project: Project) -> None:
    changed_rows(project, {1: "apple", 2: "pear"})
    limited(project, 1e-9)

    failing_run(project, end=WINDOW_END)

    assert {row.status for row in project.target().values()} == {"skipped"}
    failing_run(project, end=WINDOW_END + timedelta(days=30))
    limited(project, None)
    summary = project.run(end=WINDOW_END + timedelta(days=60))
    assert (summary.tagged, {row.status for row in project.target().values()}) == (2, {"tagged"})


def test_a_changed_text_keeps_its_tags_until_a_run_can_afford_it(project: Project) -> None:
    changed_rows(project, {1: "apple", 2: "pear"})
    project.run(end=WINDOW_END)
    project.put(1, "zebra", "2026-11-21 13:00:00")
    limited(project, 1e-9)

    failing_run(project, end=WINDOW_END)

    assert {row_id: (row.status, row.tags) for row_id, row in project.target().items()} == {
        1: ("skipped", ["fruit"]),
        2: ("tagged", []),
    }


def test_what_is_cached_is_loaded_beside_a_plan_beyond_the_limit(project: Project) -> None:
    changed_rows(project, {1: "apple"})
    project.run(end=WINDOW_END)
    changed_rows(project, {2: "apple", 3: "pear"})
    limited(project, 1e-9)

    failing_run(project, end=WINDOW_END)

    assert {row_id: row.status for row_id, row in project.target().items()} == {1: "tagged", 2: "tagged", 3: "skipped"}


@pytest.mark.parametrize(
    "selection",
    [{"all_rows": True}, {"day": date(2026, 11, 21)}, {"end": WINDOW_END, "kind": "backfill"}],
    ids=["all", "day", "backfill"],
)
def test_a_run_of_rows_that_were_out_of_sight_makes_no_later_run_too_dear(
    project: Project, selection: dict[str, Any]
) -> None:
    changed_rows(project, {1: "apple", 2: "pear"})
    limited(project, 1e-9)

    failing_run(project, **selection)

    assert project.target() == {}
    assert project.run(end=WINDOW_END + timedelta(days=30)).texts == 0


@pytest.mark.parametrize("rollout", [None, {"texts_per_run": 1}])
def test_rows_of_an_older_spec_stay_tagged(project: Project, rollout: dict[str, int] | None) -> None:
    changed_rows(project, {1: "apple", 2: "pear"})
    project.run(end=WINDOW_END)
    project.change(revision=2, rollout=rollout)
    limited(project, 1e-9)

    failing_run(project, end=WINDOW_END)

    assert {row.status for row in project.target().values()} == {"tagged"}


# The month


def spent_before(project: Project) -> float:
    """Lets an earlier run of this month spend something, and returns how much."""
    put_texts(project, *range(100, 120))
    summary = project.run()
    assert summary.cost_usd
    return summary.cost_usd


def test_the_month_counts_what_other_runs_spent(project: Project) -> None:
    spent = spent_before(project)
    put_texts(project, *range(20))
    limited(project, spent * 1.5, "max_cost_usd_per_month")

    told = refusal(take(project), project)

    assert f"`limits.max_cost_usd_per_month` leaves this run ${spent / 2:.4f}" in told
    assert "--max-cost-usd" not in told


def test_the_budget_is_the_least_of_both_limits(project: Project) -> None:
    spent = spent_before(project)
    put_texts(project, 1)
    limited(project, spent * 3, "max_cost_usd_per_month")

    budgets = []
    for of_run in (spent, spent * 5):
        limited(project, of_run)
        budgets.append(plan(take(project), project.connections).budget_usd)

    assert budgets == [spent, pytest.approx(spent * 2)]


def test_last_months_money_does_not_count(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = spent_before(project)
    put_texts(project, 1)
    limited(project, spent, "max_cost_usd_per_month")
    now = datetime.now(UTC)
    next_month = now.replace(year=now.year + now.month // 12, month=now.month % 12 + 1, day=2)
    monkeypatch.setattr("tagger.budget.utc_now", lambda: next_month)

    assert plan(take(project), project.connections).budget_usd == spent


def test_what_this_run_spent_is_not_counted_twice(project: Project) -> None:
    put_texts(project, *range(10))
    amount = estimated(project) * 3
    limited(project, amount, "max_cost_usd_per_month")
    run = take(project)
    tag(run, plan(run, project.connections).shards[0].shard, project.connections)
    put_texts(project, *range(10, 12))

    project.take(run.run_id, all_rows=True)

    assert plan(run, project.connections).budget_usd == pytest.approx(amount)


def test_no_books_are_read_where_nothing_is_new(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    put_texts(project, 1)
    project.run()
    limited(project, 5, "max_cost_usd_per_month")

    def read(*_: object, **__: object) -> float:
        raise AssertionError

    monkeypatch.setattr("tagger.budget.spent_usd", read)

    assert plan(take(project), project.connections).new == 0


@pytest.mark.parametrize(
    ("zone", "now", "start", "end"),
    [
        ("UTC", "2026-07-31T23:59:59+00:00", "2026-07-01T00:00:00+00:00", "2026-08-01T00:00:00+00:00"),
        ("Asia/Tokyo", "2026-07-31T15:00:00+00:00", "2026-07-31T15:00:00+00:00", "2026-08-31T15:00:00+00:00"),
        ("Asia/Tokyo", "2026-07-31T14:59:59+00:00", "2026-06-30T15:00:00+00:00", "2026-07-31T15:00:00+00:00"),
        ("UTC", "2026-12-31T23:00:00+00:00", "2026-12-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00"),
        ("Europe/Berlin", "2026-10-31T12:00:00+00:00", "2026-09-30T22:00:00+00:00", "2026-10-31T23:00:00+00:00"),
    ],
)
def test_a_month_is_one_of_the_datasets_time_zone(project: Project, zone: str, now: str, start: str, end: str) -> None:
    project.change(timezone=zone)

    found = month_of(datetime.fromisoformat(now), project.dataset)

    assert found == (datetime.fromisoformat(start), datetime.fromisoformat(end))


def test_skipped_texts_are_the_first_of_the_next_run(project: Project) -> None:
    put_texts(project, *range(10, 14))
    first = take(project, limit=1)
    tag(first, plan(first, project.connections).shards[0].shard, project.connections)
    load_back(first, project.connections)
    put_texts(project, *range(4))

    run = take(project, limit=3)
    planned: Plan = plan(run, project.connections)
    tag(run, planned.shards[0].shard, project.connections)
    load_back(run, project.connections)

    statuses = {row_id: row.status for row_id, row in project.target().items()}
    assert statuses == dict.fromkeys(range(10, 14), "tagged") | dict.fromkeys(range(4), "skipped")
