"""The rollup: a cache of a dataset's runs in one object, which says what the runs' own files say."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from io import BytesIO
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import error
from tagger.exceptions import RunFailed, StorageError
from tagger.history import Figures, history
from tagger.ledger import read_attempts
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.rollup import FORMAT, RolledRun, Rollup, read_rollup, rolled_up, update_rollup
from tagger.runs import Run
from tagger.spend import Spend, list_attempts, list_runs, spend_of
from tagger.storage import Storage
from tagger.window import Options
from tests.databases import make_project, teach, watch
from tests.project import Project
from tests.test_history import put_run, summary
from tests.test_spend import kill_an_attempt, put_attempt

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
FILE = "history/notes.json.gz"


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def storage_of(project: Project) -> Storage:
    return project.open("any").storage


def stored(project: Project) -> Rollup:
    """Return the rollup as the last report left it."""
    found = read_rollup(storage_of(project), project.dataset.dataset)
    assert found is not None
    return found


def update(project: Project) -> Rollup:
    update_rollup(storage_of(project), project.dataset, datetime.max.replace(tzinfo=UTC))
    return stored(project)


# The same as the files


def sums_of_files(project: Project, form: str) -> dict[str, Figures]:
    """Return figures by day or by month, straight from the attempts' files and the summaries."""
    found: dict[str, Figures] = {}

    def add(at: datetime, **figures: Any) -> None:
        period = at.astimezone(project.dataset.zone).strftime(form)
        found[period] = found.get(period, Figures()) + Figures(**figures)

    for files in list_runs(storage_of(project), project.dataset.dataset):
        attempts = read_attempts(files.run)
        for attempt in attempts:
            spend = spend_of(attempt, {})
            tokens = spend.model_dump(include={"requests", "input_tokens", "cached_input_tokens", "output_tokens"})
            add(spend.ended_at, **tokens, spent_usd=spend.cost_usd)
        told = files.run.read("summary.json", Summary)
        if told is not None and not told.dry_run:
            texts = {name: getattr(told, name) for name in (f.name for f in fields(Figures)) if hasattr(told, name)}
            counts = {name: value for name, value in texts.items() if "tokens" not in name}
            add(told.finished_at, runs=1, **counts)
        elif attempts:
            add(max(attempt.ended_at for attempt in attempts), runs=1)
    return found


def assert_same(project: Project, rollup: Rollup) -> None:
    __tracebackhide__ = True
    for by, form in (("day", "%Y-%m-%d"), ("month", "%Y-%m")):
        expected = sums_of_files(project, form)
        found = {period: figures for _, period, figures in history(rollup, by)}  # type: ignore[arg-type]
        assert found.keys() == expected.keys()
        for period, figures in found.items():
            told = {name: value for name, value in vars(figures).items() if value is not None}
            known = {name: value for name, value in vars(expected[period]).items() if value is not None}
            assert told == pytest.approx(known, rel=1e-12, abs=1e-12), period


def counted(run: Run) -> list[Spend]:
    """Return a run's attempts as its report would count them."""
    listed = list_attempts(run)
    return [spend_of(attempt, listed) for attempt in read_attempts(run)]


names = (f"notes_{number}" for number in count())
instants = st.datetimes(datetime(2025, 12, 30), datetime(2026, 2, 3), timezones=st.just(UTC))
money = st.none() | st.floats(0, 5) | st.floats(0, 5) | st.floats(0, 5)
some_run = st.sampled_from(["run-1", "run-2", "run-3"])
killed = st.tuples(st.just("attempt"), some_run, st.integers(1, 3), money, instants)
ended = st.tuples(st.just("summary"), some_run, instants, money, st.booleans(), st.booleans())
gone = st.tuples(st.sampled_from(["no summary", "no attempt", "no folder"]), some_run)
updated = st.just(("update",))
happenings = st.lists(killed | killed | ended | ended | gone | updated, max_size=12)
zones = st.sampled_from(["UTC", "Asia/Tokyo", "Asia/Kathmandu", "America/St_Johns", "Australia/Eucla"])


