"""A small deployment for the fault campaign: each server behind a proxy, and the console script as its user."""

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import psycopg
import pyarrow.parquet as pq
import yaml

from bench.endpoints import S3Endpoint
from demo.postgresql import PostgreSQL
from demo.stand_in import StandIn
from tests.conftest import REPOSITORY
from tests.databases import redis_connection
from tests.fault_proxy import (
    LLM_ANSWERS,
    POSTGRESQL_ANSWERS,
    REDIS_ANSWERS,
    S3_ANSWERS,
    Exchange,
    Fault,
    HttpProxy,
    Proxy,
    StreamProxy,
)
from tests.project import MINIMAL, merged
from tests.servers import RedisServer, S3Store

MARK = "klopstock"
"""In each text, with a number that no other text has."""

COMMAND_SECONDS = 90.0
"""Of a command, on a busy machine; one that takes longer hangs."""

CONCURRENCY = 2
SECRET = "sesame-4711"
RUN, NEXT_RUN = "day2", "day3"
ROW = ("status", "tags", "error", "cache_key", "spec_id", "model")
"""The columns of the target by which a row has the right state."""


class Row(NamedTuple):
    """A row of the target, without what tells when and by whom it was written."""

    status: str
    tags: list[str] | None
    error: str | None
    cache_key: str | None
    spec_id: str | None
    model: str | None


@dataclass(frozen=True)
class Ended:
    """How a command ended; its code is negative where a signal ended it."""

    code: int
    printed: str
    seconds: float

    @property
    def complaints(self) -> list[str]:
        """What the console script itself has to say."""
        return [line for line in self.printed.splitlines() if line.startswith("tagger: ")]


@dataclass
class State:
    """All that is kept anywhere, at one moment."""

    name: str
    objects: dict[str, bytes] = field(default_factory=dict)


def text(number: int) -> str:
    """Return a text that no other number has."""
    word = ("apple", "zebra", "storm", "horse", "cherry")[number % 5]
    return f"A {word} and what {MARK}{number:02} makes of it."


