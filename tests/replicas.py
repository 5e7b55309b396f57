"""A streaming replica of the tests' PostgreSQL, made with its own pg_basebackup."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import psycopg

from demo.postgresql import _POSTGRES_SETTINGS, Database, PostgreSQL
from demo.processes import LOOPBACK, Process, ServerError, free_port, start_on_free_ports


class Replica:
    """A hot standby that follows a server; it lies beside the server's data, and belongs to the same user."""

    def __init__(self, primary: PostgreSQL) -> None:
        """Describes the replica; `start` starts it."""
        self.primary = primary
        self._data = Path(str(self._ask_primary("SHOW data_directory"))).with_name("replica")
        self._port = 0
        self._process: Process | None = None

    def database(self, name: str) -> Database:
        """Returns how to reach the replica of a database."""
        return Database(self._port, self.primary.user, self.primary.password, name)

    def ask(self, query: str) -> Any:
        """Returns the one value that a query gives here."""
        return _ask(self.database("postgres"), query)

    def start(self) -> Self:
        """Copies the server's data, starts to follow and returns when the replica takes connections.

        Raises:
            ServerError: It did not start; with the end of its log.
        """
        owner = self._data.parent.stat()
        user = (owner.st_uid, owner.st_gid) if os.geteuid() == 0 else None
        programs = Path(psutil.Process(self.primary.pid).exe()).parent
        where = [f"--host={LOOPBACK}", f"--port={self.primary.database.port}", f"--username={self.primary.user}"]
        flags = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        made = subprocess.run(
            [programs / "pg_basebackup", f"--pgdata={self._data}", *flags, *where],
            user=user[0] if user else None,
            group=user[1] if user else None,
            extra_groups=[] if user else None,
            cwd=self._data.parent,
            env={"PATH": os.defpath, "LC_ALL": "C", "PGPASSWORD": self.primary.password},
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise ServerError(f"`pg_basebackup` failed:\n{made.stderr}", None)
        self._process = start_on_free_ports(lambda: self._build(programs, user))
        return self

    def stop(self) -> None:
        """Ends the replica and removes its data."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        shutil.rmtree(self._data, ignore_errors=True)

    def pause(self) -> None:
        """Lets the replica receive what the server writes, and not replay it."""
        self.ask("SELECT pg_wal_replay_pause()")
        wait_until(lambda: self.ask("SELECT pg_get_wal_replay_pause_state()") == "paused")

    def resume(self) -> None:
        """Lets the replica replay again."""
        self.ask("SELECT pg_wal_replay_resume()")

    def wait_until_received(self) -> None:
        """Waits until the replica has received all that the server has written."""
        written = self._ask_primary("SELECT pg_current_wal_insert_lsn()")
        wait_until(lambda: self.ask(f"SELECT pg_last_wal_receive_lsn() >= '{written}'"))

    def wait_until_replayed(self) -> None:
        """Waits until the replica has all that the server has written."""
        written = self._ask_primary("SELECT pg_current_wal_insert_lsn()")
        wait_until(lambda: self.ask(f"SELECT pg_last_wal_replay_lsn() >= '{written}'"))

    def __enter__(self) -> Self:
        """Starts the replica."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the replica."""
        self.stop()

    def _ask_primary(self, query: str) -> Any:
        return _ask(self.primary.database, query)

    def _build(self, programs: Path, user: tuple[int, int] | None) -> Process:
        self._port = free_port()
        settings = [argument for setting in _POSTGRES_SETTINGS for argument in ("-c", setting)]
        return Process(
            [programs / "postgres", "-D", self._data, "-p", str(self._port), *settings],
            self.primary.directory / "replica.log",
            ready=self._answers,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            cwd=self._data,
            user=user,
            stop_signal=signal.SIGQUIT,
            death_signal=signal.SIGQUIT,
        )

    def _answers(self) -> bool:
        try:
            return bool(self.ask("SELECT true"))
        except psycopg.OperationalError:
            return False


def wait_until(holds: Callable[[], object], seconds: float = 20) -> None:
    """Waits until something holds.

    Raises:
        TimeoutError: It does not.
    """
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.05)


def _ask(database: Database, query: str) -> Any:
    with psycopg.connect(database.airflow_uri, connect_timeout=5, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()[0][0]
