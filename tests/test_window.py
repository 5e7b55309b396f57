"""Today's rows: which rows each kind of run takes, and that consecutive runs leave no gap."""

from __future__ import annotations

from bisect import bisect_left
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pendulum
import pytest
from airflow.timetables.base import TimeRestriction
from airflow.timetables.trigger import CronTriggerTimetable
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.exceptions import InputError
from tagger.window import Selection, previous_firing, select_rows
from tests.project import MINIMAL, merged

TOKYO = ZoneInfo("Asia/Tokyo")
NEW_YORK = ZoneInfo("America/New_York")
ONE_HOUR = timedelta(hours=1)
ONE_DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)

ZONES = ["UTC", "Asia/Tokyo", "America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "America/Santiago"]
CRONS = [
    "0 1 * * *",
    "0 0 * * *",
    "30 1 * * *",
    "0 2 * * *",
    "30 2 * * *",
    "30 23 * * *",
    "0 6 * * 1-5",
    "30 1 * * 0",
    "30 2 * * 0",
    "45 1 * * 0",
    "30 23 * * 6",
    "0 0 * * 0",
    "0 0 1 * *",
    "0 */12 * * *",
]


def dataset(schedule: Any = "0 1 * * *", zone: str = "UTC", **source: Any) -> Dataset:
    changes = {"schedule": schedule, "timezone": zone, "source": {"updated_at": "updated_at", **source}}
    return parse_dataset(merged(MINIMAL, changes), "notes.yaml")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def window(start: datetime, end: datetime) -> Selection:
    return Selection(rows="window", start=start, end=end, unfinished=True)


@cache
def firings(cron: str, zone: str) -> list[datetime]:
    """Return a schedule's firings in 2026, as Airflow computes them."""
    timetable = CronTriggerTimetable(cron, timezone=zone)
    year = TimeRestriction(earliest=pendulum.datetime(2026, 1, 1), latest=pendulum.datetime(2027, 1, 1), catchup=True)
    found: list[datetime] = []
    last = None
    while info := timetable.next_dagrun_info(last_automated_data_interval=last, restriction=year):
        assert info.logical_date is not None
        found.append(datetime.fromisoformat(info.logical_date.isoformat()))
        last = info.data_interval
    return found


# which rows each kind of run takes

DAILY = {"schedule": "0 1 * * *", "zone": "Asia/Tokyo"}
WEEKDAYS = {"schedule": "0 6 * * 1-5"}
ALL = ("all", None, None, True)

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, str | None, str | None, bool]]] = {
    # dataset, run, (rows, start, end, unfinished too); 2026-11-22 is a Sunday
    "daily": (DAILY, {"end": "2026-11-21T16:00"}, ("window", "2026-11-19T16:00", "2026-11-21T16:00", True)),
    "daily, without lookback": (
        {**DAILY, "lookback": "0s"},
        {"end": "2026-11-21T16:00"},
        ("window", "2026-11-20T16:00", "2026-11-21T16:00", True),
    ),
    "daily, by hand at noon": (
        {**DAILY, "lookback": "0s"},
        {"end": "2026-11-22T03:00"},
        ("window", "2026-11-21T03:00", "2026-11-22T03:00", True),
    ),
    "weekdays, Tuesday": (
        WEEKDAYS,
        {"end": "2026-11-24T06:00"},
        ("window", "2026-11-22T06:00", "2026-11-24T06:00", True),
    ),
    "weekdays, Monday": (
        WEEKDAYS,
        {"end": "2026-11-23T06:00"},
        ("window", "2026-11-19T06:00", "2026-11-23T06:00", True),
    ),
    "weekdays, by hand on Sunday": (
        WEEKDAYS,
        {"end": "2026-11-22T12:00"},
        ("window", "2026-11-19T06:00", "2026-11-22T12:00", True),
    ),
    "hourly": (
        {"schedule": "15 * * * *", "lookback": "2h"},
        {"end": "2026-11-22T10:15"},
        ("window", "2026-11-21T08:15", "2026-11-22T10:15", True),
    ),
    "weekly": (
        {"schedule": "0 3 * * 0", "lookback": "0s"},
        {"end": "2026-11-22T03:00"},
        ("window", "2026-11-15T03:00", "2026-11-22T03:00", True),
    ),
    "weekly, by hand in the week": (
        {"schedule": "0 3 * * 0", "lookback": "0s"},
        {"end": "2026-11-25T09:30"},
        ("window", "2026-11-22T03:00", "2026-11-25T09:30", True),
    ),
    "on demand": (
        {"schedule": None},
        {"end": "2026-11-22T10:00"},
        ("window", "2026-11-20T10:00", "2026-11-22T10:00", True),
    ),
    "on assets": (
        {"schedule": {"assets": ["s3://a/b"]}, "lookback": "0s"},
        {"end": "2026-11-22T10:00"},
        ("window", "2026-11-21T10:00", "2026-11-22T10:00", True),
    ),
    "on assets, having waited": (
        {"schedule": {"assets": ["s3://a/b"]}, "lookback": "0s"},
        {"end": "2026-11-22T10:00", "waited_until": "2026-11-22T14:00"},
        ("window", "2026-11-21T10:00", "2026-11-22T14:00", True),
    ),
    "backfill, daily": (
        DAILY,
        {"end": "2026-11-21T16:00", "kind": "backfill"},
        ("window", "2026-11-20T16:00", "2026-11-21T16:00", False),
    ),
    "backfill, weekdays, Monday": (
        WEEKDAYS,
        {"end": "2026-11-23T06:00", "kind": "backfill"},
        ("window", "2026-11-20T06:00", "2026-11-23T06:00", False),
    ),
    "a day": (
        DAILY,
        {"end": "2026-11-22T03:00", "day": date(2026, 11, 20)},
        ("day", "2026-11-19T15:00", "2026-11-20T15:00", False),
    ),
    "a day, with lookback and another zone of the source": (
        {**DAILY, "lookback": "7d", "timezone": "UTC"},
        {"end": "2026-11-22T03:00", "day": date(2026, 11, 20)},
        ("day", "2026-11-19T15:00", "2026-11-20T15:00", False),
    ),
    "a day of 23 hours": (
        {"zone": "America/New_York"},
        {"end": "2026-11-22T03:00", "day": date(2026, 3, 8)},
        ("day", "2026-03-08T05:00", "2026-03-09T04:00", False),
    ),
    "a day of 25 hours": (
        {"zone": "America/New_York"},
        {"end": "2026-11-22T03:00", "day": date(2026, 11, 1)},
        ("day", "2026-11-01T04:00", "2026-11-02T05:00", False),
    ),
    "a day that begins at one o'clock": (
        {"zone": "America/Santiago"},
        {"end": "2026-11-22T03:00", "day": date(2026, 9, 6)},
        ("day", "2026-09-06T04:00", "2026-09-07T03:00", False),
    ),
    "all": (DAILY, {"end": "2026-11-22T03:00", "all_rows": True}, ALL),
    "without updated_at": ({"updated_at": None}, {"end": "2026-11-22T03:00"}, ALL),
    "without updated_at, all": ({"updated_at": None}, {"end": "2026-11-22T03:00", "all_rows": True}, ALL),
    "backfill, all": (
        DAILY,
        {"end": "2026-11-22T03:00", "kind": "backfill", "all_rows": True},
        ("all", None, None, False),
    ),
}


