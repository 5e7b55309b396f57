"""A whole deployment on loopback: the servers, Airflow's components, and a project whose DAG they run."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from bench.endpoints import S3Endpoint
from demo.airflow import Airflow, Client, settings
from demo.mail import MailCatcher
from demo.postgresql import PostgreSQL
from demo.stand_in import StandIn
from tagger.connections import Connection
from tests.databases import postgresql_project, redis_connection
from tests.project import Project, sqlite_project
from tests.servers import RedisServer, S3Store

REPOSITORY = Path(__file__).resolve().parent.parent.parent
QUICK = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
}
"""Settings that show a test within seconds what takes minutes by default."""


class Cluster:
    """Databases, S3, stand-in, SMTP catcher and, with Celery workers, Redis; then Airflow over them.

    The `with` block begins with the servers, so that the project can be filled; `start` starts Airflow over the dataset
    files that `write` wrote. Without workers the scheduler runs the tasks itself (LocalExecutor).
    """

    project: Project
    llm: StandIn
    mail: MailCatcher
    airflow: Airflow
    api: Client

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 0,
        slots: int = 4,
        postgresql: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Describes the deployment.

        Args:
            folder: Where everything is kept and logged.
            workers: Number of Celery workers.
            slots: Tasks that a worker runs at once; without workers, that run at once.
            postgresql: Whether the metadata and the project's tables are in PostgreSQL, else in SQLite.
            environment: More of Airflow's environment.
        """
        self.folder = folder
        self._workers = workers
        self._slots = slots
        self._postgresql = postgresql
        self._more = environment or {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the servers, and let Airflow make its tables meanwhile."""
        with self._stack as stack:
            home, datasets = self.folder / "airflow", self.folder / "datasets"
            home.mkdir(parents=True)
            datasets.mkdir()
            environment = settings(home) | QUICK
            environment["AIRFLOW__CORE__PARALLELISM"] = str(self._slots * max(self._workers, 1))
            server = stack.enter_context(PostgreSQL(self.folder)) if self._postgresql else None
            if server:
                environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = server.create_database("airflow").url
            self._environment = _inherited() | environment | {"TAGGER_DATASETS": str(datasets), **self._more}
            self._migration = self._migrate()
            self.llm = stack.enter_context(StandIn())
            self.mail = stack.enter_context(MailCatcher(self.folder / "mails"))
            s3 = stack.enter_context(S3Endpoint(self.folder))
            store = S3Store(s3.url, "any", "any", "tagger")
            self.project = (
                postgresql_project(server, store, self.llm) if server else sqlite_project(self.folder, store, self.llm)
            )
            stack.callback(self.project.engine.dispose)
            stack.callback(self._end_migration)
            if self._workers:
                redis = stack.enter_context(RedisServer(self.folder / "redis", password="secret"))
                self.project.redis = redis_connection(redis)
                self._environment |= {
                    "AIRFLOW__CELERY__BROKER_URL": f"redis://:secret@{redis.host}:{redis.port}/0",
                    "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
                }
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End everything."""
        self._stack.close()

    def write(self, content: dict[str, Any]) -> None:
        """Write a dataset file."""
        file = self.folder / "datasets" / f"{content['dataset']}.yaml"
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")

    def start(self, **connections: dict[str, Any]) -> None:
        """Start Airflow with the project's connections and these, and return when all of it works."""
        known = (self.project.connections(name) for name in ("db", "aws_default", "openai_default", "redis_default"))
        connections |= {each.conn_id: _fields(each) for each in known if each}
        connections["smtp_default"] = self.mail.airflow_connection
        self._environment |= {f"AIRFLOW_CONN_{name.upper()}": json.dumps(each) for name, each in connections.items()}
        if self._migration.wait(120):
            raise RuntimeError(f"Airflow's tables:\n{(self.folder / 'migration.log').read_text()}")
        airflow = Airflow(self._environment, self.folder, workers=self._workers, slots=self._slots)
        self.airflow = self._stack.enter_context(airflow)
        self.api = self.airflow.client()

    def _end_migration(self) -> None:
        self._migration.kill()
        self._migration.wait()

    def _migrate(self) -> subprocess.Popen[bytes]:
        with (self.folder / "migration.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", "from airflow.utils.db import initdb; initdb()"],
                env=self._environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def _inherited() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "TAGGER_"))}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return ours | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _fields(connection: Connection) -> dict[str, Any]:
    return {name: value for name, value in asdict(connection).items() if name != "conn_id" and value}
