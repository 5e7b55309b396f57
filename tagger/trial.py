"""A trial: texts that are asked to measure the tags, beside the daily run and through the same plan, tree and cache.

What a trial pays for is in the cache, so that the next trial and the daily run have it for nothing. Its money counts
toward the month's. Its texts are deleted from storage when it ends, and no tag is loaded.
"""

import logging
import random
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa

from tagger.cache import Cache, Record
from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import RunFailed
from tagger.ledger import read_attempts
from tagger.plan import plan
from tagger.runs import TRIAL, IdType, Plan, Run, Snapshot, open_run, utc_now, writing_parquet
from tagger.snapshot import SourceTable
from tagger.spec import normalise, spec_id, text_key
from tagger.spend import total_usd
from tagger.tables import connecting
from tagger.tag import tag
from tagger.window import Selection, run_options

logger = logging.getLogger(__name__)

T = TypeVar("T")

TEXTS_A_WRITE = 1000


@dataclass(frozen=True)
class Trial:
    """What became of a trial's texts."""

    dataset: Dataset
    """As it was asked: `mode` is online."""
    plan: Plan
    records: list[Record | None]
    """One for each text, in their order; None where the text is blank, too long, or got no answer."""
    requests: int
    """Made now; none where the cache had all."""
    spent_usd: float | None
    """What was spent now; None where the price is not known."""
    tag_seconds: float
    """How long the asking took."""


def run_trial(
    dataset: Dataset,
    texts: Sequence[str],
    connections: Connections,
    *,
    name: str,
    row_ids: Sequence[str] | None = None,
    max_cost_usd: float | None = None,
    dry_run: bool = False,
) -> Trial:
    """Ask for the tags of texts, those that the cache has aside. What that will cost is logged before.

    `name` says what the trial is for, and stands in its run id. `row_ids` is what the log calls the texts, by default
    their numbers from 0. `max_cost_usd` is instead of the dataset's limit.
    With `dry_run` nothing is asked: the trial has the plan, and the records of the cache.

    Raises:
        InputError: something is not there, or a limit is set and the price is not known.
        RunFailed: it would cost more than the limits leave, or the budget is spent.
        LLMStopped: the endpoint refuses every call.
    """
    dataset = dataset.model_copy(update={"llm": dataset.llm.model_copy(update={"mode": "online"})})
    options = run_options(max_cost_usd=max_cost_usd, dry_run=dry_run)
    if max_cost_usd is not None:
        limits = dataset.limits.model_copy(update={"max_cost_usd": max_cost_usd})
        dataset = dataset.model_copy(update={"limits": limits})
    run_id = f"{TRIAL}{name}_{utc_now():%Y-%m-%dT%H:%M:%S}_{uuid.uuid4().hex[:6]}"
    run = open_run(dataset, run_id, connections)
    run.storage.check()
    with _texts_in_storage(run, row_ids or list(map(str, range(len(texts)))), texts) as rows_file:
        run.freeze(dataset)
        now = utc_now()
        taken = Snapshot(
            rows_file=rows_file,
            rows=len(texts),
            id_type="text",
            selection=Selection(rows="all", unfinished=False),
            options=options,
            is_trial=True,
            taken_at=now,
            started_at=now,
            seconds=0.0,
        )
        run.write("snapshot.json", taken)
        planned = plan(run, connections)
        if planned.problem is not None:
            raise RunFailed(planned.problem)
        clock = time.monotonic()
        for shard in planned.shards:
            tag(run, shard.shard, connections, alone=True)
        tag_seconds = time.monotonic() - clock
    attempts = read_attempts(run)
    return Trial(
        dataset=dataset,
        plan=planned,
        records=_records(run, dataset, texts),
        requests=sum(sum(attempt.values("requests")) for attempt in attempts),
        spent_usd=total_usd(cost for attempt in attempts for cost in attempt.values("cost_usd")),
        tag_seconds=tag_seconds,
    )


@contextmanager
def _texts_in_storage(run: Run, row_ids: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """Write the texts as a snapshot's rows, and delete all that holds texts in the end."""
    rows_file = f"{run.texts}rows.parquet"
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    try:
        with writing_parquet(run.storage, rows_file, schema) as parquet:
            for start in range(0, len(texts), TEXTS_A_WRITE):
                part = slice(start, start + TEXTS_A_WRITE)
                parquet.write({"id": row_ids[part], "text": texts[part]})
        yield rows_file
    finally:
        for path in [path for path, _ in run.storage.list(run.texts)]:
            run.storage.delete(path)


def _records(run: Run, dataset: Dataset, texts: Sequence[str]) -> list[Record | None]:
    spec = spec_id(dataset)
    cache = Cache(run.storage, spec, dataset.llm.model, dataset.tag_ids)
    keys = [text_key(spec, normalise(text)) for text in texts]
    found = cache.read_many(cache.find(keys))
    return [found.get(key) for key in keys]


def source_texts(dataset: Dataset, ids: Sequence[Any], connections: Connections) -> dict[Any, str]:
    """Return the texts of those of the rows that the source has, by id as given: as the source has it, or as text.

    Raises:
        InputError: a table or column is missing.
    """
    with _source(dataset, connections) as source:
        asked = {given: row_id for given in ids if (row_id := id_in(source.id_type, given)) is not None}
        texts = source.texts(list(set(asked.values())))
        return {given: texts[row_id] for given, row_id in asked.items() if row_id in texts}


def id_in(kind: IdType, given: Any) -> Any:
    """Return an id as the source has it; None where it can be none of its kind."""
    if kind == "integer":
        number = int(given) if isinstance(given, int) or re.fullmatch(r"-?[0-9]{1,19}", str(given)) else None
        return number if number is not None and -(2**63) <= number < 2**63 else None
    if kind == "uuid":
        try:
            return str(uuid.UUID(str(given)))
        except ValueError:
            return None
    return str(given)


def sample_of_source(dataset: Dataset, size: int, seed: int, connections: Connections) -> dict[Any, str]:
    """Return the texts of so many rows, by id, drawn at random; the same ones for the same table and seed."""
    with _source(dataset, connections) as source:
        return source.texts(sorted(drawn(source.ids(), size, seed)))


@contextmanager
def _source(dataset: Dataset, connections: Connections) -> Iterator[SourceTable]:
    conn_id = dataset.source.conn_id
    with connecting(database(conn_id, connections), conn_id) as connection:
        yield SourceTable(connection, dataset)


def drawn(items: Iterable[T], size: int, seed: int) -> list[T]:
    """Return so many of the items, or all where there are no more, drawn at random in one pass (algorithm R)."""
    chance, left = random.Random(seed), iter(items)
    picked = list(islice(left, size))
    for number, item in enumerate(left, size):
        if (place := chance.randint(0, number)) < size:
            picked[place] = item
    return picked
