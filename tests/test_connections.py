"""Connections: parsed as Airflow parses them, read as its providers read them, and never shown with their secrets."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import os
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import airflow.sdk
import pytest
import redis
import redis.retry
import sqlalchemy as sa
from airflow.providers.openai.hooks.openai import OpenAIHook
from airflow.providers.postgres.hooks.postgres import PostgresHook

from demo.postgresql import PostgreSQL
from tagger.airflow.connections import connections_from_airflow
from tagger.check import check
from tagger.connections import (
    Connection,
    Connections,
    connections_from_env,
    database,
    openai_client,
)
from tagger.exceptions import InputError, Unreachable
from tagger.plan import WITHOUT_LOCK
from tagger.redis_connection import ping_redis, redis_client
from tagger.s3_connection import s3_client
from tagger.tables import connecting
from tests.databases import redis_connection
from tests.project import Project
from tests.servers import Authority, RedisServer, S3Store

SECRET = "s3cret-Pa55word"

URIS: dict[str, str] = {
    "postgres": "postgres://user:secret-one@db.example.com:5432/tagger",
    "postgresql": "postgresql://user:secret-one@db.example.com/tagger",
    "postgres, quoted": "postgres://us%40er:p%40ss%2Fw%3Aord%25@db.example.com:5433/my%2Fdb?sslmode=require",
    "postgres, @ in the password": "postgres://user:pass@word@db.example.com/tagger",
    "postgres, no password": "postgres://user@db.example.com/tagger",
    "postgres, IPv6": "postgres://user:secret-one@[::1]:5432/tagger",
    "postgres, host only": "postgres://db.example.com",
    "postgres, slash at the end": "postgres://db.example.com/",
    "postgres, several options": "postgres://db.example.com/tagger?sslmode=require&connect_timeout=5&options=-c%20x%3D1",
    "postgres, option without a value": "postgres://db.example.com/tagger?application_name=",
    "mysql": "mysql://user:secret-one@db.example.com:3306/press?charset=utf8mb4&ssl_mode=VERIFY_IDENTITY",
    "mysql, ssl as text": "mysql://user:secret-one@db.example.com/press?ssl=" + quote('{"ca": "/etc/ca.pem"}'),
    "sqlite, host": "sqlite://%2Fsrv%2Fdata%2Fsource.db",
    "sqlite, host with capitals and blanks": "sqlite://%2Fsrv%2FMy%20Data%2Fsource%231.db",
    "sqlite, host with %3A": "sqlite://%2Fsrv%2Fa%3Ab.db",
    "sqlite, three slashes": "sqlite:///srv/data/source.db",
    "sqlite, four slashes": "sqlite:////srv/data/source.db",
    "aws, keys": "aws://AKIAEXAMPLE:secret%2Fkey%2Bmore@/?region_name=eu-west-1",
    "aws, endpoint": "aws://AKIAEXAMPLE:secret-key@/?endpoint_url=http%3A%2F%2F127.0.0.1%3A9000",
    "aws, endpoint not quoted": "aws://?endpoint_url=http://127.0.0.1:9000",
    "aws, extra": "aws://AKIAEXAMPLE:secret-key@/?__extra__="
    + quote('{"service_config": {"s3": {"endpoint_url": "u"}}}'),
    "aws, nothing": "aws://",
    "openai, key": "openai://:sk-secret@",
    "openai, https host": "openai://https://:sk-secret@api.example.com",
    "openai, host, port and path quoted": "openai://:sk-secret@https%3A%2F%2Fapi.example.com%3A8443%2Fv1",
    "openai, scheme before, rest quoted": "openai://https://:sk-secret@api.example.com%3A8443%2Fv1",
    "openai, host, port and path apart": "openai://http://:sk-secret@localhost:11434/v1",
    "redis, password and number": "redis://:p%40ss%2Fword@redis.example.com:6380/2",
    "redis, extra": "redis://user:secret-one@redis.example.com?db=2&ssl=true&ssl_ca_certs=%2Fetc%2Fca.pem",
    "rediss": "rediss://:secret-one@redis.example.com:6380/2?ssl_cert_reqs=none",
    "type with a hyphen": "google-cloud-platform://",
}

JSONS: dict[str, dict[str, Any]] = {
    "all": {
        "conn_type": "postgres",
        "host": "db.example.com",
        "port": 5432,
        "login": "user",
        "password": "p@ss/word",
        "schema": "tagger",
        "extra": {"sslmode": "require"},
    },
    "port and extra as text": {
        "conn_type": "aws",
        "port": "9000",
        "extra": '{"endpoint_url": "http://127.0.0.1:9000"}',
    },
    "postgresql": {"conn_type": "postgresql", "host": "db.example.com"},
    "hyphen": {"conn_type": "google-cloud-platform"},
    "nested extra": {"conn_type": "aws", "extra": {"service_config": {"s3": {"endpoint_url": "u"}}}},
    "empty extra": {"conn_type": "sqlite", "host": "/srv/Data/source.db", "extra": ""},
    "openai": {"conn_type": "openai", "host": "http://localhost:11434/v1", "password": "sk-secret"},
    "description": {"conn_type": "sqlite", "host": "/x.db", "description": "ours"},
}


def known(*connections: Connection) -> Connections:
    return {connection.conn_id: connection for connection in connections}.get


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without AWS's and OpenAI's variables."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# parsing


@pytest.mark.parametrize("uri", URIS.values(), ids=URIS.keys())
def test_uri_is_parsed_as_airflow_does(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", uri)

    assert connections_from_env("ours") == connections_from_airflow("ours")


@pytest.mark.parametrize("fields", JSONS.values(), ids=JSONS.keys())
def test_json_is_parsed_as_airflow_does(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps(fields))

    assert connections_from_env("ours") == connections_from_airflow("ours")


@pytest.mark.parametrize("fields", JSONS.values(), ids=JSONS.keys())
def test_uri_that_airflow_writes_is_read_back(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", airflow.sdk.Connection.from_json(json.dumps(fields), conn_id="x").get_uri())
    from_uri = connections_from_env("ours")
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps(fields))

    assert from_uri == connections_from_env("ours")


def test_fields_of_a_uri() -> None:
    """The comparisons above would hold too if both sides were empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_CONN_OURS", URIS["postgres, quoted"])
        found = connections_from_env("ours")

    assert found == Connection(
        "ours", "postgres", "db.example.com", 5433, "us@er", "p@ss/w:ord%", "my/db", {"sslmode": "require"}
    )