@pytest.mark.parametrize(("about", "run", "expected"), RUNS.values(), ids=RUNS.keys())
def test_rows_that_a_run_takes(
    about: dict[str, Any], run: dict[str, Any], expected: tuple[str, str | None, str | None, bool]
) -> None:
    instants: dict[str, Any] = {name: utc(run[name]) for name in ("end", "waited_until") if name in run}
    selection = select_rows(dataset(**about), **{**run, **instants})

    rows, start, end, unfinished = expected
    assert (selection.rows, selection.unfinished) == (rows, unfinished)
    assert selection.start == (utc(start) if start else None)
    assert selection.end == (utc(end) if end else None)


def test_window_is_half_open() -> None:
    taken = window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00"))

    assert not taken.takes(utc("2026-11-20T16:00") - MICROSECOND, TOKYO)
    assert taken.takes(utc("2026-11-20T16:00"), TOKYO)
    assert taken.takes(utc("2026-11-21T16:00") - MICROSECOND, TOKYO)
    assert not taken.takes(utc("2026-11-21T16:00"), TOKYO)


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("2026-11-21T00:59:59", False),
        ("2026-11-21T01:00:00", True),
        ("2026-11-22T00:59:59", True),
        ("2026-11-22T01:00:00", False),
        ("2026-11-20T16:00:00+00:00", True),
        ("2026-11-22T01:00:00+09:00", False),
        ("2026-11-21T11:00:00-05:00", False),
        ("2026-11-21T10:59:59-05:00", True),
    ],
)
def test_naive_times_are_of_the_given_zone_and_others_of_their_own(written: str, taken: bool) -> None:
    selection = window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00"))

    assert selection.takes(datetime.fromisoformat(written), TOKYO) is taken


