"""MySQL and MariaDB: connections, errors without values, ids and times as they are, rivals, and the SQL of both."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateTable

from tagger.check import check
from tagger.connections import Connection, database
from tagger.exceptions import InputError, TaggerError, Unreachable
from tagger.mysql import OLDEST, check_version, connect_arguments
from tagger.review import export_reviews, import_reviews
from tagger.runs import Run, read_parquet
from tagger.snapshot import database_time, snapshot
from tagger.storage import Storage
from tagger.tables import connecting, new_target, only_writer
from tagger.window import Selection
from tests.databases import database_connection, make_project, put_rows
from tests.mariadb import MariaDB, MySQLDatabase
from tests.project import Project
from tests.servers import Authority

MIDNIGHT = datetime(2026, 7, 2, tzinfo=UTC)
DAY = Selection(rows="day", start=MIDNIGHT - timedelta(days=1), end=MIDNIGHT, unfinished=False)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("mysql", request)


@pytest.fixture
def ours(mariadb: MariaDB) -> MySQLDatabase:
    """A database of the test's own."""
    return mariadb.create_database(f"test_{uuid.uuid4().hex}")


def source(project: Project, columns: str, *rows: str) -> None:
    """Makes the source table anew, with rows given as SQL."""
    project.execute("DROP TABLE notes")
    project.execute(f"CREATE TABLE notes ({columns})")
    for row in rows:
        project.execute(f"INSERT INTO notes VALUES ({row})")


def taken(project: Project, selection: Selection = DAY) -> dict[Any, str]:
    """Returns ids and texts of a snapshot."""
    run = project.open("one")
    snapshot(project.dataset, run, selection, project.connections)
    rows: dict[Any, str] = {}
    for batch in read_parquet(run.storage, run.snapshot().rows_file):
        rows |= zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
    return rows


# Connections


def arguments(**extra: Any) -> dict[str, Any]:
    return connect_arguments(Connection("ours", "mysql", "db.example.com", extra=extra))


def test_a_connection_is_read_as_the_provider_does() -> None:
    extra = {"unix_socket": "/run/mysqld.sock", "charset": "latin1", "cursor": "sscursor", "local_infile": True}
    connection = Connection("ours", "mysql", "db.example.com", 3307, "me", "s3cret", "press", extra)

    url = database("ours", lambda _: connection).url

    assert url.render_as_string(hide_password=False) == "mysql+pymysql://me:s3cret@db.example.com:3307/press"
    made = connect_arguments(connection)
    assert (made["charset"], made["unix_socket"]) == ("utf8mb4", "/run/mysqld.sock")
    assert "local_infile" not in made


@pytest.mark.parametrize(
    ("extra", "verifies", "looks_at_the_name"),
    [
        ({"ssl": {}}, False, False),
        ({"ssl_mode": "REQUIRED"}, False, False),
        ({"ssl_mode": "VERIFY_CA"}, True, False),
        ({"ssl_mode": "VERIFY_IDENTITY"}, True, True),
        ({"ssl": {"ca": "authority"}}, True, False),
        ({"ssl": '{"ca": "authority"}'}, True, False),
        ({"ssl": {"ca": "authority"}, "ssl_mode": "VERIFY_IDENTITY"}, True, True),
        ({"ssl": {"ca": "authority"}, "ssl_mode": "REQUIRED"}, False, False),
    ],
)
def test_tls_is_what_mysqls_own_clients_make_of_the_settings(
    tmp_path: Path, extra: dict[str, Any], verifies: bool, looks_at_the_name: bool
) -> None:
    authority = Authority(tmp_path)
    extra = json.loads(json.dumps(extra).replace("authority", str(authority.file)))

    tls = arguments(**extra)["ssl"]

    assert (bool(tls.verify_mode), tls.check_hostname) == (verifies, looks_at_the_name)