def test_name_of_the_variable_is_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_TAGGER_DB", "sqlite://%2Fx.db")

    assert connections_from_env("tagger_db") == Connection("tagger_db", "sqlite", host="/x.db")
    assert connections_from_env("other_db") is None


def test_empty_variable_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", "")

    assert connections_from_env("ours") is None


BAD = {
    "a port beyond all": f'{{"conn_type": "postgres", "password": "{SECRET}", "port": 1e999}}',
    "a port of no machine": f'{{"conn_type": "postgres", "password": "{SECRET}", "port": 70000}}',
    "a host that is a list": f'{{"conn_type": "postgres", "host": ["{SECRET}"]}}',
    "half a surrogate pair": f'{{"conn_type": "postgres", "host": "{SECRET}\\ud800"}}',
    "NUL": f"postgres://user:{SECRET}%00@db.example.com/tagger",
    "deep": '{"extra":' * 50_000,
    "a type that is no word": f"\u202ea b://user:{SECRET}@db.example.com",
    "a password before the inner scheme": f"openai://:{SECRET}@https://llm.example.com/v1",
    "a word": SECRET,
    "port that is none": f"postgres://user:{SECRET}@db.example.com:port/tagger",
    "port out of range": f"postgres://user:{SECRET}@db.example.com:99999/tagger",
    "broken IPv6": f"postgres://user:{SECRET}@[::1/tagger",
    "broken JSON": f'{{"conn_type": "postgres", "password": "{SECRET}"',
    "port that is none, JSON": f'{{"conn_type": "postgres", "password": "{SECRET}", "port": "x"}}',
    "extra that is a list": f'{{"conn_type": "aws", "password": "{SECRET}", "extra": [1]}}',
    "extra that is no JSON": f'{{"conn_type": "aws", "password": "{SECRET}", "extra": "x"}}',
    "extra of a URI that is a number": f"aws://key:{SECRET}@/?__extra__=5",
    "extra of a URI that is a list": f"aws://key:{SECRET}@/?__extra__=%5B1%5D",
    "extra of a URI that is no JSON": f"aws://key:{SECRET}@/?__extra__=x",
    "type that is a number": f'{{"conn_type": 5, "password": "{SECRET}"}}',
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_bad_value_is_one_error_that_names_the_variable_and_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", value)

    with pytest.raises(InputError, match=r"\$AIRFLOW_CONN_OURS is neither") as caught:
        connections_from_env("ours")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repr_hides_what_is_secret() -> None:
    connection = Connection("ours", "aws", login="user", password=SECRET, extra={"aws_session_token": SECRET})

    assert SECRET not in f"{connection!r} {connection}"
    assert "ours" in repr(connection)


OUTSIDE = "import sys; from tagger.airflow.connections import connections_from_airflow as look_up; "
OUTSIDE += "print([(c.conn_type, c.host, c.password, c.extra) if (c := look_up(i)) else None for i in sys.argv[1:]])"


def test_connections_come_from_airflows_secrets_backend(tmp_path: Path) -> None:
    """In a process of its own, for Airflow sets its backends up once. The backend goes before the environment."""
    file = tmp_path / "connections.json"
    database = {"conn_type": "postgres", "host": "db.example.com", "password": SECRET, "extra": {"sslmode": "require"}}
    file.write_text(json.dumps({"tagger_db": database, "redis_default": "redis://from-the-backend"}))
    settings = {
        "AIRFLOW__SECRETS__BACKEND": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"connections_file_path": str(file)}),
        "AIRFLOW_CONN_REDIS_DEFAULT": "redis://from-the-environment",
        "AIRFLOW_CONN_OPENAI_DEFAULT": "openai://from-the-environment",
    }
    command = [sys.executable, "-c", OUTSIDE, "tagger_db", "redis_default", "openai_default"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)

    assert ast.literal_eval(done.stdout.splitlines()[-1]) == [
        ("postgres", "db.example.com", SECRET, {"sslmode": "require"}),
        ("redis", "from-the-backend", None, {}),
        ("openai", "from-the-environment", None, {}),
    ]


# databases


