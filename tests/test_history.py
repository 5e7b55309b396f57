"""A dataset's history: what its runs did and spent, by day and by month."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.history import Figures, Period, as_csv, as_rows, as_table, history
from tagger.report import Summary
from tagger.rollup import Window, rolled_up
from tagger.runs import Run
from tests.databases import make_project, watch
from tests.project import Project
from tests.test_spend import put_attempt

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def summary(run_id: str, finished_at: datetime, **changes: Any) -> Summary:
    """Return a summary of a run with 10 texts, of which 6 were cached and 4 are new."""
    counts: dict[str, Any] = {"rows": 12, "texts": 10, "cached": 6, "tagged": 2, "refused": 1, "failed": 1}
    nothing = dict.fromkeys(("blank", "skipped", "pending", "llm_requests"), 0)
    tokens = dict.fromkeys(("input_tokens", "cached_input_tokens", "output_tokens"), 0)
    about = {"dataset": "notes", "run_id": run_id, "day": "2026-11-30", "window": Window(start=None, end=None)}
    about |= {"spec_id": "0123456789ab", "model": "gpt-5-mini", "mode": "online", "state": "success", "reason": None}
    money = {"estimated_usd": 0.5, "cost_usd": 77.0, "saved_usd": 2.0, "saved_by_duplicates_usd": 0.25}
    times: dict[str, Any] = {"started_at": finished_at, "finished_at": finished_at, "seconds": {}}
    fields = nothing | tokens | about | counts | money | times | {"tags": {}, "errors": {}} | changes
    return Summary.model_validate(fields)


def put_run(project: Project, run_id: str, ended_at: datetime, *costs: float | None, **changes: Any) -> Run:
    """Leave a run whose attempts ended a minute before its summary."""
    run = project.open(run_id)
    for shard, cost in enumerate(costs, 1):
        put_attempt(run, cost, ended_at - timedelta(minutes=1), shard=shard)
    run.write("summary.json", summary(run_id, ended_at, **changes))
    return run


def by(project: Project, kind: Any) -> dict[str, Figures]:
    periods = history(rolled_up(project.open("any").storage, project.dataset), kind)
    assert {period.dataset for period in periods} <= {"notes"}
    assert list(periods) == sorted(periods)
    return {period.period: period.figures for period in periods}


def test_runs_are_summed_up_by_day_and_by_month(project: Project) -> None:
    put_run(project, "c", NOON, 1.0, 10.0)
    put_run(project, "b", NOON - timedelta(hours=6), 100.0)
    put_run(project, "a", NOON + timedelta(days=1), 1000.0)

    days, months = by(project, "day"), by(project, "month")

    assert list(days) == ["2026-11-30", "2026-12-01"]
    assert list(months) == ["2026-11", "2026-12"]
    assert days["2026-11-30"] == months["2026-11"]
    assert asdict(days["2026-11-30"]) == {
        "runs": 2,
        **{"texts": 20, "cached": 12, "tagged": 4, "refused": 2, "failed": 2, "skipped": 0, "pending": 0},
        **{"requests": 6, "input_tokens": 270, "cached_input_tokens": 30, "output_tokens": 30},
        **{"spent_usd": 111.0, "total_saved_usd": 4.5, "estimated_usd": 1.0},
    }
    assert (days["2026-12-01"].runs, days["2026-12-01"].spent_usd) == (1, 1000.0)


@pytest.mark.parametrize(
    ("zone", "day", "month"), [("UTC", "2026-11-30", "2026-11"), ("Asia/Tokyo", "2026-12-01", "2026-12")]
)
def test_days_are_those_of_the_datasets_zone(project: Project, zone: str, day: str, month: str) -> None:
    project.change(timezone=zone)
    put_run(project, "one", datetime(2026, 11, 30, 16, tzinfo=UTC), 1.0)

    assert list(by(project, "day")) == [day]
    assert list(by(project, "month")) == [month]


def test_money_belongs_to_the_day_on_which_the_attempt_ended(project: Project) -> None:
    put_run(project, "one", datetime(2026, 12, 1, 0, 0, 30, tzinfo=UTC), 1.0)
    put_attempt(project.open("one"), 10.0, NOON, attempt=2)

    days = by(project, "day")

    assert {day: (f.runs, f.texts, f.requests, f.spent_usd) for day, f in days.items()} == {
        "2026-11-30": (0, 0, 4, 11.0),
        "2026-12-01": (1, 10, 0, 0.0),
    }


def test_a_killed_run_counts_with_its_last_attempt(project: Project) -> None:
    put_attempt(project.open("one"), 1.0, NOON, state="running")
    put_attempt(project.open("one"), 10.0, NOON + timedelta(days=1), attempt=2, state="running")

    days = by(project, "day")

    assert {day: (f.runs, f.texts, f.spent_usd) for day, f in days.items()} == {
        "2026-11-30": (0, 0, 1.0),
        "2026-12-01": (1, 0, 10.0),
    }


def test_a_dry_run_did_nothing_but_what_was_spent_under_its_id(project: Project) -> None:
    put_run(project, "dry", NOON, dry_run=True)
    put_run(project, "dry-again", NOON, 1.0, dry_run=True)

    assert by(project, "day") == {
        "2026-11-30": Figures(
            runs=1, requests=2, input_tokens=90, cached_input_tokens=10, output_tokens=10, spent_usd=1.0
        )
    }


def test_what_is_not_known_does_not_become_nothing(project: Project) -> None:
    put_run(project, "one", NOON, 1.0, None)
    put_run(project, "two", NOON - timedelta(days=1), 1.0, saved_by_duplicates_usd=None)
    put_run(project, "three", NOON - timedelta(days=2), 1.0, estimated_usd=None)

    days, month = by(project, "day"), by(project, "month")["2026-11"]

    def money(figures: Figures) -> tuple[float | None, ...]:
        return figures.spent_usd, figures.total_saved_usd, figures.estimated_usd

    assert [money(figures) for figures in days.values()] == [(1.0, 2.25, None), (1.0, None, 0.5), (None, 2.25, 0.5)]
    assert money(month) == (None, None, None)


def test_a_dataset_without_runs_has_no_history(project: Project) -> None:
    assert by(project, "day") == {}


def test_a_real_run_is_in_the_history_as_its_summary_tells(project: Project) -> None:
    project.put(1, "apple")
    project.put(2, "apple")
    project.put(3, "zebra")
    told = project.run("one")

    [figures] = by(project, "day").values()

    names = ("texts", "cached", "tagged", "refused", "failed", "skipped", "pending", "total_saved_usd")
    assert {name: getattr(figures, name) for name in names} == {name: getattr(told, name) for name in names}
    assert figures.estimated_usd == told.estimated_usd
    assert figures.requests == told.llm_requests
    assert figures.spent_usd == pytest.approx(told.cost_usd)
    assert (told.saved_by_duplicates_usd or 0) > 0


def test_a_run_that_its_summary_counts_takes_one_request(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")
    requests = watch(project.open("any").storage)

    by(project, "month")

    assert requests.counts == {"ListObjectsV2": 1, "GetObject": 1}


names = (f"notes_{number}" for number in count())
instants = st.datetimes(datetime(2025, 12, 30), datetime(2026, 2, 3), timezones=st.just(UTC))
money = st.none() | st.floats(0, 5) | st.floats(0, 5) | st.floats(0, 5)
texts = st.fixed_dictionaries(
    {name: st.integers(0, 99) for name in ("cached", "tagged", "refused", "failed", "pending")}
)
finished = st.none() | st.tuples(instants, texts, money)
some_runs = st.lists(st.tuples(st.lists(st.tuples(money, instants), max_size=3), finished), max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_runs, st.sampled_from(["UTC", "Asia/Tokyo", "America/St_Johns"]))
def test_days_and_months_add_up_to_all_attempts_and_all_texts(
    project: Project,
    runs: list[tuple[list[tuple[float | None, datetime]], tuple[datetime, dict[str, int], float | None] | None]],
    zone: str,
) -> None:
    name = next(names)
    project.change(timezone=zone, dataset=name)
    storage = project.open("any").storage
    for number, (attempts, end) in enumerate(runs):
        run = Run(storage, name, f"run-{number}")
        for attempt, (cost, at) in enumerate(attempts, 1):
            put_attempt(run, cost, at, attempt=attempt)
        if end is not None:
            at, counts, saved = end
            run.write("summary.json", summary(run.run_id, at, **counts, texts=sum(counts.values()), saved_usd=saved))

    rollup = rolled_up(storage, project.dataset)
    days, months = (history(rollup, kind) for kind in ("day", "month"))

    costs = [cost for attempts, _ in runs for cost, _ in attempts]
    ends = [end for _, end in runs if end is not None]
    for periods in (days, months):
        total = sum((period.figures for period in periods), Figures())
        assert total.runs == sum(bool(attempts) or end is not None for attempts, end in runs)
        assert total.texts == sum(sum(counts.values()) for _, counts, _ in ends)
        assert total.texts == total.cached + total.tagged + total.refused + total.failed + total.skipped + total.pending
        assert total.requests == 2 * len(costs)
        assert total.spent_usd == (None if None in costs else pytest.approx(sum(cost or 0 for cost in costs)))
        savings = [saved for _, _, saved in ends]
        expected = None if None in savings else sum((saved or 0) + 0.25 for saved in savings)
        assert total.total_saved_usd == (None if expected is None else pytest.approx(expected))
    for month in months:
        of_month = [day.figures for day in days if day.period.startswith(month.period)]
        assert sum(of_month, Figures()).runs == month.figures.runs
        assert sum(of_month, Figures()).texts == month.figures.texts


# Forms

SOME = [
    Period("notes", "2026-11-29", Figures(runs=1)),
    Period(
        "notes",
        "2026-11-30",
        Figures(
            runs=2,
            texts=12_345,
            cached=12_000,
            tagged=345,
            requests=350,
            input_tokens=90_000,
            output_tokens=10_000,
            spent_usd=None,
            total_saved_usd=1234.5,
            estimated_usd=0.4,
        ),
    ),
]


def test_a_table_is_aligned() -> None:
    assert as_table(SOME, "day") == [
        "dataset  day         runs   texts  cached  tagged  refused  failed  skipped  pending  requests"
        "   tokens    spent      saved  estimated",
        "notes    2026-11-29     1       0       0       0        0       0        0        0         0"
        "        0    $0.00      $0.00      $0.00",
        "notes    2026-11-30     2  12,345  12,000     345        0       0        0        0       350"
        "  100,000  unknown  $1,234.50    $0.4000",
    ]


def test_rows_and_csv_hold_the_same() -> None:
    names = ["dataset", "month", *(field.name for field in fields(Figures))]

    rows = as_rows(SOME, "month")
    read = list(csv.DictReader(io.StringIO(as_csv(SOME, "month"))))

    assert [list(row) for row in rows] == [names, names]
    assert [list(row) for row in read] == [names, names]
    assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert json.loads(json.dumps(rows))[1]["spent_usd"] is None
    assert as_csv([], "day").splitlines() == [",".join(["dataset", "day", *names[2:]])]