def test_tls_may_be_left_to_the_server_or_switched_off() -> None:
    assert not {"ssl", "ssl_disabled"} & arguments().keys()
    assert not {"ssl", "ssl_disabled"} & arguments(ssl_mode="PREFERRED").keys()
    assert arguments(ssl_mode="DISABLED")["ssl_disabled"] is True


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"ssl_mode": "sometimes"}, "`ssl_mode`"),
        ({"ssl": {"ca": ["a"]}}, "`ssl.ca`"),
        ({"ssl": "{"}, "`ssl`"),
        ({"ssl": {"ca": "/no/such/file"}}, "No such file"),
        ({"ssl": {"cipher": "none-of-these"}}, "cipher"),
    ],
)
def test_a_wrong_setting_is_one_line(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="connection `ours`") as caught:
        arguments(**extra)

    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("version", "name"),
    [("8.0.16", "MySQL"), ("5.7.44-log", "MySQL"), ("10.5.27-MariaDB", "MariaDB"), ("8.0.11-TiDB-v7.5.0", "MySQL")],
)
def test_an_older_server_is_refused(version: str, name: str) -> None:
    with pytest.raises(InputError, match=rf"connection `ours`: it is {name} .*; {name} .* or later is needed"):
        check_version(dialect(version), "ours")


@pytest.mark.parametrize("version", ["8.0.17", "8.4.3", "9.1.0-commercial", "10.6.0-MariaDB", "11.4.2-MariaDB-log"])
def test_a_server_of_today_is_taken(version: str) -> None:
    check_version(dialect(version), "ours")


def dialect(version: str = "8.0.36") -> Any:
    """Returns SQLAlchemy's dialect as it is after it has met a server of this version."""
    made = mysql.dialect()
    made._parse_server_version(version)
    made._dispatch_for_vendor(made._initialize_mysql, made._initialize_mariadb, None)
    return made


def test_check_says_that_a_server_is_too_old(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OLDEST, "MariaDB", (99, 1))

    with pytest.raises(InputError, match=r"connection `db`: it is MariaDB 10\.\S+; MariaDB 99\.1 or later is needed"):
        list(check(project.dataset, project.connections))


def test_a_wrong_password_is_one_line_without_it(ours: MySQLDatabase) -> None:
    wrong = Connection("ours", "mysql", ours.host, ours.port, ours.user, "s3cret", ours.name)

    told = r"`ours`: the database does not answer: Access denied .*\(1045\)"
    with pytest.raises(Unreachable, match=told) as caught, connecting(database("ours", lambda _: wrong), "ours"):
        pass

    assert "s3cret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_session_is_in_utc_strict_and_sees_what_is_committed(ours: MySQLDatabase) -> None:
    before = datetime.now(UTC)

    with connected(ours) as connection:
        zone, mode = connection.execute(sa.text("SELECT @@time_zone, @@sql_mode")).one()
        assert (zone, "STRICT_ALL_TABLES" in mode) == ("+00:00", True)
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert abs(database_time(connection) - before) < timedelta(seconds=10)


def connected(place: MySQLDatabase) -> Any:
    known = database_connection(place, "ours")
    return connecting(database("ours", lambda _: known), "ours")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO notes VALUES (1, 'distinctive'), (2, 'distinctive')",  # a key twice
        "INSERT INTO notes VALUES ('distinctive', 'x')",
        "SELECT * FROM notes WHERE body = 'distinctive' ANDD",
        "INSERT INTO notes VALUES (3, CONVERT('distinctive\\xff' USING ascii)), ('distinctive', 'x')",
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'distinctive'",
        "SET time_zone = 'distinctive'",
    ],
)
def test_an_error_shows_no_value_of_a_row(ours: MySQLDatabase, statement: str) -> None:
    told = r"`ours`: the database answered: \w+Error \(\d+\)$"
    with pytest.raises(TaggerError, match=told), connected(ours) as connection:
        connection.exec_driver_sql("CREATE TABLE notes (id INTEGER PRIMARY KEY, body VARCHAR(20) UNIQUE)")
        connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("SELECT * FROM nothing", r"Table '.*nothing' doesn't exist \(1146\)"),
        ("SELECT nothing FROM notes", r"Unknown column 'nothing' in '.*' \(1054\)"),
        (
            "INSERT INTO notes VALUES (1, 'distinctive distinctive')",
            r"Data too long for column 'body' at row 1 \(1406\)",
        ),
    ],
)
def test_an_error_of_ours_is_told(ours: MySQLDatabase, statement: str, told: str) -> None:
    with pytest.raises(TaggerError, match=f"`ours`: the database answered: {told}$"), connected(ours) as connection:
        connection.exec_driver_sql("CREATE TABLE notes (id INTEGER PRIMARY KEY, body VARCHAR(20))")
        connection.exec_driver_sql(statement)


