"""The tag step: what it asks, writes and spends, and what stops it."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from demo.stand_in import Json, Reply, StandIn, completion, error, token_usage
from tagger.cache import Cache, Record, Usage
from tagger.exceptions import InputError, LLMStopped, RunFailed, StorageError, TaggerError
from tagger.ledger import Attempt, read_attempts
from tagger.plan import plan
from tagger.runs import Run
from tagger.spec import normalise, spec_id, text_key
from tagger.tag import tag
from tagger.tasks import TagTexts, TagWithLLM
from tests.conftest import REPOSITORY
from tests.project import Project, sqlite_project
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
    for number in range(count):
        project.put(number, f"apple number {number}")


def key_of(project: Project, text: str) -> str:
    return text_key(spec_id(project.dataset), normalise(text))


def records(project: Project, run: Run) -> dict[str, Json]:
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
    assert len(records(project, run)) == 1


def test_many_rows_with_one_text_cost_one_call(project: Project, llm: StandIn) -> None:
    for row_id in range(100):
        project.put(row_id, "an apple a day")

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


@dataclass
class S3Proxy:
    """An S3 server in front of another, which notes requests and answers some of them itself."""

    store: S3Store
    seen: list[tuple[str, str]] = field(default_factory=list)
    answer: Callable[[str, str], int | None] = lambda method, path: None
    """The HTTP status to answer with, 0 to drop the connection, None to pass the request on."""

    def __enter__(self) -> S3Store:
        proxy = self
        target = urlsplit(self.store.endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                path = self.path.split("?", 1)[0].removeprefix(f"/{proxy.store.bucket}").lstrip("/")
                proxy.seen.append((self.command, path))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status = proxy.answer(self.command, path)
                if status == 0:
                    self.close_connection = True
                elif status is not None:
                    code = {403: "AccessDenied", 500: "InternalError"}[status]
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return replace(self.store, endpoint=f"http://127.0.0.1:{self._server.server_port}")

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def s3(s3_bucket: S3Store) -> Iterator[S3Proxy]:
    proxy = S3Proxy(s3_bucket)
    with proxy as store:
        proxy.store_in_front = store  # type: ignore[attr-defined]
        yield proxy
