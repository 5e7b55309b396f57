"""Projects over each of the databases, and a counter of the S3 requests that the steps make."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from demo.postgresql import Database, PostgreSQL
from demo.stand_in import Reply, StandIn, choose_tags, completion, read_question
from tagger.connections import Connection
from tagger.runs import Run
from tagger.s3_connection import s3_client
from tagger.storage import Storage
from tests.mariadb import MariaDB, MySQLDatabase
from tests.project import MINIMAL, Project, merged, sqlite_project
from tests.servers import RedisServer, S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DATABASES = ("sqlite", "postgresql", "mysql")


def database_connection(database: Database | MySQLDatabase, conn_id: str = "db") -> Connection:
    """Return the Airflow connection of a database on a server."""
    kind, host = ("mysql", database.host) if isinstance(database, MySQLDatabase) else ("postgres", "127.0.0.1")
    return Connection(conn_id, kind, host, database.port, database.user, database.password, schema=database.name)


def redis_connection(server: RedisServer, **extra: Any) -> Connection:
    """Return the Airflow connection `redis_default` of a database of a Redis server: number 3, or `db`."""
    extra = {"db": 3} | extra
    return Connection("redis_default", "redis", server.host, server.port, password=server.password, extra=extra)


@cache
def shared_client(endpoint: str, access_key: str, secret_key: str) -> S3Client:
    """Return a client as the steps make it. Making one takes longer than all else that a small test does."""
    extra = {"endpoint_url": endpoint}
    connection = Connection("aws_default", "aws", login=access_key, password=secret_key, extra=extra)
    return s3_client("aws_default", lambda _: connection)


class QuickProject(Project):
    """A project whose runs share their S3 client with those of the other tests."""

    def open(self, run_id: str) -> Run:
        """Return a run's files."""
        client = shared_client(self.store.endpoint, self.store.access_key, self.store.secret_key)
        return Run(Storage(self.dataset.storage, client), self.dataset.dataset, run_id)


IN_MYSQL = {
    r"\bTEXT PRIMARY KEY": "VARCHAR(255) COLLATE utf8mb4_bin PRIMARY KEY",
    r"\bAS TEXT\)": "AS CHAR)",
    r"\bAS INTEGER\)": "AS SIGNED)",
    r"\bTIMESTAMP\b": "DATETIME(6)",
    r"\bTIMESTAMPTZ\b": "TIMESTAMP(6) NULL",
}
"""How MySQL has what the tests say as PostgreSQL does."""


def time_in_mysql(value: Any) -> Any:
    """Return a time as MariaDB takes it, which knows no offsets."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d.*[+-]\d\d:\d\d", value):
        return datetime.fromisoformat(value).astimezone(UTC).replace(tzinfo=None)
    return value


class MySQLProject(QuickProject):
    """A project whose SQL is spelled as MySQL has it."""

    def execute(self, statement: str, **values: Any) -> None:
        """Run SQL on the source database, and commit."""
        for ours, theirs in IN_MYSQL.items():
            statement = re.sub(ours, theirs, statement)
        super().execute(statement, **{name: time_in_mysql(value) for name, value in values.items()})


def mysql_engine(database: MySQLDatabase) -> sa.Engine:
    """Return an engine for the tests' own SQL, in which names are quoted as in the other databases."""
    session = "SET SESSION time_zone = '+00:00', sql_mode = 'ANSI_QUOTES,STRICT_ALL_TABLES'"
    return sa.create_engine(database.url, connect_args={"init_command": session})


def mysql_project(server: MariaDB, store: S3Store, llm: StandIn) -> Project:
    """Return a project with a MySQL database of its own, with a table `notes(id, body, updated_at)`."""
    database = server.create_database(f"test_{uuid.uuid4().hex}")
    content = merged(MINIMAL, {"storage": f"s3://{store.bucket}"})
    project = MySQLProject(store, llm, database_connection(database), mysql_engine(database), content)
    project.execute("CREATE TABLE notes (id BIGINT PRIMARY KEY, body LONGTEXT, updated_at TIMESTAMPTZ)")
    return project