def test_a_connection_that_is_killed_is_lost(ours: MySQLDatabase, mariadb: MariaDB) -> None:
    with pytest.raises(Unreachable, match="`ours`: the connection was lost"), connected(ours) as connection:
        kill(connection, mariadb)
        connection.execute(sa.text("SELECT 1"))


def kill(connection: sa.Connection, server: MariaDB) -> None:
    session = connection.execute(sa.text("SELECT CONNECTION_ID()")).scalar_one()
    with server.connect() as other, other.cursor() as cursor:
        cursor.execute(f"KILL {session}")


# TLS


def with_tls(place: MySQLDatabase, **extra: Any) -> Any:
    known = Connection("ours", "mysql", place.host, place.port, place.user, place.password, place.name, extra)
    return connecting(database("ours", lambda _: known), "ours")


def is_encrypted(connection: sa.Connection) -> bool:
    return bool(connection.execute(sa.text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1])


@pytest.mark.parametrize(
    ("extra", "encrypted"),
    [
        ({}, True),
        ({"ssl_mode": "DISABLED"}, False),
        ({"ssl_mode": "REQUIRED"}, True),
        ({"ssl": {"ca": "authority"}}, True),
        ({"ssl": {"ca": "authority"}, "ssl_mode": "VERIFY_IDENTITY"}, True),
    ],
)
def test_a_connection_is_encrypted_where_it_can_be(
    ours: MySQLDatabase, mariadb: MariaDB, extra: dict[str, Any], encrypted: bool
) -> None:
    extra = json.loads(json.dumps(extra).replace("authority", str(mariadb.authority)))

    with with_tls(ours, **extra) as connection:
        assert is_encrypted(connection) == encrypted


def test_a_server_that_another_authority_vouches_for_is_refused(ours: MySQLDatabase, tmp_path: Path) -> None:
    foreign = Authority(tmp_path).file

    told = r"`ours`: the database does not answer: .*certificate verify failed.*\(2003\)$"
    with pytest.raises(Unreachable, match=told), with_tls(ours, ssl={"ca": str(foreign)}):
        pass


def test_a_server_of_another_name_is_refused_where_the_name_is_looked_at(ours: MySQLDatabase, mariadb: MariaDB) -> None:
    elsewhere = replace(ours, host="localhost")
    extra = {"ssl": {"ca": str(mariadb.authority)}}

    refused = pytest.raises(Unreachable, match="Hostname mismatch")
    with refused, with_tls(elsewhere, **extra, ssl_mode="VERIFY_IDENTITY"):
        pass


def test_a_server_without_tls_gets_no_password_where_tls_is_wanted() -> None:
    """A fake that greets as MySQL does, without the flag for TLS."""
    capabilities = (0xFFFFFFFF & ~0x800).to_bytes(4, "little")
    salt = b"12345678", b"123456789012\0"
    greeting = b"\x0a8.0.36\0" + bytes(4) + salt[0] + b"\0" + capabilities[:2] + b"\x2d\x02\0" + capabilities[2:]
    greeting += b"\x15" + bytes(10) + salt[1] + b"caching_sha2_password\0"
    received = b""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            nonlocal received
            client, _ = server.accept()
            with client:
                client.sendall(len(greeting).to_bytes(3, "little") + b"\0" + greeting)
                received = client.recv(1000)

        greeter = threading.Thread(target=greet)
        greeter.start()
        place = MySQLDatabase("127.0.0.1", server.getsockname()[1], "tagger", "s3cret", "press")
        with pytest.raises(Unreachable, match="SSL is required"), with_tls(place, ssl_mode="REQUIRED"):
            pass
        greeter.join(10)

    assert received == b""


