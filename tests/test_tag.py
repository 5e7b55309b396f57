"""The tag step: what it asks, writes and spends, and what stops it."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import urlsplit

import gokart
import pyarrow as pa
import pytest
import sqlalchemy as sa
import yaml
from luigi.task_register import Register

from demo.processes import free_port
from demo.stand_in import Json, Reply, StandIn, completion, error, token_usage
from tagger.cache import Cache
from tagger.connections import Connection
from tagger.exceptions import InputError, LLMStopped, LockFailed, RunFailed, StorageError, TaggerError, Unreachable
from tagger.ledger import Attempt, Ledger, latest_outcomes, read_attempts
from tagger.load import load_back
from tagger.plan import plan
from tagger.redis_connection import redis_client
from tagger.report import Summary, report
from tagger.runs import Run
from tagger.spec import normalise, spec_id, text_key
from tagger.tag import FAILURES_LOGGED, ShardTexts, tag
from tagger.tasks import TagTexts, TagWave, TagWithLLM
from tagger.throttle import LocalRates
from tests.conftest import REPOSITORY
from tests.databases import redis_connection, teach
from tests.project import Project
from tests.servers import RedisServer, S3Store

SECRET = "klopstockwurst"


def planned(project: Project) -> Run:
    """Take all rows and plan; the tag step comes next."""
    run = project.take(all_rows=True)
    plan(run, project.connections)
    return run


def tag_all(project: Project, run: Run) -> dict[str, int]:
    return tag(run, 1, project.connections)


def failing_tag(project: Project, run: Run) -> TaggerError:
    with pytest.raises(TaggerError) as caught:
        tag_all(project, run)
    return caught.value


def put_texts(project: Project, count: int) -> None:
    with project.engine.begin() as connection:
        rows = [{"id": number, "body": f"apple number {number}"} for number in range(count)]
        connection.execute(sa.text("INSERT OR REPLACE INTO notes (id, body) VALUES (:id, :body)"), rows)


def key_of(project: Project, text: str) -> str:
    return text_key(spec_id(project.dataset), normalise(text))


def records(run: Run) -> dict[str, Json]:
    """Return the cache's objects as they lie there, by path."""
    paths = [path for path, _ in run.storage.list("cache/")]
    return {path: json.loads(run.storage.get(path) or b"") for path in paths}


def last_attempt(run: Run) -> Attempt:
    return read_attempts(run)[-1]


# One text, one call


def test_one_text_is_one_call_and_one_record(project: Project, llm: StandIn) -> None:
    project.put(1, "a zebra in the rain")
    run = planned(project)

    assert tag_all(project, run) == {"tagged": 1}
    assert [call.text for call in llm.calls] == ["a zebra in the rain"]
    assert len(records(run)) == 1


@pytest.mark.parametrize("texts_per_request", [1, 4], ids=["alone", "together"])
def test_the_confidence_of_tags_is_in_their_record_and_in_the_books(project: Project, texts_per_request: int) -> None:
    project.change(confidence=True, llm={"texts_per_request": texts_per_request})
    put_texts(project, 3)
    project.put(7, "a chair")
    run = planned(project)

    tag_all(project, run)

    kept = {key: (tuple(o.tags or ()), o.confidence) for key, o in latest_outcomes(read_attempts(run)).items()}
    assert sorted(tags for tags, _ in kept.values()) == [(), ("fruit",), ("fruit",), ("fruit",)]
    assert all(confidence is not None and len(confidence) == len(tags) for tags, confidence in kept.values())
    assert all(0 < value < 1 for _, confidence in kept.values() for value in confidence or ())
    of_records = {
        path[-37:-5]: (tuple(record["tags"]), tuple(record["confidence"])) for path, record in records(run).items()
    }
    assert of_records == kept


def test_without_confidence_records_and_books_have_none(project: Project) -> None:
    put_texts(project, 1)
    run = planned(project)

    tag_all(project, run)

    assert [record["confidence"] for record in records(run).values()] == [None]
    assert [outcome.confidence for outcome in last_attempt(run).outcomes] == [None]


def test_many_rows_with_one_text_cost_one_call(project: Project, llm: StandIn) -> None:
    put_texts(project, 100)
    project.execute("UPDATE notes SET body = 'an apple a day'")

    summary = project.run(all_rows=True)

    assert (summary.rows, summary.texts, summary.tagged, summary.llm_requests) == (100, 1, 1, 1)
    assert len(llm.calls) == 1
    assert [row.tags for row in project.target().values()] == [["fruit"]] * 100


def test_variants_of_width_and_white_space_cost_one_call(project: Project, llm: StandIn) -> None:
    variants = ["Apple 10\nｱｯﾌﾟﾙ", "Ａｐｐｌｅ　１０\nアップル", "  Apple 10\r\nアップル \n", "Apple １０\rｱｯﾌﾟﾙ"]
    for row_id, body in enumerate(variants):
        project.put(row_id, body)

    summary = project.run(all_rows=True)

    assert (summary.texts, summary.tagged) == (1, 1)
    assert len(llm.calls) == 1
    assert llm.calls[0].text in [body.strip() for body in variants] + variants


def test_the_text_is_asked_as_it_stands_in_the_row(project: Project, llm: StandIn) -> None:
    project.put(1, "10⁵ apples, ｈａｌｆ of them ﬁne")

    project.run(all_rows=True)

    assert [call.text for call in llm.calls] == ["10⁵ apples, ｈａｌｆ of them ﬁne"]


def test_no_more_calls_are_in_flight_than_the_file_allows(project: Project, llm: StandIn) -> None:
    llm.latency = 0.05
    put_texts(project, 20)
    project.change(llm={"concurrency": 4})

    tag_all(project, planned(project))

    assert llm.max_in_flight == 4


def test_a_shard_that_the_run_does_not_have_is_wrong_input(project: Project) -> None:
    put_texts(project, 1)
    run = planned(project)

    for number in (0, 2, -1):
        with pytest.raises(InputError, match=f"no shard {number}"):
            tag(run, number, project.connections)


# Requests to S3


