"""Whole runs: hostile texts and hostile answers among ordinary rows, each of which gets its tags all the same."""

import gzip
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, Literal, cast

import pyarrow.parquet as pq
import sqlalchemy as sa
from hypothesis import strategies as st

from demo.postgresql import PostgreSQL
from demo.stand_in import Fate, Question, Reply, StandIn
from tagger.batch import wait_for_shards
from tagger.load import load_back
from tagger.plan import plan
from tagger.prompt import BadAnswer, read_answers
from tagger.report import Summary, report
from tagger.runs import Run
from tagger.spec import normalise, spec_id, text_key
from tagger.tag import tag
from tests.databases import QuickProject, postgresql_project, shared_client
from tests.fuzz.answers import bodies, completions, errors
from tests.fuzz.batch_lines import odd_lines
from tests.fuzz.hostile import long, rarely, texts, words
from tests.fuzz.promises import assert_allowed
from tests.fuzz.rounds import Target, folder
from tests.project import Project, sqlite_project
from tests.servers import Moto, S3Store

MARK = "Tx9 本文 marker"
"""Stands in most hostile texts: nothing but the snapshot may hold it."""

ORDINARY = {
    1001: ("An apple and a banana.", ["fruit"]),
    1002: ("A tiger met a zebra.", ["animal"]),
    1003: ("暖かい天気", ["weather"]),
    1004: ("Cherry: " + "red " * 400, ["fruit"]),
    1005: ("林檎を食べる動物", ["fruit", "animal"]),
}
"""Rows that anybody might have, and their tags."""

Mode = Literal["online", "together", "batch"]


@dataclass(frozen=True)
class Whole:
    """A source table's hostile rows, what the endpoint answers to some of them, and how they are asked."""

    rows: list[tuple[str, bool]]
    """Texts, and whether SQLite is to hold them as bytes."""
    replies: list[Reply]
    """To the first of them; the stand-in answers the others."""
    answers: list[Any]
    """To the first of them in a batch."""
    lines: list[bytes]
    """In a batch's output, beside those of the rows."""
    mode: Mode
    database: str


@dataclass(eq=False, repr=False, kw_only=True)
class HostileStandIn(StandIn):
    """Answers requests that hold certain texts as it is told."""

    hostile: dict[str, Reply] = field(default_factory=dict)
    told: list[tuple[list[str], Reply]] = field(default_factory=list)
    """The texts of each request answered so, and the answer."""

    def _reply(self, asked: Any, questions: list[Question], *rest: Any) -> Reply:
        told = next((self.hostile[each.text] for each in questions if each.text in self.hostile), None)
        if told:
            self.told.append(([each.text for each in questions], told))
        return told or super()._reply(asked, questions, *rest)


@cache
def _servers() -> tuple[S3Store, HostileStandIn]:
    moto, llm = Moto().start(), HostileStandIn()
    llm.__enter__()
    store = S3Store(moto.endpoint, "moto", "moto", "fuzz")
    store.client().create_bucket(Bucket=store.bucket)
    shared_client(store.endpoint, store.access_key, store.secret_key)
    return store, llm


@cache
def _project(database: str) -> Project:
    store, llm = _servers()
    if database == "sqlite":
        made = sqlite_project(folder("source"), store, llm)
    else:
        made = postgresql_project(PostgreSQL(folder("postgresql")).start(), store, llm)
    return QuickProject(store, llm, made.database_connection, made.engine, made.content)


_numbers = count()


def check(case: Whole) -> str:
    """Run all steps over the rows."""
    project = _project(case.database)
    hostile = dict(enumerate(_storable(case)))
    project.execute("DELETE FROM notes")
    project.execute("DROP VIEW IF EXISTS note_tags_effective")
    project.execute("DROP TABLE IF EXISTS note_tags")
    _put(project, hostile)
    project.content["storage"] = f"s3://{project.store.bucket}/{next(_numbers)}"
    project.change(
        source={"max_chars": 20_000},
        llm={"mode": "batch" if case.mode == "batch" else "online"},
        limits={"max_failed_fraction": 1},
        shards={"texts_per_shard": 15},
    )
    project.content["llm"]["texts_per_request"] = 5 if case.mode == "together" else 1
    _teach(project.llm, case, hostile, spec_id(project.dataset))
    with _logged() as log:
        run = project.take()
        summary = _finish(run, project)
    _assert_tagged(project, hostile)
    _assert_private(run, log)
    parts = summary.tagged + summary.refused + summary.failed
    assert summary.state == "success" and summary.texts == parts, "the sum of the texts"
    return f"{case.database}, {case.mode}: {len(ORDINARY)} ordinary and up to 30 hostile rows"


def _storable(case: Whole) -> Iterator[str | bytes]:
    """Yield the rows' texts as their database can hold them."""
    for text, is_bytes in case.rows:
        raw = text.encode("utf-8", "surrogatepass")
        if case.database == "postgresql":
            yield raw.decode("utf-8", "replace").replace("\x00", "")
        else:
            yield raw if is_bytes else raw.decode("utf-8", "replace")


