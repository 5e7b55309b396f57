"""Files of a run: whatever became of one of them, the later steps end, or say in one line which is damaged."""

import gzip
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from demo.stand_in import StandIn
from tagger.batches import TEXTS_SCHEMA, Batch
from tagger.connections import Connection
from tagger.dataset_files import parse_dataset
from tagger.exceptions import StorageError, TaggerError
from tagger.ledger import SCHEMA as ATTEMPT
from tagger.load import load_back
from tagger.plan import NEW_KEYS_SCHEMA, plan
from tagger.report import report
from tagger.rollup import rolled_up
from tagger.runs import Plan, Run, Shard, Snapshot
from tagger.shards import SCHEMA as SHARD
from tagger.spec import normalise, spec_id, text_key
from tagger.tables import new_target, reflect
from tagger.tag import tag
from tagger.window import Selection
from tests.fuzz.held import Held
from tests.fuzz.hostile import MARKER, changed, damaged
from tests.fuzz.promises import assert_clear
from tests.fuzz.records import RECORD
from tests.fuzz.rounds import Target, folder
from tests.project import MINIMAL, merged

DATASET = parse_dataset(merged(MINIMAL, {"storage": "s3://held", "llm": {"concurrency": 2}}), "notes.yaml")
SPEC = spec_id(DATASET)
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
TEXTS = ["an apple", "a zebra", "rain", "a horse in the rain"]
KEYS = [text_key(SPEC, normalise(text)) for text in TEXTS]
RUN, OF_TEXTS = "runs/notes/one/", "snapshots/notes/one/"


def _parquet(schema: pa.Schema, rows: list[tuple[Any, ...]], about: dict[str, Any] | None = None) -> bytes:
    table = pa.Table.from_pylist([dict(zip(schema.names, row, strict=False)) for row in rows], schema=schema)
    return _written(table if about is None else table.replace_schema_metadata({"tagger": json.dumps(about)}))


def _written(table: pa.Table) -> bytes:
    body = io.BytesIO()
    pq.write_table(table, body)
    return body.getvalue()


def _objects() -> dict[str, bytes]:
    """Return what a run of four texts left before load_back: two were cached, two are new."""
    taken = Snapshot(
        rows_file=f"{OF_TEXTS}rows-aaaaaaaa.parquet",
        rows=4,
        id_type="integer",
        selection=Selection(rows="all", unfinished=True),
        taken_at=NOON,
        started_at=NOON,
        seconds=1.0,
    )
    planned = Plan(
        plan_id="bbbbbbbb", spec_id=SPEC, rows=4, blank=0, texts=4, cached=2, too_long=0, new=2,
        shards=[Shard(shard=1, of=1, texts=2)], target_rows=0, older_spec_rows=0, planned_at=NOON, seconds=1.0,
    )  # fmt: skip
    batch = Batch(
        batch="cccccccc", dataset="notes", run_id="other", plan_id="dddddddd", shard=1, conn_id="openai_default",
        requests=1, price=None, books="runs/notes/other/shard-1-1.parquet", intended_at=NOON, remote="batch_1",
        collected=True,
    )  # fmt: skip
    about = {
        "plan_id": "bbbbbbbb", "state": "done", "reason": None, "started_at": NOON.isoformat(),
        "ended_at": NOON.isoformat(), "asked": "online",
    }  # fmt: skip
    used = (1, 100, 0, 7, 0.001, NOON, None)
    ids = pa.schema([("id", pa.int64()), ("text", pa.string())])
    keys = pa.schema([("id", pa.int64()), ("key", pa.string()), ("too_long", pa.bool_())])
    attempt = [
        (KEYS[2], "3", "tagged", ["weather"], "served-model", None, None, *used),
        (KEYS[3], "4", "failed", None, None, "timeout", "no answer in time", *used),
    ]
    return {
        f"{RUN}dataset.json": DATASET.model_dump_json().encode(),
        f"{OF_TEXTS}snapshot.json": taken.model_dump_json().encode(),
        f"{OF_TEXTS}rows-aaaaaaaa.parquet": _parquet(ids, list(enumerate(TEXTS, 1))),
        f"{RUN}plan.json": planned.model_dump_json().encode(),
        f"{RUN}rows-bbbbbbbb.parquet": _parquet(keys, [(n, key, False) for n, key in enumerate(KEYS, 1)]),
        f"{RUN}new-bbbbbbbb.parquet": _parquet(NEW_KEYS_SCHEMA, [(key, False) for key in KEYS[2:]]),
        f"{OF_TEXTS}shard-bbbbbbbb-1.parquet": _parquet(
            SHARD, [(key, str(n), text) for n, key, text in zip((3, 4), KEYS[2:], TEXTS[2:], strict=True)]
        ),
        f"{RUN}shard-1-1.parquet": _parquet(ATTEMPT, attempt, about),
        f"batches/{SPEC}/cccccccc.json": batch.model_dump_json().encode(),
        f"batches/{SPEC}/cccccccc.parquet": _parquet(TEXTS_SCHEMA, [("f" * 32, "9", 5, 0)]),
        **{f"cache/{SPEC}/{key[:2]}/tag_{key}.json": json.dumps(RECORD).encode() for key in KEYS[:3]},
    }