@pytest.fixture
def sqlite_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A database with one row, in a file of the parametrised name."""
    path = tmp_path / str(request.param)
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER)")
        connection.execute("INSERT INTO notes VALUES (42)")
    connection.close()
    return path


def read_row(engine: sa.Engine) -> Any:
    with engine.connect() as connection:
        return connection.execute(sa.text("SELECT id FROM notes")).scalar_one()


@pytest.mark.parametrize(
    "sqlite_file",
    ["plain.db", "with blank.db", "q?mode=ro&x#1.db", "100%.db", "a%20b.db", "日本語.db", "a:b@c.db", "My Data/a+b.db"],
    indirect=True,
)
def test_sqlite_file_of_any_name_is_opened(monkeypatch: pytest.MonkeyPatch, sqlite_file: Path) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_URI", f"sqlite://{quote(str(sqlite_file), safe='')}")
    monkeypatch.setenv("AIRFLOW_CONN_JSON", json.dumps({"conn_type": "sqlite", "host": str(sqlite_file)}))

    assert read_row(database("uri", connections_from_env)) == 42
    assert read_row(database("json", connections_from_env)) == 42
    assert sorted(file.name for file in sqlite_file.parent.iterdir() if file.is_file()) == [sqlite_file.name]


@pytest.mark.parametrize("sqlite_file", ["source.db"], indirect=True)
@pytest.mark.parametrize("slashes", ["sqlite://", "sqlite:///"])
def test_sqlite_file_may_stand_in_the_path_of_the_uri(
    monkeypatch: pytest.MonkeyPatch, sqlite_file: Path, slashes: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", slashes + str(sqlite_file))

    assert read_row(database("ours", connections_from_env)) == 42


@pytest.mark.parametrize("sqlite_file", ["source.db"], indirect=True)
def test_sqlite_file_may_be_relative(monkeypatch: pytest.MonkeyPatch, sqlite_file: Path) -> None:
    monkeypatch.chdir(sqlite_file.parent)

    assert read_row(database("ours", known(Connection("ours", "sqlite", host="source.db")))) == 42


@pytest.mark.parametrize("sqlite_file", ["source.db"], indirect=True)
def test_sqlite_file_may_be_written(sqlite_file: Path) -> None:
    engine = database("ours", known(Connection("ours", "sqlite", host=str(sqlite_file))))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE notes SET id = 43"))

    assert read_row(engine) == 43


@pytest.mark.parametrize("host", ["missing.db", ".", None])
def test_sqlite_file_that_is_not_there_is_named_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match=r"connection `ours`: no SQLite file .+"):
        database("ours", known(Connection("ours", "sqlite", host=host)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["\x01", "a\nb", "\u200d", "x" * 5000])
def test_a_path_that_is_none_is_one_short_line(host: str) -> None:
    with pytest.raises(InputError, match=r"connection `ours`: no SQLite file .+") as raised:
        database("ours", known(Connection("ours", "sqlite", host=host)))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1100


@pytest.mark.parametrize("conn_type", ["mssql", "http", "generic"])
def test_other_databases_are_refused(conn_type: str) -> None:
    with pytest.raises(
        InputError, match=f"connection `ours`: type `{conn_type}` is not supported .sqlite, postgres and mysql"
    ):
        database("ours", known(Connection("ours", conn_type, password=SECRET)))


def test_connection_that_is_missing_is_answered_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"no connection `tagger_db`: .*\$AIRFLOW_CONN_TAGGER_DB"):
        database("tagger_db", known())


@pytest.mark.parametrize(
    "uri",
    [
        "postgres://us%40er:p%40ss%2Fw%3Aord%25@db.example.com:5433/my-db",
        "postgres://db.example.com/tagger",
        "postgres://user@[::1]:5432/tagger",
        "postgresql://user:secret-one@db.example.com",
    ],
)
def test_postgresql_is_reached_as_the_provider_does(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", uri)

    ours = database("ours", connections_from_env).url
    providers = PostgresHook("ours").sqlalchemy_url
    assert ours.drivername == "postgresql+psycopg"
    assert (ours.username, ours.password, ours.host) == (providers.username, providers.password, providers.host)
    assert (ours.port, ours.database or None) == (providers.port, providers.database or None)


def test_libpq_options_are_passed_on_and_airflows_own_are_not() -> None:
    extra = {"sslmode": "require", "connect_timeout": 3, "keepalives_idle": 10, "cursor": "dictcursor", "iam": False}

    url = database("ours", known(Connection("ours", "postgres", "db.example.com", extra=extra))).url
    assert url.query == {"sslmode": "require", "connect_timeout": "3", "keepalives_idle": "10"}


def test_postgresql_that_does_not_answer_is_not_waited_for_longer_than_a_while() -> None:
    url = database("ours", known(Connection("ours", "postgres", "db.example.com"))).url

    assert 1 <= int(str(url.query["connect_timeout"])) <= 30
    assert 1 <= int(str(url.query["keepalives_idle"])) <= 120


def test_postgresql_answers(postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OURS", postgresql.airflow_uri)

    with database("ours", connections_from_env).connect() as connection:
        assert connection.execute(sa.text("SELECT 42")).scalar_one() == 42


def test_wrong_password_is_one_line_without_it(postgresql: PostgreSQL) -> None:
    server = postgresql.database
    ours = Connection("ours", "postgres", "127.0.0.1", server.port, server.user, SECRET, server.name)

    with pytest.raises(Unreachable) as caught, connecting(database("ours", known(ours)), "ours"):
        pass
    message = str(caught.value)
    assert message.startswith("connection `ours`: the database does not answer: ")
    assert "password authentication failed" in message
    assert SECRET not in message
    assert "\n" not in message


@pytest.fixture
def unique_notes(tmp_path: Path) -> sa.Engine:
    path = tmp_path / "unique.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id TEXT PRIMARY KEY)")
    connection.close()
    return database("ours", known(Connection("ours", "sqlite", host=str(path))))


def test_errors_of_the_database_show_no_values(unique_notes: sa.Engine) -> None:
    with unique_notes.connect() as connection, pytest.raises(sa.exc.IntegrityError) as caught:
        connection.execute(sa.text("INSERT INTO notes VALUES (:id)"), [{"id": SECRET}, {"id": SECRET}])

    assert SECRET not in str(caught.value)


def test_japanese_in_json_is_stored_as_it_reads(unique_notes: sa.Engine) -> None:
    table = sa.Table("notes", sa.MetaData(), sa.Column("id", sa.JSON))
    with unique_notes.begin() as connection:
        connection.execute(table.insert().values(id=["果物"]))
        assert connection.execute(sa.text("SELECT id FROM notes")).scalar_one() == '["果物"]'


# LLM endpoints


@pytest.mark.parametrize(
    "uri",
    [
        "openai://:sk-secret@",
        "openai://https://:sk-secret@api.example.com",
        "openai://:sk-secret@https%3A%2F%2Fapi.example.com%3A8443%2Fv1",
        "openai://https://:sk-secret@api.example.com%3A8443%2Fv1",
        "openai://http://:sk-secret@localhost:11434/v1",
        "openai://?__extra__=" + quote('{"openai_client_kwargs": {"api_key": "k", "base_url": "http://h/v1"}}'),
        "openai://:sk-secret@?__extra__=" + quote('{"openai_client_kwargs": {"organization": "ours"}}'),
    ],
)
def test_openai_connection_is_read_as_the_provider_does(environment: pytest.MonkeyPatch, uri: str) -> None:
    environment.setenv("AIRFLOW_CONN_OURS", uri)

    with openai_client("ours", connections_from_env) as ours, OpenAIHook("ours").get_conn() as providers:
        assert (ours.base_url, ours.api_key) == (providers.base_url, providers.api_key)
        assert ours.organization == providers.organization


def test_openai_connection_has_base_url_in_host_and_key_in_password(environment: pytest.MonkeyPatch) -> None:
    ours = Connection("ours", "openai", host="http://localhost:11434/v1", password="sk-ours")

    with openai_client("ours", known(ours)) as client:
        assert (str(client.base_url), client.api_key) == ("http://localhost:11434/v1/", "sk-ours")


def test_openai_environment_serves_where_there_is_no_connection(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OPENAI_API_KEY", "sk-environment")
    environment.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")

    with openai_client("ours", known()) as client:
        assert (str(client.base_url), client.api_key) == ("http://localhost:8000/v1/", "sk-environment")


def test_openai_connection_goes_before_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OPENAI_API_KEY", "sk-environment")
    environment.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    ours = Connection("ours", "openai", host="http://localhost:11434/v1", password="sk-ours")

    with openai_client("ours", known(ours)) as client:
        assert (str(client.base_url), client.api_key) == ("http://localhost:11434/v1/", "sk-ours")


def test_openai_client_leaves_retries_to_us(environment: pytest.MonkeyPatch) -> None:
    extra = {"openai_client_kwargs": {"max_retries": 9}}

    with openai_client("ours", known(Connection("ours", "openai", password="k", extra=extra))) as client:
        assert client.max_retries == 0


@pytest.mark.parametrize("connections", [known(), known(Connection("ours", "openai"))], ids=["none", "without key"])
def test_missing_key_is_answered_with_where_to_put_it(
    environment: pytest.MonkeyPatch, connections: Connections
) -> None:
    with pytest.raises(InputError, match=r"no API key: .*`ours` .password = key.*OPENAI_API_KEY"):
        openai_client("ours", connections)


BAD_OPENAI: dict[str, Connection] = {
    "URL that is none": Connection("ours", "openai", host="http://localhost:port", password=SECRET),
    "kwargs that are text": Connection("ours", "openai", password=SECRET, extra={"openai_client_kwargs": "x"}),
    "unknown kwarg": Connection("ours", "openai", password=SECRET, extra={"openai_client_kwargs": {"api_kee": "x"}}),
}


@pytest.mark.parametrize("connection", BAD_OPENAI.values(), ids=BAD_OPENAI.keys())
def test_openai_connection_that_makes_no_client_is_one_error(
    environment: pytest.MonkeyPatch, connection: Connection
) -> None:
    with pytest.raises(InputError, match="`ours`") as caught:
        openai_client("ours", known(connection))
    assert SECRET not in str(caught.value)


# S3


def presigned(connections: Connections) -> dict[str, str]:
    """Return what a client puts into a URL that it signs: where it goes, as whom, for which region."""
    url = urlsplit(s3_client("ours", connections).generate_presigned_url("get_object", {"Bucket": "b", "Key": "k"}))
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    token = {"token": query["X-Amz-Security-Token"]} if "X-Amz-Security-Token" in query else {}
    key, _, region, *_ = query["X-Amz-Credential"].split("/")
    return {"endpoint": f"{url.scheme}://{url.netloc}", "path": url.path, "key": key, "region": region} | token


@pytest.fixture
def signing(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An AWS configuration that signs with version 4 everywhere."""
    config = tmp_path / "aws-config"
    config.write_text("[default]\ns3 =\n  signature_version = s3v4\n[profile ours]\nregion = eu-north-1\n")
    environment.setenv("AWS_CONFIG_FILE", str(config))
    yield environment


