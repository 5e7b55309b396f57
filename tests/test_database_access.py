"""PostgreSQL as companies run it: TLS with an authority of their own, replicas, and tables without an index."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa

from demo.postgresql import Database, PostgreSQL
from demo.stand_in import StandIn
from tagger.check import check
from tagger.connections import Connection, database
from tagger.exceptions import InputError, Unreachable
from tagger.tables import connecting
from tests.databases import database_connection, postgresql_project
from tests.project import Project
from tests.replicas import Replica, wait_until
from tests.servers import Authority, S3Store, TlsProxy

# TLS

DEBIANS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


class DebiansPostgreSQL(PostgreSQL):
    """The server of the machine, which has TLS; that of the package is built without."""

    def _programs(self, home: Path) -> Path:
        return DEBIANS[-1].parent


class PostgresqlTls(TlsProxy):
    """TLS before a server that has none: clients ask for it first."""

    def _connect(self, client: socket.socket) -> tuple[ssl.SSLSocket, socket.socket]:
        client.recv(8, socket.MSG_WAITALL)
        client.sendall(b"S")
        return super()._connect(client)


class TlsServers(NamedTuple):
    """Databases that are reached by TLS."""

    any: Database
    certified: Database
    """Only with a certificate of the authority."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module", params=["its own TLS", "TLS before it"])
def servers(request: pytest.FixtureRequest, authority: Authority) -> Iterator[TlsServers]:
    if request.param == "TLS before it":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        with ExitStack() as stack:
            ports = []
            for asks_clients in (False, True):
                context = authority.server(asks_clients=asks_clients)
                proxy = PostgresqlTls(context, lambda: server.database.port)
                proxy.start()
                stack.callback(proxy.stop)
                ports.append(proxy.port)
            yield TlsServers(*(dataclasses.replace(server.database, port=port) for port in ports))
    elif not DEBIANS:
        pytest.skip("no PostgreSQL of Debian's: apt install postgresql")
    else:
        with DebiansPostgreSQL(request.getfixturevalue("tmp_path_factory").mktemp("tls")) as server:
            yield of_its_own(server, authority)


def of_its_own(server: PostgreSQL, authority: Authority) -> TlsServers:
    """Let a server take TLS alone, and to the database `certified` only with a certificate."""
    certified = server.create_database("certified")
    with psycopg.connect(server.airflow_uri, autocommit=True) as direct:
        data = Path(str(direct.execute("SHOW data_directory").fetchall()[0][0]))
        certificate, key = authority.issue()
        rights = "hostssl certified all 127.0.0.1/32 cert\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
        contents = {"server.pem": certificate.read_text(), "server.key": key.read_text(), "pg_hba.conf": rights}
        for name, content in (contents | {"authority.pem": authority.file.read_text()}).items():
            file = data / name
            file.touch(mode=0o600)
            file.write_text(content)
            os.chown(file, data.stat().st_uid, data.stat().st_gid)
        for setting in ("cert_file = 'server.pem'", "key_file = 'server.key'", "ca_file = 'authority.pem'"):
            direct.execute(f"ALTER SYSTEM SET ssl_{setting}".encode())
        direct.execute("ALTER SYSTEM SET ssl = on")
        direct.execute("SELECT pg_reload_conf()")
        wait_until(lambda: direct.execute("SHOW ssl").fetchall() == [("on",)])
    return TlsServers(server.database, certified)


def by_tls(server: Database, **extra: Any) -> Connection:
    return dataclasses.replace(database_connection(server, "ours"), extra=extra)


def reached(connection: Connection) -> bool:
    """Connect, and return whether it is by TLS."""
    with connecting(database("ours", {"ours": connection}.get), "ours") as opened:
        raw: Any = opened.connection.dbapi_connection
        assert opened.execute(sa.text("SELECT 42")).scalar_one() == 42
        return bool(raw.pgconn.ssl_in_use)


def test_postgresql_is_reached_by_tls_with_an_authority_of_our_own(servers: TlsServers, authority: Authority) -> None:
    files = {"sslrootcert": str(authority.file)}

    assert reached(by_tls(servers.any, sslmode="verify-full", ssl_min_protocol_version="TLSv1.3", **files))


