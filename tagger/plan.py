"""The plan step: which of the snapshot's texts are new, spread over shards for the tag step."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from tagger.cache import Cache, Usage
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.price import ANSWER_TOKENS, cost_usd, estimated_tokens, price_of, usd
from tagger.prompt import instructions
from tagger.runs import (
    WAVE_CHARS,
    WAVE_TEXTS,
    ParquetFile,
    Plan,
    Run,
    Shard,
    Snapshot,
    new_keys_path,
    opened_parquet,
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


WITHOUT_LOCK = "without `lock`, two runs or machines that ask the same text at the same time may both pay for it"

RECORDS_A_READ = 5000
"""Records fetched at once where refused texts are looked for."""

BUFFERED_CHARS = 64_000_000
"""Of the waves of all shards that are being filled: what bounds the memory where texts are long."""


@dataclass
class Texts:
    """What the snapshot holds: rows by kind, and the keys of its distinct texts."""

    rows: int = 0
    blank: int = 0
    keys: set[str] = field(default_factory=set)
    too_long: dict[str, str] = field(default_factory=dict)
    """Keys of the texts that are too long in all their rows, with one of these."""


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
    cache = Cache(run.storage, spec, dataset.llm.model)
    with opened_parquet(run.storage, taken.rows_file) as snapshot:
        with writing_parquet(run.storage, rows_path(run, plan_id), _rows_schema(taken)) as parquet:
            texts = _write_rows(snapshot, parquet, spec, dataset.source.max_chars)
        new = cache.missing(texts.keys)
        refused = set[str]()
        if taken.options.retry_refused:
            refused = _refused(cache, texts.keys - new, dataset, taken, connections)
            new |= refused
        with writing_parquet(run.storage, new_keys_path(run, plan_id), NEW_KEYS_SCHEMA) as parquet:
            parquet.write({"key": list(new)})
        cached = len(texts.keys) - len(new)
        asked = NewTexts(snapshot, new, taken.options.limit)
        shards: list[Shard] = []
        if new:
            with opened_parquet(run.storage, rows_path(run, plan_id)) as rows:
                if taken.options.dry_run:
                    asked.count(rows)
                else:
                    shards = _write_shards(run, asked, rows, dataset, plan_id)
    if not taken.options.dry_run:
        for key in refused - asked.left:  # what has a record is not asked
            cache.remove(key)
    target_rows, older_rows, older_texts = _target_state(dataset, taken, spec, connections)
    planned = Plan(
        plan_id=plan_id,
        spec_id=spec,
        rows=texts.rows,
        blank=texts.blank,
        texts=len(texts.keys) + len(texts.too_long),
        cached=cached,
        too_long=len(texts.too_long),
        too_long_row=next(iter(texts.too_long.values()), None),
        new=len(texts.keys) - cached,
        asked_again=len(refused),
        estimated_usd=_estimate(dataset, cache, asked),
        shards=shards,
        target_rows=target_rows,
        older_spec_rows=older_rows,
        older_spec_texts=older_texts,
        planned_at=utc_now(),
        seconds=time.monotonic() - clock,
    )
    run.write("plan.json", planned)
    for line in describe(planned, dataset, taken):
        logger.info("plan: %s", line)
    return planned


def describe(planned: Plan, dataset: Dataset, taken: Snapshot) -> list[str]:
    """Return the plan in words."""
    limit = taken.options.limit
    lines = [
        f"{planned.rows} rows ({planned.blank} more are blank), {planned.texts} distinct texts: "
        f"{planned.cached} cached, {planned.new} new"
        + (f", {planned.too_long} over {dataset.source.max_chars} characters" if planned.too_long else "")
        + f"; {len(planned.shards)} shards; spec {planned.spec_id}"
    ]
    if planned.asked_again:
        lines.append(f"{planned.asked_again} of the new texts were refused before (`retry_refused`)")
    if limit is not None and limit < planned.new:
        lines.append(f"only the first {limit} new texts are asked (`limit`); the others are skipped until the next run")
    if planned.new:
        lines.append(f"estimated cost: {usd(planned.estimated_usd)}")
    if taken.options.dry_run:
        lines.append("dry run: no text is asked, nothing is written to the target")
    if planned.older_spec_rows:
        takes_all = taken.selection.rows == "all"
        lines.append(
            f"the prompt, the tags or the model changed, which makes {planned.older_spec_texts} texts new: "
            f"{planned.older_spec_rows} of {planned.target_rows} rows of the target hold another spec; "
            + ("this run takes them all" if takes_all else "`--all` (`rows: all`) would tag them all again")
        )
    if planned.shards and dataset.lock is None:
        lines.append(WITHOUT_LOCK)
    return lines


def _check_budget(dataset: Dataset) -> None:
    if dataset.llm.mode == "batch":
        raise InputError("`llm.mode`: batch is not available in this version; set `mode: online`")
    if dataset.limits.max_cost_usd is not None and price_of(dataset.llm) is None:
        raise InputError(
            f"`limits.max_cost_usd` is set, but the price of `{dataset.llm.model}` is not known: set `llm.price` "
            "(0 for a local model), or `max_cost_usd: null`"
        )


def _refused(cache: Cache, cached: set[str], dataset: Dataset, taken: Snapshot, connections: Connections) -> set[str]:
    """Return which of the cached texts are refused. Records of texts that the target has as tagged are not read."""
    engine = database(dataset.target_conn_id, connections)
    with connecting(engine, dataset.target_conn_id) as connection:
        target = existing_target(connection, dataset.target.table, taken.id_type)
        if target is not None:
            tagged = sa.select(target.c.cache_key).where(target.c.status == "tagged")
            cached = cached.difference(connection.execute(tagged).scalars())
    keys, refused = iter(cached), set[str]()
    while part := list(islice(keys, RECORDS_A_READ)):
        refused.update(key for key, record in cache.read_many(part).items() if record.status == "refused")
    return refused


def _estimate(dataset: Dataset, cache: Cache, asked: "NewTexts") -> float | None:
    """Return about what the texts will cost: by the spec's records, or where there are none, by the texts' lengths."""
    if not asked.texts:
        return 0.0
    mean = cache.mean_cost()
    if mean is not None:
        return mean * asked.texts
    tokens = asked.tokens + asked.texts * estimated_tokens(instructions(dataset))
    return cost_usd(Usage(input=tokens, output=ANSWER_TOKENS * asked.texts), price_of(dataset.llm))


def _rows_schema(taken: Snapshot) -> pa.Schema:
    ids = pa.int64() if taken.id_type == "integer" else pa.string()
    return pa.schema([("id", ids), ("key", pa.string()), ("too_long", pa.bool_())])


def _write_rows(snapshot: pq.ParquetFile, parquet: ParquetFile, spec: str, max_chars: int) -> Texts:
    """Write the snapshot's ids and keys, a row group for each of its own, and return what it holds."""
    texts = Texts()
    for group in range(snapshot.num_row_groups):
        rows = snapshot.read_row_group(group)
        ids, bodies = rows.column("id"), rows.column("text").to_pylist()
        keys = [text_key(spec, normalised) if (normalised := normalise(text)) else None for text in bodies]
        too_long = [key is not None and len(text) > max_chars for key, text in zip(keys, bodies, strict=True)]
        parquet.write({"id": ids, "key": keys, "too_long": too_long})
        blank = keys.count(None)
        texts.blank += blank
        texts.rows += len(keys) - blank
        texts.keys.update(key for key, long in zip(keys, too_long, strict=True) if key is not None and not long)
        if any(too_long):
            texts.too_long.update(
                (key, str(row_id))
                for row_id, key, long in zip(ids.to_pylist(), keys, too_long, strict=True)
                if key is not None and long
            )
    # a text may be too long in one row and, with less white space around it, short enough in another
    texts.too_long = {key: row_id for key, row_id in texts.too_long.items() if key not in texts.keys}
    return texts