def happen(project: Project, what: str, run_id: str = "", *how: Any) -> None:
    """Do what a random history has next."""
    run = Run(storage_of(project), project.dataset.dataset, run_id or "none")
    if what == "attempt":
        attempt, cost, at = how
        put_attempt(run, cost, at, attempt=attempt)
    elif what == "summary":
        at, saved, dry, counts = how
        attempts = counted(run) if counts else []
        run.write("summary.json", summary(run_id, at, saved_usd=saved, dry_run=dry, attempts=attempts))
    elif what == "update":
        update(project)
    else:
        ends = {"no summary": "summary.json", "no attempt": "shard-1-1.parquet", "no folder": ""}
        for path, _ in list(run.storage.list(run.files)):
            if path.startswith(run.files + ends[what]):
                run.storage.delete(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings, zones)
def test_whatever_happened_the_rollup_has_the_days_and_months_of_the_files(
    project: Project, happened: list[tuple[Any, ...]], zone: str
) -> None:
    project.change(dataset=next(names), timezone=zone)
    for each in happened:
        happen(project, *each)

    now = rolled_up(storage_of(project), project.dataset)

    assert_same(project, now)
    assert update(project) == now
    assert now.runs == sorted(now.runs, key=lambda run: run.ended_at)


def test_after_each_report_the_rollup_is_as_the_files_are(project: Project) -> None:
    def check() -> list[tuple[str, bool]]:
        assert_same(project, stored(project))
        return [(run.run_id, run.summary is not None) for run in stored(project).runs]

    project.put(1, "apple")
    project.put(2, "zebra")
    project.run("one")
    assert check() == [("one", True)]

    # killed after its plan, and found by the next run
    killed = project.take("two")
    plan(killed, project.connections)
    kill_an_attempt(killed, 0.25)
    project.put(3, "storm")
    project.run("three")
    assert check() == [("one", True), ("two", False), ("three", True)]

    # dry
    project.put(4, "a tiger")
    project.run("four", options=Options(dry_run=True))
    assert check() == [("one", True), ("two", False), ("three", True), ("four", True)]

    # cleared: all its steps go again, and its summary changes
    project.run("one")
    assert check() == [("two", False), ("three", True), ("four", True), ("one", True)]

    # removed
    for path, _ in list(killed.storage.list(killed.files)):
        killed.storage.delete(path)
    project.run("five")
    assert check() == [("three", True), ("four", True), ("one", True), ("five", True)]


def test_a_run_that_fails_is_in_the_rollup(project: Project) -> None:
    teach(project.llm, apple=error(400, "no", "odd_text"))
    project.put(1, "apple")

    with pytest.raises(RunFailed, match="failed, more than"):
        project.run("one")

    [run] = stored(project).runs
    assert run.summary is not None
    assert (run.summary.state, run.summary.failed) == ("failed", 1)
    assert "failed, more than" in (run.summary.reason or "")


# What it holds


def test_the_rollup_tells_of_the_dataset_what_a_page_shows(project: Project) -> None:
    project.change(timezone="Asia/Tokyo", limits={"max_cost_usd": 3, "max_cost_usd_per_month": 20})
    project.change(llm={"mode": "batch"})

    found = rolled_up(storage_of(project), project.dataset)

    assert found.model_dump() == {
        **{"dataset": "notes", "timezone": "Asia/Tokyo", "model": "offline-stand-in", "mode": "batch"},
        **{"max_cost_usd": 3.0, "max_cost_usd_per_month": 20.0, "tags": ["fruit", "animal", "weather"], "runs": []},
    }


def test_a_run_is_its_summary_without_row_ids(project: Project) -> None:
    project.change(limits={"max_failed_fraction": 1})
    teach(project.llm, apple=error(400, "no", "odd_text"))
    for number in (7001, 7002):
        project.put(number, f"apple {number}")
    project.put(7003, "zebra")

    told = project.run("one")

    [run] = stored(project).runs
    assert run.summary is not None
    same = told.model_dump(exclude={"errors", "attempts", "drift"})
    assert run.summary.model_dump(exclude={"errors"}) == same
    assert sum(run.summary.errors.values()) == 2
    assert run.summary.total_saved_usd == told.total_saved_usd
    assert "700" not in gzip.decompress(storage_of(project).get(FILE) or b"").decode().replace(told.spec_id, "")


