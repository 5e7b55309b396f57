"""Runs of every kind, made in a running Airflow: each takes the rows that `docs/run-kinds.md` says.

What is expected is worked out here on the clock on the wall, without `tagger.window`.
"""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from demo.airflow import APIError, Client
from demo.stand_in import Reply, choose_tags, completion, read_question
from tagger.report import Summary
from tagger.runs import Run, read_parquet
from tagger.storage import Storage
from tagger.tables import new_target
from tagger.window import Selection
from tests.airflow.cluster import Cluster
from tests.databases import redis_connection
from tests.project import merged
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "run-kinds.md"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LOOKBACK = DAY
TOKYO, NEW_YORK = ZoneInfo("Asia/Tokyo"), ZoneInfo("America/New_York")
AUTUMN, SPRING = date(2026, 11, 1), date(2026, 3, 8)
"""The Sundays on which New York's clocks change at 02:00: a day of 25 hours, and one of 23."""

KINDS = ("scheduled", "backfill", "UI trigger", "API trigger", "target_date", "rows: all", "asset trigger")
WITHOUT_TIME, UNFINISHED, FINISHED = 1, {2: "failed", 3: "skipped", 4: "pending"}, (5, 6)
"""Ids of rows. Those of 2020 and without a time are few; any other id tells the hour: hours since 1970."""

MISSING_POOL = "nobody_made_this_pool"


@dataclass(frozen=True)
class Timetable:
    """One dataset by when it runs."""

    name: str
    schedule: str
    zone: ZoneInfo
    hour: int

    @property
    def dag_id(self) -> str:
        return f"tag_{self.name}"

    @property
    def cron(self) -> str:
        return f"0 {self.hour} * * *" if self.schedule == "daily" else f"0 {self.hour} * * 1-5"

    def fires_on(self, day: date) -> bool:
        return self.schedule == "daily" or (self.schedule == "weekdays" and day.weekday() < 5)

    def at(self, day: date, hour: int) -> datetime:
        """Return when a clock of the zone shows an hour of a day; the first time, if it does so twice."""
        return datetime.combine(day, time(hour), self.zone).astimezone(UTC)

    def firing(self, day: date) -> datetime:
        """Return when the schedule fires; of an hour that comes twice, Airflow takes the second."""
        return datetime.combine(day, time(self.hour, fold=1), self.zone).astimezone(UTC)

    def days(self, first: date, end: datetime) -> list[date]:
        """Return the days of the firings from a day on and before `end`."""
        days = [first + n * DAY for n in range((end.astimezone(self.zone).date() - first).days + 1)]
        return [day for day in days if self.fires_on(day) and self.firing(day) < end]

    def window(self, end: datetime, lookback: timedelta) -> tuple[datetime, datetime]:
        """Return from when to when a run takes rows."""
        start = end - DAY
        if self.schedule in ("daily", "weekdays"):
            [*_, last] = self.days(end.astimezone(self.zone).date() - 7 * DAY, end)
            start = min(start, self.at(last, self.hour))
        return start - lookback, end


@dataclass
class Made:
    """A run, and the rows that it has to take."""

    kind: str
    timetable: Timetable
    run_id: str
    instant: datetime
    window: tuple[datetime, datetime] | None
    """None: the whole table."""
    unfinished: set[int]

    def expected(self, hours: set[int]) -> set[int]:
        if self.window is None:
            return hours | {WITHOUT_TIME, *UNFINISHED, *FINISHED}
        start, end = (moment.timestamp() / 3600 for moment in self.window)
        return {hour for hour in hours if start <= hour < end} | {WITHOUT_TIME} | self.unfinished


@dataclass
class Gate:
    """Replies of the stand-in: texts that name a gate wait until it is opened, others do not."""

    open: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, request: dict[str, Any]) -> Reply:
        question = read_question(request)
        gate = re.search(r"gate \w+", question.text)
        with self.changed:
            self.asked[question.text] += 1
            self.waiting.add(question.text)
            self.changed.notify_all()
            self.changed.wait_for(lambda: not gate or gate[0] in self.open or "all" in self.open)
            self.waiting.discard(question.text)
        return completion(json.dumps({"tags": choose_tags(question)}))

    def let(self, *gates: str) -> None:
        with self.changed:
            self.open.update(gates)
            self.changed.notify_all()


