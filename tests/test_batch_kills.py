"""A shard in batch mode, of two batches with a failing line, is killed with -9 wherever that may matter."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from demo.stand_in import Fate, Reply, StandIn, error
from tagger import batch
from tagger.batch import wait_for_shards
from tagger.batch_api import BatchAPI
from tagger.batches import Batches
from tagger.connections import Connection
from tagger.dataset import Dataset
from tagger.ledger import read_attempts
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.runs import open_run
from tagger.storage import Storage
from tagger.tag import tag
from tests.project import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS, OF_A_BATCH = 6, 4
FAILING = "number 5"
STEPS = [(Storage, name) for name in ("put", "create", "upload", "delete")] + [
    (BatchAPI, name) for name in ("upload", "create", "download", "delete")
]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_batch_kills", "tagger.engine", "tagger.tasks"])


def tag_shard(
    dataset: Dataset, run_id: str, connections: dict[str, Connection], kill_at: int | None, steps: Any = None
) -> None:
    """Go through the tag step; die at the moment `kill_at`, where each step has one before it and one after it."""
    moments = 0

    def moment(name: str) -> None:
        nonlocal moments
        if moments == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        moments += 1
        if steps is not None:
            steps.put(name)

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            moment(f"before {name}")
            result = method(*args, **kwargs)
            moment(f"after {name}")
            return result

        return call

    for owner, name in STEPS:
        setattr(owner, name, watched(f"{owner.__name__}.{name}", getattr(owner, name)))
    batch.MAX_REQUESTS = OF_A_BATCH
    run = open_run(dataset, run_id, connections.get)
    wait_for_shards(run, [1], connections.get)
    tag(run, 1, connections.get)


def start(project: Project, run_id: str, kill_at: int | None, steps: Any = None) -> int | None:
    """Run `tag_shard` in a process of its own; return its exit code."""
    names = ("db", "aws_default", "openai_default")
    connections = {name: found for name in names if (found := project.connections(name))}
    process = processes.Process(target=tag_shard, args=(project.dataset, run_id, connections, kill_at, steps))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def fail_one(body: dict[str, Any]) -> Reply | None:
    return error(500, "Broken.") if FAILING in body["messages"][1]["content"] else None


def new_run(project: Project, number: int) -> str:
    with project.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM notes"))
        rows = [{"id": i, "body": f"apple {number:03} number {i}"} for i in range(TEXTS)]
        connection.execute(sa.text("INSERT INTO notes (id, body) VALUES (:id, :body)"), rows)
    project.llm.script_batches(*[Fate(answer=fail_one)] * 2)
    project.change(limits={"max_deleted_fraction": 1, "max_failed_fraction": 1})
    run = project.take(f"run-{number}", all_rows=True)
    plan(run, project.connections)
    return run.run_id


def moments(project: Project) -> list[str]:
    """Return the moments of a run that nobody kills."""
    steps = processes.SimpleQueue()
    run_id = new_run(project, 0)
    names: list[str] = []
    assert start(project, run_id, None, steps) == 0
    while not steps.empty():
        names.append(steps.get())
    return names


def test_nothing_is_handed_over_twice_or_lost_wherever_it_is_killed(project: Project, llm: StandIn) -> None:
    project.change(llm={"mode": "batch"})
    all_moments = moments(project)
    *_, last, _, _ = (i for i, name in enumerate(all_moments) if name == "after Storage.delete")
    assert last > 50
    price = None

    for kill_at, name in enumerate(all_moments[:last]):  # after that the shard is done: what follows is a clear
        calls, batches = len(llm.calls), len(llm.submitted)
        run_id = new_run(project, kill_at + 1)
        assert start(project, run_id, kill_at) == -signal.SIGKILL, name

        assert start(project, run_id, None) == 0, name
        run = project.open(run_id)
        load_back(run, project.connections)
        summary = report(run)

        where = f"killed {name}, moment {kill_at}"
        assert len(llm.submitted) == batches + 2, where
        assert Counter(Counter(call.key for call in llm.calls[calls:]).values()) == {1: TEXTS}, where
        assert (summary.state, summary.texts, summary.tagged, summary.failed) == ("success", TEXTS, TEXTS - 1, 1), where
        assert Counter(row.status for row in project.target().values()) == {"tagged": TEXTS - 1, "failed": 1}
        assert [file.filename for file in llm.files if not file.deleted] == [], where
        assert Batches(run.storage, run.plan().spec_id).all() == [], where
        assert summary.llm_requests == TEXTS, where
        price = price or summary.cost_usd
        assert summary.cost_usd == pytest.approx(price), where
        assert [attempt.state for attempt in read_attempts(run)][-1] == "done", where
