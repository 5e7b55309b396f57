"""A dataset with `mode: batch` in a running Airflow that can run one task at a time."""

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from demo.stand_in import Fate
from tagger.ledger import read_attempts
from tests.airflow.cluster import Cluster
from tests.databases import put_rows
from tests.project import merged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS, SHARDS = 10, 2


@pytest.fixture
def cluster(tmp_path: Any) -> Iterator[Cluster]:
    with Cluster(tmp_path, slots=1) as cluster:
        yield cluster


def test_it_waits_without_a_worker_and_through_a_restart_of_the_triggerer(cluster: Cluster) -> None:
    project, ready = cluster.project, threading.Event()

    def wait(_: object) -> None:
        ready.wait(300)

    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()  # nothing to catch up
    batch = {"llm": {"mode": "batch"}, "shards": {"texts_per_shard": TEXTS // SHARDS}, "start_date": tomorrow}
    put_rows(project, {n: f"note {n}: an apple in the storm" for n in range(TEXTS)})
    project.execute("CREATE TABLE days (id BIGINT PRIMARY KEY, body TEXT)")
    project.execute("INSERT INTO days VALUES (1, 'a zebra')")
    days = {"dataset": "days", "source": {"table": "days"}, "target": {"table": "day_tags"}, "start_date": tomorrow}
    cluster.write(merged(project.content, days))
    project.change(**batch)
    cluster.write(project.content)
    cluster.llm.script_batches(*[Fate(answer=wait)] * SHARDS)
    try:
        cluster.start()
        api = cluster.api
        for name in ("notes", "days"):
            api.wait_for_dag(f"tag_{name}")
            api.unpause(f"tag_{name}")
        run_id = api.trigger("tag_notes", rows="all")

        def states() -> dict[str, list[str]]:
            return api.states("tag_notes", run_id)

        def is_deferred() -> bool:
            return states().get("tag") == ["deferred"] * SHARDS

        cluster.airflow.wait(is_deferred, 120, lambda: str(states()))

        assert api.wait_for_run("tag_days", api.trigger("tag_days")) == "success"  # the one slot is free
        assert is_deferred()
        cluster.airflow.restart("triggerer")
        ready.set()
        assert api.wait_for_run("tag_notes", run_id) == "success"
    finally:
        ready.set()

    assert len(cluster.llm.submitted) == SHARDS
    batches = [call for call in cluster.llm.calls if call.asked == "batch"]
    assert Counter(Counter(call.key for call in batches).values()) == {1: TEXTS}
    assert {row.status for row in project.target().values()} == {"tagged"}
    assert [file.filename for file in cluster.llm.files if not file.deleted] == []
    run = project.open(run_id)
    summary = project.summary(run)
    assert (summary.tagged, summary.llm_requests, summary.mode) == (TEXTS, TEXTS, "batch")
    assert Counter(attempt.asked for attempt in read_attempts(run)) == {"batch": SHARDS, "online": SHARDS}
    logs = "".join(api.log("tag_notes", run_id, "tag", map_index=shard) for shard in range(SHARDS))
    assert "handed to the Batch API" in logs
    assert "apple" not in logs + cluster.airflow.log("triggerer")
