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
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import urlsplit

import gokart
import pytest
import sqlalchemy as sa
import yaml
from luigi.task_register import Register

from demo.stand_in import Json, Reply, StandIn, completion, error, token_usage
from tagger.cache import Cache
from tagger.exceptions import InputError, LLMStopped, RunFailed, StorageError, TaggerError
from tagger.ledger import Attempt, Ledger, read_attempts
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.runs import Run
from tagger.spec import normalise, spec_id, text_key
from tagger.tag import FAILURES_LOGGED, tag
from tagger.tasks import TagTexts, TagWithLLM
from tests.conftest import REPOSITORY
from tests.project import Project
from tests.servers import S3Store

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
                    self.reply(status, {}, b"<Error><Code>AccessDenied</Code></Error>")
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
        wait_until(lambda: any(attempt.outcomes for attempt in read_attempts(run)))
        process.kill()
    llm.latency = 0.0
    asked_before = len(llm.calls)
    [killed] = read_attempts(run)
    tag_all(project, run)
    load_back(run, project.connections)
    summary = report(run)

    assert 0 < asked_before < texts
    assert killed.state == "running"
    assert len(llm.calls) <= texts + concurrency
    assert max(llm.calls_per_key().values()) <= 2
    assert (summary.texts, summary.tagged) == (texts, texts)
    both = [outcome for attempt in read_attempts(run) for outcome in attempt.outcomes]
    spent_by_killed = sum(outcome.cost_usd or 0 for outcome in killed.outcomes)
    assert spent_by_killed > 0
    assert summary.cost_usd == pytest.approx(sum(outcome.cost_usd or 0 for outcome in both))
    assert summary.llm_requests == sum(outcome.requests for outcome in both) >= texts - concurrency


@contextmanager
def tagging_process(project: Project, run: Run, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tagger tag` in a process of its own."""
    file = folder / "notes.yaml"
    file.write_text(yaml.safe_dump(project.content, allow_unicode=True))
    ids = {"db": "sqlite", "aws_default": "aws", "openai_default": "openai"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_CONN")}
    for conn_id in ids:
        connection = project.connections(conn_id)
        assert connection is not None
        env[f"AIRFLOW_CONN_{conn_id.upper()}"] = json.dumps(
            {
                "conn_type": connection.conn_type,
                "host": connection.host,
                "login": connection.login,
                "password": connection.password,
                "extra": connection.extra,
            }
        )
    command = [sys.executable, "-m", "tagger.cli", "tag", str(file), "--run-id", run.run_id]
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
    assert len(llm.calls) <= 5 + 1 + 4
    attempt = last_attempt(run)
    assert attempt.state == "broken"
    assert sum(outcome.requests for outcome in attempt.outcomes) == len(llm.calls)
    assert {outcome.kind for outcome in attempt.outcomes if outcome.status == "failed"} == {"storage"}


def test_s3_going_away_stops_the_calls(
    project: Project, proxy: S3Proxy, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    put_texts(project, 24)
    project.change(llm={"concurrency": 4})
    run = planned(project)
    proxy.seen.clear()
    proxy.answer = lambda method, key: 0 if len(llm.calls) >= 6 else None

    failure = failing_tag(project, run)

    assert failure.exit_code == 1
    assert "S3" in str(failure)
    assert len(llm.calls) <= 6 + 2 * 4


def test_after_s3_is_back_the_shard_can_be_tagged_again(
    project: Project, proxy: S3Proxy, llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    put_texts(project, 16)
    project.change(llm={"concurrency": 4})
    run = planned(project)
    proxy.answer = lambda method, key: 0 if len(llm.calls) >= 6 else None
    failing_tag(project, run)
    proxy.answer = lambda method, key: None

    tag_all(project, run)

    assert len(records(run)) == 16
    assert len(llm.calls) <= 16 + 2 * 4


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
    put_texts(project, 20)
    with_budget(project, llm, 0.01)
    first = planned(project)
    failing_tag(project, first)

    second = planned(project)
    tag_all(project, second)

    assert len(llm.calls) == len(records(second)) == 20


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
        "model": "gpt-5-mini-2025-08-07",
        "usage": {"input": 1200, "cached_input": 1024, "output": 8},
        "cost_usd": pytest.approx((176 * 1.0 + 1024 * 0.1 + 8 * 10.0) / 1e6),
        "finish_reason": "stop",
        "asked": "online",
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
    assert last_attempt(run).outcomes[0].requests == 3


def test_an_unknown_price_is_no_cost_of_zero(project: Project) -> None:
    project.put(1, "a zebra")
    project.content["llm"] = {"model": "offline-stand-in"}
    run = planned(project)

    tag_all(project, run)

    assert [found["cost_usd"] for found in records(run).values()] == [None]


# The text stays where it is


def task(text: str, key: str = "0123456789abcdef0123456789abcdef") -> TagWithLLM:
    return TagWithLLM(key=key, text=text, asker=SimpleNamespace(cache=Cache(None, "spec", "model")))  # type: ignore[arg-type]


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


def test_the_root_shows_no_text() -> None:
    root = TagTexts(shard="shard-1-of-1", texts={"0" * 32: SECRET}, asker=task(SECRET).asker)

    assert not [form for form in forms(root) if SECRET in form]


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
    project.change(llm={"concurrency": 1})
    llm.script(*[reply] * 3)
    run = planned(project)

    counts = tag_all(project, run)

    assert counts["tagged"] >= 7
    assert counts["failed"] == 10 - counts["tagged"] >= 1
