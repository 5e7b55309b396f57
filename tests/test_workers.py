"""Workers that are killed, that share a tree, and whose endpoint is over its rate: whole processes at full size."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from bench.endpoints import LLMEndpoint, S3Endpoint
from bench.project import LOCK, create_source, dataset, environment, redis_connection
from tagger.cache import parse_record
from tagger.connections import Connection
from tagger.dataset_files import parse_dataset
from tagger.ledger import read_attempts
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.runs import Run, open_run
from tagger.snapshot import snapshot
from tagger.window import Selection
from tests.conftest import REPOSITORY
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Site:
    """One shard of new texts, the endpoints, and workers: each a `tagger tag` in a process of its own."""

    def __init__(
        self,
        folder: Path,
        llm: LLMEndpoint,
        s3: S3Endpoint,
        texts: int,
        concurrency: int,
        redis: RedisServer | None = None,
    ) -> None:
        self.folder = folder
        self.llm = llm
        self.s3 = s3
        source = folder / "source.db"
        create_source(source, texts)
        shards = {"texts_per_shard": texts, "max": 1}
        content = dataset("workers", in_flight=concurrency, shards=shards) | ({"lock": LOCK} if redis else {})
        (folder / "bench.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
        self.env = environment(s3.url, llm.base_url, source)
        if redis:
            self.env["AIRFLOW_CONN_REDIS_DEFAULT"] = json.dumps(redis_connection(redis))
        self.dataset = parse_dataset(content, "bench.yaml")

    def connections(self, conn_id: str) -> Connection | None:
        """Look a connection up, as the workers do."""
        value = self.env.get(f"AIRFLOW_CONN_{conn_id.upper()}")
        return Connection(conn_id, **json.loads(value)) if value else None

    def planned(self) -> Run:
        """Take the snapshot and make the plan."""
        run = open_run(self.dataset, "test", self.connections)
        snapshot(self.dataset, run, Selection(rows="all", unfinished=False), self.connections)
        plan(run, self.connections)
        return run

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start a worker; end it at the block's end if it is still there."""
        command = [sys.executable, "-m", "tagger.cli", "tag", str(self.folder / "bench.yaml"), "--run-id", "test"]
        with (
            (self.folder / "worker.log").open("ab") as log,
            subprocess.Popen(command, cwd=REPOSITORY, env=self.env, stderr=log) as process,
        ):
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()

    def finish(self, run: Run) -> Summary:
        """Load and report."""
        load_back(run, self.connections)
        return report(run)

    def log(self) -> str:
        """Return what the workers logged."""
        return (self.folder / "worker.log").read_text()


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLMEndpoint]:
    with LLMEndpoint(tmp_path) as endpoint:
        yield endpoint


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Endpoint]:
    with S3Endpoint(tmp_path) as endpoint:
        yield endpoint


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def ended(worker: subprocess.Popen[bytes], seconds: float = 240.0) -> int:
    return worker.wait(seconds)


def records(run: Run) -> int:
    """Return the number of records in the cache, having read each of them."""
    paths = [path for path, _ in run.storage.list("cache/")]
    for path in paths:
        parse_record(run.storage.get(path) or b"", "bench-model")
    return len(paths)


