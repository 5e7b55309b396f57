"""`AIRFLOW_CONN_*`: whatever stands there, a connection and its client, or one line without its secrets."""

import json
import os
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

from hypothesis import strategies as st

from tagger.connections import Connection, connections_from_env, database, openai_client
from tagger.exceptions import InputError
from tagger.redis_connection import redis_client
from tests.fuzz.hostile import MARKER, changed, damaged, nested, words
from tests.fuzz.promises import assert_clear
from tests.fuzz.rounds import Target

NAME = "AIRFLOW_CONN_FUZZED"

SECRET = quote(MARKER)

URIS = (
    f"postgresql://user:{SECRET}@127.0.0.1:5432/db?sslmode=disable",
    f"postgres://user:{SECRET}@[::1]:5432/db?connect_timeout=1",
    "sqlite:////no/such/file.db",
    f"redis://:{SECRET}@127.0.0.1:6379/3?ssl=true",
    f"openai://:{SECRET}@https://127.0.0.1:8443/v1",
    f"aws://{SECRET}:{SECRET}@/?endpoint_url=http%3A%2F%2F127.0.0.1%3A9000",
    f"mysql://user:{SECRET}@127.0.0.1:3306/db",
    f"redis://127.0.0.1/?__extra__={quote(json.dumps({'db': 1, 'ssl': False}))}",
)

FIELDS: list[dict[str, Any]] = [
    {
        "conn_type": conn_type,
        "host": host,
        "port": 5432,
        "login": "user",
        "password": MARKER,
        "schema": "1",
        "extra": extra,
    }
    for conn_type, host, extra in (
        ("postgres", "127.0.0.1", {"sslmode": "disable", "cursor": "x"}),
        ("sqlite", "/no/such/file.db", {}),
        ("redis", "127.0.0.1", {"db": 2, "ssl": True, "ssl_cert_reqs": "none"}),
        ("openai", "http://127.0.0.1:9/v1", {"openai_client_kwargs": {"timeout": 5, "api_key": MARKER}}),
        ("mysql", "127.0.0.1", '{"charset": "utf8mb4"}'),
    )
]

TOKENS = tuple(
    token.encode() for token in ("://", "@", ":", "/", "?", "&", "#", "[", "]", "%", "%00", "%ff", "__extra__=", " ")
)


def _decoded(raw: bytes) -> str:
    return raw.replace(b"\x00", b"").decode("utf-8", "surrogateescape")


values = st.one_of(
    changed(FIELDS).map(json.dumps),
    changed(FIELDS).map(json.dumps),
    damaged(st.sampled_from(URIS).map(str.encode), TOKENS).map(_decoded),
    damaged(changed(FIELDS).map(json.dumps).map(str.encode), TOKENS).map(_decoded),
    st.builds(lambda scheme, rest: f"{scheme}://{rest}", words, words),
    st.sampled_from((10, 1000, 50_000)).map(lambda depth: nested('{"extra":', "}", depth)),
).map(lambda value: value.replace("\x00", "").encode("utf-8", "surrogateescape" if _escaped(value) else "replace"))


def _escaped(value: str) -> bool:
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in value)


def check(value: bytes) -> str:
    """Read a connection, and make its client."""
    with patch.dict(os.environ):
        os.environ[NAME] = os.fsdecode(value)
        try:
            connection = connections_from_env("fuzzed")
        except InputError as e:
            assert_clear(e)
            return "refused"
        if connection is None:
            return "none"
        if any(MARKER in part for part in (connection.host, connection.login, connection.schema) if part):
            return "a connection whose secret stands in the wrong place"
        assert MARKER not in repr(connection), "its repr shows a secret"
        assert isinstance(connection.extra, dict)
        try:
            _client(connection)
        except InputError as e:
            assert_clear(e)
            return "a connection, refused by what takes it"
    return "a connection"


def _client(connection: Connection) -> None:
    if connection.conn_type in ("redis", "rediss"):
        redis_client("fuzzed", lambda _: connection).close()
    elif connection.conn_type == "openai":
        openai_client("fuzzed", lambda _: connection).close()
    else:
        database("fuzzed", lambda _: connection).dispose()


TARGET = Target("connections", values, check, share=8_000)