class S3Proxy:
    """An S3 server in front of another: notes the requests, and answers those itself for which `answer` has a status.

    `answer` gets method and key; 0 drops the connection, None passes the request on.
    """

    def __init__(self, behind: S3Store) -> None:
        self.seen: list[tuple[str, str]] = []
        self.answer: Callable[[str, str], int | None] = lambda method, key: None
        proxy, target = self, urlsplit(behind.endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                key = self.path.split("?", 1)[0].removeprefix(f"/{behind.bucket}").lstrip("/")
                proxy.seen.append((self.command, key))
                status = proxy.answer(self.command, key)
                if status == 0:
                    self.close_connection = True
                elif status:
                    code = {403: "AccessDenied", 503: "SlowDown"}[status]
                    self.reply(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
                else:
                    self.pass_on(body)

            def pass_on(self, body: bytes) -> None:
                connection = HTTPConnection(target, timeout=20)
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                self.reply(answer.status, dict(answer.getheaders()), answer.read())
                connection.close()

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_request

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), OSError):  # which is a client that hung up
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.store = replace(behind, endpoint=f"http://127.0.0.1:{self._server.server_port}")

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def cache_requests(self) -> list[str]:
        return [method for method, key in self.seen if key.startswith("cache/")]


@pytest.fixture
def proxy(project: Project) -> Iterator[S3Proxy]:
    """A proxy in front of the project's S3 server."""
    with S3Proxy(project.store) as proxy:
        project.store = proxy.store
        yield proxy


def test_a_new_text_costs_one_write_and_nothing_else(project: Project, proxy: S3Proxy, llm: StandIn) -> None:
    put_texts(project, 12)
    run = planned(project)
    proxy.seen.clear()

    tag_all(project, run)

    assert proxy.cache_requests() == ["PUT"] * 12
    assert len(llm.calls) == 12


def test_other_requests_do_not_grow_with_the_texts(project: Project, proxy: S3Proxy) -> None:
    others = []
    for count in (2, 20):
        put_texts(project, count)
        run = planned(project)
        proxy.seen.clear()
        tag_all(project, run)
        others.append(len(proxy.seen) - len(proxy.cache_requests()))

    assert others[0] == others[1] <= 10


# A shard tagged again


def test_a_shard_tagged_again_makes_no_call_and_asks_nothing_of_the_cache(
    project: Project, proxy: S3Proxy, llm: StandIn
) -> None:
    put_texts(project, 5)
    run = planned(project)
    tag_all(project, run)
    proxy.seen.clear()

    tag_all(project, run)

    assert len(llm.calls) == 5
    assert proxy.cache_requests() == []
    assert [attempt.state for attempt in read_attempts(run)] == ["done", "done"]


def test_a_text_that_failed_is_not_cached_and_the_others_are(project: Project, llm: StandIn) -> None:
    put_texts(project, 5)
    llm.script(error(400, "Invalid character."))
    run = planned(project)

    assert tag_all(project, run) == {"tagged": 4, "failed": 1}
    assert len(records(run)) == 4
    [failed] = [outcome for outcome in last_attempt(run).outcomes if outcome.status == "failed"]
    assert (failed.kind, failed.requests) == ("rejected", 1)


def test_the_next_run_asks_for_what_failed_and_no_more(project: Project, llm: StandIn) -> None:
    put_texts(project, 5)
    llm.script(error(400, "Invalid character."))
    first = planned(project)
    tag_all(project, first)
    [failed] = [outcome.key for outcome in last_attempt(first).outcomes if outcome.status == "failed"]

    second = planned(project)
    tag_all(project, second)

    assert [call.key for call in llm.calls[5:]] == [failed]
    assert len(records(second)) == 5


def test_a_shard_tagged_again_asks_for_what_failed_and_no_more(project: Project, llm: StandIn) -> None:
    put_texts(project, 5)
    llm.script(error(400, "Invalid character."))
    run = planned(project)
    tag_all(project, run)

    tag_all(project, run)

    assert len(llm.calls) == 6
    assert len(records(run)) == 5


def test_a_retried_attempt_looks_once_for_each_open_text(project: Project, proxy: S3Proxy, llm: StandIn) -> None:
    put_texts(project, 12)
    llm.script(*[error(400, "Invalid character.")] * 3)
    run = planned(project)
    assert tag_all(project, run) == {"tagged": 9, "failed": 3}
    proxy.seen.clear()

    assert tag_all(project, run) == {"tagged": 3}
    assert Counter(proxy.cache_requests()) == {"HEAD": 3, "PUT": 3}
    assert len(llm.calls) == 12 + 3


def test_a_run_that_is_planned_again_asks_for_what_is_new_in_it(project: Project, llm: StandIn) -> None:
    put_texts(project, 5)
    llm.script(error(400, "Invalid character."))
    run = planned(project)
    tag_all(project, run)
    plan(run, project.connections)

    assert tag_all(project, run) == {"tagged": 1}
    assert len(llm.calls) == 6
    assert len(records(run)) == 5


def test_what_an_attempt_answered_and_did_not_book_is_not_asked_again(project: Project, llm: StandIn) -> None:
    put_texts(project, 5)
    run = planned(project)
    tag_all(project, run)
    with Ledger(run, run.plan().plan_id, 1, None):  # as an attempt that was killed before it wrote its books
        run.storage.delete(f"{run.files}shard-1-1.parquet")

    assert tag_all(project, run) == {"tagged": 5}
    assert len(llm.calls) == 5


@pytest.mark.slow
def test_a_killed_shard_loses_the_calls_in_flight_and_no_money_unseen(
    project: Project, llm: StandIn, tmp_path: Path
) -> None:
    texts, concurrency = 64, 4
    put_texts(project, texts)
    project.change(llm={"concurrency": concurrency})
    run = planned(project)
    llm.latency = 0.4

    with tagging_process(project, run, tmp_path) as process:
        wait_until(lambda: any(attempt.values("key") for attempt in read_attempts(run)))
        process.kill()
    llm.latency = 0.0
    asked_before = len(llm.calls)
    [killed] = read_attempts(run)
    tag_all(project, run)
    load_back(run, project.connections)
    summary = report(run)

    assert 0 < asked_before < texts
    assert killed.state == "running"
    assert len(llm.calls) < texts + 2 * concurrency  # in flight, or answered and not yet written
    assert max(llm.calls_per_key().values()) <= 2
    assert (summary.texts, summary.tagged) == (texts, texts)
    both = [outcome for attempt in read_attempts(run) for outcome in attempt.outcomes]
    spent_by_killed = sum(outcome.cost_usd or 0 for outcome in killed.outcomes)
    assert spent_by_killed > 0
    assert summary.cost_usd == pytest.approx(sum(outcome.cost_usd or 0 for outcome in both))
    assert summary.llm_requests == sum(outcome.requests for outcome in both) >= texts - concurrency