# Rights

RIGHTS = "SELECT, SHOW VIEW, INSERT, UPDATE, DELETE, CREATE, CREATE VIEW, DROP, ALTER, CREATE TEMPORARY TABLES"
"""Those that docs/mysql.md names, of the target's database."""


def as_user(project: Project, mariadb: MariaDB, rights: str) -> Connection:
    """Returns a connection to the project's database as somebody with these rights."""
    known = project.database_connection
    user = f"u{uuid.uuid4().hex[:20]}"
    password = mariadb.create_user(user, f"{rights} ON `{known.schema}`.*")
    return replace(known, login=user, password=password)


def test_the_rights_that_the_docs_name_are_enough(project: Project, mariadb: MariaDB, tmp_path: Path) -> None:
    project.database_connection = as_user(project, mariadb, RIGHTS)
    put_rows(project, {1: "apple", 2: "zebra"})

    list(check(project.dataset, project.connections, create=True))
    project.run()
    project.execute("ALTER TABLE note_tags DROP COLUMN reviewed_at")
    project.execute("DROP VIEW note_tags_effective")
    told = list(check(project.dataset, project.connections, create=True))

    assert {row.status for row in project.target().values()} == {"tagged"}
    assert [line for line in told if line.endswith(" made")] == [
        "target note_tags: column reviewed_at made",
        "target note_tags: view note_tags_effective made",
    ]


def test_check_says_that_temporary_tables_are_not_granted(project: Project, mariadb: MariaDB) -> None:
    rights = RIGHTS.removesuffix(", CREATE TEMPORARY TABLES")
    project.database_connection = as_user(project, mariadb, rights)
    put_rows(project, {1: "apple"})

    with pytest.raises(InputError, match=r"`db`: CREATE TEMPORARY TABLES is not granted: Access denied for user"):
        list(check(project.dataset, project.connections))
    with pytest.raises(TaggerError, match=r"Access denied for user .* to database .* \(1044\)"):
        project.run()


def test_a_server_that_is_read_only_is_no_target(project: Project, mariadb: MariaDB) -> None:
    project.database_connection = as_user(project, mariadb, RIGHTS)

    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL read_only = 1")
        try:
            with pytest.raises(InputError, match=r"^`target\.conn_id`: connection `db` takes no writes"):
                list(check(project.dataset, project.connections, create=True))
        finally:
            cursor.execute("SET GLOBAL read_only = 0")


def test_a_source_needs_to_be_read_only(project: Project, mariadb: MariaDB) -> None:
    project.execute("CREATE VIEW shouted AS SELECT id, upper(body) AS body FROM notes")
    project.database_connection = as_user(project, mariadb, "SELECT, SHOW VIEW")
    put_rows(project, {1: "apple"})

    assert taken(project) == {1: "apple"}
    project.change(source={"table": "shouted"})
    assert taken(project) == {1: "APPLE"}


# The lock


def test_one_writer_keeps_the_other_out_until_it_has_committed(ours: MySQLDatabase) -> None:
    order: list[str] = []
    started = threading.Event()

    def second() -> None:
        with connected(ours) as connection:
            started.set()
            with only_writer(connection, "note_tags"):
                order.append("second")

    with connected(ours) as connection:
        with only_writer(connection, "note_tags"):
            rival = threading.Thread(target=second)
            rival.start()
            started.wait(10)
            rival.join(0.5)
            order.append("first")
        rival.join(10)

    assert order == ["first", "second"]


