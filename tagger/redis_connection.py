"""The Redis of the lock and the rates: a client for an Airflow connection, and what its errors mean."""

import re
import ssl
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tagger.connections import Connection, Connections, existing, first_mistake
from tagger.exceptions import InputError, Unreachable

if TYPE_CHECKING:
    import redis
    from redis.retry import Retry

T = TypeVar("T")

REDIS_PORT = 6379

MAX_REDIS_CONNECTIONS = 1024
"""Opened at most, as they are needed. A thread that holds one more than that is refused, it does not wait."""

REDIS_SECONDS = 5
"""How long Redis may take to answer: to a connection, to a command."""

REDIS_RETRIES = 2
"""Of a command whose connection was lost or refused, after 0.6 s and 1 s."""


class RedisExtra(BaseModel):
    """What is read of a `redis` connection's extra, as Airflow's provider and redis-py name it."""

    db: Annotated[int, Field(ge=0)] = 0
    ssl: bool = False
    ssl_cert_reqs: Literal["required", "optional", "none"] = "required"
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True


def redis_client(conn_id: str, connections: Connections) -> "redis.Redis":
    """Return a Redis client for an Airflow `redis` connection. Nothing is connected yet.

    Read of the connection: host, port (6379), login, password, and of its extra `db`, `ssl`, `ssl_cert_reqs`,
    `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` and `ssl_check_hostname`. Where its extra has no `db`, its schema is
    the database's number, as in `redis://host:6379/1`. Its type may be `rediss` too, which is TLS.

    Raises:
        InputError: no such connection, another type, no host, or a wrong value.
    """
    import redis

    connection = existing(conn_id, connections)
    extra = _redis_extra(connection)
    tls = extra.model_dump(exclude={"db", "ssl"}) if extra.ssl else {}
    # "none" and "false" are no passwords for the provider either
    password = None if (connection.password or "").lower() in ("", "none", "false") else connection.password
    return redis.Redis(
        connection.host or "",
        connection.port or REDIS_PORT,
        extra.db,
        username=connection.login or None,
        password=password,
        ssl=extra.ssl,
        **tls,
        protocol=2,  # that of every Redis, and a new connection asks for less
        socket_connect_timeout=REDIS_SECONDS,
        socket_timeout=REDIS_SECONDS,
        health_check_interval=30,
        retry=_redis_retry(),
        max_connections=MAX_REDIS_CONNECTIONS,
    )


def _redis_retry() -> "Retry":
    from redis.backoff import ExponentialBackoff
    from redis.exceptions import AuthenticationError
    from redis.retry import Retry

    class FlatRetry(Retry):
        """redis-py's, but a refused password is final, and what is tried again does not try again within.

        redis-py does so three deep (command, health check, connecting), which makes minutes of a few seconds. Each
        connection has a copy, and one thread at a time.
        """

        running = False

        def call_with_retry(
            self,
            do: Callable[[], T],
            fail: Callable[..., Any],
            is_retryable: Callable[[Exception], bool] | None = None,
            with_failure_count: bool = False,
        ) -> T:
            if self.running:
                return do()
            self.running = True
            try:
                return super().call_with_retry(do, fail, self._may_pass, with_failure_count)
            finally:
                self.running = False

        @staticmethod
        def _may_pass(error: Exception) -> bool:
            return not isinstance(error, AuthenticationError)

    return FlatRetry(ExponentialBackoff(cap=1, base=0.3), REDIS_RETRIES)


def _redis_extra(connection: Connection) -> RedisExtra:
    name = f"connection `{connection.conn_id}`"
    if connection.conn_type not in ("redis", "rediss"):
        raise InputError(f"{name}: type `{connection.conn_type}` is not supported (redis is)")
    if not connection.host:
        raise InputError(f"{name}: it has no host")
    given = {key: value for key, value in connection.extra.items() if value not in (None, "")}
    from_schema = "db" not in given and bool(connection.schema)
    if from_schema:
        given["db"] = connection.schema
    extra: RedisExtra | str
    try:
        extra = RedisExtra.model_validate(given)
    except ValidationError as e:
        extra = first_mistake(e)
    if isinstance(extra, str):  # not in the `except`: the context would hold the values
        raise InputError(f"{name}: {extra.replace('`db`', '`schema`') if from_schema else extra}")
    if connection.conn_type == "rediss":
        extra.ssl = True
    if extra.ssl:
        for key in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
            if (path := getattr(extra, key)) and not Path(path).is_file():
                raise InputError(f"{name}: `{key}`: no file {path}")
        if extra.ssl_keyfile and not extra.ssl_certfile:
            raise InputError(f"{name}: `ssl_keyfile` needs `ssl_certfile`")
    return extra


def ping_redis(client: "redis.Redis", conn_id: str) -> str:
    """Take a lock of our own for a moment, and return where: `host:port, database N`.

    A lock needs more than an answer: a replica refuses to write, and a user may lack the right to run scripts.

    Raises:
        Unreachable: Redis does not answer, or TLS with it fails.
        InputError: it refuses the password, the database's number or the lock.
    """
    import redis

    options = client.connection_pool.connection_kwargs
    failure: InputError
    try:
        with client.lock(f"tagger-check-{uuid.uuid4().hex}", timeout=2 * REDIS_SECONDS, blocking=False):
            pass
        return f"{options['host']}:{options['port']}, database {options['db']}"
    except (redis.RedisError, OSError) as e:
        failure = redis_failure(e, client, conn_id)
    except UnicodeError:
        failure = InputError(f"connection `{conn_id}`: its host is no host name")
    raise failure  # not in the `except`: what redis-py says may hold a command's arguments, so the password


def redis_failure(error: Exception, client: "redis.Redis", conn_id: str) -> InputError:
    """Return one line for an error of redis-py, in our own words or in those that hold no argument of a command."""
    from redis import exceptions as of_redis

    options = client.connection_pool.connection_kwargs
    name = f"connection `{conn_id}`: Redis at {options['host']}:{options['port']}"
    if isinstance(error, of_redis.AuthenticationError | of_redis.AuthorizationError):
        return InputError(f"{name} refuses the login or the password")
    if isinstance(error, of_redis.NoPermissionError):
        return InputError(f"{name} gives the user no right to lock: commands and keys of its ACL")
    if isinstance(error, of_redis.ReadOnlyError):
        return InputError(f"{name} is a replica, which takes no locks; the connection must name the primary")
    reason = re.split(r"[\n`']| \(_ssl", str(error))[0].strip(" .,")
    if isinstance(error, of_redis.ResponseError):
        if "DB index" in reason:
            return InputError(f"{name} has no database {options['db']}")
        return InputError(f"{name} answers with an error: {reason}")
    if isinstance(error, of_redis.InvalidResponse):
        return Unreachable(f"{name} does not speak Redis; where it is TLS, set `ssl` in the extra")
    cause = error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Unreachable(f"{name}: its TLS certificate is refused: {cause.verify_message}")
    if isinstance(cause, ssl.SSLError):
        return Unreachable(f"{name}: TLS fails: {cause.reason or reason}")
    if isinstance(cause, OSError) and cause.strerror:
        reason = cause.strerror
    return Unreachable(f"{name} does not answer: {reason}")
