"""Where the demo keeps everything, and the environment in which its parts run."""

import fcntl
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from demo.airflow import REPOSITORY, settings
from demo.mail import MailCatcher
from demo.seaweedfs import SeaweedFS

STAND_IN_MODEL = "offline-stand-in"
BUCKET = "tagger"
CAUGHT_UP = timedelta(days=3)
"""How far back the schedule begins: what is older would be caught up, day after day, once a DAG is unpaused."""

ALERTS = "alerts: {to: [team@example.com], deadline: 2h}"


def root() -> Path:
    """Return the folder that holds all the demo keeps: `.demo` in the repository, or `$TAGGER_DEMO`."""
    return Path(os.environ.get("TAGGER_DEMO") or REPOSITORY / ".demo").absolute()


@dataclass(frozen=True)
class Home:
    """The demo's folder, `offline` or `live` below the root: both are forgotten by `--reset`."""

    live: bool

    @property
    def path(self) -> Path:
        """The folder."""
        return root() / ("live" if self.live else "offline")

    @property
    def database(self) -> Path:
        """The source and target database."""
        return self.path / "tables.db"

    @property
    def airflow(self) -> Path:
        """Airflow's home."""
        return self.path / "airflow"

    @property
    def datasets(self) -> Path:
        """The dataset files, changed for the demo."""
        return self.path / "datasets"

    @property
    def mails(self) -> Path:
        """The mails that Airflow sent."""
        return self.path / "mails"

    @property
    def logs(self) -> Path:
        """What the servers and Airflow print."""
        return self.path / "logs"

    def prepare(self) -> None:
        """Make the folders and the dataset files."""
        for folder in (self.path, self.airflow, self.datasets, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        for old in self.datasets.glob("*.yaml"):
            old.unlink()
        for source in sorted((REPOSITORY / "dags" / "datasets").glob("*.yaml")):
            content = source.read_text(encoding="utf-8")
            if self.live:
                content = content.replace("storage: s3://tagger", "storage: s3://tagger/live")
            else:
                content = content.replace("model: gpt-5-mini", f"model: {STAND_IN_MODEL}")
            (self.datasets / source.name).write_text(f"{content}\n{ALERTS}\n", encoding="utf-8")

    def shorten_catch_up(self) -> None:
        """Let the schedules begin a few days ago."""
        start_date = datetime.now(UTC).date() - CAUGHT_UP
        for file in self.datasets.glob("*.yaml"):
            content = re.sub("(?m)^start_date: .*", f"start_date: {start_date}", file.read_text(encoding="utf-8"))
            file.write_text(content, encoding="utf-8")

    def lock(self) -> bool:
        """Take the folder for this process, until it ends; return whether it was free."""
        file = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def store(self) -> SeaweedFS:
        """Return the S3 server, not started yet."""
        return SeaweedFS(self.path / "s3", self.logs / "s3.log")

    def environment(
        self, store: SeaweedFS, llm_url: str | None, mail: MailCatcher, database_url: str | None
    ) -> dict[str, str]:
        """Return the environment of Airflow and the `tagger` command: connections, folders, loopback only.

        Args:
            store: The S3 server.
            llm_url: The stand-in's base URL; None: the real API.
            mail: The catcher of Airflow's mails.
            database_url: Airflow's own database; None: one in SQLite.
        """
        aws = {
            "conn_type": "aws",
            "login": store.access_key,
            "password": store.secret_key,
            "extra": {"endpoint_url": store.endpoint, "region_name": "us-east-1"},
        }
        connections = {
            "TAGGER_DB": {"conn_type": "sqlite", "host": str(self.database)},
            "AWS_DEFAULT": aws,
            "SMTP_DEFAULT": mail.airflow_connection,
        }
        if llm_url is not None:
            connections["OPENAI_DEFAULT"] = {"conn_type": "openai", "host": llm_url, "password": "not-needed"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "AWS_", "TAGGER_"))}
        return {
            **inherited,
            **{f"AIRFLOW_CONN_{name}": json.dumps(fields) for name, fields in connections.items()},
            **settings(self.airflow, database_url),
            "NO_PROXY": "127.0.0.1,localhost",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "TAGGER_DATASETS": str(self.datasets),
        }


def forget() -> bool:
    """Delete all that the demo ever kept; return whether there was something."""
    folder = root()
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True