@pytest.mark.parametrize(
    ("day", "taken"),
    [(date(2026, 11, 20), False), (date(2026, 11, 21), True), (date(2026, 11, 22), True), (date(2026, 11, 23), False)],
)
def test_a_date_is_taken_where_a_moment_of_it_is_in_the_window(day: date, taken: bool) -> None:
    selection = window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00"))  # 01:00 to 01:00 in Tokyo
    first, after = selection.date_bounds(TOKYO)

    assert selection.takes(day, TOKYO) is taken
    assert (first <= day < after) is taken


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("sentinel", [datetime.min, datetime.max, datetime.min.replace(tzinfo=UTC), date.min, date.max])
def test_the_first_and_the_last_time_there_is_are_times_like_others(sentinel: date, zone: str) -> None:
    assert not window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00")).takes(sentinel, ZoneInfo(zone))


def test_a_date_is_not_taken_where_the_window_ends_as_it_begins() -> None:
    selection = window(utc("2026-11-20T15:00"), utc("2026-11-21T15:00"))  # a day in Tokyo

    assert selection.date_bounds(TOKYO) == (date(2026, 11, 21), date(2026, 11, 22))
    assert [selection.takes(date(2026, 11, day), TOKYO) for day in (20, 21, 22)] == [False, True, False]


@pytest.mark.parametrize("selection", ["window", "day", "all"])
def test_rows_without_a_time_are_always_taken(selection: str) -> None:
    taken = select_rows(
        dataset(),
        end=utc("2026-11-22T03:00"),
        day=date(2026, 11, 20) if selection == "day" else None,
        all_rows=selection == "all",
    )

    assert taken.rows == selection
    assert taken.takes(None, TOKYO)


@pytest.mark.parametrize("value", [utc("1970-01-01"), datetime(1970, 1, 1), date(2999, 1, 1)])
def test_all_rows_are_all_rows(value: date) -> None:
    assert Selection(rows="all", unfinished=True).takes(value, TOKYO)


def test_selection_is_described_in_the_zone_of_the_dataset() -> None:
    taken = window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00"))

    assert taken.describe(TOKYO) == "2026-11-21 01:00 to 2026-11-22 01:00, and rows not finished before"
    assert Selection(rows="all", unfinished=True).describe(TOKYO) == "all rows"


def test_selection_survives_being_written() -> None:
    taken = select_rows(dataset(zone="Asia/Tokyo"), end=utc("2026-11-21T16:00"))

    assert Selection.model_validate_json(taken.model_dump_json()) == taken


def test_a_lookback_of_a_century_is_possible() -> None:
    taken = select_rows(dataset(lookback="36500d"), end=utc("2026-11-22T01:00"))

    assert taken.start == utc("2026-11-21T01:00") - timedelta(days=36500)


# times as Airflow has them


@pytest.mark.parametrize(
    "end",
    [
        pendulum.datetime(2026, 11, 22, 1, tz="UTC"),
        pendulum.datetime(2026, 11, 22, 10, tz="Asia/Tokyo"),
        pendulum.datetime(2026, 11, 21, 20, tz="America/New_York"),
        datetime(2026, 11, 22, 10, tzinfo=TOKYO),
    ],
    ids=str,
)
def test_end_may_be_of_any_zone_and_of_airflows_own_kind(end: datetime) -> None:
    taken = select_rows(dataset(), end=end)

    assert (taken.start, taken.end) == (utc("2026-11-20T01:00"), utc("2026-11-22T01:00"))
    assert type(taken.start) is type(taken.end) is datetime