@dataclass
class Story:
    """What was started."""

    cluster: Cluster
    timetables: dict[str, Timetable]
    storage: Storage
    hours: set[int]
    gate: Gate
    first_days: dict[str, date]
    fired: datetime
    """The last firing of the datasets `odd` and `beside`."""
    command_line: subprocess.Popen[str]
    backfilled: dict[str, list[datetime]]
    made: list[Made] = field(default_factory=list)
    odd_run: str = ""
    odd_backfill: int = 0

    def scheduled(self) -> list[Timetable]:
        return [each for each in self.timetables.values() if each.schedule in ("daily", "weekdays")]

    def files(self, name: str, run_id: str) -> Run:
        return Run(self.storage, name, run_id)

    def selection(self, name: str, run_id: str) -> Selection:
        return self.files(name, run_id).snapshot().selection

    def taken(self, name: str, run_id: str) -> set[int]:
        """Return the ids of the rows that a run took."""
        file = self.files(name, run_id).snapshot().rows_file
        return {row_id for batch in read_parquet(self.storage, file) for row_id in batch.column("id").to_pylist()}

    def summary(self, name: str, run_id: str) -> Summary:
        summary = self.files(name, run_id).read("summary.json", Summary)
        assert summary is not None
        return summary

    def target(self, name: str) -> dict[int, Any]:
        table = new_target(f"{name}_tags", "integer")
        with self.cluster.project.engine.connect() as connection:
            return {row.row_id: row for row in connection.execute(sa.select(table))}

    def the(self, kind: str, name: str) -> Made:
        """Return the run of a kind that a dataset had first."""
        return next(made for made in self.made if (made.kind, made.timetable.name) == (kind, name))

    def runs(self, dag_id: str, run_type: str) -> list[dict[str, Any]]:
        """Return a DAG's runs of a type, in the order of their dates."""
        runs = [run for run in self.cluster.api.runs(dag_id) if run["run_type"] == run_type]
        return sorted(runs, key=lambda run: moment(run["run_after"]))

    def wait_for_runs(self, dag_id: str, run_type: str, count: int) -> None:
        api = self.cluster.api
        self.cluster.airflow.wait(lambda: len(self.runs(dag_id, run_type)) >= count, 900, lambda: str(api.runs(dag_id)))

    def succeeds(self, dag_id: str, run_id: str) -> None:
        assert self.cluster.api.wait_for_run(dag_id, run_id, 900) == "success"

    def trigger(self, kind: str, name: str, logical_date: str | None = None, **conf: Any) -> Made:
        """Start a run by hand; its date and what it has to take go into the table."""
        timetable = self.timetables[name]
        run = self.cluster.api.post(f"/dags/{timetable.dag_id}/dagRuns", logical_date=logical_date, conf=conf)
        instant = moment(run["logical_date"] or run["run_after"])
        window: tuple[datetime, datetime] | None = timetable.window(instant, LOOKBACK)
        if conf.get("rows") == "all":
            window = None
        elif day := conf.get("target_date"):
            window = (timetable.at(date.fromisoformat(day), 0), timetable.at(date.fromisoformat(day) + DAY, 0))
        unfinished = set[int]() if conf.get("target_date") else set(UNFINISHED)
        made = Made(kind, timetable, run["dag_run_id"], instant, window, unfinished)
        self.made.append(made)
        return made

    def press_trigger(self, name: str) -> Made:
        """Start a run with what the UI's form sends when nothing is filled in."""
        dag_id = self.timetables[name].dag_id
        params = self.cluster.api.get(f"/dags/{dag_id}/details")["params"]
        conf = {name: param["value"] for name, param in params.items()}
        return self.trigger("UI trigger", name, datetime.now(UTC).isoformat(timespec="milliseconds"), **conf)