class NewTexts:
    """The first new texts of a snapshot, in the order of its rows, each once."""

    def __init__(self, snapshot: pq.ParquetFile, new: set[str], limit: int | None) -> None:
        self._snapshot = snapshot
        self.left = new
        """Keys of the new texts that were not given out; the set is emptied on the way."""
        self.size = len(new) if limit is None else min(limit, len(new))
        self.texts = 0
        self.tokens = 0
        """About how many the texts that were given out have."""

    def read(self, rows: pq.ParquetFile) -> Iterator[tuple[str, str, str]]:
        """Yield key, row id and text; `rows` are the plan's."""
        for group in range(self._snapshot.num_row_groups):
            known = rows.read_row_group(group, ["key", "too_long"]).to_pydict()
            picked = []
            for i, (key, long) in enumerate(zip(known["key"], known["too_long"], strict=True)):
                if key in self.left and not long and self.texts < self.size:
                    self.left.remove(key)
                    self.texts += 1
                    picked.append(i)
            if picked:
                found = self._snapshot.read_row_group(group).take(picked).to_pydict()
                for i, row_id, text in zip(picked, found["id"], found["text"], strict=True):
                    self.tokens += estimated_tokens(text)
                    yield known["key"][i], str(row_id), text
            if self.texts == self.size:
                break

    def count(self, rows: pq.ParquetFile) -> None:
        """Read them all, for the sake of their number and length."""
        for _ in self.read(rows):
            pass


class ShardFile:
    """A shard's file while it is written: a row group for each wave of texts."""

    def __init__(self, parquet: ParquetFile, wave_chars: int) -> None:
        self._parquet = parquet
        self._wave_chars = wave_chars
        self._wave: list[tuple[str, str, str]] = []
        self._chars = 0
        self.texts = 0

    def add(self, key: str, row_id: str, text: str) -> None:
        """Add a text."""
        if len(self._wave) == WAVE_TEXTS or self._chars + len(text) > self._wave_chars:
            self.end_wave()
        self._wave.append((key, row_id, text))
        self._chars += len(text)
        self.texts += 1

    def end_wave(self) -> None:
        """Write what was added since the last wave."""
        if self._wave:
            columns = zip(*self._wave, strict=True)
            self._parquet.write(dict(zip(SHARD_SCHEMA.names, map(list, columns), strict=True)))
        self._wave, self._chars = [], 0


def _write_shards(run: Run, asked: NewTexts, rows: pq.ParquetFile, dataset: Dataset, plan_id: str) -> list[Shard]:
    """Deal the new texts out to the shards, in the order of their first rows."""
    count = min(dataset.shards.max, -(-asked.size // dataset.shards.texts_per_shard))
    wave_chars = min(WAVE_CHARS, BUFFERED_CHARS // count)
    with ExitStack() as stack:
        paths = [shard_path(run, plan_id, i + 1) for i in range(count)]
        parquets = [stack.enter_context(writing_parquet(run.storage, path, SHARD_SCHEMA)) for path in paths]
        files = [ShardFile(parquet, wave_chars) for parquet in parquets]
        for file, text in zip(cycle(files), asked.read(rows), strict=False):
            file.add(*text)
        for file in files:
            file.end_wave()
    return [Shard(shard=i + 1, of=count, texts=file.texts) for i, file in enumerate(files)]


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