def test_a_killed_worker_loses_no_more_than_the_calls_in_flight(
    tmp_path: Path, llm: LLMEndpoint, s3: S3Endpoint
) -> None:
    texts, concurrency = 2000, 32
    site = Site(tmp_path, llm, s3, texts, concurrency)
    run = site.planned()
    llm.behave(latency=0.3)

    with site.worker() as killed:
        wait_until(lambda: llm.stats()["calls"] >= texts // 2)
        killed.kill()
        killed.wait()
    [attempt] = read_attempts(run)
    with site.worker() as second:
        assert ended(second) == 0
    summary = site.finish(run)

    assert texts <= llm.stats()["calls"] <= texts + 2 * concurrency
    assert records(run) == texts
    assert (summary.texts, summary.tagged, summary.state) == (texts, texts, "success")
    spent_by_killed = sum(outcome.cost_usd or 0 for outcome in attempt.outcomes)
    assert spent_by_killed > 0
    both = read_attempts(run)
    assert summary.cost_usd == pytest.approx(sum(o.cost_usd or 0 for each in both for o in each.outcomes))
    spent_by_second = sum(outcome.cost_usd or 0 for outcome in both[1].outcomes)
    assert summary.cost_usd == pytest.approx(spent_by_killed + spent_by_second)


def test_three_workers_on_one_tree_call_once_for_each_text_though_one_is_slow(
    tmp_path: Path, llm: LLMEndpoint, s3: S3Endpoint, redis: RedisServer
) -> None:
    texts = 900
    site = Site(tmp_path, llm, s3, texts, 16, redis=redis)
    run = site.planned()
    llm.behave(latency=0.3)

    with site.worker() as first, site.worker() as second, site.worker() as slow:
        wait_until(lambda: llm.stats()["calls"] >= 50)
        for _ in range(5):
            slow.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            slow.send_signal(signal.SIGCONT)
            time.sleep(0.5)
        assert [ended(worker) for worker in (first, second, slow)] == [0, 0, 0], site.log()
    stats = llm.stats()

    assert (stats["calls"], stats["texts"], stats["most_calls_per_text"]) == (texts, texts, 1)
    assert records(run) == texts
    assert site.finish(run).tagged == texts
    by_worker = [sum(outcome.requests for outcome in attempt.outcomes) for attempt in read_attempts(run)]
    assert sum(by_worker) == texts
    assert min(by_worker) > 0  # each had its share


def test_of_a_worker_that_is_killed_the_others_repeat_only_the_calls_in_flight(
    tmp_path: Path, llm: LLMEndpoint, s3: S3Endpoint, redis: RedisServer
) -> None:
    texts, concurrency = 600, 16
    site = Site(tmp_path, llm, s3, texts, concurrency, redis=redis)
    run = site.planned()
    llm.behave(latency=0.5)

    with site.worker() as first, site.worker() as second, site.worker() as killed:
        wait_until(lambda: llm.stats()["calls"] >= texts // 2 and len(read_attempts(run)) == 3)
        killed.kill()
        at = time.monotonic()
        assert [ended(worker) for worker in (first, second)] == [0, 0], site.log()
    stats = llm.stats()

    assert time.monotonic() - at < 60 + 30  # its locks are free after 60 s
    assert stats["texts"] == texts
    assert stats["most_calls_per_text"] <= 2
    assert stats["calls"] < texts + 2 * concurrency  # in flight, or answered and not yet written
    assert records(run) == texts


def test_a_minute_of_429s_leaves_no_text_untagged_and_burns_no_calls(
    tmp_path: Path, llm: LLMEndpoint, s3: S3Endpoint
) -> None:
    texts = 1500
    site = Site(tmp_path, llm, s3, texts, 32)
    run = site.planned()
    llm.behave(latency=0.2, share_429=0.5, retry_after=None)

    with site.worker() as worker:
        wait_until(lambda: llm.stats()["calls"] > 0)
        time.sleep(60)
        assert worker.poll() is None
        llm.behave(share_429=0.0)
        at = time.monotonic()
        assert ended(worker) == 0
    stats = llm.stats()
    summary = site.finish(run)

    assert (summary.tagged, summary.failed) == (texts, 0)
    assert stats["most_calls_per_text"] == 1  # 429s aside
    assert summary.llm_requests == texts + stats["answered_429"]
    assert stats["answered_429"] < 200  # the worker slowed down
    assert time.monotonic() - at < 60  # and recovered: all at once would take 10 s, one by one 300 s


def test_a_tree_that_is_done_is_left_alone_by_a_late_worker(
    tmp_path: Path, llm: LLMEndpoint, s3: S3Endpoint, redis: RedisServer
) -> None:
    site = Site(tmp_path, llm, s3, 100, 16, redis=redis)
    run = site.planned()
    llm.behave(latency=0.1)

    for _ in range(2):
        with site.worker() as worker:
            assert ended(worker) == 0

    assert llm.stats()["calls"] == 100
    assert [attempt.state for attempt in read_attempts(run)] == ["done", "done"]