def _put(project: Project, hostile: dict[int, str | bytes]) -> None:
    texts: dict[int, Any] = {**hostile, **{row_id: text for row_id, (text, _) in ORDINARY.items()}}
    body = "CAST(:body AS TEXT)" if project.engine.dialect.name == "sqlite" else ":body"
    with project.engine.begin() as connection:
        for row_id, text in texts.items():
            # every third of the bytes stay such: SQLite does not mind what a column is declared
            value = ":body" if isinstance(text, bytes) and row_id % 3 == 0 else body
            connection.execute(sa.text(f"INSERT INTO notes VALUES (:id, {value}, NULL)"), {"id": row_id, "body": text})


def _read(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


def _teach(llm: StandIn, case: Whole, hostile: dict[int, str | bytes], spec: str) -> None:
    assert isinstance(llm, HostileStandIn)
    llm._batches._fates.clear()
    llm.hostile, llm.told = {}, []
    ordinary = {normalise(text) for text, _ in ORDINARY.values()}
    keys = {text_key(spec, text) for text in ordinary}
    if case.mode == "batch":
        llm.script_batches(*[Fate(output=lambda lines: _changed(lines, case, keys))] * 4)
        return
    for text, reply in zip(hostile.values(), case.replies, strict=False):
        if normalise(_read(text)) not in ordinary:
            llm.hostile[_read(text)] = reply


def _changed(lines: list[str], case: Whole, ordinary: set[str]) -> list[str]:
    """Let a batch's output answer hostile rows with hostile bodies, and hold lines that are none."""
    bodies, changed = iter(case.answers), []
    for line in map(json.loads, lines):
        if line["custom_id"] not in ordinary and (body := next(bodies, None)) is not None:
            line["response"]["body"] = body
        changed.append(json.dumps(line))
    return [raw.decode("utf-8", "replace").replace("\n", " ") for raw in case.lines] + changed


def _finish(run: Run, project: Project) -> Summary:
    for shard in plan(run, project.connections).shards:
        if project.dataset.llm.mode == "batch":
            wait_for_shards(run, [shard.shard], project.connections)
        tag(run, shard.shard, project.connections)
    load_back(run, project.connections)
    return report(run)


def _assert_tagged(project: Project, hostile: dict[int, str | bytes]) -> None:
    target, told = project.target(), _told(project)
    for row_id, (text, tags) in ORDINARY.items():
        row = target[row_id]
        assert row.status == "tagged", f"ordinary row {row_id} is {row.status}"
        assert set(row.tags) in [set(tags), *told[text]], f"ordinary row {row_id} has {row.tags}"
    blank = {row_id for row_id, text in hostile.items() if not normalise(_read(text))}
    assert target.keys() == hostile.keys() - blank | ORDINARY.keys(), "other rows than those with a text"
    for row in target.values():
        assert row.status in ("tagged", "refused", "failed"), row.status
        if row.status == "tagged":
            assert_allowed(project.dataset, row.tags)
        else:
            assert row.error and row.error.isprintable() and MARK not in row.error, "an error that is not clear"
            assert row.tags is None or row.tags == []


def _told(project: Project) -> defaultdict[str, list[set[str]]]:
    """Return what the endpoint said of each text, under its own number, in answer to a request for several."""
    assert isinstance(project.llm, HostileStandIn)
    told = defaultdict[str, list[set[str]]](list)
    for asked, reply in project.llm.told:
        with suppress(BadAnswer, LookupError, RecursionError, TypeError, ValueError):
            content = json.loads(cast(bytes, reply.body))["choices"][0]["message"]["content"]
            for text, choice in read_answers(project.dataset, content, asked).items():
                told[text].append(set(choice.tags))
    return told


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Keep what is logged in the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)


def _assert_private(run: Run, log: list[str]) -> None:
    assert MARK not in "\n".join(log), "the log shows a text"
    for path, _ in run.storage.list(""):
        if path.startswith("snapshots/"):
            continue
        body = run.storage.get(path) or b""
        if path.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(body))
            body = f"{table.to_pylist()} {table.schema.metadata}".encode("utf-8", "replace")
        elif path.endswith(".gz"):
            body = gzip.decompress(body)
        shown = [MARK.encode(), json.dumps(MARK)[1:-1].encode()]
        assert not any(mark in path.encode() + body for mark in shown), f"{path} shows a text"


rows = st.builds(
    lambda text, mark, is_bytes: (f"{mark}{text}{mark}", is_bytes),
    rarely(long(words, 1_000_000), texts, 60),
    st.sampled_from((MARK, MARK, "")),
    st.booleans(),
)
replies = st.one_of(
    st.builds(Reply, st.just(200), bodies),
    st.builds(Reply, st.just(200), bodies),
    st.builds(Reply, st.just(413), errors.map(lambda error: json.dumps(error).encode())),
)
wholes = st.builds(
    Whole,
    st.lists(rows, min_size=20, max_size=30),
    st.lists(replies, min_size=8, max_size=12),
    st.lists(completions, min_size=8, max_size=12),
    st.lists(odd_lines, min_size=2, max_size=5),
    st.sampled_from(("online", "online", "together", "together", "batch")),
    st.sampled_from(("sqlite", "sqlite", "postgresql")),
)

TARGET = Target("whole-runs", wholes, check, share=60, round_size=5, shrinks=False)
