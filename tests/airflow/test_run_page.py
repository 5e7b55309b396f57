"""The tab of a run: its summary, how far its shards are, and which rows failed."""

import io
import secrets
from collections import Counter
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.stand_in import completion
from tagger.airflow.shard_tally import Tallies, tally
from tagger.dataset import Price
from tagger.exceptions import RunFailed
from tagger.ledger import SCHEMA, Attempt, Ledger, Outcome, OutcomeStatus, latest_outcomes
from tagger.plan import plan
from tagger.runs import Run
from tagger.storage import Storage
from tagger.tag import tag
from tagger.window import Options
from tests.airflow.server import NOON, RUN, SECRET, Server, tagged, where
from tests.databases import REFUSAL, teach
from tests.project import Project
from tests.servers import S3Store

PRICE = Price(input=1.0, output=10.0)


def page(server: Server, run_id: str = RUN) -> dict[str, Any]:
    answer = server.get(f"/api/v1/datasets/tag_notes/runs/{run_id}")
    assert answer.status_code == 200
    return dict(answer.json())


def planned(server: Server, project: Project, *shards: str | None, **fields: Any) -> Run:
    """Take and plan a run of as many texts as shards; its tasks are in these states."""
    project.change(shards={"texts_per_shard": 1}, llm={"concurrency": 1})
    for number in range(len(shards)):
        project.put(number, f"{SECRET}, {number}")
    run = project.take(RUN)
    plan(run, project.connections)
    server.dag()
    server.run(RUN, **{"state": "running", "where": where(project), "shards": shards} | fields)
    return run


def test_a_run_that_ended_shows_its_figures(server: Server, project: Project) -> None:
    tagged(server, project)

    shown = page(server)

    summary = project.summary(project.open(RUN))
    assert {name: shown[name] for name in ("dag_id", "run_id", "dataset", "day", "state", "running", "dry_run")} == {
        "dag_id": "tag_notes",
        "run_id": RUN,
        "dataset": "notes",
        "day": summary.day,
        "state": "success",
        "running": False,
        "dry_run": False,
    }
    assert (shown["reason"], shown["problem"], shown["failures"]) == (None, None, [])
    figures = shown["summary"]
    assert {name: figures[name] for name in ("rows", "texts", "cached", "tagged", "failed", "requests")} == {
        "rows": 2,
        "texts": 2,
        "cached": 0,
        "tagged": 2,
        "failed": 0,
        "requests": 2,
    }
    assert figures["spent_usd"] == summary.cost_usd
    assert figures["saved_usd"] == summary.total_saved_usd
    assert set(figures["seconds"]) == {"snapshot", "plan", "tag", "load", "report"}
    assert shown["plan"] == {
        "rows": 2,
        "texts": 2,
        "cached": 0,
        "new": 2,
        "shards": 1,
        "estimated_usd": pytest.approx(shown["plan"]["estimated_usd"]),
        "budget_usd": None,
    }
    [shard] = shown["shards"]
    assert (shard["name"], shard["done"], shard["state"], shard["attempt"]) == ("shard 1/1 · 2 texts", 2, "done", 1)
    assert shard["spent_usd"] == pytest.approx(summary.cost_usd)
    assert shard["texts_per_second"] > 0


@pytest.mark.parametrize(
    ("task", "state"),
    [
        (None, "waiting"),
        ("scheduled", "waiting"),
        ("queued", "waiting"),
        ("running", "running"),
        ("deferred", "deferred"),
        ("up_for_retry", "retrying"),
        ("success", "done"),
        ("failed", "broken"),
        ("removed", "skipped"),
    ],
)
def test_a_shard_is_in_the_state_of_its_task(server: Server, project: Project, task: str | None, state: str) -> None:
    planned(server, project, task)

    [shard] = page(server)["shards"]

    assert shard["state"] == state
    log = f"dags/tag_notes/runs/{RUN}/tasks/tag/mapped/0"
    assert shard["log_url"] == (log if task else None)  # a task that was never tried has no log


def test_a_log_is_found_whatever_stands_in_the_runs_id(server: Server, project: Project) -> None:
    tagged(server, project, "scheduled__2026-11-21T16:00:00+00:00")

    [shard] = page(server, "scheduled__2026-11-21T16:00:00+00:00")["shards"]

    run = "scheduled__2026-11-21T16%3A00%3A00%2B00%3A00"
    assert shard["log_url"] == f"dags/tag_notes/runs/{run}/tasks/tag/mapped/0"