def aws(**extra: Any) -> Connections:
    return known(Connection("ours", "aws", login="AKIAOURS", password="secret", extra=extra))


@pytest.mark.parametrize(
    "extra",
    [
        {"endpoint_url": "http://127.0.0.1:9000"},
        {"service_config": {"s3": {"endpoint_url": "http://127.0.0.1:9000"}}},
        {"endpoint_url": "http://other:1", "service_config": {"s3": {"endpoint_url": "http://127.0.0.1:9000"}}},
    ],
    ids=["endpoint_url", "service_config", "both"],
)
def test_s3_endpoint_of_a_connection(signing: pytest.MonkeyPatch, extra: dict[str, Any]) -> None:
    signing.setenv("AWS_ENDPOINT_URL_S3", "http://environment:1")

    found = presigned(aws(region_name="eu-west-1", **extra))
    assert found == {"endpoint": "http://127.0.0.1:9000", "path": "/b/k", "key": "AKIAOURS", "region": "eu-west-1"}


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_s3_endpoint_of_the_environment(signing: pytest.MonkeyPatch, variable: str) -> None:
    signing.setenv(variable, "http://127.0.0.1:9000")

    assert presigned(aws())["endpoint"] == "http://127.0.0.1:9000"
    assert presigned(aws())["path"] == "/b/k"


def test_aws_environment_serves_where_there_is_no_connection(signing: pytest.MonkeyPatch) -> None:
    signing.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    signing.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    signing.setenv("AWS_DEFAULT_REGION", "ap-northeast-1")

    found = presigned(known())
    assert (found["key"], found["region"]) == ("AKIAENVIRONMENT", "ap-northeast-1")
    assert "amazonaws.com" in found["endpoint"]


def test_aws_connection_without_keys_takes_those_of_the_environment(signing: pytest.MonkeyPatch) -> None:
    signing.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    signing.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    found = presigned(known(Connection("ours", "aws", extra={"region_name": "eu-west-1"})))
    assert (found["key"], found["region"]) == ("AKIAENVIRONMENT", "eu-west-1")


def test_aws_connection_may_have_its_keys_in_extra_as_the_provider_allows(signing: pytest.MonkeyPatch) -> None:
    signing.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    signing.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    extra = {"aws_access_key_id": "AKIAEXTRA", "aws_secret_access_key": "secret"}

    assert presigned(known(Connection("ours", "aws", extra=extra)))["key"] == "AKIAEXTRA"


@pytest.mark.parametrize("half", [{"login": "AKIAOURS"}, {"password": SECRET}], ids=["login", "password"])
def test_half_a_key_pair_counts_as_none_as_for_the_provider(signing: pytest.MonkeyPatch, half: dict[str, Any]) -> None:
    signing.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    signing.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    assert presigned(known(Connection("ours", "aws", **half)))["key"] == "AKIAENVIRONMENT"


def test_aws_connection_may_have_a_session_token(signing: pytest.MonkeyPatch) -> None:
    assert presigned(aws(aws_session_token="token"))["token"] == "token"


def test_aws_connection_may_name_a_profile(signing: pytest.MonkeyPatch) -> None:
    assert presigned(aws(profile_name="ours"))["region"] == "eu-north-1"


def test_s3_client_of_a_connection_works(s3_bucket: S3Store, signing: pytest.MonkeyPatch) -> None:
    uri = f"aws://{s3_bucket.access_key}:{s3_bucket.secret_key}@/?endpoint_url={quote(s3_bucket.endpoint, safe='')}"
    signing.setenv("AIRFLOW_CONN_OURS", uri)

    client = s3_client("ours", connections_from_env)
    client.put_object(Bucket=s3_bucket.bucket, Key="a", Body=b"1")
    assert client.get_object(Bucket=s3_bucket.bucket, Key="a")["Body"].read() == b"1"


@pytest.mark.parametrize(
    ("connection", "found"),
    [
        (Connection("ours", "aws", extra={"profile_name": "missing"}), "missing"),
        (Connection("ours", "aws", extra={"endpoint_url": "127.0.0.1:9000"}), "127.0.0.1:9000"),
        (Connection("ours", "aws", extra={"service_config": "x"}), "service_config"),
        (Connection("ours", "aws", extra={"service_config": {"s3": "x"}}), "service_config"),
        (Connection("ours", "aws", extra={"endpoint_url": 9000}), "endpoint_url|9000"),
    ],
    ids=["profile", "endpoint", "service_config", "s3", "endpoint type"],
)
def test_aws_connection_that_makes_no_client_is_one_error(
    signing: pytest.MonkeyPatch, connection: Connection, found: str
) -> None:
    with pytest.raises(InputError, match=rf"connection `ours`: .*({found})") as caught:
        s3_client("ours", known(connection))
    assert SECRET not in str(caught.value)


# Redis


