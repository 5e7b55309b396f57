"""A small user of tagger for tests: a source table, a bucket, the offline stand-in, and the steps run over them."""

import uuid
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from demo.stand_in import StandIn
from tagger.connections import Connection
from tagger.dataset import Dataset
from tagger.dataset_files import parse_dataset
from tagger.exceptions import TaggerError
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import Summary, report
from tagger.runs import IdType, Run, open_run
from tagger.snapshot import snapshot
from tagger.tables import new_target, reflect
from tagger.tag import tag
from tagger.window import Options, RunKind, select_rows
from tests.servers import S3Store

MINIMAL: dict[str, Any] = {
    "dataset": "notes",
    "storage": "s3://replaced",
    "source": {"conn_id": "db", "table": "notes", "id_column": "id", "text_columns": ["body"]},
    "target": {"table": "note_tags"},
    "llm": {"model": "offline-stand-in", "concurrency": 8, "price": {"input": 1.0, "output": 10.0}},
    "prompt": "You tag short notes.",
    "tags": [
        {"id": "fruit", "description": "apple, banana, cherry; 果物, 林檎"},
        {"id": "animal", "description": "zebra, tiger, horse; 動物"},
        {"id": "weather", "description": "rain, storm, sunshine; 天気"},
    ],
    "max_tags": 2,
}
"""A dataset file with the required keys, and a model and price for the stand-in."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged in, dict by dict."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


@dataclass
class Project:
    """One dataset and all it needs. Rows go in with `put`; `run` goes through all steps like the DAG does.

    With a lock: `project.redis = redis_default` (the fixture) and `project.change(lock={"conn_id": "redis_default"})`.
    """

    store: S3Store
    llm: StandIn
    database_connection: Connection
    engine: sa.Engine
    content: dict[str, Any]
    runs: list[str] = field(default_factory=list)
    redis: Connection | None = None

    def connections(self, conn_id: str) -> Connection | None:
        """Look a connection up: `db`, `aws_default` and `openai_default` are there, and `redis` where it is set."""
        extra = {"endpoint_url": self.store.endpoint}
        known = {
            "db": self.database_connection,
            "aws_default": Connection(
                "aws_default", "aws", login=self.store.access_key, password=self.store.secret_key, extra=extra
            ),
            "openai_default": Connection("openai_default", "openai", host=self.llm.base_url, password="key"),
        }
        if self.redis is not None:
            known[self.redis.conn_id] = self.redis
        return known.get(conn_id)

    @property
    def dataset(self) -> Dataset:
        """The dataset as `content` has it now."""
        return parse_dataset(self.content, "notes.yaml")

    def change(self, **changes: Any) -> None:
        """Change the dataset file: `project.change(llm={"concurrency": 2})`."""
        self.content = merged(self.content, changes)

    def execute(self, statement: str, **values: Any) -> None:
        """Run SQL on the source database, and commit."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def put(self, row_id: Any, body: str | None, updated_at: Any = None) -> None:
        """Insert or replace a row of the source."""
        self.execute("DELETE FROM notes WHERE id = :id", id=row_id)
        self.execute("INSERT INTO notes VALUES (:id, :body, :at)", id=row_id, body=body, at=updated_at)

    def target(self) -> dict[Any, Any]:
        """Return the target's rows by row id, with attributes named like the columns."""
        with self.engine.connect() as connection:
            found = reflect(connection, self.dataset.target.table)
            if found is None:
                return {}
            ids: IdType = "integer" if isinstance(found.c.row_id.type, sa.Integer) else "text"
            table = new_target(self.dataset.target.table, ids)
            return {row.row_id: row for row in connection.execute(sa.select(table))}

    def open(self, run_id: str) -> Run:
        """Return a run's files."""
        return open_run(self.dataset, run_id, self.connections)

    def take(
        self,
        run_id: str | None = None,
        *,
        end: datetime | None = None,
        kind: RunKind = "regular",
        day: date | None = None,
        all_rows: bool = False,
        options: Options | None = None,
    ) -> Run:
        """Take the snapshot of a new run, and return the run."""
        run = self.open(run_id or f"test__{uuid.uuid4().hex[:8]}")
        selection = select_rows(self.dataset, end=end or datetime.now(UTC), kind=kind, day=day, all_rows=all_rows)
        snapshot(self.dataset, run, selection, self.connections, options)
        return run

    def run(self, run_id: str | None = None, **selection: Any) -> Summary:
        """Go through all steps as the DAG does, and return the summary.

        Raises:
            TaggerError: the run failed; its summary is written where there is a plan.
        """
        return self.finish(self.take(run_id, **selection))

    def finish(self, run: Run) -> Summary:
        """Go through the steps after the snapshot."""
        for shard in plan(run, self.connections).shards:
            try:
                tag(run, shard.shard, self.connections)
            except TaggerError:
                break
        load_back(run, self.connections)
        return report(run)

    def summary(self, run: Run) -> Summary:
        """Return the summary that a run wrote."""
        summary = run.read("summary.json", Summary)
        assert summary is not None
        return summary

    def everything_stored(self, *, but: str = "snapshots/") -> bytes:
        """Return paths and bodies of all objects in the bucket, those below `but` aside."""
        client = self.store.client()
        found = bytearray()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.store.bucket):
            for item in page.get("Contents", []):
                if not item["Key"].startswith(but):
                    found += item["Key"].encode() + b"\n"
                    found += client.get_object(Bucket=self.store.bucket, Key=item["Key"])["Body"].read() + b"\n"
        return bytes(found)


def sqlite_project(folder: Path, store: S3Store, llm: StandIn) -> Project:
    """Return a project whose source and target are in an SQLite file, with a table `notes(id, body, updated_at)`."""
    path = folder / "source.db"
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    project = Project(
        store,
        llm,
        Connection("db", "sqlite", host=str(path)),
        engine,
        merged(MINIMAL, {"storage": f"s3://{store.bucket}"}),
    )
    project.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT, updated_at TEXT)")
    return project