def postgresql_project(server: PostgreSQL, store: S3Store, llm: StandIn) -> Project:
    """Return a project with a PostgreSQL database of its own, with a table `notes(id, body, updated_at)`."""
    database = server.create_database(f"test_{uuid.uuid4().hex}")
    project = Project(
        store,
        llm,
        database_connection(database),
        sa.create_engine(database.url),
        merged(MINIMAL, {"storage": f"s3://{store.bucket}"}),
    )
    project.execute("CREATE TABLE notes (id BIGINT PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    return project


def make_project(kind: str, request: pytest.FixtureRequest) -> Project:
    """Return a project over a database of this kind, for the test that asks; only the servers it needs are started."""
    server, llm = request.getfixturevalue("moto_server"), request.getfixturevalue("llm")
    store = replace(server, bucket=f"test-{uuid.uuid4().hex}")
    shared_client(store.endpoint, store.access_key, store.secret_key).create_bucket(Bucket=store.bucket)
    if kind == "mysql":
        project = mysql_project(request.getfixturevalue("mariadb"), store, llm)
        request.addfinalizer(project.engine.dispose)
        return project
    if kind == "sqlite":
        project = sqlite_project(request.getfixturevalue("tmp_path"), store, llm)
    else:
        project = postgresql_project(request.getfixturevalue("postgresql"), store, llm)
    request.addfinalizer(project.engine.dispose)
    return QuickProject(store, llm, project.database_connection, project.engine, project.content)


def put_rows(project: Project, texts: Mapping[Any, str | None], updated_at: str | None = None) -> None:
    """Insert rows into the source, at once."""
    notes = sa.table("notes", sa.column("id"), sa.column("body"), sa.column("updated_at"))
    at = time_in_mysql(updated_at) if project.engine.dialect.name == "mysql" else updated_at
    rows = [{"id": row_id, "body": text, "updated_at": at} for row_id, text in texts.items()]
    with project.engine.begin() as connection:
        connection.execute(notes.insert(), rows)


def put_all(project: Project, *texts: str | None) -> None:
    """Insert rows with these texts, and the ids 0, 1 and so on."""
    put_rows(project, dict(enumerate(texts)))


@dataclass
class Requests:
    """The S3 requests that a storage made: operation and key, in order."""

    made: list[tuple[str, str]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Requests by operation, such as `GetObject`."""
        return dict(Counter(operation for operation, _ in self.made))

    def of(self, operation: str, under: str = "") -> list[str]:
        """Return the keys that were asked for by an operation."""
        return [key for made, key in self.made if made == operation and key.startswith(under)]


def watch(storage: Storage) -> Requests:
    """Note the requests of a storage from now on, by its client's own events."""
    requests = Requests()

    def note(params: dict[str, Any], model: Any, **_: object) -> None:
        requests.made.append((model.name, str(params.get("Key", params.get("Prefix", "")))))

    storage._client.meta.events.register("provide-client-params.s3", note)
    return requests


REFUSAL = completion(None, refusal="I will not.")


def teach(llm: StandIn, **replies: Reply) -> None:
    """Make the stand-in answer texts that contain a word with a reply of ours, and the others as ever."""

    def answer(request: dict[str, Any]) -> Reply:
        question = read_question(request)
        known = next((reply for word, reply in replies.items() if word in question.text), None)
        return known or completion(json.dumps({"tags": choose_tags(question)}))

    llm._script.clear()
    llm.script(*[answer] * (500 if replies else 0))


@contextmanager
def failing_on(project: Project, row_id: int, run_id: str) -> Iterator[None]:
    """Let the database refuse one row of the target when a certain run writes it."""
    if project.engine.dialect.name == "sqlite":
        project.execute(
            f"CREATE TRIGGER refuse BEFORE INSERT ON note_tags WHEN NEW.row_id = {row_id} "
            rf"AND NEW.run_id = '{run_id}' BEGIN SELECT RAISE(ABORT, 'not this row'); END"
        )
        yield
        project.execute("DROP TRIGGER refuse")
    else:
        project.execute(
            f"ALTER TABLE note_tags ADD CONSTRAINT refuse CHECK (row_id <> {row_id} OR run_id <> '{run_id}')"
        )
        yield
        project.execute("ALTER TABLE note_tags DROP CONSTRAINT refuse")
