"""A whole deployment: one worker is killed, three days are filled back, a run is late, a run fails."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from demo.mail import SENDER
from demo.processes import LOOPBACK, free_port
from tagger.ledger import read_attempts
from tests.airflow.cluster import Cluster
from tests.databases import put_rows
from tests.project import merged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS, SHARDS, CONCURRENCY = 2000, 8, 4
TEAM = "team@example.com"
DEADLINE = "5s"
DAYS = 3


@dataclass
class Story:
    """What was started, and what was so when the worker was killed."""

    cluster: Cluster
    firings: list[datetime]
    killed_run: str
    killed_at: float
    killed_shards: set[int]
    other_shards: set[int]
    keys_at_kill: set[str]
    failing_run: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with Cluster(tmp_path_factory.mktemp("cluster"), workers=2) as cluster:
        firings = last_firings(DAYS)
        fill(cluster, firings)
        unreachable = {"conn_type": "postgres", "host": LOOPBACK, "port": free_port(), "login": "x", "schema": "x"}
        cluster.start(lost_db=unreachable)
        api = cluster.api
        for name in ("notes", "days", "lost"):
            api.wait_for_dag(f"tag_{name}")
        api.unpause("tag_notes")
        killed_run = api.trigger("tag_notes", rows="all")
        wait_for_calls_by_both(cluster, killed_run)
        shards = shards_by_worker(cluster, killed_run)
        killed_at = time.time()
        cluster.airflow.kill("worker-1")
        keys = cached_keys(cluster)
        backfill_from, backfill_to = firings[0].isoformat(), firings[-1].isoformat()
        api.post("/backfills", dag_id="tag_days", from_date=backfill_from, to_date=backfill_to)
        api.unpause("tag_days")  # not before: what the backfill makes, the catch-up leaves out
        api.unpause("tag_lost")
        failing_run = api.trigger("tag_lost")
        yield Story(cluster, firings, killed_run, killed_at, shards["worker-1"], shards["worker-2"], keys, failing_run)


def wait_for_calls_by_both(cluster: Cluster, run_id: str) -> None:
    """Return in mid-run, when all shards are at work. Until they are the LLM is so slow that none is done before."""
    cluster.llm.latency = 2.0

    def state() -> str:
        return f"{len(cluster.llm.calls)} calls; {cluster.api.states('tag_notes', run_id)}"

    def at_work() -> int:
        return sum(map(len, shards_by_worker(cluster, run_id).values()))

    cluster.airflow.wait(lambda: at_work() == SHARDS, 300, state)
    cluster.llm.latency = 0.3
    cluster.airflow.wait(lambda: len(cluster.llm.calls) > TEXTS // 3, 300, state)


def last_firings(count: int) -> list[datetime]:
    """Return the last times at which `0 1 * * *` fired."""
    now = datetime.now(UTC)
    last = now.replace(hour=1, minute=0, second=0, microsecond=0) - timedelta(days=now.hour < 1)
    return [last - timedelta(days=ago) for ago in reversed(range(count))]


def fill(cluster: Cluster, firings: list[datetime]) -> None:
    """Write three datasets and the rows of two; the third one's database is not there."""
    common: dict[str, Any] = {
        "schedule": "0 1 * * *",
        "source": {"updated_at": "updated_at"},
        "llm": {"concurrency": CONCURRENCY},
        "lock": {"conn_id": "redis_default"},
        "shards": {"texts_per_shard": TEXTS // SHARDS, "max": SHARDS},
        "alerts": {"to": [TEAM], "deadline": DEADLINE},
        "tasks": {"default": {"retries": 1}},
    }
    project = cluster.project
    project.change(**common)
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()  # nothing to catch up
    cluster.write(merged(project.content, {"start_date": tomorrow}))
    put_rows(project, {n: f"note {n}: an apple in the storm" for n in range(TEXTS)}, "2026-10-01 12:00+00")
    project.execute("CREATE TABLE days (id BIGINT PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    for day, firing in enumerate(firings):
        at = firing - timedelta(hours=2)
        for n in (2 * day, 2 * day + 1):
            project.execute("INSERT INTO days VALUES (:id, :body, :at)", id=n, body=f"zebra {n}", at=at)
    days = {"dataset": "days", "source": {"table": "days"}, "target": {"table": "day_tags"}}
    cluster.write(merged(project.content, days | {"start_date": firings[0].date()}))
    lost = {"dataset": "lost", "source": {"conn_id": "lost_db"}, "target": {"table": "lost_tags"}}
    cluster.write(merged(project.content, lost | {"start_date": tomorrow, "alerts": {"deadline": "1h"}}))


def shards_by_worker(cluster: Cluster, run_id: str) -> dict[str, set[int]]:
    """Return the shards that each worker is at."""
    running = {
        task["pid"]: task["map_index"]
        for task in cluster.api.tasks("tag_notes", run_id)
        if (task["task_id"], task["state"]) == ("tag", "running")
    }
    return {
        name: {
            running[child.pid] for child in psutil.Process(process.pid).children(recursive=True) if child.pid in running
        }
        for name, process in cluster.airflow.processes.items()
        if name.startswith("worker-")
    }


def cached_keys(cluster: Cluster) -> set[str]:
    """Return the keys of the texts that have a record."""
    paths = [path for path, _ in cluster.project.open("any").storage.list("cache/")]
    return {path.rpartition("/tag_")[2].removesuffix(".json") for path in paths}


def mails(story: Story, dataset: str) -> list[EmailMessage]:
    """Return the mails about a dataset, in the order they came."""
    return [mail for mail in story.cluster.mail.mails() if f"[tagger] {dataset}, " in mail["subject"]]


def body(mail: EmailMessage, kind: str) -> str:
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content())


def test_of_a_worker_killed_in_mid_run_only_the_calls_in_flight_are_made_again(story: Story) -> None:
    cluster, project = story.cluster, story.cluster.project

    assert cluster.api.wait_for_run("tag_notes", story.killed_run, 400) == "success"

    assert {row.status for row in project.target().values()} == {"tagged"}
    assert len(project.target()) == TEXTS
    keys = {row.cache_key for row in project.target().values()}
    made = [call for call in cluster.llm.calls if call.key in keys]
    calls = Counter(call.key for call in made)
    assert 0 < len(story.keys_at_kill) < TEXTS
    assert {calls[key] for key in story.keys_at_kill} == {1}  # no finished text was called twice
    again = {key for key, count in calls.items() if count > 1}
    # in flight, or answered and not yet written
    assert len(again) < 2 * CONCURRENCY * len(story.killed_shards)
    tasks = cluster.api.tasks("tag_notes", story.killed_run)
    tries = {task["map_index"]: task["try_number"] for task in tasks if task["task_id"] == "tag"}
    assert tries == {shard: 2 if shard in story.killed_shards else 1 for shard in range(SHARDS)}
    run = project.open(story.killed_run)
    summary = project.summary(run)
    assert (summary.state, summary.texts, summary.tagged) == ("success", TEXTS, TEXTS)
    # the money is counted all but that of the killed worker's last seconds
    just_before = sum(0 < story.killed_at - call.time < 10 for call in made)
    assert len(made) - just_before <= summary.llm_requests <= len(made)


def test_both_workers_had_their_share(story: Story) -> None:
    cluster = story.cluster
    cluster.api.wait_for_run("tag_notes", story.killed_run, 400)

    attempts = read_attempts(cluster.project.open(story.killed_run))

    done = Counter[tuple[int, str]]()
    for attempt in attempts:
        done[attempt.shard - 1, attempt.state] += sum(outcome.status == "tagged" for outcome in attempt.outcomes)
    assert all(done[shard, "running"] > 0 for shard in story.killed_shards)
    assert all(done[shard, "done"] > 0 for shard in story.other_shards)


def test_late_run_mails_once_and_is_not_stopped(story: Story) -> None:
    story.cluster.api.wait_for_run("tag_notes", story.killed_run, 400)

    [mail] = mails(story, "notes")

    assert str(mail["subject"]).endswith(f": not finished {DEADLINE} after its start")
    assert (mail["to"], mail["from"]) == (TEAM, SENDER)
    for kind in ("plain", "html"):
        assert story.killed_run in body(mail, kind)


def test_backfill_takes_each_days_rows_and_mails_nothing(story: Story) -> None:
    cluster, api = story.cluster, story.cluster.api

    states = [api.wait_for_run("tag_days", run["dag_run_id"]) for run in api.runs("tag_days")]

    assert states == ["success"] * DAYS
    runs = api.runs("tag_days")
    assert {run["run_type"] for run in runs} == {"backfill"}
    at = {run["dag_run_id"]: datetime.fromisoformat(run["logical_date"]) for run in runs}
    with cluster.project.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT row_id, run_id, status FROM day_tags ORDER BY row_id")).all()
    assert [(n, at[run_id], status) for n, run_id, status in rows] == [
        (2 * day + n, firing, "tagged") for day, firing in enumerate(story.firings) for n in (0, 1)
    ]
    assert mails(story, "days") == []


def test_failing_run_mails_once_though_its_task_was_tried_twice(story: Story) -> None:
    api = story.cluster.api

    assert api.wait_for_run("tag_lost", story.failing_run, 300) == "failed"

    [snapshot] = [task for task in api.tasks("tag_lost", story.failing_run) if task["task_id"] == "snapshot"]
    assert (snapshot["state"], snapshot["try_number"]) == ("failed", 2)
    [mail] = mails(story, "lost")
    assert str(mail["subject"]).endswith(": run failed at snapshot")
    assert (mail["to"], mail["from"]) == (TEAM, SENDER)
    for kind in ("plain", "html"):
        assert "connection `lost_db`: the database does not answer" in body(mail, kind)
        assert story.failing_run in body(mail, kind)
        assert story.cluster.airflow.url in body(mail, kind)
