"""A cache, and the target table that goes with it, made directly: as if all of the texts had been tagged before."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.endpoints import S3Endpoint
from bench.project import BUCKET, text
from demo.processes import LOOPBACK
from tagger.cache import Record, Usage
from tagger.dataset_files import parse_dataset
from tagger.spec import normalise, spec_id, text_key
from tagger.tables import new_target

THREADS = 4
KEYS_A_THREAD = 500


class Seed:
    """The records of the texts 0, 1, … under one dataset file; which of them exist is each benchmark's own choice."""

    def __init__(self, content: dict[str, Any], texts: int, folder: Path) -> None:
        """Works out the keys, about 20 s for a million."""
        self._dataset = parse_dataset(content, "bench.yaml")
        self._spec = spec_id(self._dataset)
        prefix = self._dataset.storage.removeprefix(f"s3://{BUCKET}").strip("/")
        self._prefix = f"{prefix}/cache/{self._spec}/"
        self._keys_file = folder / f"keys-{texts}"
        self._objects_file = folder / f"objects-{texts}"
        with self._keys_file.open("w") as file:
            file.writelines(f"{text_key(self._spec, normalise(text(number)))}\n" for number in range(texts))

    def fill(self, s3: S3Endpoint, missing: set[int]) -> None:
        """Make the records exist, all but `missing`."""
        with self._objects_file.open("w") as file:
            file.writelines(f"{path}\n" for path in self._paths(missing))
        s3.seed(BUCKET, self._objects_file, self._body())

    def fill_seaweedfs(self, filer_port: int, missing: set[int]) -> None:
        """Write the records into SeaweedFS, all but `missing`, by its filer, which asks for no signature."""
        paths, body = self._paths(missing), self._body()
        with ThreadPoolExecutor(THREADS) as threads:
            while parts := [part for _ in range(THREADS) if (part := list(islice(paths, KEYS_A_THREAD)))]:
                list(threads.map(lambda part: _put(filer_port, part, body), parts))

    def fill_target(self, source: Path, texts: int, missing: set[int]) -> None:
        """Make the target table with a row for each of the first `texts` texts, all but `missing`."""
        engine = sa.create_engine(f"sqlite:///{source}", poolclass=sa.NullPool)
        table = new_target(self._dataset.target.table, "integer")
        table.drop(engine, checkfirst=True)
        table.create(engine)
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(sep=" ")
        same = (json.dumps(["cardiology"]), "tagged", self._spec, self._dataset.llm.model, now, now, "before")
        columns = "tags, status, spec_id, model, tagged_at, snapshot_at, run_id, row_id, cache_key"
        rows = ((*same, number, key) for number, key in islice(self._keys(), texts) if number not in missing)
        with sqlite3.connect(source) as connection:
            connection.executemany(f"INSERT INTO {table.name} ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        connection.close()

    def paths_of(self, numbers: set[int]) -> list[str]:
        """Return the object keys of some texts' records."""
        return [self._path(key) for number, key in self._keys() if number in numbers]

    def _keys(self) -> Iterator[tuple[int, str]]:
        with self._keys_file.open() as file:
            for number, line in enumerate(file):
                yield number, line.rstrip("\n")

    def _paths(self, missing: set[int]) -> Iterator[str]:
        return (self._path(key) for number, key in self._keys() if number not in missing)

    def _path(self, key: str) -> str:
        return f"{self._prefix}{key[:2]}/tag_{key}.json"

    def _body(self) -> str:
        record = Record(
            status="tagged",
            tags=["cardiology"],
            model=self._dataset.llm.model,
            usage=Usage(input=400, output=10),
            cost_usd=0.00012,
            finish_reason="stop",
            created_at=datetime.now(UTC),
        )
        return record.to_bytes().decode()


def _put(filer_port: int, paths: Iterable[str], body: str) -> None:
    connection = HTTPConnection(LOOPBACK, filer_port, timeout=60)
    for path in paths:
        connection.request("PUT", f"/buckets/{BUCKET}/{path}", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status >= 300:
            raise OSError(f"SeaweedFS's filer answered {answer.status}")
    connection.close()