def test_pendulum_times_and_dates_of_rows_are_understood() -> None:
    selection = window(utc("2026-11-20T16:00"), utc("2026-11-21T16:00"))

    assert selection.takes(pendulum.datetime(2026, 11, 21, 1, tz="Asia/Tokyo"), TOKYO)
    assert not selection.takes(pendulum.datetime(2026, 11, 22, 1, tz="Asia/Tokyo"), TOKYO)
    assert selection.takes(pendulum.naive(2026, 11, 21, 1), TOKYO)
    assert selection.takes(pendulum.date(2026, 11, 22), TOKYO)
    assert not selection.takes(pendulum.date(2026, 11, 23), TOKYO)


# arguments that exclude each other


@pytest.mark.parametrize(
    ("about", "run", "message"),
    [
        ({}, {"day": date(2026, 11, 20), "kind": "backfill"}, "`target_date` cannot be set in a backfill"),
        ({}, {"day": date(2026, 11, 20), "all_rows": True}, "a day and all rows exclude each other"),
        ({"updated_at": None}, {"day": date(2026, 11, 20)}, "needs `source.updated_at`"),
        ({"updated_at": None}, {"day": date(2026, 11, 20), "all_rows": True}, "exclude each other"),
        ({"updated_at": None}, {"day": date(2026, 11, 20), "kind": "backfill"}, "backfill"),
    ],
)
def test_arguments_that_exclude_each_other(about: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_rows(dataset(**about), end=utc("2026-11-22T03:00"), **run)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("day", [date.min, date.max])
def test_a_day_at_the_end_of_the_calendar_is_wrong_input_or_taken(day: date, zone: str) -> None:
    try:
        assert select_rows(dataset(zone=zone), end=utc("2026-11-22T03:00"), day=day).rows == "day"
    except InputError as e:
        assert str(day) in str(e)


# consecutive runs


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("cron", CRONS)
def test_consecutive_runs_leave_no_gap_and_overlap_by_no_more_than_a_clock_change(cron: str, zone: str) -> None:
    notes = dataset(cron, zone, lookback="0s")
    inexact = 0
    for before, firing in pairwise(firings(cron, zone)):
        start = select_rows(notes, end=firing).start
        needed = min(before, firing - ONE_DAY)
        assert start is not None
        assert needed - ONE_HOUR <= start <= needed, (
            f"the run of {firing} starts at {start}, the one before ended {before}"
        )
        inexact += start < needed
    assert inexact <= 2  # the nights when the clocks change


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("cron", ["15 * * * *", "*/30 * * * *"])
def test_runs_of_every_hour_take_a_day(cron: str, zone: str) -> None:
    notes = dataset(cron, zone, lookback="0s")
    for firing in firings("0 */12 * * *", zone):
        assert select_rows(notes, end=firing).start == firing - ONE_DAY


@pytest.mark.parametrize("zone", ZONES)
def test_consecutive_backfill_runs_leave_no_gap(zone: str) -> None:
    notes = dataset("30 2 * * 1-5", zone)
    for before, firing in pairwise(firings("30 2 * * 1-5", zone)):
        start = select_rows(notes, end=firing, kind="backfill").start
        assert start is not None
        assert start <= before


@pytest.mark.parametrize("zone", ZONES)
def test_days_follow_each_other_without_gap_or_overlap(zone: str) -> None:
    first = date(2026, 1, 1)
    days = [
        select_rows(dataset(zone=zone), end=utc("2026-12-31T00:00"), day=first + timedelta(days=n)) for n in range(365)
    ]

    assert all(one.end == following.start for one, following in pairwise(days))


instants = st.datetimes(datetime(2026, 1, 10), datetime(2026, 12, 30)).map(lambda naive: naive.replace(tzinfo=UTC))
near_clock_changes = st.builds(
    lambda change, seconds: utc(change) + timedelta(seconds=seconds),
    st.sampled_from(
        [
            "2026-03-08T07:00",  # New York forward
            "2026-11-01T06:00",  # New York back
            "2026-03-29T01:00",  # Berlin forward
            "2026-10-25T01:00",  # Berlin back
            "2026-10-03T15:30",  # Lord Howe forward by half an hour
            "2026-04-04T15:00",  # Lord Howe back
            "2026-09-06T04:00",  # Santiago forward, at midnight
            "2026-04-05T03:00",  # Santiago back
        ]
    ),
    st.integers(-6 * 3600, 6 * 3600),
)


@given(st.sampled_from(["30 1 * * 0", "30 2 * * 0", "0 0 * * 0", "30 23 * * 6"]), st.sampled_from(ZONES), instants)
@settings(deadline=None)
def test_a_run_by_hand_starts_at_the_firing_before_it(cron: str, zone: str, end: datetime) -> None:
    fired = firings(cron, zone)
    position = bisect_left(fired, end)
    if position:
        assert fired[position - 1] - ONE_HOUR <= previous_firing(dataset(cron, zone), end) <= fired[position - 1]


@given(
    st.sampled_from(["30 1 * * 0", "30 2 * * 0", "0 0 * * 0", "30 23 * * 6"]),
    st.sampled_from(ZONES),
    near_clock_changes,
)
@settings(deadline=None)
def test_a_run_by_hand_near_a_clock_change_misses_no_firing(cron: str, zone: str, end: datetime) -> None:
    fired = firings(cron, zone)
    latest = fired[bisect_left(fired, end) - 1]

    assert previous_firing(dataset(cron, zone), end) <= latest


# naive times around the changes of the clocks


@given(
    st.sampled_from(ZONES),
    near_clock_changes | instants,
    st.integers(1, 2 * 86_400),
    st.floats(0, 1, exclude_max=True),
)
@example("America/New_York", utc("2026-11-01T05:30"), 3600, 0.0)
@example("America/New_York", utc("2026-11-01T06:30"), 600, 0.99)
@example("America/New_York", utc("2026-11-01T05:10"), 3600, 0.8)
@example("Australia/Lord_Howe", utc("2026-04-04T14:45"), 1800, 0.5)
@settings(max_examples=400, deadline=None)
def test_a_row_of_the_window_is_taken_though_its_zone_was_not_written(
    name: str, start: datetime, seconds: int, position: float
) -> None:
    zone = ZoneInfo(name)
    taken = window(start, start + timedelta(seconds=seconds))
    changed = start + timedelta(seconds=int(position * seconds))
    written = changed.astimezone(zone).replace(tzinfo=None, fold=0)

    low, high = taken.naive_bounds(zone)
    first, after = taken.date_bounds(zone)
    assert taken.takes(written, zone)
    assert low <= written < high
    assert taken.takes(written.date(), zone)
    assert first <= written.date() < after


@given(st.sampled_from(ZONES), st.datetimes(datetime(2026, 1, 10), datetime(2026, 12, 30)), st.integers(600, 86_400))
@settings(deadline=None)
def test_any_naive_time_even_one_that_the_clocks_skip_is_of_some_window(
    name: str, written: datetime, length: int
) -> None:
    zone = ZoneInfo(name)
    step = timedelta(seconds=length)
    around = written.replace(tzinfo=zone).astimezone(UTC)
    windows = [window(around + n * step - 2 * ONE_HOUR, around + (n + 1) * step - 2 * ONE_HOUR) for n in range(-13, 26)]

    assert any(each.takes(written, zone) for each in windows)
    assert any(low <= written < high for low, high in (each.naive_bounds(zone) for each in windows))


@given(st.sampled_from(["UTC", "Asia/Tokyo"]), instants, st.integers(1, 86_400), st.integers(-86_400, 86_400))
@settings(deadline=None)
def test_where_the_clocks_do_not_change_nothing_else_is_taken(
    name: str, start: datetime, seconds: int, offset: int
) -> None:
    zone = ZoneInfo(name)
    taken = window(start, start + timedelta(seconds=seconds))
    written = (start + timedelta(seconds=offset)).astimezone(zone).replace(tzinfo=None)

    low, high = taken.naive_bounds(zone)
    assert taken.takes(written, zone) == (0 <= offset < seconds) == (low <= written < high)


def test_a_repeated_hour_is_taken_by_both_windows_that_it_may_belong_to() -> None:
    first = window(utc("2026-11-01T05:00"), utc("2026-11-01T06:00"))
    second = window(utc("2026-11-01T06:00"), utc("2026-11-01T07:00"))
    written = datetime(2026, 11, 1, 1, 30)

    for each in (first, second):
        low, high = each.naive_bounds(NEW_YORK)
        assert each.takes(written, NEW_YORK)
        assert low <= written < high