OBJECTS = _objects()
PARQUETS = [path for path in OBJECTS if path.endswith(".parquet")]
JSONS = [path for path in OBJECTS if path.endswith(".json")]
ROLLUP = json.loads(rolled_up(Held(dict(OBJECTS)), DATASET).model_dump_json())
HISTORY = "history/notes.json.gz"

ODD_COLUMNS: Sequence[pa.Array] = (
    pa.array([None, None]),
    pa.array([1, 2**63 - 1]),
    pa.array([-1.5, float("nan")]),
    pa.array(["\x00", "x" * 40]),
    pa.array([b"\xff\xfe", b""]),
    pa.array([["hacked"], ["fruit", "fruit"]]),
    pa.array([[None], None], pa.list_(pa.string())),
    pa.array([True, False]),
    pa.array([2**62, -(2**62)], pa.timestamp("us", tz="UTC")),
    pa.array([{"a": 1}, None]),
    pa.array(["asked", "none such"]),
    pa.array([KEYS[0], KEYS[0]]),
)


@st.composite
def _other_columns(draw: DrawFn, path: str) -> bytes:
    """Return a Parquet file with a column lost, named otherwise, or of other values."""
    table = pq.read_table(io.BytesIO(OBJECTS[path]))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, table.num_columns - 1))
        name = table.column_names[place]
        how = draw(st.sampled_from(("lose", "name", "values", "values", "values", "rows", "about")))
        if how == "lose" and table.num_columns > 1:
            table = table.remove_column(place)
        elif how == "name":
            table = table.rename_columns([*table.column_names[:place], "other", *table.column_names[place + 1 :]])
        elif how == "values":
            column = draw(st.sampled_from(ODD_COLUMNS)).take(pa.array([n % 2 for n in range(len(table))], pa.int64()))
            table = table.set_column(place, name, column)
        elif how == "rows":
            table = draw(st.sampled_from((table[:0], pa.concat_tables([table, table]))))
        elif table.schema.metadata:
            about = draw(changed([json.loads(table.schema.metadata[b"tagger"])]))
            table = table.replace_schema_metadata({"tagger": json.dumps(about)})
    return _written(table)


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes, str]:
    kind = draw(st.sampled_from(("json", "json", "columns", "columns", "bytes", "history")))
    step = draw(st.sampled_from(tuple(STEPS)))
    if kind == "history":
        raw = json.dumps(draw(changed([ROLLUP]))).encode()
        body = draw(st.sampled_from((gzip.compress(raw, mtime=0), raw, gzip.compress(raw, mtime=0)[:-9])))
        return HISTORY, body, "rolled_up"
    if kind == "json":
        path = draw(st.sampled_from(JSONS))
        return path, json.dumps(draw(changed([json.loads(OBJECTS[path])]))).encode(), step
    if kind == "columns":
        path = draw(st.sampled_from(PARQUETS))
        return path, draw(_other_columns(path)), step
    path = draw(st.sampled_from(tuple(OBJECTS)))
    return path, draw(damaged(st.just(OBJECTS[path]))), step


@cache
def _llm() -> StandIn:
    stand_in = StandIn()
    stand_in.__enter__()
    return stand_in


@cache
def _database() -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{folder('run') / 'source.db'}", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT)"))
        connection.execute(sa.text("INSERT INTO notes VALUES (1, 'an apple')"))
    return engine


def _connections(conn_id: str) -> Connection | None:
    known = {
        "db": Connection("db", "sqlite", host=str(folder("run") / "source.db")),
        "openai_default": Connection("openai_default", "openai", host=_llm().base_url, password="key"),
    }
    return known.get(conn_id)


STEPS: dict[str, Callable[[Run], object]] = {
    "plan": lambda run: plan(run, _connections),
    "tag": lambda run: tag(run, 1, _connections),
    "load_back": lambda run: load_back(run, _connections),
    "report": report,
    "rolled_up": lambda run: rolled_up(run.storage, DATASET),
}


def _is_key(body: bytes) -> bool:
    """Return whether the marker stands in a key of a JSON file: a dataset's keys are shown."""
    keys = list[str]()
    with suppress(ValueError):
        json.loads(body, object_pairs_hook=lambda pairs: keys.extend(name for name, _ in pairs))
    return any(MARKER in key for key in keys)


def check(case: tuple[str, bytes, str]) -> str:
    """Go through a step with one file as the case has it."""
    path, body, step = case
    storage = Held({**OBJECTS, path: body})
    with _database().begin() as connection:
        connection.execute(sa.text("DROP VIEW IF EXISTS note_tags_effective"))
        connection.execute(sa.text("DROP TABLE IF EXISTS note_tags"))
    try:
        STEPS[step](Run(storage, "notes", "one"))
    except TaggerError as e:
        assert_clear(e, lines=len(str(e).split("\n")), may_show=path.endswith("/dataset.json") and _is_key(body))
        outcome = "damage is told" if isinstance(e, StorageError) else "refused"
    else:
        outcome = "ended"
    _assert_target()
    return f"{step}: {outcome}"


def _assert_target() -> None:
    """Assert that the target, where it was written, holds no tag outside the enum."""
    with _database().connect() as connection:
        if reflect(connection, "note_tags") is None:
            return
        rows = connection.execute(sa.select(new_target("note_tags", "integer").c.tags)).scalars()
        assert {tag for tags in rows for tag in tags or ()} <= set(DATASET.tag_ids), "a tag outside the enum"


TARGET = Target("run-files", _cases(), check, share=4_000, round_size=400)
