"""Connections: parsed as Airflow parses them, read as its providers read them, and never shown with their secrets."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import airflow.sdk
import pytest
import sqlalchemy as sa
from airflow.providers.openai.hooks.openai import OpenAIHook
from airflow.providers.postgres.hooks.postgres import PostgresHook

from tagger.airflow.connections import connections_from_airflow
from tagger.connections import (
    Connection,
    Connections,
    connections_from_env,
    database,
    openai_client,
    s3_client,
)
from tagger.exceptions import InputError, Unreachable
from tagger.tables import connecting
from tests.servers import PostgreSQL, S3Store

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


@pytest.mark.parametrize("conn_type", ["mysql", "http", "generic"])
def test_other_databases_are_refused(conn_type: str) -> None:
    with pytest.raises(
        InputError, match=f"connection `ours`: type `{conn_type}` is not supported .sqlite and postgres"
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
    extra = {"sslmode": "require", "connect_timeout": 3, "cursor": "dictcursor", "iam": False}

    url = database("ours", known(Connection("ours", "postgres", "db.example.com", extra=extra))).url
    assert url.query == {"sslmode": "require", "connect_timeout": "3"}


def test_postgresql_that_does_not_answer_is_not_waited_for_longer_than_a_while() -> None:
    url = database("ours", known(Connection("ours", "postgres", "db.example.com"))).url

    assert 1 <= int(str(url.query["connect_timeout"])) <= 30


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
        (Connection("ours", "aws", extra={"role_arn": "arn:aws:iam::1:role/x"}), "`role_arn` is not supported"),
        (Connection("ours", "aws", extra={"profile_name": "missing"}), "missing"),
        (Connection("ours", "aws", extra={"endpoint_url": "127.0.0.1:9000"}), "127.0.0.1:9000"),
        (Connection("ours", "aws", extra={"service_config": "x"}), "service_config"),
        (Connection("ours", "aws", extra={"service_config": {"s3": "x"}}), "service_config"),
        (Connection("ours", "aws", extra={"endpoint_url": 9000}), "endpoint_url|9000"),
    ],
    ids=["role", "profile", "endpoint", "service_config", "s3", "endpoint type"],
)
def test_aws_connection_that_makes_no_client_is_one_error(
    signing: pytest.MonkeyPatch, connection: Connection, found: str
) -> None:
    with pytest.raises(InputError, match=rf"connection `ours`: .*({found})") as caught:
        s3_client("ours", known(connection))
    assert SECRET not in str(caught.value)