def test_what_attempts_spent_is_summed_up_by_quarter_hours(project: Project) -> None:
    for number, minutes in enumerate((0, 14, 15, 44), 1):
        put_attempt(project.open("one"), 10.0**number, NOON + timedelta(minutes=minutes), attempt=number)

    [run] = rolled_up(storage_of(project), project.dataset).runs

    told = [(spent.at, spent.requests, spent.cost_usd) for spent in run.spent]
    quarter = timedelta(minutes=15)
    assert told == [(NOON, 4, 110.0), (NOON + quarter, 2, 1000.0), (NOON + 2 * quarter, 2, 10_000.0)]


def test_a_change_of_the_spec_is_told_by_the_run_that_met_it(project: Project) -> None:
    project.put(1, "apple")
    assert project.run("one").spec_change is None
    project.change(prompt="You tag long notes.")

    assert project.run("two").spec_change == "the prompt changed"
    assert [run.summary and run.summary.spec_change for run in stored(project).runs] == [None, "the prompt changed"]


def test_the_runs_of_another_dataset_are_not_in_it(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    other = Run(storage_of(project), "notes_too", "two")
    other.write("summary.json", summary("two", NOON))

    assert [run.run_id for run in rolled_up(storage_of(project), project.dataset).runs] == ["one"]


# Little is read


def test_a_rollup_is_read_in_one_request(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    update(project)
    requests = watch(storage_of(project))

    stored(project)

    assert requests.made == [("GetObject", FILE)]


def test_only_runs_that_changed_are_read_again(project: Project) -> None:
    for number in range(5):
        put_run(project, f"run-{number}", NOON + timedelta(days=number), 1.0, 10.0)
    update(project)
    put_attempt(project.open("run-3"), 100.0, NOON, attempt=2)
    requests = watch(storage_of(project))

    rolled_up(storage_of(project), project.dataset)

    assert requests.counts["ListObjectsV2"] == 2  # all runs, and the changed one's attempts
    assert {key.rpartition("/")[0] for key in requests.of("GetObject")} == {"history", "runs/notes/run-3"}


def test_nothing_is_written_but_by_an_update(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    requests = watch(storage_of(project))

    rolled_up(storage_of(project), project.dataset)

    assert "PutObject" not in requests.counts
    assert read_rollup(storage_of(project), "notes") is None


def test_the_same_runs_give_the_same_object(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)

    bodies = [(update(project), storage_of(project).get(FILE))[1] for _ in range(2)]

    assert bodies[0] == bodies[1]


def test_where_files_have_no_version_they_are_read_every_time(project: Project) -> None:
    run = put_run(project, "one", NOON, 1.0)
    events = storage_of(project)._client.meta.events

    def no_etags(parsed: dict[str, Any], **_: object) -> None:
        for item in parsed.get("Contents", []):
            item["ETag"] = ""

    events.register("after-call.s3.ListObjectsV2", no_etags)
    try:
        update(project)
        put_attempt(run, 5.0, NOON)
        [found] = rolled_up(storage_of(project), project.dataset).runs
    finally:
        events.unregister("after-call.s3.ListObjectsV2", no_etags)

    assert [spent.cost_usd for spent in found.spent] == [5.0]


# Damage


def whole(project: Project) -> bytes:
    put_run(project, "one", NOON, 1.0)
    update(project)
    return storage_of(project).get(FILE) or b""


DAMAGE = {
    "empty": lambda body: b"",
    "cut off": lambda body: body[: len(body) // 2],
    "no gzip": lambda body: b"{}",
    "flipped": lambda body: body[:40] + bytes([body[40] ^ 255]) + body[41:],
    "no JSON": lambda body: gzip.compress(b"not JSON"),
    "other JSON": lambda body: gzip.compress(b'{"runs": 1}'),
    "not text": lambda body: gzip.compress(b"\xff\xfe"),
    "no such zone": lambda body: gzip.compress(gzip.decompress(body).replace(b'"UTC"', b'"Mars/Base"')),
    "no zone": lambda body: gzip.compress(gzip.decompress(body).replace(b'"UTC"', b'"../UTC"')),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_rollup_is_named_and_made_anew_by_the_next_report(project: Project, damage: Any) -> None:
    body = whole(project)
    before = stored(project)
    storage_of(project).put(FILE, damage(body))

    with pytest.raises(StorageError, match=r"history/notes\.json\.gz: damaged; the dataset's next report makes it"):
        stored(project)
    assert rolled_up(storage_of(project), project.dataset) == before
    project.run("two")
    assert [run.run_id for run in stored(project).runs] == ["two", "one"]  # the present, and a made-up future


@pytest.mark.parametrize("name", ["summary.json", "shard-1-1.parquet"])
def test_a_run_with_a_damaged_file_is_in_it_with_the_problem_and_with_all_that_is_whole(
    project: Project, name: str
) -> None:
    put_run(project, "one", NOON, 1.0)
    put_run(project, "two", NOON + timedelta(days=1), 10.0)
    body = storage_of(project).get(f"runs/notes/two/{name}") or b""
    storage_of(project).put(f"runs/notes/two/{name}", b"x")

    with_problem = update(project)
    storage_of(project).put(f"runs/notes/two/{name}", body)
    mended = update(project)

    one, two = sorted(with_problem.runs, key=lambda run: run.run_id)
    assert one.problem is None
    assert f"runs/notes/two/{name}: " in (two.problem or "")
    assert with_problem.problems == [two.problem]
    if name == "summary.json":
        assert (two.summary, [spent.cost_usd for spent in two.spent]) == (None, [10.0])
    else:
        assert two.summary is not None
        assert [(spent.requests, spent.cost_usd) for spent in two.spent] == [(0, None)]
    assert mended.problems == []
    assert_same(project, mended)


def test_what_a_damaged_attempt_spent_is_told_by_the_summary_that_counts_it(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")
    [before] = stored(project).runs
    storage_of(project).put("runs/notes/one/shard-1-1.parquet", b"x")

    [damaged] = update(project).runs
    put_attempt(project.open("one"), 100.0, NOON, shard=2)
    [with_another] = update(project).runs

    assert "shard-1-1.parquet: damaged" in (damaged.problem or "")
    assert damaged.spent == before.spent
    assert None in [spent.cost_usd for spent in with_another.spent]


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"started_at": "2026-11-30T12:00:00"}, "runs/notes/odd/shard-2-1.parquet: damaged"),
        ({"asked": "by mail"}, "runs/notes/odd/: a shard's file has times or figures that cannot be"),
    ],
    ids=["time", "asked"],
)
def test_a_run_with_an_odd_attempt_is_a_problem_and_fails_no_report(project: Project, about: Any, told: str) -> None:
    put_run(project, "odd", NOON, 1.0)
    put_attempt(project.open("odd"), 10.0, NOON, shard=2, **about)

    assert project.run("one").state == "success"

    [problem] = stored(project).problems
    assert told in problem


def test_a_run_of_which_nothing_can_be_read_ended_when_its_files_were_written(project: Project) -> None:
    put_run(project, "one", datetime(2025, 10, 1, tzinfo=UTC), 1.0)
    storage_of(project).put("runs/notes/two/summary.json", b"x")

    found = update(project)
    storage_of(project).delete("runs/notes/two/summary.json")

    assert [run.run_id for run in found.runs] == ["one", "two"]
    assert datetime.now(UTC) - found.runs[1].ended_at < timedelta(minutes=1)
    assert_same(project, found)


@contextmanager
def refusing(storage: Storage, operation: str, path: str, code: str) -> Iterator[None]:
    """Let S3 refuse what is done to one object."""

    def answer(request: Any, **_: object) -> Any:
        if not request.url.endswith(path):
            return None
        body = BytesIO(f"<Error><Code>{code}</Code></Error>".encode())
        return AWSResponse(request.url, 403, HTTPHeaders(), SimpleNamespace(stream=lambda: body))

    events: Any = storage._client.meta.events
    events.register(f"before-send.s3.{operation}", answer)
    try:
        yield
    finally:
        events.unregister(f"before-send.s3.{operation}", answer)


def test_a_run_that_s3_stumbled_over_is_read_again(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)

    with refusing(storage_of(project), "GetObject", "summary.json", "Tired"):
        stumbled = update(project)
    again = update(project)

    assert "reading runs/notes/one/summary.json: S3 answered Tired" in stumbled.problems[0]
    assert again.problems == []
    assert_same(project, again)


def test_a_rollup_that_cannot_be_written_is_a_warning(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    project.put(1, "apple")

    with refusing(storage_of(project), "PutObject", FILE, "AccessDenied"), caplog.at_level(logging.WARNING):
        told = project.run("one")

    assert told.state == "success"
    [line] = [record.getMessage() for record in caplog.records if record.name == "tagger.rollup"]
    assert line.startswith("notes: the pages do not show this run until the next report: s3://")
    assert f"writing {FILE}: access denied" in line
    assert read_rollup(storage_of(project), "notes") is None


def test_what_else_lies_in_the_storage_is_no_run(project: Project) -> None:
    storage_of(project).put("runs/notes/not a run/summary.json", b"x")

    assert project.run("one").state == "success"

    assert [run.run_id for run in stored(project).runs] == ["one"]


def test_a_later_version_reads_all_runs_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    put_run(project, "one", NOON, 1.0)
    before = update(project)
    monkeypatch.setattr("tagger.rollup.FORMAT", FORMAT + 1)

    assert update(project).runs[0].version != before.runs[0].version


def test_of_two_reports_at_once_nothing_is_lost_for_long(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    update(project)
    outdated = storage_of(project).get(FILE) or b""
    put_run(project, "two", NOON + timedelta(hours=1), 10.0)
    update(project)
    storage_of(project).put(FILE, outdated)  # by a report that had listed the runs before

    put_run(project, "three", NOON + timedelta(hours=2), 100.0)

    assert [run.run_id for run in update(project).runs] == ["one", "two", "three"]
    assert_same(project, stored(project))


def test_a_rollup_of_a_later_version_is_read_as_far_as_this_one_knows_it(project: Project) -> None:
    body = json.loads(gzip.decompress(whole(project)))
    body["news"] = 1
    body["runs"][0]["news"] = 2
    storage_of(project).put(FILE, gzip.compress(json.dumps(body).encode()))

    [run] = stored(project).runs

    assert isinstance(run, RolledRun)
    assert run.run_id == "one"


def test_a_report_that_finds_another_one_wrote_meanwhile_begins_again(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    update(project)
    with_one = storage_of(project).get(FILE) or b""
    late = iter(["two", "three"])

    def report_another(**_: object) -> None:
        if run_id := next(late, None):
            put_run(project, run_id, NOON, 1.0)
            storage_of(project).put(FILE, with_one + run_id.encode())

    events = storage_of(project)._client.meta.events
    events.register("after-call.s3.ListObjectsV2", report_another)
    try:
        found = update(project)
    finally:
        events.unregister("after-call.s3.ListObjectsV2", report_another)

    assert {run.run_id for run in found.runs} == {"one", "two", "three"}


def test_an_old_run_that_is_reported_again_changes_nothing(project: Project) -> None:
    project.put(1, "apple")
    project.run("old")
    project.change(timezone="Asia/Tokyo", limits={"max_cost_usd_per_month": 5.0})
    project.run("new")
    before = stored(project)

    report(project.open("old"))

    assert (before.timezone, before.max_cost_usd_per_month) == ("Asia/Tokyo", 5.0)
    assert stored(project).model_dump(exclude={"runs"}) == before.model_dump(exclude={"runs"})
    assert [(run.run_id, run.ended_at) for run in stored(project).runs] == [
        (run.run_id, run.ended_at) for run in before.runs
    ]


def test_a_run_reported_by_hand_updates_the_rollup(project: Project) -> None:
    project.put(1, "apple")
    project.run("one")
    storage_of(project).delete(FILE)

    report(project.open("one"))

    assert [run.run_id for run in stored(project).runs] == ["one"]