def redis_options(connection: Connection) -> dict[str, Any]:
    """Return what a client is made of, TLS aside where it is off."""
    pool = redis_client(connection.conn_id, known(connection)).connection_pool
    names = ["host", "port", "db", "username", "password"]
    if issubclass(pool.connection_class, redis.SSLConnection):
        names += ["ssl_cert_reqs", "ssl_check_hostname", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"]
    found = {name: pool.connection_kwargs[name] for name in names}
    return {name: value for name, value in found.items() if value is not None}


PLAIN = {"host": "redis.example.com", "port": 6379, "db": 0}
VERIFIED = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
REDIS: dict[str, tuple[str, dict[str, Any]]] = {
    "host only": ("redis://redis.example.com", PLAIN),
    "password, port and number": (
        "redis://:p%40ss%2Fw%3Aord%25@redis.example.com:6380/2",
        {**PLAIN, "port": 6380, "db": 2, "password": "p@ss/w:ord%"},
    ),
    "login": ("redis://user:pass@redis.example.com", {**PLAIN, "username": "user", "password": "pass"}),
    "number in the extra": ("redis://redis.example.com?db=3", {**PLAIN, "db": 3}),
    "number in both: that of the extra, the only one the provider reads": (
        "redis://redis.example.com/2?db=0",
        PLAIN,
    ),
    "a schema that is no number, with one in the extra": ("redis://redis.example.com/tagger?db=3", {**PLAIN, "db": 3}),
    "nested extra": ("redis://redis.example.com?__extra__=" + quote('{"db": 3}'), {**PLAIN, "db": 3}),
    "empty extras, as a form leaves them": (
        "redis://redis.example.com?__extra__=" + quote('{"db": null, "ssl": false, "ssl_cert_reqs": ""}'),
        PLAIN,
    ),
    "no password, as the provider spells it": ("redis://:None@redis.example.com", PLAIN),
    "ssl": ("redis://redis.example.com?ssl=true", PLAIN | VERIFIED),
    "ssl that is off": ("redis://redis.example.com?ssl=False&ssl_ca_certs=/no/such/file", PLAIN),
    "ssl, nothing verified": (
        "redis://redis.example.com?ssl=True&ssl_cert_reqs=none",
        PLAIN | {"ssl_cert_reqs": "none", "ssl_check_hostname": True},
    ),
    "ssl, no host name": (
        "redis://redis.example.com?ssl=1&ssl_check_hostname=false",
        PLAIN | {"ssl_cert_reqs": "required", "ssl_check_hostname": False},
    ),
    "ssl, null is not off": (
        "redis://redis.example.com?__extra__=" + quote('{"ssl": true, "ssl_cert_reqs": null}'),
        PLAIN | VERIFIED,
    ),
    "rediss": ("rediss://redis.example.com/1", PLAIN | VERIFIED | {"db": 1}),
    "rediss is not switched off": ("rediss://redis.example.com?ssl=false", PLAIN | VERIFIED),
    "IPv6": ("redis://[::1]:6380", PLAIN | {"host": "::1", "port": 6380}),
}


@pytest.mark.parametrize(("uri", "options"), REDIS.values(), ids=REDIS.keys())
def test_redis_connection_is_read_as_the_provider_does(
    monkeypatch: pytest.MonkeyPatch, uri: str, options: dict[str, Any]
) -> None:
    """Its `db`, `ssl` and `ssl_…` of the extra; besides, the number may be the schema."""
    monkeypatch.setenv("AIRFLOW_CONN_OURS", uri)
    connection = connections_from_env("ours")

    assert connection is not None
    assert redis_options(connection) == options


def test_redis_certificates_are_those_of_the_extra(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")}
    for file in files.values():
        Path(file).touch()

    found = redis_options(Connection("ours", "redis", "redis.example.com", extra={"ssl": True, **files}))
    assert found == PLAIN | VERIFIED | files


BAD_REDIS: dict[str, tuple[Connection, str]] = {
    "type": (Connection("ours", "postgres", "h"), "type `postgres` is not supported .redis is"),
    "no host": (Connection("ours", "redis"), "it has no host"),
    "number in words": (Connection("ours", "redis", "h", extra={"db": "two"}), "`db`: Input should be a valid integer"),
    "number below 0": (Connection("ours", "redis", "h", extra={"db": -1}), "`db`: Input should be greater than"),
    "schema": (Connection("ours", "redis", "h", schema="tagger"), "`schema`: Input should be a valid integer"),
    "ssl": (Connection("ours", "redis", "h", extra={"ssl": "perhaps"}), "`ssl`: Input should be a valid boolean"),
    "cert_reqs": (Connection("ours", "redis", "h", extra={"ssl_cert_reqs": "no"}), "`ssl_cert_reqs`: .*'required'"),
    "no such file": (
        Connection("ours", "rediss", "h", extra={"ssl_ca_certs": "/no/ca.pem"}),
        "`ssl_ca_certs`: no file /no/ca.pem",
    ),
    "key alone": (Connection("ours", "rediss", "h", extra={"ssl_keyfile": __file__}), "`ssl_keyfile` needs"),
}


@pytest.mark.parametrize(("connection", "found"), BAD_REDIS.values(), ids=BAD_REDIS.keys())
def test_redis_connection_that_makes_no_client_is_one_error(connection: Connection, found: str) -> None:
    with pytest.raises(InputError, match=f"^connection `ours`: {found}") as caught:
        redis_client("ours", known(dataclasses.replace(connection, password=SECRET)))
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None


def test_redis_connection_that_is_missing_is_answered_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"no connection `redis_default`: .*\$AIRFLOW_CONN_REDIS_DEFAULT"):
        redis_client("redis_default", known())


def test_redis_client_connects_to_nothing_yet_and_reads_bytes(redis_default: Connection) -> None:
    nobody = Connection("ours", "redis", "no-such-host.invalid")
    assert redis_client("ours", known(nobody)).connection_pool.connection_kwargs["decode_responses"] is False

    with redis_client("redis_default", known(redis_default)) as client:
        client.set("key", "心臓")
        assert client.get("key") == "心臓".encode()


def test_redis_is_imported_when_a_client_is_made() -> None:
    """Airflow parses the DAG files every few seconds."""
    code = "import sys, tagger.redis_connection; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_redis_of_the_connection_is_reached(redis_server: RedisServer, redis_default: Connection) -> None:
    """With its password, and in its database."""
    with redis_client("redis_default", known(redis_default)) as client:
        client.set("key", "value")
        [mine] = [entry for entry in client.client_list() if entry["id"] == str(client.client_id())]
    assert (mine["db"], mine["user"]) == ("3", "default")
    sizes = {}
    for number in range(5):
        with redis_server.client(number) as direct:
            sizes[number] = direct.dbsize()
    assert sizes == {0: 0, 1: 0, 2: 0, 3: 1, 4: 0}


def test_redis_number_may_stand_in_the_path_of_the_uri(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "AIRFLOW_CONN_OURS", f"redis://:{redis_server.password}@{redis_server.host}:{redis_server.port}/5"
    )

    with redis_client("ours", connections_from_env) as client:
        assert ping_redis(client, "ours") == f"127.0.0.1:{redis_server.port}, database 5"
        [mine] = [entry for entry in client.client_list() if entry["id"] == str(client.client_id())]
    assert mine["db"] == "5"


def test_redis_user_and_password_of_any_letters_get_in(redis_server: RedisServer, redis_default: Connection) -> None:
    password = "p@ss/w:ord% \"'`#ü果"
    with redis_server.client() as direct:
        direct.acl_setuser("tagger", enabled=True, passwords=[f"+{password}"], keys=["*"], commands=["+@all"])
    ours = dataclasses.replace(redis_default, login="tagger", password=password)

    with redis_client("redis_default", known(ours)) as client:
        assert ping_redis(client, "redis_default")
        assert client.acl_whoami() == "tagger"


def test_redis_serves_several_hundred_threads(redis_default: Connection) -> None:
    """Each of them holds a connection; redis-py's own limit is 100."""
    with redis_client("redis_default", known(redis_default)) as client:
        pool = client.connection_pool
        held = [pool.get_connection() for _ in range(400)]
        assert client.ping()
        for connection in held:
            pool.release(connection)


# Redis and TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls_server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("tls"), password=SECRET, tls=authority.server()) as server:
        yield server


def ping(connection: Connection) -> str:
    with redis_client(connection.conn_id, known(connection)) as client:
        return ping_redis(client, connection.conn_id)


@pytest.mark.parametrize("conn_type", ["redis", "rediss"])
def test_redis_is_reached_by_tls_with_an_authority_of_our_own(
    tls_server: RedisServer, authority: Authority, conn_type: str
) -> None:
    ours = redis_connection(tls_server, ssl_ca_certs=str(authority.file), ssl=conn_type == "redis")
    ours = dataclasses.replace(ours, conn_type=conn_type)

    assert ping(ours) == f"127.0.0.1:{tls_server.port}, database 3"
    with redis_client("redis_default", known(ours)) as client:
        client.set("large", b"x" * 1_000_000)
        assert client.get("large") == b"x" * 1_000_000
    with tls_server.client(3) as direct:
        assert direct.delete("large") == 1


def test_redis_host_name_is_not_looked_at_where_the_extra_says_so(
    tls_server: RedisServer, authority: Authority
) -> None:
    ours = redis_connection(tls_server, ssl=True, ssl_ca_certs=str(authority.file), ssl_check_hostname=False)

    assert ping(dataclasses.replace(ours, host="localhost"))


def test_redis_may_want_a_certificate_of_ours(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("worker")
    extra: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(authority.file)}
    with RedisServer(tmp_path, tls=authority.server(asks_clients=True)) as server:
        assert ping(redis_connection(server, **extra, ssl_certfile=str(certificate), ssl_keyfile=str(key)))
        with pytest.raises(Unreachable):
            ping(redis_connection(server, **extra))


# what Redis refuses


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr("tagger.redis_connection.REDIS_SECONDS", 0.3)
    monkeypatch.setattr("tagger.redis_connection.REDIS_RETRIES", 0)


def refused(connection: Connection, caplog: pytest.LogCaptureFixture) -> str:
    """Return the one line for a Redis that is of no use, with no secret in it, behind it or in the log."""
    caplog.set_level(logging.DEBUG)
    with redis_client(connection.conn_id, known(connection)) as client:
        with pytest.raises(InputError) as caught:
            ping_redis(client, connection.conn_id)
        shown = f"{client!r} {client.connection_pool!r} {connection!r}"
    shown += "".join(traceback.format_exception(caught.value)) + caplog.text
    assert connection.password is None or connection.password not in shown
    assert caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    if "does not answer" in str(caught.value):
        assert isinstance(caught.value, Unreachable)
    return str(caught.value).replace(f":{connection.port}", ":PORT")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong password": ({"password": SECRET}, "127.0.0.1:PORT refuses the login or the password"),
    "no password": ({"password": None}, "127.0.0.1:PORT refuses the login or the password"),
    "unknown login": ({"login": "nobody"}, "127.0.0.1:PORT refuses the login or the password"),
    "number out of range": ({"extra": {"db": 99}}, "127.0.0.1:PORT has no database 99"),
    "nothing there": ({"port": 1}, "127.0.0.1:PORT does not answer: Connection refused"),
    "no such host": ({"host": "no-such-host.invalid"}, "no-such-host.invalid:PORT does not answer: "),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("change", "found"), REFUSED.values(), ids=REFUSED.keys())