def backfill(api: Client, dag_id: str, first: str, last: str, **conf: Any) -> int:
    """Start a backfill of the runs between two times, both inclusive; return its id."""
    options = {"dag_run_conf": conf} if conf else {}
    return int(api.post("/backfills", dag_id=dag_id, from_date=first, to_date=last, **options)["id"])


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def quiet_hour(zone: ZoneInfo, now: datetime) -> int:
    """Return an hour for a schedule, 01:00 if no firing then comes while the tests run."""
    until = (datetime.combine(now.astimezone(zone).date(), time(1), zone) - now.astimezone(zone)) % DAY
    return 1 if until > 2 * HOUR else 13


def all_timetables(now: datetime) -> dict[str, Timetable]:
    tokyo, new_york = quiet_hour(TOKYO, now), quiet_hour(NEW_YORK, now)
    known = [
        Timetable("daily_tokyo", "daily", TOKYO, tokyo),
        Timetable("daily_new_york", "daily", NEW_YORK, new_york),
        Timetable("weekdays_tokyo", "weekdays", TOKYO, tokyo),
        Timetable("weekdays_new_york", "weekdays", NEW_YORK, new_york),
        Timetable("on_demand", "null", NEW_YORK, 0),
        Timetable("after_on_demand", "assets", TOKYO, 0),
    ]
    return {each.name: each for each in known}


def first_day(timetable: Timetable, now: datetime) -> date:
    """Return a `start_date`: two firings ago, of weekdays in Tokyo the Friday before the last Monday."""
    days = timetable.days(now.astimezone(timetable.zone).date() - 14 * DAY, now)
    if timetable.name != "weekdays_tokyo":
        return days[-2]
    return [day for day in days if day.weekday() == 0][-1] - 3 * DAY