def test_postgresql_may_want_a_certificate_of_ours(servers: TlsServers, authority: Authority) -> None:
    certificate, key = authority.issue("tagger")
    key.chmod(0o600)
    files = {"sslrootcert": str(authority.file), "sslcert": str(certificate), "sslkey": str(key)}

    assert reached(by_tls(servers.certified, sslmode="verify-full", **files))


def refused(connection: Connection) -> str:
    with pytest.raises(Unreachable) as caught:
        reached(connection)
    line = str(caught.value)
    assert line.startswith("connection `ours`: the database does not answer: ")
    assert "\n" not in line
    assert not connection.password or connection.password not in line
    assert caught.value.exit_code == 2
    return line


def test_another_authority_is_refused(servers: TlsServers, tmp_path: Path) -> None:
    other = Authority(tmp_path)

    assert "certificate verify failed" in refused(
        by_tls(servers.any, sslmode="verify-full", sslrootcert=str(other.file))
    )


def test_a_certificate_of_another_host_is_refused(servers: TlsServers, authority: Authority) -> None:
    ours = by_tls(servers.any, sslmode="verify-full", sslrootcert=str(authority.file))

    line = refused(dataclasses.replace(ours, host="localhost"))
    assert 'does not match host name "localhost"' in line


def test_a_file_that_is_not_there_is_named(servers: TlsServers) -> None:
    line = refused(by_tls(servers.any, sslmode="verify-full", sslrootcert="/no/authority.pem"))
    assert 'root certificate file "/no/authority.pem" does not exist' in line


def test_a_server_that_wants_a_certificate_refuses_who_has_none(servers: TlsServers) -> None:
    line = refused(by_tls(servers.certified, sslmode="require"))
    assert re.search("requires a valid client certificate|alert certificate required", line)


def test_a_key_that_others_may_read_is_refused(servers: TlsServers, authority: Authority) -> None:
    certificate, key = authority.issue("tagger")
    key.chmod(0o644)

    line = refused(by_tls(servers.certified, sslmode="require", sslcert=str(certificate), sslkey=str(key)))
    assert "has group or world access" in line


def test_a_server_without_tls_is_refused_where_it_is_required(postgresql: PostgreSQL) -> None:
    line = refused(by_tls(postgresql.database, sslmode="require"))
    assert "server does not support SSL, but SSL was required" in line


# replicas


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with PostgreSQL(tmp_path_factory.mktemp("primary")) as primary, Replica(primary) as replica:
        yield replica


@pytest.fixture
def replicated(replica: Replica, s3_bucket: S3Store, llm: StandIn) -> Iterator[Project]:
    """A project whose source is a replica, with a target in its primary, and a lookback of a second."""
    project = postgresql_project(replica.primary, s3_bucket, llm)
    project.change(
        source={"conn_id": "replica", "updated_at": "updated_at", "lookback": "1s"}, target={"conn_id": "db"}
    )
    replica_of(project, replica)
    replica.wait_until_replayed()
    yield project
    replica.resume()
    project.engine.dispose()


def replica_of(project: Project, replica: Replica, **changes: Any) -> None:
    """Let the project's connection `replica` reach the replica of its database."""
    of_primary, name = project.connections, project.database_connection.schema
    assert name is not None
    connection = dataclasses.replace(database_connection(replica.database(name), "replica"), **changes)
    project.connections = (  # type: ignore[method-assign]
        lambda conn_id: connection if conn_id == "replica" else of_primary(conn_id)
    )


def said_of_the_source(project: Project) -> list[str]:
    lines = [line for line in check(project.dataset, project.connections) if line.startswith("source notes: ")]
    return [line.removeprefix("source notes: ") for line in lines if "no index" not in line][1:]


def write(project: Project) -> datetime:
    """Insert a row into the primary, and return when it changed."""
    now = datetime.now(UTC)
    project.put(1, "apple", now)
    return now


def test_a_replica_of_an_idle_primary_is_not_behind(replicated: Project, replica: Replica) -> None:
    write(replicated)
    replica.wait_until_replayed()
    time.sleep(1.5)

    assert replica.ask("SELECT now() - pg_last_xact_replay_timestamp()") > timedelta(seconds=1.2)
    assert said_of_the_source(replicated) == []


def test_a_replica_that_is_behind_by_less_than_the_lookback_is_well(replicated: Project, replica: Replica) -> None:
    replicated.change(source={"lookback": "1h"})
    replica.pause()
    write(replicated)
    replica.wait_until_received()

    assert said_of_the_source(replicated) == []