def test_a_run_at_work_shows_how_far_it_is(server: Server, project: Project) -> None:
    run = planned(server, project, "success", "running", None)
    tag(run, 1, project.connections)

    shown = page(server)

    assert (shown["running"], shown["summary"], shown["plan"]["shards"]) == (True, None, 3)
    assert [shard["done"] for shard in shown["shards"]] == [1, 0, 0]
    assert [shard["state"] for shard in shown["shards"]] == ["done", "running", "waiting"]
    first, *others = shown["shards"]
    assert first["started_at"] and first["updated_at"]
    assert {(shard["attempt"], shard["spent_usd"], shard["started_at"]) for shard in others} == {(None, 0.0, None)}


def test_before_its_plan_a_run_has_neither_shards_nor_a_problem(server: Server, project: Project) -> None:
    server.dag()
    server.run(RUN, state="running", steps={"snapshot": "running"})

    shown = page(server)

    assert (shown["plan"], shown["summary"], shown["shards"], shown["problem"]) == (None, None, [], None)


@pytest.mark.parametrize(
    ("timezone", "conf", "day"),
    [
        ("UTC", None, "2026-11-20"),
        ("Pacific/Kiritimati", None, "2026-11-21"),
        ("UTC", {"target_date": "2026-11-02"}, "2026-11-02"),
    ],
)
def test_a_run_without_a_summary_has_its_day_too(
    server: Server, project: Project, timezone: str, conf: dict[str, str] | None, day: str
) -> None:
    project.change(timezone=timezone)
    planned(server, project, None, at=NOON, conf=conf)

    assert page(server)["day"] == day


def test_a_dry_run_says_so(server: Server, project: Project) -> None:
    project.put(1, SECRET)
    project.take(RUN, options=Options(dry_run=True))
    server.dag()
    server.run(RUN, state="running", where=where(project))

    assert page(server)["dry_run"] is True


def test_a_run_that_failed_says_why(server: Server, project: Project) -> None:
    run = planned(server, project, "success", state="failed", steps={"report": "failed"})
    teach(project.llm, storm=completion("no json"))
    with pytest.raises(RunFailed):
        project.finish(run)

    shown = page(server)

    assert shown["reason"].startswith("1 of 1 texts failed, more than `limits.max_failed_fraction`")


def test_a_run_that_failed_before_its_report_says_where(server: Server, project: Project) -> None:
    server.dag()
    server.run(RUN, state="failed", steps={"plan": "failed"}, where=where(project))

    assert page(server)["reason"] == "failed at `plan`: the log says why"


# Failures


def test_failures_are_by_kind_with_their_rows(server: Server, project: Project) -> None:
    project.change(limits={"max_failed_fraction": 1}, source={"max_chars": 60})
    bodies = [
        "an apple",
        "a zebra",
        "zebras",
        "secretly",
        "a note of more than sixty characters, which is too long to ask",
    ]
    for number, body in enumerate(bodies):
        project.put(number, body)
    teach(project.llm, zebra=completion("no json"), secretly=REFUSAL)
    project.run(RUN)
    server.dag()
    server.run(RUN, where=where(project), shards=["success"])

    failures = page(server)["failures"]

    [first, *others] = failures
    assert (first["count"], sorted(first["row_ids"]), first["more"]) == (2, ["1", "2"], 0)
    assert {(each["kind"], each["count"], *each["row_ids"]) for each in others} == {
        ("refusal", 1, "3"),
        ("too_long", 1, "4"),
    }


def test_of_a_text_that_is_asked_again_the_last_word_counts(server: Server, project: Project) -> None:
    run = planned(server, project, "success")
    teach(project.llm, storm=completion("no json"))
    tag(run, 1, project.connections)
    assert page(server)["failures"] != []
    teach(project.llm)
    tag(run, 1, project.connections)

    shown = page(server)

    [shard] = shown["shards"]
    assert (shard["tagged"], shard["failed"], shard["done"], shard["attempt"]) == (1, 0, 1, 2)
    assert shown["failures"] == []