def all_hours(now: datetime) -> set[int]:
    """Return the hours of the last days and of a week around each change of the clocks."""
    spans = [(now - 13 * DAY, now + 6 * HOUR)]
    for sunday in (AUTUMN, SPRING):
        midnight = datetime.combine(sunday, time(), UTC)
        spans.append((midnight - 4 * DAY, midnight + 4 * DAY))
    return {
        hour for start, end in spans for hour in range(int(start.timestamp() // 3600), int(end.timestamp() // 3600))
    }


def fill(cluster: Cluster, timetables: dict[str, Timetable], first_days: dict[str, date], hours: set[int]) -> None:
    """Write dataset files, source and targets, and let the one text of most rows be answered already."""
    project = cluster.project
    project.change(
        source={"updated_at": "updated_at"}, lock={"conn_id": "redis_default"}, tasks={"default": {"retries": 1}}
    )
    rows: list[dict[str, Any]] = [{"id": WITHOUT_TIME, "body": "an apple", "at": None}]
    rows += [{"id": n, "body": "an apple", "at": datetime(2020, 1, 1, tzinfo=UTC)} for n in UNFINISHED]
    rows += [
        {"id": n, "body": body, "at": datetime(2020, 1, 1, tzinfo=UTC)}
        for n, body in zip(FINISHED, ("a zebra", "a storm"), strict=True)
    ]
    rows += [{"id": n, "body": "an apple", "at": datetime.fromtimestamp(n * 3600, UTC)} for n in sorted(hours)]
    with project.engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO notes VALUES (:id, :body, :at)"), rows)
    project.run(all_rows=True)
    for timetable in timetables.values():
        schedule: Any = {"daily": timetable.cron, "weekdays": timetable.cron, "null": None}.get(
            timetable.schedule, {"assets": ["x-tagger://db/on_demand_tags"]}
        )
        changes = {
            "dataset": timetable.name,
            "schedule": schedule,
            "timezone": timetable.zone.key,
            "start_date": first_days.get(timetable.name, date(2026, 1, 1)),
            "target": {"table": f"{timetable.name}_tags"},
            "revision": 2 if timetable.name == "on_demand" else 1,
        }
        cluster.write(merged(project.content, changes))
        with project.engine.begin() as connection:
            table = new_target(f"{timetable.name}_tags", "integer")
            table.create(connection)
            never = datetime(2999, 1, 1, tzinfo=UTC)  # no older snapshot changes these rows: they stay unfinished
            values = [{"row_id": n, "status": s, "snapshot_at": never, "run_id": "x"} for n, s in UNFINISHED.items()]
            connection.execute(table.insert(), values)


def write_others(cluster: Cluster, now: datetime) -> datetime:
    """Write a dataset whose pool is missing and one whose texts wait at the gate; return when both fired last."""
    daily = Timetable("odd", "daily", ZoneInfo("UTC"), quiet_hour(ZoneInfo("UTC"), now))
    common = {"schedule": daily.cron, "start_date": now.date() + DAY}
    odd = {"dataset": "odd", "target": {"table": "odd_tags"}, "revision": 3, "llm": {"pool": MISSING_POOL}}
    cluster.write(merged(cluster.project.content, common | odd))
    beside: dict[str, Any] = {"dataset": "beside", "source": {"table": "beside", "lookback": "3d"}}
    beside |= {"target": {"table": "beside_tags"}, "llm": {"conn_id": "patient", "concurrency": 4}}
    cluster.write(merged(cluster.project.content, common | beside))
    cluster.project.execute("CREATE TABLE beside (id BIGINT PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    return daily.firing(daily.days(now.date() - 2 * DAY, now)[-1])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder, now = tmp_path_factory.mktemp("run-kinds"), datetime.now(UTC)
    timetables, hours, gate = all_timetables(now), all_hours(now), Gate()
    first_days = {
        each.name: first_day(each, now) for each in timetables.values() if each.schedule in ("daily", "weekdays")
    }
    with RedisServer(folder / "redis", password="secret") as redis, Cluster(folder / "cluster", slots=4) as cluster:
        cluster.project.redis = redis_connection(redis)
        fill(cluster, timetables, first_days, hours)
        fired = write_others(cluster, now)
        patient = {"openai_client_kwargs": {"timeout": 900}}
        cluster.start(
            patient={"conn_type": "openai", "host": cluster.llm.base_url, "password": "key", "extra": patient}
        )
        cluster.llm.script(*[gate] * 1000)
        story = start(cluster, timetables, hours, gate, first_days, fired)
        yield story
        gate.let("all")
        story.command_line.kill()
        story.command_line.communicate()


def start(
    cluster: Cluster,
    timetables: dict[str, Timetable],
    hours: set[int],
    gate: Gate,
    first_days: dict[str, date],
    fired: datetime,
) -> Story:
    """Start the runs of all kinds."""
    api = cluster.api
    for name in (*timetables, "odd", "beside"):
        api.wait_for_dag(f"tag_{name}")
    for name in (*timetables, "beside"):
        api.unpause(f"tag_{name}")
    # before the backfills: catch-up goes on from the latest run that is scheduled or of a backfill
    cluster.airflow.wait(
        lambda: all(api.runs(f"tag_{name}") for name in first_days), 120, lambda: "nothing was caught up"
    )
    backfilled = {
        name: [timetables[name].firing(day) for day in days]
        for name, days in {
            "daily_new_york": [AUTUMN - DAY, AUTUMN, AUTUMN + DAY],
            "weekdays_new_york": [SPRING + DAY],
            "daily_tokyo": [AUTUMN],
            "weekdays_tokyo": [AUTUMN + DAY],
        }.items()
    }
    name, firings = "weekdays_new_york", backfilled["weekdays_new_york"]
    command = [sys.executable, "-m", "airflow", "backfill", "create", "--dag-id", f"tag_{name}"]
    command += ["--from-date", (firings[0] - 2 * DAY).isoformat(), "--to-date", (firings[-1] + HOUR).isoformat()]
    command_line = subprocess.Popen(
        command, env=cluster.airflow.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for name, firings in backfilled.items():
        if name != "weekdays_new_york":
            backfill(api, f"tag_{name}", firings[0].isoformat(), firings[-1].isoformat())
    storage = cluster.project.open("any").storage
    story = Story(cluster, timetables, storage, hours, gate, first_days, fired, command_line, backfilled)
    story.odd_run = api.trigger("tag_odd")
    story.odd_backfill = backfill(api, "tag_odd", fired.isoformat(), fired.isoformat(), target_date="2026-11-01")
    limited = story.trigger("rows: all", "on_demand", rows="all", limit=1)
    for timetable in story.scheduled():
        day = SPRING if timetable.name == "weekdays_new_york" else AUTUMN
        story.press_trigger(timetable.name)
        story.trigger("API trigger", timetable.name)
        story.trigger("target_date", timetable.name, target_date=day.isoformat())
        story.trigger("rows: all", timetable.name, rows="all", dry_run=timetable.schedule == "weekdays")
    story.trigger("target_date", "daily_new_york", target_date=SPRING.isoformat())
    story.press_trigger("after_on_demand")
    story.trigger("API trigger", "after_on_demand")
    story.trigger("target_date", "after_on_demand", target_date=AUTUMN.isoformat())
    story.trigger("rows: all", "after_on_demand", rows="all")
    story.succeeds("tag_on_demand", limited.run_id)
    story.trigger("target_date", "on_demand", target_date=AUTUMN.isoformat())
    pressed = story.press_trigger("on_demand")
    pressed.unfinished |= set(FINISHED)  # which the limited run skipped
    story.succeeds("tag_on_demand", pressed.run_id)
    story.trigger("API trigger", "on_demand")
    return story


def test_backfill_beside_another_run_pays_nothing_twice_and_overwrites_nothing_newer(
    story: Story, request: pytest.FixtureRequest
) -> None:
    cluster, api, gate = story.cluster, story.cluster.api, story.gate
    request.addfinalizer(lambda: gate.let("all"))
    fired = story.fired
    insert = sa.text("INSERT INTO beside VALUES (:id, :body, :at)")
    rows = [{"id": n, "body": f"an apple, gate {n}", "at": fired - 3 * HOUR} for n in range(2, 14)]
    with cluster.project.engine.begin() as connection:
        connection.execute(insert, [{"id": 1, "body": "a zebra, gate old", "at": fired - 2 * HOUR}, *rows])
    backfill(api, "tag_beside", fired.isoformat(), fired.isoformat())
    with gate.changed:
        assert gate.changed.wait_for(lambda: len(gate.waiting) >= 4, 600)  # the backfill has its rows
    cluster.project.execute("UPDATE beside SET body = 'a storm, gate new', updated_at = now() WHERE id = 1")
    daily = api.trigger("tag_beside")
    with gate.changed:
        assert gate.changed.wait_for(lambda: len(gate.waiting) >= 8, 600)  # both runs are at their texts
    [filled] = story.runs("tag_beside", "backfill")
    gate.let("gate new", *(f"gate {n}" for n in range(2, 14)))

    story.succeeds("tag_beside", daily)

    newer = story.target("beside")[1]
    assert (newer.status, newer.tags, newer.run_id) == ("tagged", ["weather"], daily)
    assert api.run("tag_beside", filled["dag_run_id"])["state"] == "running"
    gate.let("gate old")
    story.succeeds("tag_beside", filled["dag_run_id"])
    target = story.target("beside")
    assert target[1] == newer
    assert {row.status for row in target.values()} == {"tagged"}
    assert len(target) == 13
    asked = {text: count for text, count in gate.asked.items() if "gate" in text}
    assert set(asked.values()) == {1}
    assert len(asked) == 14
    summaries = [story.summary("beside", run_id) for run_id in (filled["dag_run_id"], daily)]
    assert all(summary.llm_requests >= 4 for summary in summaries)
    assert sum(summary.llm_requests for summary in summaries) == 14


def test_day_without_rows_is_a_run_like_others(story: Story) -> None:
    run_id = story.cluster.api.trigger("tag_beside", target_date="2025-01-01")

    story.succeeds("tag_beside", run_id)

    assert story.taken("beside", run_id) == set()
    states = story.cluster.api.states("tag_beside", run_id)
    assert (states["tag"], states["load_back"], states["report"]) == (["skipped"], ["skipped"], ["success"])


def test_paused_dataset_waits_and_then_only_the_pool_and_the_wrong_date_hold_it_up(story: Story) -> None:
    cluster, api = story.cluster, story.cluster.api
    [filled] = story.runs("tag_odd", "backfill")
    for run_id in (story.odd_run, filled["dag_run_id"]):
        assert api.run("tag_odd", run_id)["state"] == "queued"
        assert set(map(str, api.states("tag_odd", run_id).values())) <= {"['None']"}
    assert api.get(f"/backfills/{story.odd_backfill}")["completed_at"] is None

    api.unpause("tag_odd")

    assert api.wait_for_run("tag_odd", filled["dag_run_id"], 900) == "failed"
    states = api.states("tag_odd", filled["dag_run_id"])
    assert (states["snapshot"], states["plan"]) == (["failed"], ["upstream_failed"])
    message = "`target_date` cannot be set in a backfill: each of its runs has a date of its own"
    assert message in api.log("tag_odd", filled["dag_run_id"], "snapshot")
    warning = f"Tasks using non-existent pool '{MISSING_POOL}' will not be scheduled"
    cluster.airflow.wait(
        lambda: warning in cluster.airflow.log("scheduler"), 900, lambda: str(api.states("tag_odd", story.odd_run))
    )
    assert api.states("tag_odd", story.odd_run)["tag"] == ["scheduled"]
    path = f"/dags/tag_odd/dagRuns/{urllib.parse.quote(story.odd_run, safe='')}/taskInstances/tag/0/dependencies"
    assert MISSING_POOL in str(api.get(path)["dependencies"])  # which the UI shows at the task
    assert api.get("/dagWarnings", dag_id="tag_odd")["dag_warnings"] == []  # Airflow 3.3 has none for this
    other = api.trigger("tag_beside", target_date="2025-01-02")
    story.succeeds("tag_beside", other)
    assert api.states("tag_odd", story.odd_run)["tag"] == ["scheduled"]

    api.post("/pools", name=MISSING_POOL, slots=1)

    story.succeeds("tag_odd", story.odd_run)


def test_missed_days_are_caught_up_without_a_gap(story: Story) -> None:
    now = datetime.now(UTC)
    for timetable in story.scheduled():
        firings = [timetable.firing(day) for day in timetable.days(story.first_days[timetable.name], now)]
        story.wait_for_runs(timetable.dag_id, "scheduled", len(firings))
        runs = story.runs(timetable.dag_id, "scheduled")
        for run, firing in zip(runs, firings, strict=True):
            story.succeeds(timetable.dag_id, run["dag_run_id"])
            assert moment(run["logical_date"]) == firing
            made = Made(
                "scheduled", timetable, run["dag_run_id"], firing, timetable.window(firing, LOOKBACK), set(UNFINISHED)
            )
            assert story.taken(timetable.name, made.run_id) == made.expected(story.hours)
            story.made.append(made)
        windows = [story.selection(timetable.name, run["dag_run_id"]) for run in runs]
        for before, after in pairwise(windows):
            assert before.end and after.start and after.start + LOOKBACK <= before.end
        if timetable.name == "weekdays_tokyo":
            friday = story.first_days[timetable.name]
            assert windows[1].end == timetable.firing(friday + 3 * DAY)
            assert windows[1].start == timetable.at(friday, timetable.hour) - LOOKBACK


def test_one_run_of_a_dag_at_a_time(story: Story) -> None:
    for made in story.made:
        story.cluster.api.wait_for_run(made.timetable.dag_id, made.run_id, 900)
    for timetable in story.timetables.values():
        runs = [run for run in story.cluster.api.runs(timetable.dag_id) if run["run_type"] != "backfill"]
        times = sorted((moment(run["start_date"]), moment(run["end_date"])) for run in runs if run["end_date"])
        assert all(before[1] <= after[0] for before, after in pairwise(times)), timetable


def test_backfills_take_the_windows_of_their_days_and_nothing_else(story: Story) -> None:
    output, _ = story.command_line.communicate(timeout=300)
    assert story.command_line.returncode == 0, output
    for name, firings in story.backfilled.items():
        timetable = story.timetables[name]
        runs = story.runs(timetable.dag_id, "backfill")
        assert [moment(run["logical_date"]) for run in runs] == firings
        for run, firing in zip(runs, firings, strict=True):
            story.succeeds(timetable.dag_id, run["dag_run_id"])
            made = Made("backfill", timetable, run["dag_run_id"], firing, timetable.window(firing, timedelta()), set())
            assert story.taken(name, made.run_id) == made.expected(story.hours)
            story.made.append(made)


@pytest.mark.parametrize("kind", ["UI trigger", "API trigger", "target_date", "rows: all"])
def test_runs_started_by_hand_take_the_rows_that_they_should(story: Story, kind: str) -> None:
    mine = [made for made in story.made if made.kind == kind]
    assert {made.timetable.name for made in mine} == set(story.timetables)
    for made in mine:
        story.succeeds(made.timetable.dag_id, made.run_id)
        run = story.cluster.api.run(made.timetable.dag_id, made.run_id)
        assert (run["run_type"], run["logical_date"] is None) == ("manual", kind != "UI trigger")
        assert story.taken(made.timetable.name, made.run_id) == made.expected(story.hours), made


def test_days_on_which_the_clocks_change_have_25_and_23_hours(story: Story) -> None:
    for day, hours in ((AUTUMN, 25), (SPRING, 23)):
        midnight = story.timetables["daily_new_york"].at(day, 0)
        [made] = [
            made
            for made in story.made
            if made.kind == "target_date"
            and made.timetable.name == "daily_new_york"
            and made.window
            and made.window[0] == midnight
        ]
        story.succeeds("tag_daily_new_york", made.run_id)
        assert len(story.taken("daily_new_york", made.run_id)) == hours + 1  # the row without a time


def test_limited_run_asks_for_the_first_texts_and_the_next_one_for_the_others(story: Story) -> None:
    limited, pressed = story.the("rows: all", "on_demand"), story.the("UI trigger", "on_demand")
    summary = story.summary("on_demand", limited.run_id)
    assert (summary.texts, summary.tagged, summary.skipped) == (3, 1, 2)
    summary = story.summary("on_demand", pressed.run_id)
    assert (summary.texts, summary.cached, summary.tagged) == (3, 1, 2)
    target = story.target("on_demand")
    assert {target[n].status for n in FINISHED} == {"tagged"}
    assert {target[n].run_id for n in FINISHED} == {pressed.run_id}


def test_dry_run_writes_nothing(story: Story) -> None:
    for name in ("weekdays_tokyo", "weekdays_new_york"):
        dry = story.the("rows: all", name)
        story.succeeds(f"tag_{name}", dry.run_id)
        assert story.summary(name, dry.run_id).dry_run
        target = story.target(name)
        assert dry.run_id not in {row.run_id for row in target.values()}
        assert target.keys().isdisjoint(FINISHED)


def test_target_of_one_dataset_starts_another_one(story: Story) -> None:
    timetable, limited = story.timetables["after_on_demand"], story.the("rows: all", "on_demand")
    answer = story.cluster.api.get("/assets/events", source_dag_id="tag_on_demand", order_by="timestamp")
    events = answer["asset_events"]
    [event, *_] = [event for event in events if event["source_run_id"] == limited.run_id]
    rows = len(story.hours) + 1 + len(FINISHED)
    assert event["extra"] == {
        "written": rows, "deleted": 0, "tagged": 1, "refused": 0, "failed": 0, "skipped": 2, "pending": 0
    }  # fmt: skip
    assert len(events) == 2  # the other one by the run that asked for the rest: where no row changed there is none
    story.wait_for_runs(timetable.dag_id, "asset_triggered", 1)
    for run in story.runs(timetable.dag_id, "asset_triggered"):
        story.succeeds(timetable.dag_id, run["dag_run_id"])
        assert run["logical_date"] is None
        instant = moment(run["run_after"])
        taken_until = story.selection(timetable.name, run["dag_run_id"]).end
        assert taken_until is not None and instant <= taken_until < instant + timedelta(minutes=10)
        window = timetable.window(instant, LOOKBACK)[0], taken_until
        made = Made("asset trigger", timetable, run["dag_run_id"], instant, window, set(UNFINISHED))
        assert story.taken(timetable.name, made.run_id) == made.expected(story.hours)
        story.made.append(made)


@pytest.mark.parametrize(
    "conf",
    [{"limit": 0}, {"rows": "some"}, {"target_date": "yesterday"}, {"max_cost_usd": 0}, {"dry_run": "maybe"}],
    ids=str,
)
def test_value_out_of_its_range_is_refused_at_once(story: Story, conf: dict[str, Any]) -> None:
    api, [name] = story.cluster.api, conf
    with pytest.raises(APIError, match=name) as refused:
        api.trigger("tag_daily_tokyo", **conf)
    assert refused.value.status == 400
    day = datetime(2026, 9, 1, tzinfo=UTC).isoformat()
    with pytest.raises(APIError, match=name) as refused:
        backfill(api, "tag_daily_tokyo", day, day, **conf)
    assert refused.value.status == 422


@pytest.mark.parametrize("name", ["on_demand", "after_on_demand"])
def test_dag_without_times_cannot_be_backfilled(story: Story, name: str) -> None:
    with pytest.raises(APIError, match="non-periodic schedule that does not support backfills") as refused:
        backfill(story.cluster.api, f"tag_{name}", "2026-11-01", "2026-11-02")
    assert refused.value.status == 422


def test_plain_dates_of_a_backfill_are_midnights_in_utc(story: Story) -> None:
    first, last = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 3, tzinfo=UTC)
    for name, at_one in (("daily_tokyo", [2, 3]), ("daily_new_york", [1, 2])):
        timetable = story.timetables[name]
        firings = {day: timetable.firing(first.date() + (day - 1) * DAY) for day in range(5)}
        days = [day for day, at in firings.items() if first <= at <= last]
        assert days == at_one or timetable.hour != 1  # as the document has it
        answer = story.cluster.api.post(
            "/backfills/dry_run",
            dag_id=timetable.dag_id,
            from_date=f"{first:%Y-%m-%d}",
            to_date=f"{last:%Y-%m-%d}",
            reprocess_behavior="completed",
        )
        assert [moment(run["logical_date"]) for run in answer["backfills"]] == [firings[day] for day in days]


def test_no_text_of_any_dataset_was_paid_for_twice(story: Story) -> None:
    calls = Counter((call.key, call.sha256) for call in story.cluster.llm.calls)
    assert set(calls.values()) == {1}


def local_day(instant: datetime | None, zone: ZoneInfo) -> date:
    assert instant is not None
    return instant.astimezone(zone).date()


def local(instant: datetime | None, zone: ZoneInfo) -> str:
    assert instant is not None
    return f"{instant.astimezone(zone):%a %Y-%m-%d %H:%M %z}"


def table(story: Story) -> str:
    """Return what the document says of the runs: a table for each kind."""
    lines: list[str] = []
    schedules = ["daily", "weekdays", "null", "assets"]
    runs = sorted(
        story.made, key=lambda made: (schedules.index(made.timetable.schedule), made.timetable.zone.key, made.instant)
    )
    for kind in KINDS:
        lines += [
            f"\n### {kind}\n",
            "| schedule | zone | the run's time | rows from | before | rows, one an hour | unfinished | no time |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        shown: Counter[str] = Counter()
        for made in runs:
            timetable = made.timetable
            if made.kind != kind or (kind == "scheduled" and shown[timetable.name] == 2):
                continue
            shown[timetable.name] += 1
            taken = story.taken(timetable.name, made.run_id)
            selection = story.selection(timetable.name, made.run_id)
            dated = len(taken & story.hours)
            bounds = ["the whole table", ""]
            if selection.start is not None:
                bounds = [local(moment, timetable.zone) for moment in (selection.start, selection.end)]
            cells = [timetable.schedule, timetable.zone.key, local(made.instant, timetable.zone), *bounds, str(dated)]
            cells += ["yes" if taken >= UNFINISHED.keys() else "no", "yes" if WITHOUT_TIME in taken else "no"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def combinations(text: str) -> set[tuple[str, str, str]]:
    """Return kind, schedule and zone of each row of the document's tables."""
    found = set()
    for kind, rows in re.findall(r"^### (.+?)\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
        found |= {
            (kind, schedule, zone) for schedule, zone in re.findall(r"^\| (\w+) \| (\w+/\w+) \|", rows, re.MULTILINE)
        }
    return found


def test_document_tells_of_all_runs(story: Story) -> None:
    made = table(story)
    start, end = "<!-- runs: begin -->\n", "<!-- runs: end -->"
    if os.environ.get("WRITE_DOCS") == "1":
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(start)
        DOCUMENT.write_text(f"{before}{start}{made}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    assert combinations(DOCUMENT.read_text(encoding="utf-8")) == combinations(made)