class Site:
    """The servers, the dataset's files, and the process that its commands are forked from."""

    def __init__(self, folder: Path) -> None:
        """Describes the deployment; its files are kept in `folder`."""
        self.folder = folder
        self._stack = ExitStack()
        self._present = State("")
        self.calls_before = 0
        """Calls to the LLM before the present state was restored."""
        self.left_files: list[str] = []
        """Temporary files that the last command left."""

    def __enter__(self) -> Self:
        """Start all servers and their proxies."""
        enter = self._stack.enter_context
        self.postgresql = enter(PostgreSQL(self.folder / "postgresql"))
        self.redis = enter(RedisServer(self.folder / "redis", password=SECRET))
        storage = enter(S3Endpoint(self.folder))
        self.llm = enter(StandIn())
        database = StreamProxy(self.postgresql.database.port, POSTGRESQL_ANSWERS, "COMMIT")
        target = StreamProxy(self.postgresql.database.port, POSTGRESQL_ANSWERS, "COMMIT")
        s3 = HttpProxy(urlsplit(storage.url).port or 0, S3_ANSWERS)
        redis = StreamProxy(self.redis.port, REDIS_ANSWERS, "(?i)SET|EVAL|DEL")
        llm = HttpProxy(self.llm.port, LLM_ANSWERS)
        self.s3, self.lock, self.asked = enter(s3), enter(redis), enter(llm)
        self.proxies: dict[str, Proxy] = {
            "source": enter(database),
            "target": enter(target),
            "s3": s3,
            "redis": redis,
            "llm": llm,
        }
        self.store = S3Store(storage.url, "key", SECRET, "tagger")
        self._s3 = self.store.client()
        self._s3.create_bucket(Bucket=self.store.bucket)
        for name in ("source", "target"):
            self.postgresql.create_database(name)
        self._write_files()
        self._zygote = enter(_zygote(self._environment()))
        return self

    def __exit__(self, *_: object) -> None:
        """End all of them."""
        self._stack.close()

    def _write_files(self) -> None:
        content = merged(
            MINIMAL,
            {
                "schedule": "0 1 * * *",
                "storage": f"s3://{self.store.bucket}",
                "source": {"conn_id": "source_db", "updated_at": "updated_at", "max_chars": 200},
                "target": {"conn_id": "target_db"},
                "llm": {"concurrency": CONCURRENCY, "requests_per_minute": 100_000},
                "lock": {"conn_id": "redis_default"},
                "limits": {"max_cost_usd": 20},
                "shards": {"texts_per_shard": 6},
            },
        )
        by_mode = {"online": content, "batch": merged(content, {"llm": {"mode": "batch"}})}
        del by_mode["batch"]["lock"]
        for mode, each in by_mode.items():
            self.file(mode).parent.mkdir()
            self.file(mode).write_text(yaml.safe_dump(each, allow_unicode=True))

    def file(self, mode: str) -> Path:
        """Return the dataset's file, whose `llm.mode` is this."""
        return self.folder / mode / "notes.yaml"

    def _environment(self) -> dict[str, str]:
        def database(name: str) -> dict[str, Any]:
            server = self.postgresql.database
            login = {"login": server.user, "password": server.password, "schema": name}
            extra = {"connect_timeout": 2, "sslmode": "disable"}
            return {
                "conn_type": "postgres",
                "host": "127.0.0.1",
                "port": self.proxies[name].port,
                "extra": extra,
            } | login

        url = f"http://127.0.0.1:{self.proxies['llm'].port}/v1"
        endpoint = {"endpoint_url": f"http://127.0.0.1:{self.proxies['s3'].port}"}
        redis = redis_connection(self.redis)
        connections = {
            "source_db": database("source"),
            "target_db": database("target"),
            "aws_default": {"conn_type": "aws", "login": "key", "password": SECRET, "extra": endpoint},
            "openai_default": {
                "conn_type": "openai",
                "host": url,
                "password": SECRET,
                "extra": {"openai_client_kwargs": {"timeout": 1.0}},
            },
            "redis_default": {
                "conn_type": "redis",
                "host": "127.0.0.1",
                "port": self.proxies["redis"].port,
                "password": SECRET,
                "extra": redis.extra,
            },
        }
        return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(each) for name, each in connections.items()}

    # The rows

    def first_day(self) -> None:
        """Make the source as it is before the first run."""
        with self._connect("source") as connection:
            connection.execute("CREATE TABLE notes (id BIGINT PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
        self._put({number: text(number) for number in range(1, 9)}, timedelta(days=10))

    def second_day(self) -> None:
        """Let rows of the source be new, changed, blank, gone, the same as others and too long."""
        changed = {3: text(30), 4: "  "}
        new = {number: text(number) for number in range(9, 15)}
        with self._connect("source") as connection:
            connection.execute("DELETE FROM notes WHERE id IN (3, 4, 5)")
        self._put(changed | new | {15: text(9), 16: text(1), 17: text(17) * 20}, timedelta(hours=1))

    def _put(self, rows: dict[int, str], ago: timedelta) -> None:
        at = datetime.now(UTC) - ago
        with self._connect("source") as connection, connection.cursor() as cursor:
            cursor.executemany("INSERT INTO notes VALUES (%s, %s, %s)", [(*row, at) for row in rows.items()])

    @contextmanager
    def disk_full(self) -> Iterator[None]:
        """Let the target's database find its disk full when a row of the target is written."""
        with self._connect("target") as connection:
            connection.execute(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
                """'could not extend file "base/1/2": No space left on device' USING ERRCODE = '53100'; END $$"""
            )
            connection.execute(
                "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON note_tags FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        yield
        with self._connect("target") as connection:
            connection.execute("DROP FUNCTION refuse CASCADE")

    def rows(self) -> dict[int, Row]:
        """Return the target's rows by id."""
        with self._connect("target") as connection:
            found = connection.execute(f"SELECT row_id, {', '.join(ROW)} FROM note_tags").fetchall()
        return {row_id: Row(*rest) for row_id, *rest in found}

    def _connect(self, name: str) -> "psycopg.Connection[Any]":
        uri = self.postgresql.airflow_uri.rpartition("/")[0]
        return psycopg.connect(f"{uri}/{name}", autocommit=True)

    # What is kept

    def keep(self, name: str) -> State:
        """Return all that is kept now, to come back to."""
        with self._connect("postgres") as connection:
            for database in ("source", "target"):
                self._copy(connection, database, f"{name}_{database}")
        return State(name, {path: self.object(path) for path in self._etags()})

    def restore(self, state: State) -> None:
        """Let everything be as it was."""
        with self._connect("postgres") as connection:
            for database in ("source", "target"):
                self._copy(connection, f"{state.name}_{database}", database)
        there = self._etags()
        for path in there.keys() - state.objects.keys():
            self._s3.delete_object(Bucket=self.store.bucket, Key=path)
        for path, body in state.objects.items():
            if there.get(path) != _etag(body):
                self._s3.put_object(Bucket=self.store.bucket, Key=path, Body=body)
        with self.redis.client() as client:
            client.flushall()
        self.s3.exchanges.clear()
        self.asked.exchanges.clear()
        self.lock.sent.clear()
        self._present = state
        self.calls_before = len(self.llm.calls)

    @staticmethod
    def _copy(connection: "psycopg.Connection[Any]", name: str, to: str) -> None:
        connection.execute(f"DROP DATABASE IF EXISTS {to} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {to} TEMPLATE {name}")

    def object(self, path: str) -> bytes:
        """Return an object of the bucket."""
        return self._s3.get_object(Bucket=self.store.bucket, Key=path)["Body"].read()

    def _etags(self) -> dict[str, str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.store.bucket)
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}

    def leaks(self, printed: str) -> Iterator[str]:
        """Yield where a text or a secret is that belongs to the source, the snapshots and the LLM's requests."""
        if _shows(printed.encode()):
            yield f"what was printed: {printed}"
        before = {path: _etag(body) for path, body in self._present.objects.items()}
        for path, etag in self._etags().items():
            is_new = etag != before.get(path) and not path.startswith("snapshots/")
            if is_new and _shows(path.encode() + _opened(path, self.object(path))):
                yield f"s3://{path}"
        if MARK.encode() in self.lock.sent:
            yield "Redis"
        with self.redis.client(db=3) as client:
            for key in client.scan_iter():
                if _shows(key + (client.dump(key) or b"")):
                    yield "Redis"
        with self._connect("target") as connection:
            [found] = connection.execute("SELECT string_agg(note_tags::text, ' ') FROM note_tags").fetchone() or [""]
        if _shows((found or "").encode()):
            yield "the target"

    # The commands

    def run(
        self,
        *commands: Sequence[str],
        server: str | None = None,
        fault: Fault | None = None,
        file_limit: int | None = None,
    ) -> Ended:
        """Run commands of the console script in one process, until one of them fails, while a fault happens."""
        pid_known = threading.Event()
        pids: list[int] = []

        def kill(with_signal: signal.Signals) -> None:
            pid_known.wait(10)
            with suppress(ProcessLookupError):
                os.kill(pids[0], with_signal)

        for name, proxy in self.proxies.items():
            proxy.arm(fault if name == server else None, kill)
        temporary = tempfile.mkdtemp(dir=self.folder)
        order = {"commands": commands, "temporary": temporary, "file_limit": file_limit}
        clock = datetime.now()
        assert self._zygote.stdin and self._zygote.stdout and self._zygote.stderr
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        pid = self._zygote.stdout.readline()
        if not pid:
            raise RuntimeError(f"the process that forks has ended: {self._zygote.stderr.read()}")
        pids.append(int(pid))
        pid_known.set()
        endings = [(COMMAND_SECONDS, signal.SIGTERM), (COMMAND_SECONDS + 10, signal.SIGKILL)]
        timers = [threading.Timer(seconds, kill, [with_signal]) for seconds, with_signal in endings]
        for timer in timers:
            timer.start()
        printed: list[str] = []
        while not (line := self._zygote.stderr.readline()).startswith("\0"):
            if not line:
                raise RuntimeError(f"the process that forks has ended: {''.join(printed)}")
            printed.append(line)
        for timer in timers:
            timer.cancel()
        self.left_files = os.listdir(temporary)  # noqa: PTH208 - names alone
        return Ended(int(line[1:]), "".join(printed), (datetime.now() - clock).total_seconds())

    def settle(self) -> None:
        """Let no fault happen any more."""
        for proxy in self.proxies.values():
            proxy.arm(None)


@contextmanager
def _zygote(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    variables = os.environ | environment | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fault_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=REPOSITORY,
        env=variables,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def _shows(body: bytes) -> bool:
    return MARK.encode() in body or SECRET.encode() in body


def _opened(path: str, body: bytes) -> bytes:
    """Return what an object holds, uncompressed."""
    if path.endswith(".parquet"):
        file = pq.ParquetFile(io.BytesIO(body))
        return f"{file.read().to_pylist()} {file.schema_arrow.metadata}".encode()
    return gzip.decompress(body) if path.endswith(".gz") else body


def key_asked(exchange: Exchange) -> str:
    """Return the key of the text that a request to the LLM is about; empty where it is about none."""
    found = re.search(rb'<text id=\\?"([0-9a-f]+)', exchange.body)
    return found[1].decode() if found else ""


def key_stored(exchange: Exchange) -> str:
    """Return the key of the text whose record a request to S3 wrote; empty where it wrote none."""
    found = re.search(r"/tag_([0-9a-f]{32})\.json", exchange.path)
    return found[1] if found and exchange.method == "PUT" and exchange.status == 200 else ""