@pytest.mark.parametrize("reader", ["superuser", "a user without rights"])
def test_a_replica_that_is_behind_by_more_than_the_lookback_is_warned_of(
    replicated: Project, replica: Replica, caplog: pytest.LogCaptureFixture, reader: str
) -> None:
    if reader != "superuser":
        role = f"reader{uuid.uuid4().hex[:8]}"
        replicated.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'reads'")
        replicated.execute(f"GRANT SELECT ON notes TO {role}")
        replica_of(replicated, replica, login=role, password="reads")
    write(replicated)
    replica.wait_until_replayed()
    replica.pause()
    write(replicated)
    replica.wait_until_received()
    time.sleep(1.5)

    [line] = said_of_the_source(replicated)
    assert line.startswith("a replica that is 0:00:0")
    assert " behind, with `source.lookback` 0:00:01: rows that changed since " in line

    with caplog.at_level(logging.WARNING):
        replicated.take()
    assert "snapshot: source notes: a replica that is 0:00:0" in caplog.text


@pytest.mark.parametrize(("lookback", "taken"), [("1s", 0), ("1h", 1)])
def test_a_row_that_the_replica_lacks_is_taken_the_next_day_within_the_lookback(
    replicated: Project, replica: Replica, lookback: str, taken: int
) -> None:
    replicated.change(source={"lookback": lookback})
    replica.pause()
    changed = write(replicated)
    end = changed + timedelta(seconds=2)
    first = replicated.take(end=end)
    replica.resume()
    replica.wait_until_replayed()
    second = replicated.take(end=end + timedelta(days=1))

    assert first.snapshot().rows == 0
    assert second.snapshot().rows == taken