@contextmanager
def tagging_process(project: Project, run: Run, folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tagger tag` in a process of its own."""
    file = folder / "notes.yaml"
    file.write_text(yaml.safe_dump(project.content, allow_unicode=True))
    ids = ["db", "aws_default", "openai_default", *(["redis_default"] if project.redis else [])]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_CONN")}
    for conn_id in ids:
        connection = project.connections(conn_id)
        assert connection is not None
        env[f"AIRFLOW_CONN_{conn_id.upper()}"] = json.dumps(
            {
                "conn_type": connection.conn_type,
                "host": connection.host,
                "port": connection.port,
                "login": connection.login,
                "password": connection.password,
                "extra": connection.extra,
            }
        )
    command = [sys.executable, "-m", "tagger.cli", "tag", str(file), "--run-id", run.run_id, *options]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


# What stops a shard


def test_a_wrong_key_stops_after_the_calls_in_flight(project: Project, llm: StandIn) -> None:
    llm.api_key = "another"
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    run = planned(project)

    failure = failing_tag(project, run)

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 2
    assert 1 <= len(llm.calls) <= 4
    assert records(run) == {}
    assert (last_attempt(run).state, last_attempt(run).reason) == ("broken", str(failure))


def test_a_key_revoked_in_mid_run_keeps_what_was_answered(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    llm.script(*[completion('{"tags": ["fruit"]}')] * 10, *[error(401, "No.", "invalid_api_key")] * 30)
    run = planned(project)

    failure = failing_tag(project, run)

    assert isinstance(failure, LLMStopped)
    assert failure.exit_code == 1
    assert 11 <= len(llm.calls) <= 14
    assert len(records(run)) == 10
    assert sum(outcome.status == "tagged" for outcome in last_attempt(run).outcomes) == 10


def test_the_stand_ins_answers_are_not_recorded_for_a_real_model(project: Project, llm: StandIn) -> None:
    put_texts(project, 20)
    project.change(llm={"model": "gpt-5-mini", "concurrency": 2})
    run = planned(project)

    failure = failing_tag(project, run)

    assert isinstance(failure, LLMStopped)
    assert "stand-in" in str(failure)
    assert len(llm.calls) <= 2
    assert records(run) == {}


def test_an_answer_that_may_not_be_written_stops_the_calls(project: Project, proxy: S3Proxy, llm: StandIn) -> None:
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    run = planned(project)
    proxy.seen.clear()

    def allowed_five_times(method: str, key: str) -> int | None:
        return 403 if proxy.cache_requests().count("PUT") > 5 else None

    proxy.answer = lambda method, key: allowed_five_times(method, key) if key.startswith("cache/") else None
    failure = failing_tag(project, run)

    assert isinstance(failure, StorageError)
    assert failure.exit_code == 1
    assert "access denied" in str(failure)
    assert len(llm.calls) <= 5 + 1 + 2 * 4  # four in flight and four that wait to be written
    attempt = last_attempt(run)
    assert attempt.state == "broken"
    assert sum(outcome.requests for outcome in attempt.outcomes) == len(llm.calls)
    assert {outcome.kind for outcome in attempt.outcomes if outcome.status == "failed"} == {"storage"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 is not waited for as long as else."""
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("tagger.cache.PATIENCE_SECONDS", 0.5)


@pytest.mark.parametrize("status", [503, 0], ids=["503", "reset"])
@pytest.mark.usefixtures("impatient")
def test_s3_going_away_stops_the_calls(project: Project, proxy: S3Proxy, llm: StandIn, status: int) -> None:
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    run = planned(project)
    proxy.seen.clear()
    proxy.answer = lambda method, key: status if len(llm.calls) >= 6 else None

    failure = failing_tag(project, run)

    assert isinstance(failure, StorageError)
    assert failure.exit_code == 1
    assert "S3" in str(failure)
    assert len(llm.calls) <= 6 + 2 * 4


@pytest.mark.usefixtures("impatient")
def test_after_s3_is_back_the_shard_can_be_tagged_again(project: Project, proxy: S3Proxy, llm: StandIn) -> None:
    put_texts(project, 32)
    project.change(llm={"concurrency": 4})
    run = planned(project)
    proxy.answer = lambda method, key: 0 if len(llm.calls) >= 12 else None
    failing_tag(project, run)
    proxy.answer = lambda method, key: None
    kept = [path.removesuffix(".json").rsplit("_", 1)[1] for path in records(run)]

    assert tag_all(project, run)["tagged"] >= 32 - len(kept)

    assert len(records(run)) == 32
    assert len(kept) > 0
    assert {llm.calls_per_key()[key] for key in kept} == {1}
    assert len(llm.calls) <= 32 + 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("with_lock", [False, True], ids=["no lock", "lock"])
def test_s3_that_is_away_for_some_seconds_costs_nothing(
    project: Project, proxy: S3Proxy, llm: StandIn, with_lock: bool, request: pytest.FixtureRequest
) -> None:
    if with_lock:
        request.getfixturevalue("locked")
    put_texts(project, 80)
    project.change(llm={"concurrency": 8})
    llm.latency = 0.05
    run = planned(project)
    proxy.seen.clear()
    until: list[float] = []

    def away(method: str, key: str) -> int | None:
        if not until and proxy.cache_requests().count("PUT") > 10:
            until.append(time.monotonic() + 10.0)
        if until and time.monotonic() < until[0]:
            return [503, 0][len(proxy.seen) % 2]
        return None

    proxy.answer = away

    assert tag_all(project, run) == {"tagged": 80}
    assert until
    assert len(llm.calls) == len(records(run)) == 80
    assert proxy.cache_requests().count("PUT") > 80
    assert last_attempt(run).state == "done"
    assert sum(outcome.requests for outcome in last_attempt(run).outcomes) == 80


@pytest.mark.slow
def test_an_s3_that_hangs_does_not_hold_up_the_end_of_a_process(
    project: Project, proxy: S3Proxy, llm: StandIn, tmp_path: Path
) -> None:
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    llm.latency = 1.0
    run = planned(project)
    over = threading.Event()

    def hang(method: str, key: str) -> int | None:
        if len(llm.calls) >= 4:
            over.wait(90)
        return None

    proxy.answer = hang
    with tagging_process(project, run, tmp_path) as process:
        try:
            wait_until(lambda: len(llm.calls) >= 4)
            time.sleep(6)  # the books are being written
            process.terminate()
            code = process.wait(30)  # 18 s on a machine that has nothing else to do
        finally:
            over.set()

    assert code == 143


class OneAtATime:
    """A Parquet file that counts how many threads are in it at once."""

    num_row_groups = 8
    inside = most = 0

    def read_row_group(self, wave: int, columns: list[str]) -> pa.Table:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.02)
        self.inside -= 1
        return pa.table({name: ["x"] for name in columns})


def test_the_shards_file_is_read_by_one_thread_at_a_time(project: Project) -> None:
    file: Any = OneAtATime()
    texts = ShardTexts(file, Cache(project.open("one").storage, "spec", "model"))
    threads = [threading.Thread(target=(texts.keys, texts.unanswered)[n % 2], args=(n,)) for n in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert file.most == 1


# The budget

ONE_MILLI_DOLLAR = completion('{"tags": ["fruit"]}', usage=token_usage(1000, 0))


def with_budget(project: Project, llm: StandIn, usd: float) -> None:
    project.change(limits={"max_cost_usd": usd}, llm={"concurrency": 4, "price": {"input": 1.0, "output": 1.0}})
    llm.script(*[ONE_MILLI_DOLLAR] * 100)


def test_a_spent_budget_stops_within_the_calls_in_flight(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    with_budget(project, llm, 0.01)
    run = planned(project)

    failure = failing_tag(project, run)

    assert isinstance(failure, RunFailed)
    assert failure.exit_code == 1
    assert "budget reached" in str(failure)
    assert 10 <= len(llm.calls) < 10 + 4
    assert len(records(run)) == len(llm.calls)


@pytest.mark.parametrize("concurrency", [1, 2, 16])
def test_the_budget_is_overshot_by_the_calls_in_flight_at_most(
    project: Project, llm: StandIn, concurrency: int
) -> None:
    put_texts(project, 40)
    with_budget(project, llm, 0.0095)
    project.change(llm={"concurrency": concurrency})
    run = planned(project)

    assert "budget reached" in str(failing_tag(project, run))
    assert 10 <= len(llm.calls) < 10 + concurrency
    assert len(records(run)) == len(llm.calls)
    spent = sum(outcome.cost_usd or 0 for outcome in last_attempt(run).outcomes)
    assert spent == pytest.approx(len(llm.calls) * 0.001)


def test_a_run_over_its_budget_fails_and_skips_the_rest(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    with_budget(project, llm, 0.01)
    run = project.take(all_rows=True)

    with pytest.raises(RunFailed, match="budget reached"):
        project.finish(run)

    summary = project.summary(run)
    calls = len(llm.calls)
    assert (summary.state, summary.tagged, summary.skipped, summary.failed) == ("failed", calls, 24 - calls, 0)
    assert summary.cost_usd == pytest.approx(calls * 0.001)
    assert Counter(row.status for row in project.target().values()) == {"tagged": calls, "skipped": 24 - calls}


def test_failed_calls_count_against_the_budget(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    project.change(limits={"max_cost_usd": 0.012}, llm={"concurrency": 1, "price": {"input": 1.0, "output": 1.0}})
    llm.script(*[completion("no tags", usage=token_usage(1000, 0))] * 100)
    run = planned(project)

    assert "budget reached" in str(failing_tag(project, run))
    assert len(llm.calls) == 12


def test_a_shard_tagged_again_has_no_new_budget(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    with_budget(project, llm, 0.01)
    run = planned(project)
    failing_tag(project, run)
    calls = len(llm.calls)

    assert "budget reached" in str(failing_tag(project, run))
    assert len(llm.calls) == calls


def test_the_next_run_goes_on_where_the_budget_ended(project: Project, llm: StandIn) -> None:
    put_texts(project, 18)  # of which the first run answers at least 10
    with_budget(project, llm, 0.01)
    first = planned(project)
    failing_tag(project, first)

    second = planned(project)
    tag_all(project, second)

    assert len(llm.calls) == len(records(second)) == 18


def test_a_budget_that_just_suffices_is_not_reached(project: Project, llm: StandIn) -> None:
    put_texts(project, 10)
    with_budget(project, llm, 0.01)
    run = planned(project)

    assert tag_all(project, run) == {"tagged": 10}
    assert len(llm.calls) == 10


def test_all_shards_together_stay_within_the_budget(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    with_budget(project, llm, 0.008)
    project.change(shards={"texts_per_shard": 6}, llm={"concurrency": 1})
    run = planned(project)

    for shard in run.plan().shards:
        with pytest.raises(RunFailed, match="budget reached"):
            tag(run, shard.shard, project.connections)

    assert len(run.plan().shards) == 4
    assert len(llm.calls) == 8


def test_shards_that_go_one_after_the_other_have_all_that_is_left(project: Project, llm: StandIn) -> None:
    put_texts(project, 24)
    with_budget(project, llm, 0.008)
    project.change(shards={"texts_per_shard": 6}, llm={"concurrency": 1})
    run = planned(project)

    assert tag(run, 1, project.connections, alone=True) == {"tagged": 6}
    for number in (2, 3):
        with pytest.raises(RunFailed, match="budget reached: the run's budget"):
            tag(run, number, project.connections, alone=True)

    assert len(llm.calls) == 8


@pytest.mark.slow
@pytest.mark.parametrize("with_lock", [True, False], ids=["lock", "no lock"])
def test_four_workers_at_once_stop_at_the_cap_and_the_calls_in_flight(
    project: Project, llm: StandIn, tmp_path: Path, with_lock: bool, request: pytest.FixtureRequest
) -> None:
    if with_lock:
        request.getfixturevalue("locked")
    texts, cap, concurrency = 400, 100, 4
    put_texts(project, texts)
    with_budget(project, llm, cap / 1000)
    project.change(shards={"texts_per_shard": texts // 4}, llm={"concurrency": concurrency})
    llm._script.clear()
    llm.script(*[replace(ONE_MILLI_DOLLAR, delay=0.1)] * texts)
    run = planned(project)
    assert len(run.plan().shards) == 4

    with ExitStack() as stack:
        workers = [
            stack.enter_context(tagging_process(project, run, tmp_path, "--shard", str(shard))) for shard in range(1, 5)
        ]
        codes = [worker.wait(120) for worker in workers]
    load_back(run, project.connections)
    with pytest.raises(RunFailed, match="budget reached"):
        report(run)

    assert codes == [1] * 4
    assert cap <= len(llm.calls) < cap + 4 * concurrency
    assert len(records(run)) == len(llm.calls)
    summary = project.summary(run)
    assert summary.cost_usd == pytest.approx(len(llm.calls) / 1000)
    assert (summary.tagged, summary.skipped, summary.failed) == (len(llm.calls), texts - len(llm.calls), 0)


# Several texts in one request


def put_notes(project: Project, count: int) -> None:
    words = ("an apple", "a zebra", "rain", "a chair", "林檎", "a tiger in a storm", "動物と天気")
    with project.engine.begin() as connection:
        rows = [
            {"id": n, "body": f"{words[n % 7]}, note {n}" + " and so on" * (200 * (n % 50 == 7))} for n in range(count)
        ]
        connection.execute(sa.text("INSERT OR REPLACE INTO notes (id, body) VALUES (:id, :body)"), rows)


def test_texts_asked_together_get_the_tags_that_they_get_alone(project: Project, llm: StandIn) -> None:
    put_notes(project, 300)
    by_size: dict[int, dict[str, Json]] = {}
    requests: dict[int, int] = {}
    for texts_per_request in (1, 20):
        project.change(
            storage=f"s3://{project.store.bucket}/{texts_per_request}", llm={"texts_per_request": texts_per_request}
        )
        before = len(llm.calls)
        summary = project.run(all_rows=True)
        requests[texts_per_request] = len(llm.calls) - before
        by_size[texts_per_request] = {
            path.rpartition("tag_")[2]: record for path, record in records(project.open("any")).items()
        }
        assert (summary.tagged, summary.failed, summary.llm_requests) == (300, 0, requests[texts_per_request])

    assert requests[1] == 300
    assert requests[20] <= 6 + 294 // 20 + 3  # six are long
    one, several = by_size[1], by_size[20]
    assert {key: record["tags"] for key, record in one.items()} == {key: r["tags"] for key, r in several.items()}
    assert Counter(record["asked"] for record in one.values()) == {"online": 300}
    assert Counter(record["asked"] for record in several.values())["together"] >= 290


def test_what_a_request_used_is_booked_whole(project: Project, llm: StandIn) -> None:
    put_notes(project, 100)
    project.change(llm={"texts_per_request": 20})
    llm.script(completion("no JSON", usage=token_usage(1000, 7)))

    run = planned(project)
    tag_all(project, run)

    stats, outcomes = llm.stats(), list(last_attempt(run).outcomes)
    usages = [record["usage"] for record in records(run).values()]
    assert sum(outcome.input_tokens for outcome in outcomes) == stats["prompt_tokens"]
    assert sum(outcome.output_tokens for outcome in outcomes) == stats["completion_tokens"]
    assert sum(outcome.requests for outcome in outcomes) == stats["calls"]
    assert sum(usage["input"] for usage in usages) == stats["prompt_tokens"]
    cost = sum(record["cost_usd"] for record in records(run).values())
    assert cost == pytest.approx((stats["prompt_tokens"] + 10 * stats["completion_tokens"]) / 1e6)


def test_a_spent_budget_stops_requests_for_several_texts_within_those_in_flight(project: Project, llm: StandIn) -> None:
    put_texts(project, 200)
    project.change(
        limits={"max_cost_usd": 0.0995},
        llm={"concurrency": 2, "price": {"input": 1.0, "output": 1.0}, "texts_per_request": 10},
    )
    answers = json.dumps({"answers": [{"id": str(number), "tags": ["fruit"]} for number in range(1, 11)]})
    llm.script(*[completion(answers, usage=token_usage(10_000, 0))] * 100)
    run = planned(project)

    assert "budget reached" in str(failing_tag(project, run))
    assert 10 <= len(llm.calls) < 10 + 2
    assert len(records(run)) == 10 * len(llm.calls)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["to the end", "one is killed"])
def test_workers_on_one_shard_ask_each_text_once_though_several_at_a_time(
    locked: Project, llm: StandIn, tmp_path: Path, killed: bool
) -> None:
    texts = 300
    put_texts(locked, texts)
    locked.change(llm={"concurrency": 4, "texts_per_request": 5})
    llm.latency = 0.3
    run = planned(locked)

    with tagging_process(locked, run, tmp_path) as one, tagging_process(locked, run, tmp_path) as other:
        if killed:
            wait_until(lambda: len(read_attempts(run)) == 2 and len(llm.calls) >= 20)
            one.kill()
        codes = one.wait(120), other.wait(180)

    assert codes == (-9 if killed else 0, 0)
    assert len(records(run)) == texts
    again = [count for count in llm.calls_per_text().values() if count > 1]
    assert max(again, default=1) <= 2
    assert len(again) < (2 * 4 * 5 if killed else 1)


# Rates


@pytest.mark.parametrize(
    ("alone", "rates"), [(False, (150.0, 15_000.0)), (True, (600.0, 60_000.0))], ids=["beside others", "alone"]
)
def test_without_a_lock_each_shard_has_its_part_of_the_rates(
    project: Project, monkeypatch: pytest.MonkeyPatch, alone: bool, rates: tuple[float, float]
) -> None:
    given: list[tuple[float | None, float | None]] = []

    class Noted(LocalRates):
        def __init__(self, requests: float | None, tokens: float | None) -> None:
            given.append((requests, tokens))
            super().__init__(requests, tokens)

    monkeypatch.setattr("tagger.tag.LocalRates", Noted)
    put_texts(project, 8)
    project.change(shards={"texts_per_shard": 2}, llm={"requests_per_minute": 600, "tokens_per_minute": 60_000})
    run = planned(project)

    for shard in run.plan().shards:
        tag(run, shard.shard, project.connections, alone=alone)

    assert given == [rates] * 4


@pytest.mark.slow
def test_a_rate_of_a_shard_is_kept_at_the_endpoint(project: Project, llm: StandIn) -> None:
    put_texts(project, 20)
    project.change(shards={"texts_per_shard": 10}, llm={"requests_per_minute": 240})
    run = planned(project)

    tag(run, 1, project.connections)
    first = [call.time for call in llm.calls]
    tag(run, 2, project.connections, alone=True)
    second = [call.time for call in llm.calls[len(first) :]]

    assert len(first) == len(second) == 10
    assert max(first) - min(first) >= 3.3  # 2 a second: 9 · 61 / 120 - 1
    assert max(second) - min(second) >= 1.2
    assert max(second) - min(second) < 3.3


def test_half_of_all_calls_answered_429_cost_no_text(
    project: Project, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.02)
    monkeypatch.setattr("tagger.throttle.LONGEST_PAUSE", 0.1)
    llm.rate_429 = 0.5
    put_texts(project, 60)
    run = planned(project)

    assert tag_all(project, run) == {"tagged": 60}
    by_status = llm.stats()["by_status"]
    assert by_status["200"] == 60
    assert by_status["429"] == len(llm.calls) - 60 > 10


# Several workers


@pytest.fixture
def locked(project: Project, redis_default: Connection) -> Project:
    """The project, with a lock."""
    project.redis = redis_default
    project.change(lock={"conn_id": "redis_default"})
    return project


def test_with_a_lock_a_new_text_costs_one_write_and_one_look(locked: Project, proxy: S3Proxy, llm: StandIn) -> None:
    put_texts(locked, 12)
    run = planned(locked)
    proxy.seen.clear()

    assert tag_all(locked, run) == {"tagged": 12}
    assert Counter(proxy.cache_requests()) == {"HEAD": 12, "PUT": 12}
    assert len(llm.calls) == 12


def test_a_text_that_another_run_answered_since_the_plan_is_not_asked(
    locked: Project, proxy: S3Proxy, llm: StandIn
) -> None:
    put_texts(locked, 8)
    late = planned(locked)
    tag_all(locked, planned(locked))
    proxy.seen.clear()

    assert tag_all(locked, late) == {"tagged": 8}
    assert len(llm.calls) == 8
    assert Counter(proxy.cache_requests()) == {"HEAD": 8, "GET": 8}
    assert [(o.requests, o.cost_usd) for o in last_attempt(late).outcomes] == [(0, 0.0)] * 8


@pytest.mark.slow
def test_processes_that_tag_the_same_shard_at_once_never_ask_a_text_twice(
    locked: Project, llm: StandIn, tmp_path: Path
) -> None:
    texts = 120
    put_texts(locked, texts)
    locked.change(llm={"concurrency": 4})
    llm.latency = 0.2
    run = planned(locked)

    with tagging_process(locked, run, tmp_path) as one, tagging_process(locked, run, tmp_path) as other:
        codes = one.wait(120), other.wait(120)

    assert codes == (0, 0)
    assert set(llm.calls_per_key().values()) == {1}
    assert len(llm.calls) == len(records(run)) == texts
    attempts = read_attempts(run)
    assert [attempt.state for attempt in attempts] == ["done", "done"]
    assert sum(outcome.requests for attempt in attempts for outcome in attempt.outcomes) == texts


def test_locks_are_free_afterwards_and_the_rates_and_the_spend_expire(
    locked: Project, redis_default: Connection
) -> None:
    put_texts(locked, 5)
    locked.change(limits={"max_cost_usd": 1}, llm={"requests_per_minute": 6000, "tokens_per_minute": 1_000_000})
    run = planned(locked)

    tag_all(locked, run)

    with redis_client("redis_default", locked.connections) as client:
        keys = client.keys("*")
        assert sorted(key.decode() for key in keys) == [
            f"tagger:rates:notes:{run.run_id}",
            f"tagger:spend:notes:{run.run_id}",
        ]
        assert all(0 < client.ttl(key) <= 3600 for key in keys)


def test_redis_is_told_no_text(locked: Project, llm: StandIn, redis_server: RedisServer) -> None:
    locked.put(1, f"a zebra and {SECRET}")
    locked.change(limits={"max_cost_usd": 1}, llm={"requests_per_minute": 6000, "tokens_per_minute": 1_000_000})
    run = planned(locked)
    seen: list[str] = []
    with redis_server.client() as watcher, redis_server.client() as other, watcher.monitor() as monitor:

        def watch() -> None:
            for command in monitor.listen():
                seen.append(command["command"])
                if "that is all" in command["command"]:
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        tag_all(locked, run)
        other.echo("that is all")
        thread.join(10)

    assert len(llm.calls) == 1
    assert len(seen) > 3
    assert not [command for command in seen if SECRET in command or "zebra" in command]


def test_a_redis_that_is_away_at_the_start_is_wrong_input_and_no_call(locked: Project, llm: StandIn) -> None:
    put_texts(locked, 3)
    run = planned(locked)
    locked.redis = Connection("redis_default", "redis", "127.0.0.1", free_port(), password="s3cret-Pa55word")

    failure = failing_tag(locked, run)

    assert isinstance(failure, Unreachable)
    assert failure.exit_code == 2
    assert "`redis_default`" in str(failure)
    assert "s3cret-Pa55word" not in str(failure)
    assert llm.calls == []
    assert [(attempt.state, attempt.reason) for attempt in read_attempts(run)] == [("broken", str(failure))]


def test_a_shard_that_could_not_even_start_tells_the_report_why(project: Project, llm: StandIn) -> None:
    put_texts(project, 1)
    project.change(llm={"conn_id": "nope"})

    with pytest.raises(RunFailed, match="connection `nope`"):
        project.run()

    assert llm.calls == []


def test_a_redis_that_refuses_the_password_is_wrong_input_and_no_call(
    locked: Project, llm: StandIn, redis_default: Connection
) -> None:
    put_texts(locked, 3)
    run = planned(locked)
    locked.redis = replace(redis_default, password="s3cret-Pa55word")

    failure = failing_tag(locked, run)

    assert failure.exit_code == 2
    assert "password" in str(failure)
    assert "s3cret-Pa55word" not in str(failure)
    assert llm.calls == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rates", "limits"),
    [
        ({}, {}),
        ({"requests_per_minute": 60_000}, {}),
        ({"tokens_per_minute": 60_000_000}, {}),
        ({}, {"max_cost_usd": 1}),
    ],
    ids=["lock", "requests", "tokens", "budget"],
)
def test_a_redis_that_goes_away_stops_the_calls_and_loses_no_answer(
    locked: Project, llm: StandIn, tmp_path: Path, rates: dict[str, int], limits: dict[str, int]
) -> None:
    put_texts(locked, 24)
    locked.change(llm={"concurrency": 4, **rates}, limits=limits)
    llm.latency = 1.0
    run = planned(locked)
    with RedisServer(tmp_path / "redis") as server:
        locked.redis = redis_connection(server)

        def kill() -> None:
            wait_until(lambda: len(llm.calls) >= 6)
            server.kill()

        killing = threading.Thread(target=kill, daemon=True)
        killing.start()
        failure = failing_tag(locked, run)
        killing.join(10)

        answered = len(records(run))
        assert isinstance(failure, LockFailed)
        assert failure.exit_code == 1
        assert 6 <= len(llm.calls) <= 12
        assert answered == len(llm.calls)
        assert sum(outcome.requests for outcome in last_attempt(run).outcomes) == len(llm.calls)

        server.start()
        llm.latency = 0.0
        tag_all(locked, run)
    assert set(llm.calls_per_key().values()) == {1}
    assert len(records(run)) == 24


# The record


def test_the_record_has_this_form(project: Project, llm: StandIn) -> None:
    project.put(1, f"a zebra and {SECRET}")
    project.change(llm={"price": {"input": 1.0, "cached_input": 0.1, "output": 10.0}})
    llm.script(
        completion(
            '{"tags": ["animal"]}', model="gpt-5-mini-2025-08-07", usage=token_usage(prompt=1200, answer=8, cached=1024)
        )
    )
    run = planned(project)

    tag_all(project, run)

    [(path, found)] = records(run).items()
    key = key_of(project, f"a zebra and {SECRET}")
    created_at = datetime.fromisoformat(found.pop("created_at"))
    assert path == f"cache/{spec_id(project.dataset)}/{key[:2]}/tag_{key}.json"
    assert found == {
        "version": 1,
        "status": "tagged",
        "reason": None,
        "tags": ["animal"],
        "confidence": None,
        "model": "gpt-5-mini-2025-08-07",
        "usage": {"input": 1200, "cached_input": 1024, "output": 8},
        "cost_usd": pytest.approx((176 * 1.0 + 1024 * 0.1 + 8 * 10.0) / 1e6),
        "finish_reason": "stop",
        "asked": "online",
        "chars": {"narrow": len(f"a zebra and {SECRET}"), "wide": 0},
    }
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


def test_the_record_of_a_refused_text_says_why(project: Project, llm: StandIn) -> None:
    project.put(1, "a zebra")
    llm.script(completion(None, refusal="I cannot help with that."))
    run = planned(project)

    assert tag_all(project, run) == {"refused": 1}
    [found] = records(run).values()
    assert (found["status"], found["reason"], found["tags"]) == ("refused", "refusal", [])


def test_a_refused_text_is_not_asked_again(project: Project, llm: StandIn) -> None:
    project.put(1, "a zebra")
    llm.script(completion(None, refusal="I cannot help with that."))

    project.run(all_rows=True)
    second = project.run(all_rows=True)

    assert (second.cached, second.llm_requests, len(llm.calls)) == (1, 0, 1)


def test_the_record_counts_all_calls_that_led_to_it(project: Project, llm: StandIn) -> None:
    project.put(1, "a zebra")
    project.change(llm={"price": {"input": 1.0, "output": 10.0}})
    llm.script(
        completion("no tags", usage=token_usage(100, 3)),
        error(429, "Busy.", headers={"Retry-After": "0"}),
        completion('{"tags": ["animal"]}', usage=token_usage(100, 5)),
    )
    run = planned(project)

    tag_all(project, run)

    [found] = records(run).values()
    assert found["usage"] == {"input": 200, "cached_input": 0, "output": 8}
    assert found["cost_usd"] == pytest.approx((200 * 1.0 + 8 * 10.0) / 1e6)
    assert [outcome.requests for outcome in last_attempt(run).outcomes] == [3]


def test_an_unknown_price_is_no_cost_of_zero(project: Project) -> None:
    project.put(1, "a zebra")
    project.content["llm"] = {"model": "offline-stand-in"}
    run = planned(project)

    tag_all(project, run)

    assert [found["cost_usd"] for found in records(run).values()] == [None]


# Records that are damaged


def object_of(run: Run) -> str:
    [path] = records(run)
    return path


@pytest.mark.parametrize("body", [b"", b"{}", b'{"version": 1, "status": "tagged"'], ids=["empty", "small", "cut off"])
def test_a_record_too_small_to_be_one_is_asked_for_and_written_again(
    locked: Project, llm: StandIn, body: bytes
) -> None:
    locked.put(1, "a zebra")
    late = planned(locked)
    tag_all(locked, planned(locked))
    late.storage.put(object_of(late), body)

    assert tag_all(locked, late) == {"tagged": 1}
    assert len(llm.calls) == 2
    assert [found["tags"] for found in records(late).values()] == [["animal"]]


@pytest.mark.parametrize(
    "body",
    [
        b"x" * 500,
        b'{"version":1,"status":"tagged","reason":null,"tags":["animal"],"model":"offline-stand-in","usage":{"input"',
    ],
    ids=["replaced", "cut off"],
)
def test_a_damaged_record_is_warned_about_and_its_text_asked_again(
    locked: Project, llm: StandIn, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    locked.put(1, "a zebra")
    late = planned(locked)
    tag_all(locked, planned(locked))
    path = object_of(late)
    late.storage.put(path, body)
    assert len(body) >= 100

    assert tag_all(locked, late) == {"tagged": 1}
    assert f"damaged cache record deleted: {path}" in caplog.text
    assert len(llm.calls) == 2
    assert [found["tags"] for found in records(late).values()] == [["animal"]]


def test_a_record_of_a_newer_version_is_an_error_and_no_second_call(locked: Project, llm: StandIn) -> None:
    locked.put(1, "a zebra")
    late = planned(locked)
    tag_all(locked, planned(locked))
    path = object_of(late)
    newer = json.dumps({**records(late)[path], "version": 2}).encode()
    late.storage.put(path, newer)

    failure = failing_tag(locked, late)

    assert "version 2" in str(failure)
    assert "upgrade" in str(failure)
    assert len(llm.calls) == 1
    assert late.storage.get(path) == newer


def test_a_record_cut_off_after_its_run_is_tagged_by_the_next_one(project: Project, llm: StandIn) -> None:
    project.put(1, "a zebra")
    project.put(2, "an apple")
    project.run(all_rows=True)
    run = project.open("any")
    path = f"cache/{spec_id(project.dataset)}/{(key := key_of(project, 'a zebra'))[:2]}/tag_{key}.json"
    run.storage.put(path, (run.storage.get(path) or b"")[:50])

    summary = project.run(all_rows=True)

    assert (summary.cached, summary.tagged, len(llm.calls)) == (1, 1, 3)
    assert records(run)[path]["tags"] == ["animal"]


def test_a_record_replaced_after_its_run_fails_its_rows_and_is_tagged_by_the_next_run(
    project: Project, llm: StandIn
) -> None:
    project.put(1, "a zebra")
    project.change(limits={"max_failed_fraction": 1.0})
    project.run(all_rows=True)
    run = project.open("any")
    run.storage.put(object_of(run), b"x" * 500)
    project.put(2, "a zebra")

    project.run(all_rows=True)
    assert project.target()[2].status == "failed"
    assert records(run) == {}
    project.run(all_rows=True)

    assert len(llm.calls) == 2
    assert project.target()[2].tags == ["animal"]


# The text stays where it is


def task(text: str, key: str = "0123456789abcdef0123456789abcdef") -> TagWithLLM:
    asker = SimpleNamespace(cache=Cache(None, "spec", "model"), lock={})  # type: ignore[arg-type]
    return TagWithLLM(key=key, text=text, asker=asker)


@pytest.fixture(autouse=True)
def luigi_forgets() -> Iterator[None]:
    yield
    Register.clear_instance_cache()  # type: ignore[no-untyped-call]


def forms(shown: Any) -> list[str]:
    """Return all that luigi and gokart show of a task."""
    params = [
        shown.to_str_params(only_significant=significant, only_public=public)
        for significant in (True, False)
        for public in (True, False)
    ]
    return [shown.task_id, repr(shown), str(shown), repr(params), shown.make_unique_id(), gokart.make_tree_info(shown)]


def test_a_task_shows_its_key_and_not_its_text() -> None:
    shown = task(SECRET)

    assert not [form for form in forms(shown) if SECRET in form]
    assert shown.key[:16] in shown.task_id
    assert shown.key in shown.output().path()


class OneText:
    """A shard's texts: one, in one wave."""

    waves = 1

    def keys(self, wave: int) -> list[str]:
        return ["0" * 32]

    def unanswered(self, wave: int) -> dict[str, str]:
        return {"0" * 32: SECRET}

    def __repr__(self) -> str:
        return SECRET


def test_root_and_waves_show_no_text() -> None:
    asker = task(SECRET).asker
    root = TagTexts(shard="shard-1-of-1", texts=OneText(), asker=asker)
    wave = TagWave(number=0, texts=OneText(), asker=asker)

    leaves: Any = wave.requires()
    assert [leaf.text for leaf in leaves] == [SECRET]
    assert "0" * 16 in gokart.make_tree_info(root)
    assert not [form for form in forms(root) + forms(wave) if SECRET in form]


def test_the_key_alone_tells_tasks_apart() -> None:
    assert task("one", "0" * 32).task_id != task("one", "1" * 32).task_id
    assert task("one", "0" * 32).task_id == task("other", "0" * 32).task_id


UNHAPPY = {
    "all well": [],
    "refused": [completion(None, refusal=f"I cannot say {SECRET}.")],
    "bad answers": [completion(f"It says {SECRET}.")] * 3,
    "unknown tag": [completion(json.dumps({"tags": [SECRET]}))] * 3,
    "quoted in an error": [error(400, f"Cannot process {SECRET}.")],
    "quoted in a wrong key": [error(401, f"Cannot process {SECRET}.", "invalid_api_key")],
    "quoted in a page": [Reply(body=f"<p>{SECRET}</p>".encode(), headers={"Content-Type": "text/html"})],
    "no JSON": [Reply(body=f"{{{SECRET}".encode())],
}


@pytest.mark.parametrize("replies", UNHAPPY.values(), ids=UNHAPPY.keys())
def test_no_file_and_no_log_line_holds_a_text(
    project: Project, llm: StandIn, replies: list[Reply], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "tagger")
    caplog.set_level(logging.INFO)
    project.put(1, f"a zebra and {SECRET}")
    llm.script(*replies)
    run = project.take(all_rows=True)

    with suppress(TaggerError):
        project.finish(run)

    assert len(llm.calls) == max(len(replies), 1)
    assert run.read("summary.json", Summary) is not None
    assert SECRET.encode() not in project.everything_stored()
    assert SECRET not in caplog.text
    assert SECRET not in repr(project.target())


def test_only_the_first_failures_are_logged(project: Project, llm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tagger")
    put_texts(project, 30)
    llm.script(*[error(400, "Invalid character.")] * 30)
    run = planned(project)

    assert tag_all(project, run) == {"failed": 30}
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    rows = [line for line in lines if re.fullmatch(r"row \d+ failed: rejected: HTTP 400", line)]
    assert len(rows) == FAILURES_LOGGED
    assert len(lines) == FAILURES_LOGGED + 1
    assert len([outcome for outcome in last_attempt(run).outcomes if outcome.status == "failed"]) == 30


# Odd answers leave the other texts alone


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>Sign in</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b"no json"),
        Reply(body=b"[]"),
        Reply(body={"choices": [{"index": 0, "finish_reason": "stop"}]}),
    ],
    ids=["a page", "no JSON", "a list", "no message"],
)
def test_an_answer_that_is_no_completion_fails_one_text(project: Project, llm: StandIn, reply: Reply) -> None:
    put_texts(project, 10)
    project.put(10, "a zebra")
    teach(llm, zebra=reply)
    run = planned(project)

    assert tag_all(project, run) == {"tagged": 10, "failed": 1}
    [failed] = [outcome for outcome in last_attempt(run).outcomes if outcome.status == "failed"]
    assert failed.row_id == "10"