def test_redis_that_is_of_no_use_is_one_line(
    redis_default: Connection, caplog: pytest.LogCaptureFixture, change: dict[str, Any], found: str
) -> None:
    line = refused(dataclasses.replace(redis_default, **change), caplog)
    assert line.startswith(f"connection `redis_default`: Redis at {found}")


def test_redis_host_that_is_no_name_is_one_line(redis_default: Connection, caplog: pytest.LogCaptureFixture) -> None:
    line = refused(dataclasses.replace(redis_default, host="a..b"), caplog)
    assert line == "connection `redis_default`: its host is no host name"


def test_redis_password_that_is_refused_is_tried_once(redis_default: Connection) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="refuses"):
        ping(dataclasses.replace(redis_default, password=SECRET))
    assert time.monotonic() - started < 0.5


@pytest.mark.usefixtures("impatient")
def test_redis_that_hangs_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path, password=SECRET) as server:
        server.pause()
        line = refused(redis_connection(server), caplog)
        server.resume()
        assert ping(redis_connection(server))
    assert line.startswith("connection `redis_default`: Redis at 127.0.0.1:PORT does not answer: Timeout")


def test_redis_that_takes_no_locks_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It answers a PING all the same."""
    with RedisServer(tmp_path, password=SECRET) as server, server.client() as direct:
        direct.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@read", "+@connection"])
        reader = dataclasses.replace(redis_connection(server), login="reader")
        no_right = refused(reader, caplog)
        direct.replicaof("127.0.0.1", 1)
        replica = refused(redis_connection(server), caplog)
    assert no_right.endswith("gives the user no right to lock: commands and keys of its ACL")
    assert replica.endswith("is a replica, which takes no locks; the connection must name the primary")


TLS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown authority": ({"ssl_ca_certs": None}, ": its TLS certificate is refused: unable to get local issuer"),
    "other host": ({"host": "localhost"}, ": its TLS certificate is refused: Hostname mismatch"),
    "authority's file that is none": ({"ssl_ca_certs": __file__}, ": TLS fails: NO_CERTIFICATE_OR_CRL_FOUND"),
    "certificate's file that is none": ({"ssl_certfile": __file__}, ": TLS fails: "),
    "no TLS": ({"ssl": False}, " does not answer: "),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("change", "found"), TLS_REFUSED.values(), ids=TLS_REFUSED.keys())
def test_redis_with_wrong_tls_is_one_line(
    tls_server: RedisServer,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    found: str,
) -> None:
    extra: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(authority.file)} | change
    host = extra.pop("host", "127.0.0.1")
    line = refused(dataclasses.replace(redis_connection(tls_server, **extra), host=host), caplog)
    assert line.startswith(f"connection `redis_default`: Redis at {host}:PORT{found}")
    assert "_ssl.c" not in line


SAYS: dict[str, tuple[bytes, str]] = {
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak Redis; where it is TLS, set `ssl` in the extra"),
    "it repeats what was sent": (
        f"-ERR unknown command 'AUTH', with args beginning with: '{SECRET}'\r\n".encode(),
        "answers with an error: unknown command",
    ),
    "it is starting": (b"-LOADING Redis is loading the dataset\r\n", "does not answer: Redis is loading the dataset"),
    "it hangs up": (b"", "does not answer: Connection closed by server"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("answer", "found"), SAYS.values(), ids=SAYS.keys())
def test_what_is_no_good_redis_is_one_line(caplog: pytest.LogCaptureFixture, answer: bytes, found: str) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                self.request.recv(4096)
                self.request.sendall(answer)
                self.request.shutdown(socket.SHUT_WR)
                self.request.recv(4096)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        line = refused(Connection("ours", "redis", "127.0.0.1", port, password=SECRET), caplog)
        server.shutdown()
    assert line == f"connection `ours`: Redis at 127.0.0.1:PORT {found}"


def test_redis_that_starts_again_is_found_again(tmp_path: Path) -> None:
    """A command that meets its restart is tried again."""
    with (
        RedisServer(tmp_path, password=SECRET) as server,
        redis_client("redis_default", known(redis_connection(server))) as client,
    ):
        client.set("key", "value")
        server.kill()
        restart = threading.Timer(0.3, server.start)
        restart.start()
        assert client.get("key") is None
        restart.join()


def test_redis_that_has_gone_is_tried_three_times_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py alone would connect three times for each of three tries of a health check for each of the command."""
    waits: list[float] = []
    monkeypatch.setattr(redis.retry, "sleep", waits.append)
    monkeypatch.setattr("tagger.redis_connection.REDIS_SECONDS", 0.3)
    with (
        RedisServer(tmp_path, password=SECRET) as server,
        redis_client("redis_default", known(redis_connection(server))) as client,
    ):
        client.set("key", "value")
        server.kill()
        with pytest.raises(redis.ConnectionError, match="Connection refused"):
            client.get("key")
        assert waits == [0.6, 1]
        server.start()
        client.set("key", "value")
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 60)  # its health is looked at
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("key")
        server.resume()
        assert client.get("key") == b"value"
    assert waits == [0.6, 1, 0.6, 1]


# tagger check


def test_check_says_where_the_lock_is(project: Project, redis_default: Connection) -> None:
    project.redis = redis_default
    project.change(lock={"conn_id": "redis_default"})

    lines = list(check(project.dataset, project.connections, create=True))
    assert f"lock redis_default: answers at 127.0.0.1:{redis_default.port}, database 3" in lines
    assert WITHOUT_LOCK not in lines


def test_check_says_what_holds_without_a_lock(project: Project) -> None:
    lines = list(check(project.dataset, project.connections, create=True))
    assert WITHOUT_LOCK in lines
    assert not [line for line in lines if line.startswith("lock")]


@pytest.mark.usefixtures("impatient")
def test_check_fails_where_the_lock_does_not_answer(project: Project, redis_default: Connection) -> None:
    project.redis = dataclasses.replace(redis_default, port=1)
    project.change(lock={"conn_id": "redis_default"})

    with pytest.raises(Unreachable, match=r"Redis at 127\.0\.0\.1:1 does not answer"):
        list(check(project.dataset, project.connections, create=True))