def test_a_writer_that_is_waited_for_in_vain_is_named(ours: MySQLDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.mysql.LOCK_SECONDS", 0)

    with connected(ours) as first, only_writer(first, "note_tags"):
        with connected(ours) as other, only_writer(other, "other_tags"):  # another table is another lock
            pass
        told = rf"table {ours.name}\.note_tags: another load has been at work for 0 s"
        with pytest.raises(TaggerError, match=told), connected(ours) as second:  # noqa: SIM117
            with only_writer(second, f"{ours.name}.note_tags"):
                pass


def test_the_lock_of_a_dead_writer_is_free(ours: MySQLDatabase, mariadb: MariaDB) -> None:
    with pytest.raises(Unreachable), connected(ours) as first, only_writer(first, "note_tags"):
        kill(first, mariadb)
        first.execute(sa.text("SELECT 1"))

    with connected(ours) as second, only_writer(second, "note_tags"):
        pass


def test_a_writer_that_fails_gives_the_lock_back(ours: MySQLDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.mysql.LOCK_SECONDS", 0)

    with connected(ours) as first, connected(ours) as second:
        with pytest.raises(ZeroDivisionError), only_writer(first, "note_tags"):
            raise ZeroDivisionError
        with only_writer(second, "note_tags"):
            pass


# Ids


def test_ids_that_only_case_accents_or_spaces_tell_apart_are_apart(project: Project) -> None:
    ids = ["a", "A", "á", "a ", "ａ", "🍎", "🍏", "ß", "ss"]
    source(project, "id VARCHAR(20) COLLATE utf8mb4_nopad_bin PRIMARY KEY, body TEXT, updated_at TEXT")
    put_rows(project, {row_id: f"apple {row_id}" for row_id in ids})

    project.run()
    again = project.run()

    assert set(project.target()) == set(ids)
    assert (again.llm_requests, again.rows) == (0, len(ids))


def test_a_row_whose_id_changed_its_case_is_taken_once(project: Project) -> None:
    source(project, "id VARCHAR(20) PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ")
    project.change(source={"updated_at": "updated_at"})
    put_rows(project, {"one": "apple"}, str(datetime.now(UTC)))
    project.run()
    project.execute("UPDATE note_tags SET status = 'failed'")
    project.execute("UPDATE notes SET id = 'ONE'")

    project.run()

    assert {row_id: row.status for row_id, row in project.target().items()} == {"one": "failed", "ONE": "tagged"}


def test_as_long_as_a_key_may_be_an_id_is_kept(project: Project) -> None:
    longest = "\U0001f34e" * 768
    source(project, "id VARCHAR(768) CHARACTER SET utf8mb4 PRIMARY KEY, body TEXT, updated_at TEXT")
    put_rows(project, {longest: "apple"})

    project.run()

    assert set(project.target()) == {longest}


def test_an_id_that_is_longer_than_a_key_may_be_is_one_line(project: Project) -> None:
    source(project, "id TEXT, body TEXT, updated_at TEXT")
    put_rows(project, {"x" * 769: "apple"})

    with pytest.raises(TaggerError, match=r"Data too long for column 'row_id' at row 1 \(1406\)"):
        project.run()


@pytest.mark.parametrize(
    ("declared", "value", "kind", "row_id"),
    [
        ("TINYINT", "-7", "integer", -7),
        ("INT UNSIGNED", "4294967295", "integer", 2**32 - 1),
        ("BIGINT", "-9223372036854775808", "integer", -(2**63)),
        ("BIGINT UNSIGNED", "9223372036854775807", "integer", 2**63 - 1),
        ("CHAR(9)", "'00042'", "text", "00042"),
        ("VARCHAR(20) CHARACTER SET latin1", "'café'", "text", "café"),
        ("VARCHAR(20)", "'記事 1'", "text", "記事 1"),
        ("UUID", "'8D8AC610-566D-4EF0-9C22-186B2A5ED793'", "uuid", "8d8ac610-566d-4ef0-9c22-186b2a5ed793"),
    ],
)
def test_an_id_goes_through_all_steps(project: Project, declared: str, value: str, kind: str, row_id: Any) -> None:
    source(project, f"id {declared} PRIMARY KEY, body TEXT", f"{value}, 'apple'")

    project.run("one")
    again = project.run("two")

    assert project.open("one").snapshot().id_type == kind
    assert {found: row.tags for found, row in project.target().items()} == {row_id: ["fruit"]}
    assert again.llm_requests == 0
    project.execute("UPDATE note_tags SET status = 'failed'")
    project.run("three")
    assert project.target()[row_id].status == "tagged"


def test_an_id_beyond_a_signed_integer_is_one_line(project: Project) -> None:
    source(project, "id BIGINT UNSIGNED PRIMARY KEY, body TEXT", "9223372036854775808, 'apple'")

    with pytest.raises(InputError, match=r"`source\.id_column`: id 9223372036854775808 in notes is beyond"):
        project.take()


@pytest.mark.parametrize("declared", ["DECIMAL(10, 2)", "BINARY(16)", "DOUBLE", "DATETIME"])
def test_an_id_of_another_kind_is_refused(project: Project, declared: str) -> None:
    source(project, f"id {declared} PRIMARY KEY, body TEXT")

    with pytest.raises(InputError, match=r"`source\.id_column`: `id` is .*; expected integer, text or uuid"):
        project.take()


# Texts and times


@pytest.mark.parametrize(
    ("declared", "value", "text"),
    [
        ("LONGTEXT", "'\U0001f34e 林檎'", "\U0001f34e 林檎"),
        ("TEXT CHARACTER SET latin1", "'café'", "café"),
        ("TEXT CHARACTER SET sjis", "'林檎'", "林檎"),
        ("VARCHAR(30)", r"'a\0b ''\"'", "a\0b '\""),
        ("ENUM('red', 'green')", "'green'", "green"),
        ("JSON", """'{"a": "林檎"}'""", '{"a": "林檎"}'),
        ("INTEGER", "5", "5"),
        ("DATE", "'2026-07-01'", "2026-07-01"),
    ],
)
def test_a_text_goes_out_as_it_stands(project: Project, declared: str, value: str, text: str) -> None:
    source(project, f"id INTEGER PRIMARY KEY, body {declared}", f"1, {value}")

    assert taken(project) == {1: text}


@pytest.mark.parametrize("declared", ["BLOB", "LONGBLOB", "VARBINARY(20)", "BINARY(3)", "TEXT CHARACTER SET binary"])
def test_bytes_are_refused(project: Project, declared: str) -> None:
    source(project, f"id INTEGER PRIMARY KEY, body {declared}")

    with pytest.raises(InputError, match=r"`source\.text_columns`: `body` is .*, which is no text"):
        project.take()


NUMBERS = (
    "CREATE VIEW notes AS SELECT seq AS id, REPEAT(CHAR(97 + seq % 26 USING utf8mb4), 1500) AS body FROM seq_1_to_{}"
)
"""A table of so many rows of 1,500 characters, which MariaDB makes as it is read."""


def test_a_snapshot_that_fails_does_not_read_the_rows_that_are_left(project: Project) -> None:
    project.execute("DROP TABLE notes")
    project.execute(NUMBERS.format(500_000).replace("seq AS id", "CAST(IF(seq < 100, seq, 7) AS INT) AS id"))
    clock = time.monotonic()

    with pytest.raises(InputError, match="id 7 appears twice"):
        project.take()

    assert time.monotonic() - clock < 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(project: Project) -> None:
    put_rows(project, {1: "apple"})
    project.take("small")
    project.execute("DROP TABLE notes")
    project.execute(NUMBERS.format(200_000))
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    grown: list[int] = []

    class Watched(Storage):
        def upload(self, path: str, file: IO[bytes]) -> None:
            grown.append(process.memory_info().rss - before)
            super().upload(path, file)

    storage = project.open("one").storage
    run = Run(Watched(storage.url, storage._client), "notes", "one")
    rows = snapshot(project.dataset, run, DAY, project.connections).rows

    assert rows == 200_000
    assert max(grown) < 150_000_000


def test_a_view_of_a_column_that_is_gone_is_one_line(project: Project) -> None:
    project.execute("CREATE VIEW shown AS SELECT id, body FROM notes")
    project.execute("ALTER TABLE notes RENAME COLUMN body TO moved")
    project.change(source={"table": "shown"})

    with pytest.raises(
        InputError, match=r"table shown cannot be read: it is a view of tables or columns that are gone"
    ):
        project.take()


# In Asia/Tokyo, the server's own zone, the day ends at nine in the morning of the next one.
@pytest.mark.parametrize(
    ("declared", "zone", "inside", "outside"),
    [
        ("TIMESTAMP(6) NULL", "Asia/Tokyo", ["2026-07-01 00:00:00", "2026-07-01 23:59:59.999999"], ["2026-07-02"]),
        ("DATETIME", "UTC", ["2026-07-01 00:00:00", "2026-07-01 23:59:59"], ["2026-06-30 23:59:59", "2026-07-02"]),
        ("DATETIME(6)", "UTC", ["2026-07-01 23:59:59.999999"], ["2026-07-02", "9999-12-31", "0000-00-00"]),
        ("DATETIME", "Asia/Tokyo", ["2026-07-02 08:59:00"], ["2026-07-02 09:00:00", "2026-07-01 08:59:00"]),
        ("DATE", "UTC", ["2026-07-01"], ["2026-06-30", "2026-07-02", "0000-00-00"]),
        ("DATE", "Asia/Tokyo", ["2026-07-01", "2026-07-02"], ["2026-06-30", "2026-07-03"]),
    ],
)
def test_times(project: Project, declared: str, zone: str, inside: list[str], outside: list[str]) -> None:
    with project.engine.begin() as connection:  # as they stand here
        connection.exec_driver_sql("DROP TABLE notes")
        connection.exec_driver_sql(f"CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT, updated_at {declared})")
        for row_id, time in enumerate(inside + outside):
            connection.exec_driver_sql(f"INSERT INTO notes VALUES ({row_id}, '{time}', '{time}')")
    project.change(source={"updated_at": "updated_at", "timezone": zone})

    assert list(taken(project).values()) == inside


@pytest.mark.parametrize("declared", ["BIGINT", "TEXT", "TIME", "YEAR"])
def test_other_types_are_no_times(project: Project, declared: str) -> None:
    source(project, f"id INTEGER, body TEXT, updated_at {declared}")
    project.change(source={"updated_at": "updated_at"})

    with pytest.raises(InputError, match=rf"`source\.updated_at`: `updated_at` is {declared}.*; expected a date or"):
        project.take()


# The target


def columns(place: MySQLDatabase, table: str = "note_tags") -> dict[str, str]:
    with sa.create_engine(place.url, poolclass=sa.NullPool).connect() as connection:
        return {column["name"]: str(column["type"]) for column in sa.inspect(connection).get_columns(table)}


def test_the_target_is_what_we_make_it_whatever_the_databases_defaults_are(project: Project, mariadb: MariaDB) -> None:
    other = mariadb.create_database(f"test_{uuid.uuid4().hex}", "latin1")
    tags = {"果物": "林檎", "pet": "zebra", "Pet": "tiger"}
    project.change(
        target={"table": f"{other.name}.note_tags"},
        tags=[{"id": tag, "description": description} for tag, description in tags.items()],
    )
    put_rows(project, {1: "林檎", 2: "zebra", 3: "tiger"})

    summary = project.run()

    assert summary.tags == {"Pet": 1, "pet": 1, "果物": 1}
    assert columns(other)["tagged_at"] == "DATETIME"
    with mariadb.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"SHOW CREATE TABLE `{other.name}`.note_tags")
        [(_, made)] = cursor.fetchall()
    assert "ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin" in made


def test_uuids_of_postgresql_are_kept_as_they_read(request: pytest.FixtureRequest, ours: MySQLDatabase) -> None:
    source_project = make_project("postgresql", request)
    row_id = uuid.uuid4()
    source_project.execute("DROP TABLE notes")
    source_project.execute("CREATE TABLE notes (id UUID PRIMARY KEY, body TEXT, updated_at TEXT)")
    source_project.put(row_id, "apple")
    source_project.change(target={"conn_id": "ours"})
    connections = source_project.connections

    def both(conn_id: str) -> Connection | None:
        return database_connection(ours, "ours") if conn_id == "ours" else connections(conn_id)

    source_project.connections = both  # type: ignore[method-assign]
    source_project.run()
    again = source_project.run()

    with connected(ours) as connection:
        rows = connection.execute(sa.text("SELECT row_id, status FROM note_tags")).all()
    assert (rows, again.llm_requests) == ([(str(row_id), "tagged")], 0)


MADE = """
CREATE TABLE note_tags (
	row_id {ids} NOT NULL,
	tags JSON,
	status TEXT NOT NULL,
	error TEXT,
	cache_key VARCHAR(32),
	spec_id VARCHAR(12),
	model TEXT,
	tagged_at DATETIME(6),
	snapshot_at DATETIME(6) NOT NULL,
	run_id TEXT NOT NULL,
	confidence FLOAT(53),
	reviewed_tags JSON,
	reviewed_by TEXT,
	reviewed_at DATETIME(6),
	PRIMARY KEY (row_id)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_bin

"""


@pytest.mark.parametrize(
    ("version", "ids", "declared"),
    [
        ("8.0.36", "integer", "BIGINT"),
        ("8.0.36", "text", "VARCHAR(768) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"),
        ("8.0.36", "uuid", "CHAR(36)"),
        ("10.11.6-MariaDB", "text", "VARCHAR(768) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"),
        ("10.11.6-MariaDB", "uuid", "CHAR(36)"),
    ],
)
def test_the_table_for_mysql_differs_from_that_for_mariadb_in_the_ids_collation(
    version: str, ids: Any, declared: str
) -> None:
    made = str(CreateTable(new_target("note_tags", ids)).compile(dialect=dialect(version)))

    assert made.replace(" \n", "\n") == MADE.replace("{ids}", declared)


def test_the_statements_of_runs_are_the_same_for_mysql(project: Project, tmp_path: Path) -> None:
    """But for the collation of text ids: what is run here on MariaDB is what MySQL 8 gets."""
    project.change(
        confidence=True, review_below=0.5, limits={"max_deleted_fraction": 1}, source={"updated_at": "updated_at"}
    )
    source(project, "id VARCHAR(20) PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ")
    sent: list[Any] = []

    def note(_connection: Any, statement: Any, *_: Any) -> None:
        sent.append(statement)

    sa.event.listen(sa.Engine, "before_execute", note)
    try:
        put_rows(project, {"a": "apple", "b": "zebra", "c": " "})
        project.run()
        project.put("b", "rain")
        project.change(revision=2, rollout={"texts_per_run": 1})
        project.run()
        project.execute("DELETE FROM notes WHERE id = 'a'")
        project.run(all_rows=True)
        export_reviews(project.dataset, tmp_path / "out.csv", project.connections, status="all")
        file = tmp_path / "in.csv"
        file.write_text("row_id,reviewed_tags\nb,animal\n")
        import_reviews(project.dataset, file, project.connections)
    finally:
        sa.event.remove(sa.Engine, "before_execute", note)
    pairs = {
        str(statement.compile(dialect=dialect("10.11.6-MariaDB"))): str(statement.compile(dialect=dialect()))
        for statement in sent
    }

    for on_mariadb, on_mysql in pairs.items():
        spelled = on_mysql.replace("utf8mb4_0900_bin", "utf8mb4_nopad_bin")
        assert spelled.replace("`", "") == on_mariadb.replace("`", "")  # their reserved words differ
        assert "RETURNING" not in on_mysql
    assert {sql.split()[0] for sql in pairs} >= {"CREATE", "SELECT", "INSERT", "UPDATE", "DELETE"}
