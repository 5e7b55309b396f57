"""A MariaDB server for the tests, from Debian's binaries, or one that is there already."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pymysql

from demo.processes import LOOPBACK, Process, ServerError, free_port, start_on_free_ports
from tests.servers import Authority

WITHOUT = "no MariaDB: `apt-get install --no-install-recommends mariadb-server-core mariadb-client-core` brings it"

# Nothing has to survive a crash of the machine.
_STORE = (
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-method=nosync",
    "--skip-innodb-doublewrite",
)
# The defaults are not those that suit us.
_SETTINGS = (
    f"--bind-address={LOOPBACK}",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--innodb-flush-log-at-trx-commit=0",
    "--key-buffer-size=64K",
    "--aria-pagecache-buffer-size=1M",
    "--default-time-zone=+09:00",
    "--character-set-server=latin1",
    "--sql-mode=",
)

_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", "LC_ALL": "C"}


@dataclass(frozen=True)
class MySQLDatabase:
    """How to reach a database of a MySQL server."""

    host: str
    port: int
    user: str
    password: str
    name: str

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy, with the PyMySQL driver."""
        return f"mysql+pymysql://{self.user}:{self.password}@{self.host}:{self.port}/{self.name}?charset=utf8mb4"


def is_installed() -> bool:
    """Returns whether the server's programs are there."""
    return all(shutil.which(program, path=_ENVIRONMENT["PATH"]) for program in ("mariadbd", "mariadb-install-db"))


class MariaDB:
    """A MariaDB server with an account `tagger` that may do all, over TCP on 127.0.0.1 only, with or without TLS.

    For root it runs as `nobody`, with the data in the machine's temporary directory. Every start begins empty.
    """

    def __init__(self, directory: Path) -> None:
        """Describes the server, whose log is kept in a directory; `start` starts it."""
        self.directory = directory.absolute()
        self.user = "tagger"
        self.password = secrets.token_hex(16)
        self._owner = _unprivileged()
        self._port = 0
        self._home: Path | None = None
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerError("MariaDB is not running", None)
        return self._process.pid

    def database(self, name: str) -> MySQLDatabase:
        """Returns how to reach a database."""
        return MySQLDatabase(LOOPBACK, self._port, self.user, self.password, name)

    def create_database(self, name: str, charset: str = "utf8mb4") -> MySQLDatabase:
        """Creates a database and returns how to reach it."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE `{name}` CHARACTER SET {charset}")
        return self.database(name)

    @property
    def authority(self) -> Path:
        """The file of the authority that has signed the server's certificate."""
        if self._home is None:
            raise ServerError("MariaDB is not running", None)
        return self._home / "authority.pem"

    def create_user(self, name: str, rights: str) -> str:
        """Creates an account with these rights, `SELECT ON a.b, …`, and returns its password."""
        password = secrets.token_hex(16)
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE USER '{name}'@'{LOOPBACK}' IDENTIFIED BY '{password}'")
            cursor.execute(f"GRANT {rights} TO '{name}'@'{LOOPBACK}'")
        return password

    def connect(self) -> pymysql.Connection[pymysql.cursors.Cursor]:
        """Returns a connection to the server."""
        return pymysql.connect(
            host=LOOPBACK, port=self._port, user=self.user, password=self.password, connect_timeout=5, autocommit=True
        )

    def start(self) -> Self:
        """Starts the server and returns when it accepts connections.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            home = self._home = Path(tempfile.mkdtemp(prefix="mariadb-"))
            self._initialise(home)
            self._process = start_on_free_ports(lambda: self._build(home))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server and removes the data."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._home is not None:
            shutil.rmtree(self._home)
            self._home = None

    def __enter__(self) -> Self:
        """Starts the server."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the server."""
        self.stop()

    def _initialise(self, home: Path) -> None:
        account = f"'{self.user}'@'{LOOPBACK}'"
        (home / "init.sql").write_text(
            f"CREATE OR REPLACE USER {account} IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {account} WITH GRANT OPTION;\n"
        )
        Authority(home).issue()
        made = subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={home / 'data'}", "--skip-test-db", *_STORE],
            env=_ENVIRONMENT,
            cwd=home,
            capture_output=True,
        )
        if made.returncode:
            raise ServerError(f"`mariadb-install-db` failed:\n{made.stderr.decode(errors='replace')}", None)
        if self._owner is not None:
            for path in (home, *home.rglob("*")):
                os.chown(path, *self._owner)

    def _build(self, home: Path) -> Process:
        self._port = free_port()
        program = shutil.which("mariadbd", path=_ENVIRONMENT["PATH"]) or "mariadbd"  # not on every user's PATH
        files = [f"--datadir={home / 'data'}", f"--socket={home / 'socket'}", f"--init-file={home / 'init.sql'}"]
        files += [f"--ssl-cert={home / LOOPBACK}.pem", f"--ssl-key={home / LOOPBACK}.key"]
        return Process(
            [program, "--no-defaults", *files, f"--port={self._port}", *_STORE, *_SETTINGS],
            self.directory / "mariadb.log",
            ready=self._answers,
            env=_ENVIRONMENT,
            cwd=home,
            user=self._owner,
        )

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except pymysql.OperationalError:
            return False
        return True


def _unprivileged() -> tuple[int, int] | None:
    """Returns the user and group id to run MariaDB as; None: our own."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid
