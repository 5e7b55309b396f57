"""The plan step: which of the snapshot's texts are new, spread over shards for the tag step."""

import logging
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyarrow as pa
import sqlalchemy as sa

from tagger.cache import Cache
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.price import price_of
from tagger.runs import (
    Plan,
    Run,
    Shard,
    Snapshot,
    new_keys_path,
    read_parquet,
    rows_path,
    shard_path,
    utc_now,
    writing_parquet,
)
from tagger.spec import normalise, spec_id, text_key
from tagger.tables import connecting, existing_target

logger = logging.getLogger(__name__)

NEW_KEYS_SCHEMA = pa.schema([("key", pa.string())])
SHARD_SCHEMA = pa.schema([("key", pa.string()), ("row_id", pa.string()), ("text", pa.string())])


class Row(NamedTuple):
    """A row of the snapshot: its id, its text, and the text's key (None where the text is blank)."""

    id: Any
    text: str
    key: str | None
    too_long: bool


def plan(run: Run, connections: Connections) -> Plan:
    """Find out which texts of the snapshot the cache lacks, and write them out by shard.

    Raises:
        InputError: the run has no snapshot, or a budget is set and the price is not known.
    """
    clock = time.monotonic()
    dataset, taken = run.dataset(), run.snapshot()
    _check_budget(dataset)
    run.forget("plan.json", "load.json", "summary.json")
    plan_id, spec = uuid.uuid4().hex[:8], spec_id(dataset)
    rows = blank = 0
    keys: set[str] = set()
    too_long: dict[str, str] = {}
    with writing_parquet(run.storage, rows_path(run, plan_id), _rows_schema(taken)) as parquet:
        for batch in _rows(run, taken, dataset, spec):
            parquet.write({name: [getattr(row, name) for row in batch] for name in ("id", "key", "too_long")})
            blank += sum(row.key is None for row in batch)
            rows += sum(row.key is not None for row in batch)
            keys.update(row.key for row in batch if row.key is not None and not row.too_long)
            too_long.update((row.key, str(row.id)) for row in batch if row.key is not None and row.too_long)
    # a text may be too long in one row and, with less white space around it, short enough in another
    too_long = {key: row_id for key, row_id in too_long.items() if key not in keys}
    cache = Cache(run.storage, spec, dataset.llm.model)
    cached = cache.find(keys)
    new = keys - cached
    with writing_parquet(run.storage, new_keys_path(run, plan_id), NEW_KEYS_SCHEMA) as parquet:
        parquet.write({"key": list(new)})
    shards = _write_shards(run, taken, dataset, spec, plan_id, new)
    target_rows, older_rows, older_texts = _target_state(dataset, taken, spec, connections)
    planned = Plan(
        plan_id=plan_id,
        spec_id=spec,
        rows=rows,
        blank=blank,
        texts=len(keys) + len(too_long),
        cached=len(cached),
        too_long=len(too_long),
        too_long_row=next(iter(too_long.values()), None),
        new=len(new),
        shards=shards,
        target_rows=target_rows,
        older_spec_rows=older_rows,
        older_spec_texts=older_texts,
        planned_at=utc_now(),
        seconds=time.monotonic() - clock,
    )
    run.write("plan.json", planned)
    for line in describe(planned, dataset, takes_all=taken.selection.rows == "all"):
        logger.info("plan: %s", line)
    return planned


def describe(planned: Plan, dataset: Dataset, *, takes_all: bool) -> list[str]:
    """Return the plan in words; `takes_all` tells whether the run takes the whole table."""
    lines = [
        f"{planned.rows} rows ({planned.blank} more are blank), {planned.texts} distinct texts: "
        f"{planned.cached} cached, {planned.new} new"
        + (f", {planned.too_long} over {dataset.source.max_chars} characters" if planned.too_long else "")
        + f"; {len(planned.shards)} shards; spec {planned.spec_id}"
    ]
    if planned.older_spec_rows:
        lines.append(
            f"the prompt, the tags or the model changed, which makes {planned.older_spec_texts} texts new: "
            f"{planned.older_spec_rows} of {planned.target_rows} rows of the target hold another spec; "
            + ("this run takes them all" if takes_all else "`--all` (`rows: all`) would tag them all again")
        )
    return lines + not_in_force(dataset)


def not_in_force(dataset: Dataset) -> list[str]:
    """Return what the dataset file asks for and this version does not do."""
    asked = {
        "lock": dataset.lock is not None,
        "llm.requests_per_minute": dataset.llm.requests_per_minute is not None,
        "llm.tokens_per_minute": dataset.llm.tokens_per_minute is not None,
        "alerts": bool(dataset.alerts.to) or dataset.alerts.deadline is not None,
    }
    return [f"`{key}` is set, but not in force in this version" for key, is_set in asked.items() if is_set]


def _check_budget(dataset: Dataset) -> None:
    if dataset.llm.mode == "batch":
        raise InputError("`llm.mode`: batch is not available in this version; set `mode: online`")
    if dataset.limits.max_cost_usd is not None and price_of(dataset.llm) is None:
        raise InputError(
            f"`limits.max_cost_usd` is set, but the price of `{dataset.llm.model}` is not known: set `llm.price` "
            "(0 for a local model), or `max_cost_usd: null`"
        )


def _rows_schema(taken: Snapshot) -> pa.Schema:
    ids = pa.int64() if taken.id_type == "integer" else pa.string()
    return pa.schema([("id", ids), ("key", pa.string()), ("too_long", pa.bool_())])


def _rows(run: Run, taken: Snapshot, dataset: Dataset, spec: str) -> Iterator[list[Row]]:
    for batch in read_parquet(run.storage, taken.rows_file):
        rows = []
        for row_id, text in zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True):
            normalised = normalise(text)
            key = text_key(spec, normalised) if normalised else None
            rows.append(Row(row_id, text, key, key is not None and len(text) > dataset.source.max_chars))
        yield rows


def _write_shards(run: Run, taken: Snapshot, dataset: Dataset, spec: str, plan_id: str, new: set[str]) -> list[Shard]:
    """Spread the new texts over the shards, at random, and write each shard's texts into the snapshot's folder."""
    if not new:
        return []
    count = min(dataset.shards.max, -(-len(new) // dataset.shards.texts_per_shard))
    shuffled = list(new)
    random.shuffle(shuffled)
    shard_of = {key: i % count for i, key in enumerate(shuffled)}
    with ExitStack() as stack:
        files = [
            stack.enter_context(writing_parquet(run.storage, shard_path(run, plan_id, i + 1), SHARD_SCHEMA))
            for i in range(count)
        ]
        sizes = [0] * count
        for batch in _rows(run, taken, dataset, spec):
            parts: dict[int, list[Row]] = {}
            for row in batch:
                if row.key is not None and (shard := shard_of.pop(row.key, None)) is not None:
                    parts.setdefault(shard, []).append(row)
            for shard, rows in parts.items():
                sizes[shard] += len(rows)
                files[shard].write(
                    {
                        "key": [row.key for row in rows],
                        "row_id": [str(row.id) for row in rows],
                        "text": [row.text for row in rows],
                    }
                )
    return [Shard(shard=i + 1, of=count, texts=size) for i, size in enumerate(sizes)]


def _target_state(dataset: Dataset, taken: Snapshot, spec: str, connections: Connections) -> tuple[int, int, int]:
    """Return the number of the target's rows, and of those tagged under another spec rows and distinct texts."""
    engine = database(dataset.target_conn_id, connections)
    with connecting(engine, dataset.target_conn_id) as connection:
        target = existing_target(connection, dataset.target.table, taken.id_type)
        if target is None:
            return 0, 0, 0
        rows = connection.execute(sa.select(sa.func.count()).select_from(target)).scalar_one()
        count = sa.select(sa.func.count(), sa.func.count(target.c.cache_key.distinct()))
        older = connection.execute(count.where(target.c.spec_id != spec)).one()
        return rows, older[0], older[1]