def test_of_many_rows_a_hundred_are_named(server: Server, project: Project) -> None:
    run = planned(server, project, "running", "running")
    for shard in (1, 2):
        with Ledger(run, run.plan().plan_id, shard, PRICE) as ledger:
            for number in range(80):
                ledger.failed(secrets.token_hex(16), f"{shard}-{number}", "timeout", SECRET)

    [failures] = page(server)["failures"]

    assert (failures["count"], len(failures["row_ids"]), failures["more"]) == (160, 100, 60)
    assert SECRET not in server.get(f"/api/v1/datasets/tag_notes/runs/{RUN}").text


def test_what_was_asked_for_an_earlier_plan_is_no_progress(server: Server, project: Project) -> None:
    run = planned(server, project, "running", "running")
    tag(run, 1, project.connections)
    plan(run, project.connections)  # the other text is shard 1 now

    assert [shard["done"] for shard in page(server)["shards"]] == [0]


# What is away


def test_a_damaged_shard_file_is_told_and_the_others_are_shown(server: Server, project: Project) -> None:
    run = planned(server, project, "success", "success")
    for shard in (1, 2):
        tag(run, shard, project.connections)
    run.storage.put(f"{run.files}shard-1-1.parquet", b"damaged")

    shown = page(server)

    assert [shard["done"] for shard in shown["shards"]] == [0, 1]
    assert shown["problem"].endswith("shard-1-1.parquet: damaged; delete it to go on without its counts")


def test_a_damaged_summary_is_told_and_the_shards_are_shown(server: Server, project: Project) -> None:
    tagged(server, project)
    run = project.open(RUN)
    run.storage.put(f"{run.files}summary.json", b"{}")

    shown = page(server)

    assert shown["problem"].endswith("summary.json: damaged: run its step again")
    assert (shown["summary"], [shard["done"] for shard in shown["shards"]]) == (None, [2])


def test_a_time_zone_that_there_is_not_is_told(server: Server, project: Project) -> None:
    run = planned(server, project, "running")
    run.storage.put(f"{run.files}dataset.json", b'{"timezone": "Mars/Base"}')

    shown = page(server)

    assert shown["problem"].endswith("dataset.json: damaged: run its step again")
    assert (shown["day"], shown["plan"]["shards"]) == ("2026-11-20", 1)


# Tallies


class CountingStorage(Storage):
    """Counts the objects that are read."""

    reads = 0

    def get(self, path: str) -> bytes | None:
        """Count, and read."""
        self.reads += 1
        return super().get(path)


def test_a_shard_is_read_again_when_its_file_changed(project: Project, s3_bucket: S3Store) -> None:
    storage = CountingStorage(f"s3://{s3_bucket.bucket}", s3_bucket.client())
    run, tallies = Run(storage, "notes", RUN), Tallies()

    def done() -> int:
        return tallies.of(run, "a plan", 1, tallies.versions(run)[1]).done

    with Ledger(run, "a plan", 1, PRICE) as ledger:
        ledger.failed("key", "1", "timeout", "no answer")
        counts = [done(), done()]
    counts += [done(), done()]

    assert counts == [0, 0, 1, 1]
    assert storage.reads == 2


statuses: st.SearchStrategy[OutcomeStatus] = st.sampled_from(["asked", "tagged", "refused", "failed"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), statuses), min_size=1, max_size=4))
def test_a_tally_counts_as_the_report_does(books: list[dict[str, OutcomeStatus]]) -> None:
    attempts = [attempt_of(number, texts) for number, texts in enumerate(books, 1)]

    counted = tally(attempts, "a plan")

    latest = list(latest_outcomes(attempts).values())
    assert counted.counts == Counter(outcome.status for outcome in latest)
    kinds = Counter(outcome.kind for outcome in latest if outcome.kind)
    assert {kind: failures.count for kind, failures in counted.failures.items()} == kinds


def attempt_of(number: int, texts: dict[str, OutcomeStatus]) -> Attempt:
    """Return an attempt's file as a ledger writes it, refusals and failures with a kind."""
    rows = [
        Outcome(
            key, f"{number}{key}", status, kind=f"{status} by {number}" if status in ("refused", "failed") else None
        )
        for key, status in texts.items()
    ]
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMA), body)
    file = pq.ParquetFile(pa.BufferReader(body.getvalue()))
    started = NOON + timedelta(minutes=number)
    return Attempt(1, number, "a plan", "done", None, started, started, file)
