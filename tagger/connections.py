"""Connections: Airflow's, read as its providers read them, and the clients made from them.

Outside Airflow the same `AIRFLOW_CONN_<ID>` variables serve (URI or JSON); where no such connection is set,
`OPENAI_API_KEY`/`OPENAI_BASE_URL` and the AWS SDK's own chain do.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tagger.exceptions import InputError, printable

if TYPE_CHECKING:
    import sqlalchemy as sa
    from openai import OpenAI
    from pydantic import ValidationError

LIBPQ_PARAMETERS: tuple[str, ...] = ("application_name", "channel_binding", "connect_timeout", "gssencmode")
LIBPQ_PARAMETERS += ("keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "options")
LIBPQ_PARAMETERS += ("require_auth", "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcertmode")
LIBPQ_PARAMETERS += ("sslcrl", "sslcrldir", "sslkey", "sslmode", "sslnegotiation", "sslpassword", "sslrootcert")
LIBPQ_PARAMETERS += ("target_session_attrs", "tcp_user_timeout")
"""Keys of a PostgreSQL connection's extra that libpq takes; Airflow's own (cursor, iam, …) are not passed on."""


SQLITE_BUSY_SECONDS = 60
"""How long a writer waits for another one."""

LOGGED_AS = "tagger"
"""Whom SQLAlchemy's pool says it logs for: tracebacks of what it cannot close of a lost connection, which is an error
of its own already."""

logging.getLogger(f"sqlalchemy.pool.impl.NullPool.{LOGGED_AS}").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Connection:
    """An Airflow connection. Its secrets are in no repr."""

    conn_id: str
    conn_type: str
    host: str | None = None
    port: int | None = None
    login: str | None = None
    password: str | None = field(default=None, repr=False)
    schema: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)


Connections = Callable[[str], Connection | None]
"""Looks a connection up by its id; None where there is none."""


def connections_from_env(conn_id: str) -> Connection | None:
    """Read a connection from `AIRFLOW_CONN_<ID>`, a URI or JSON as in Airflow.

    Raises:
        InputError: the variable is set, but is neither.
    """
    name = f"AIRFLOW_CONN_{conn_id.upper()}"
    value = os.environ.get(name)
    if not value:
        return None
    try:
        connection = _from_json(conn_id, value) if value.lstrip().startswith("{") else _from_uri(conn_id, value)
        _check(connection)
        return connection
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"${name} is neither an Airflow connection URI nor its JSON form") from None


def _from_json(conn_id: str, value: str) -> Connection:
    fields = json.loads(value)
    extra = fields.get("extra") or {}
    if isinstance(extra, str):
        extra = json.loads(extra)
    return Connection(
        conn_id,
        _conn_type(fields["conn_type"]) if "conn_type" in fields else "generic",
        fields.get("host"),
        int(fields["port"]) if fields.get("port") else None,
        fields.get("login"),
        fields.get("password"),
        fields.get("schema"),
        dict(extra),
    )


def _from_uri(conn_id: str, value: str) -> Connection:
    scheme, rest = value.split("://", 1)
    # conn_type://https://host/… keeps the inner scheme in the host, as Airflow does for HTTP endpoints
    inner = rest.split("://", 1)[0] if "://" in rest.split("?", 1)[0] else None
    if inner is not None and not inner.isalnum():  # behind a password, which would be read as a part of the host
        raise ValueError
    parts = urlsplit(rest if inner else f"//{rest}")
    host = unquote(parts.netloc.rsplit("@", 1)[-1])
    if parts.port is not None:
        host = host.rsplit(":", 1)[0]
    if host.startswith("[") and host.endswith("]"):  # IPv6
        host = host[1:-1]
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    extra = dict(json.loads(query["__extra__"])) if "__extra__" in query else query
    return Connection(
        conn_id,
        _conn_type(scheme),
        f"{inner}://{host}" if inner and host else host or None,
        parts.port,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        unquote(parts.path[1:]) or None,
        extra,
    )


def _check(connection: Connection) -> None:
    """Raise ValueError or TypeError where a part of a connection is none."""
    for part in (connection.host, connection.login, connection.password, connection.schema):
        if part is not None and b"\0" in part.encode():
            raise ValueError
    if connection.port is not None and not 0 < connection.port < 65536:
        raise ValueError
    if not connection.conn_type.isidentifier():
        raise ValueError


def _conn_type(name: str) -> str:
    return "postgres" if name == "postgresql" else name.replace("-", "_")


def database(conn_id: str, connections: Connections) -> "sa.Engine":
    """Return an engine for a database connection. Nothing is connected yet, and no error shows a row's values.

    Raises:
        InputError: no such connection, a type that is not supported, or an SQLite file that does not exist.
    """
    import sqlalchemy as sa

    connection = existing(conn_id, connections)
    return sa.create_engine(
        _database_url(connection),
        **_engine_options(connection),
        hide_parameters=True,
        poolclass=sa.NullPool,
        pool_logging_name=LOGGED_AS,
        json_serializer=lambda value: json.dumps(value, ensure_ascii=False),
    )


def _engine_options(connection: Connection) -> dict[str, Any]:
    """Return what an engine needs besides its URL. All servers read what is committed, as PostgreSQL does."""
    if connection.conn_type == "sqlite":
        return {"connect_args": {"timeout": SQLITE_BUSY_SECONDS}}
    if connection.conn_type == "mysql":
        from tagger.mysql import connect_arguments

        return {"connect_args": connect_arguments(connection), "isolation_level": "READ COMMITTED"}
    return {}


def existing(conn_id: str, connections: Connections) -> Connection:
    """Return a connection, or raise the InputError that says how to define it."""
    connection = connections(conn_id)
    if connection is None:
        raise InputError(f"no connection `{conn_id}`: define it in Airflow or set $AIRFLOW_CONN_{conn_id.upper()}")
    return connection


def _database_url(connection: Connection) -> "sa.URL":
    import sqlalchemy as sa

    if connection.conn_type == "sqlite":
        path = Path(connection.host or "/" + (connection.schema or "").lstrip("/"))
        if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file() raises where a name is too long
            raise InputError(f"connection `{connection.conn_id}`: no SQLite file {printable(str(path))}")
        return sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": "rw", "uri": "true"})
    if connection.conn_type == "postgres":
        query = {k: str(v) for k, v in connection.extra.items() if k in LIBPQ_PARAMETERS}
        return sa.URL.create(
            "postgresql+psycopg",
            connection.login,
            connection.password,
            connection.host,
            connection.port,
            connection.schema,
            {"connect_timeout": "15", "keepalives_idle": "60", **query},  # a host that is gone is noticed in minutes
        )
    if connection.conn_type == "mysql":
        return sa.URL.create(
            "mysql+pymysql",
            connection.login,
            connection.password,
            connection.host,
            connection.port,
            connection.schema,
        )
    raise InputError(
        f"connection `{connection.conn_id}`: type `{connection.conn_type}` is not supported "
        "(sqlite, postgres and mysql are)"
    )


def first_mistake(error: "ValidationError") -> str:
    """Return the first of the mistakes in a connection's extra: its key, and what is wrong."""
    wrong = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, wrong['loc']))}`: {wrong['msg']}"


def openai_client(conn_id: str, connections: Connections) -> "OpenAI":
    """Return an OpenAI client for an Airflow `openai` connection, or for `OPENAI_*` where there is none.

    The client does not retry: `tagger.llm` owns the retries.

    Raises:
        InputError: there is neither a connection nor `OPENAI_API_KEY`.
    """
    from openai import OpenAI, OpenAIError, Timeout

    connection = connections(conn_id)
    options: dict[str, Any] = {}
    try:
        if connection is not None:
            options = dict(connection.extra.get("openai_client_kwargs", {}))
            options.setdefault("base_url", connection.host or None)
            options.setdefault("api_key", connection.password or None)
        options["max_retries"] = 0
        options.setdefault("timeout", Timeout(120, connect=10))
        return OpenAI(**options)
    except OpenAIError:
        raise InputError(
            f"no API key: neither connection `{conn_id}` (password = key, host = base URL) nor $OPENAI_API_KEY is set"
        ) from None
    except Exception:  # of several libraries; some of them show the key
        raise InputError(
            f"connection `{conn_id}`: no client can be made of it: its host must be a base URL, and "
            "`openai_client_kwargs` of its extra the SDK's arguments"
        ) from None