def test_a_day_that_the_replica_has_wholly_is_not_warned_of(
    replicated: Project, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    write(replicated)
    replica.wait_until_replayed()
    replica.pause()
    write(replicated)
    replica.wait_until_received()
    time.sleep(1.5)

    with caplog.at_level(logging.WARNING):
        replicated.take(day=datetime.now(UTC).date() - timedelta(days=2))
        replicated.take(end=datetime.now(UTC) - timedelta(hours=1), kind="backfill")
        assert "replica" not in caplog.text
        replicated.take(day=datetime.now(UTC).date())
    assert "replica that is" in caplog.text


def test_a_lag_that_the_replica_does_not_tell_is_no_error(replicated: Project, replica: Replica) -> None:
    role = f"reader{uuid.uuid4().hex[:8]}"
    replicated.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'reads'")
    replicated.execute(f"GRANT SELECT ON notes TO {role}")
    replicated.execute("REVOKE EXECUTE ON FUNCTION pg_last_wal_receive_lsn() FROM PUBLIC")
    replica_of(replicated, replica, login=role, password="reads")
    replica.wait_until_replayed()

    assert said_of_the_source(replicated) == []
    assert replicated.take().snapshot().rows == 0


def test_a_replica_is_no_target(replicated: Project) -> None:
    replicated.change(target={"conn_id": "replica"})

    with pytest.raises(InputError, match=r"^`target\.conn_id`: connection `replica` takes no writes"):
        list(check(replicated.dataset, replicated.connections))


def test_a_replica_whose_primary_is_gone_is_as_old_as_its_last_commit(
    tmp_path: Path, s3_bucket: S3Store, llm: StandIn
) -> None:
    with PostgreSQL(tmp_path) as primary, Replica(primary) as replica:
        project = postgresql_project(primary, s3_bucket, llm)
        project.change(source={"conn_id": "replica", "updated_at": "updated_at", "lookback": "1s"})
        project.change(target={"conn_id": "db2"})
        replica_of(project, replica)
        write(project)
        replica.wait_until_replayed()
        project.engine.dispose()
        os.kill(primary.pid, 9)
        wait_until(lambda: replica.ask("SELECT count(*) = 0 FROM pg_stat_wal_receiver"))
        time.sleep(1.5)

        with pytest.raises(InputError, match="no connection `db2`"):
            lines = []
            for line in check(project.dataset, project.connections):
                lines.append(line)
    assert any("a replica that is 0:00:0" in line for line in lines)


# indexes

TABLES: dict[str, tuple[str, bool]] = {
    "none": ("", True),
    "of the column": ("CREATE INDEX ON notes (updated_at)", False),
    "descending": ("CREATE INDEX ON notes (updated_at DESC NULLS LAST)", False),
    "that begins with it": ("CREATE INDEX ON notes (updated_at, id)", False),
    "that ends with it": ("CREATE INDEX ON notes (id, updated_at)", True),
    "of some rows": ("CREATE INDEX ON notes (updated_at) WHERE updated_at IS NOT NULL", True),
    "of an expression": ("CREATE INDEX ON notes (date_trunc('day', updated_at, 'UTC'))", True),
    "hash": ("CREATE INDEX ON notes USING hash (updated_at)", True),
    "brin": ("CREATE INDEX ON notes USING brin (updated_at)", False),
    "unique": ("ALTER TABLE notes ADD UNIQUE (updated_at)", False),
    "primary key": (
        "ALTER TABLE notes DROP CONSTRAINT notes_pkey; ALTER TABLE notes ADD PRIMARY KEY (updated_at, id)",
        False,
    ),
    "view": ("ALTER TABLE notes RENAME TO rows; CREATE VIEW notes AS SELECT * FROM rows", False),
    "materialized view": (
        "ALTER TABLE notes RENAME TO rows; CREATE MATERIALIZED VIEW notes AS SELECT * FROM rows",
        False,
    ),
    "partitioned, without": (
        "DROP TABLE notes; CREATE TABLE notes (id BIGINT, body TEXT, updated_at TIMESTAMPTZ) PARTITION BY HASH (id)",
        True,
    ),
    "partitioned": (
        "DROP TABLE notes; CREATE TABLE notes (id BIGINT, body TEXT, updated_at TIMESTAMPTZ) PARTITION BY HASH (id);"
        "CREATE INDEX ON notes (updated_at)",
        False,
    ),
}
NO_INDEX = "`updated_at` has no index, so each run reads the whole table"


@pytest.fixture
def indexed(postgresql: PostgreSQL, s3_bucket: S3Store, llm: StandIn) -> Iterator[Project]:
    project = postgresql_project(postgresql, s3_bucket, llm)
    project.change(source={"updated_at": "updated_at"})
    yield project
    project.engine.dispose()


@pytest.mark.parametrize(("statements", "lacks"), TABLES.values(), ids=TABLES.keys())
def test_check_warns_where_no_index_finds_the_changed_rows(indexed: Project, statements: str, lacks: bool) -> None:
    for statement in filter(None, statements.split(";")):
        indexed.execute(statement)

    assert (f"source notes: {NO_INDEX}" in check(indexed.dataset, indexed.connections)) is lacks


def test_an_index_is_looked_for_in_the_tables_schema(indexed: Project) -> None:
    indexed.execute("CREATE SCHEMA press")
    indexed.execute("CREATE TABLE press.notes (LIKE notes INCLUDING ALL)")
    indexed.change(source={"table": "press.notes"})
    assert f"source press.notes: {NO_INDEX}" in check(indexed.dataset, indexed.connections)

    indexed.execute("CREATE INDEX ON press.notes (updated_at)")
    assert f"source press.notes: {NO_INDEX}" not in check(indexed.dataset, indexed.connections)


def test_without_a_window_no_index_is_missed(indexed: Project) -> None:
    indexed.change(source={"updated_at": None})
    assert f"source notes: {NO_INDEX}" not in check(indexed.dataset, indexed.connections)


def test_sqlite_has_no_use_for_an_index(project: Project) -> None:
    project.change(source={"updated_at": "updated_at"})
    assert f"source notes: {NO_INDEX}" not in check(project.dataset, project.connections)


def test_the_index_is_what_a_run_reads_by(indexed: Project, caplog: pytest.LogCaptureFixture) -> None:
    """What check asks for has a use: PostgreSQL counts the scans."""
    indexed.execute("CREATE INDEX by_time ON notes (updated_at)")
    indexed.execute(
        "INSERT INTO notes SELECT n, 'apple', now() - n * interval '1 hour' FROM generate_series(1, 20000) AS n"
    )
    indexed.execute("ANALYZE notes")

    assert indexed.take().snapshot().rows == 47
    with indexed.engine.connect() as connection:
        query = sa.text("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'by_time'")
        wait_until(lambda: connection.execute(query).scalar_one())
