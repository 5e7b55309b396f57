"""The traces of rows: what the target, the storage and the provider hold of them, and how it is taken out.

By its id a row is found in the target and in the files of its dataset's runs. These tell the keys of all texts that it
ever had. By key are found its records, its lines in trials, which have names of their own for texts, and those in
files that are left at the provider; of records and trials, only what no other row has the text of is a trace.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
import sqlalchemy as sa

from tagger.batch_api import BatchAPI
from tagger.batches import Batch, Batches
from tagger.cache import STAND_IN_MODEL, Cache
from tagger.connections import Connections, database, openai_client
from tagger.dataset import Dataset
from tagger.exceptions import InputError, StorageError
from tagger.leftovers import find_leftovers
from tagger.rollup import read_rollup, update_rollup
from tagger.runs import TRIAL, IdType, is_trial, opened_parquet
from tagger.scrub import Kind, Theirs, in_words, lines_of, new_keys, take_out, without_names
from tagger.spec import normalise, text_key
from tagger.spend import THREADS
from tagger.storage import Storage
from tagger.stored_runs import active_runs
from tagger.tables import connecting, existing_target, is_reviewed, only_writer

EVALUATION = f"{TRIAL}evaluate_"
"""How the ids of those trials start that call texts by the ids of their rows, where they know them."""

VALUES_A_QUERY = 500

_KINDS: dict[Kind | Literal["json"], re.Pattern[str]] = {
    "texts": re.compile(r"snapshots/rows\b.*\.parquet"),
    "shard": re.compile(r"snapshots/shard-.+\.parquet"),
    "rows": re.compile(r"runs/rows-.+\.parquet"),
    "new": re.compile(r"runs/new-.+\.parquet"),
    "books": re.compile(r"runs/shard-.+\.parquet"),
    "json": re.compile(r"runs/(plan|load|summary)\.json"),
}
"""Files of a run that may hold something of a row, by folder and name."""


class Place(IntEnum):
    """Where something of a row is kept, in the order in which it is taken out.

    What is found by key goes first and what tells the keys last: whoever begins again after a kill finds the rest.
    """

    PROVIDER = 0
    TRIALS = 1
    BATCHES = 2
    CACHE = 3
    BOOKS = 4
    SNAPSHOTS = 5
    SUMMARIES = 6
    ROWS = 7
    TARGET = 8


_PLACES = {
    "texts": Place.SNAPSHOTS,
    "shard": Place.SNAPSHOTS,
    "rows": Place.ROWS,
    "new": Place.BOOKS,
    "books": Place.BOOKS,
}


class StoredFile(NamedTuple):
    """A file of a run."""

    path: str
    dataset: str
    run_id: str
    kind: Kind | Literal["json"]


class Trace(NamedTuple):
    """What one object, table or file holds of the rows."""

    place: Place
    lines: int
    remove: Callable[[], object]
    file: StoredFile | None = None
    """The file of a run, where it is one."""


@dataclass
class Found:
    """All that is left of the rows."""

    traces: list[Trace] = field(default_factory=list)
    reviewed: int = 0
    """Of the target's rows, those with a review."""
    kept: int = 0
    """Records that stay, for other rows have their texts."""
    sharing: set[str] = field(default_factory=set)
    """Other datasets that have such rows."""
    not_looked_at: set[str] = field(default_factory=set)
    """Connections that batches were handed over by, and that are not there any more."""


@dataclass
class Hit:
    """What a file holds of the rows by their ids."""

    lines: int = 0
    keys: set[str] = field(default_factory=set)
    of_batch_at: datetime | None = None
    """When the books were opened, if they are a batch's."""


class Search:
    """The search for traces of some rows of a dataset. `ids` are as the source has them, uuids as text."""

    def __init__(
        self, dataset: Dataset, storage: Storage, ids: Sequence[Any], id_type: IdType, connections: Connections
    ) -> None:
        self._dataset = dataset
        self._name = dataset.dataset
        self._storage = storage
        self._ids = [uuid.UUID(row_id) for row_id in ids] if id_type == "uuid" else list(ids)
        self._id_type = id_type
        self._names = frozenset(map(str, ids))
        """The ids as the runs' files have them."""
        self._connections = connections
        self._new_keys = defaultdict[tuple[str, str], defaultdict[str, str]](new_keys)
        """By dataset and run."""

    def waiting(self) -> Iterator[tuple[Batch, list[str]]]:
        """Yield the dataset's batches that are not collected and hold texts of the rows, and these rows' ids."""
        for path, batch in self._batches():
            if batch is not None and batch.dataset == self._name and not batch.collected:
                lines = self._lines(path, Theirs(ids=self._names))
                if held := [line["row_id"] for line in lines]:
                    yield batch, held

    def find(self) -> Found:
        """Return all that is left of the rows; nothing is changed.

        Raises:
            StorageError: a file is damaged, so that nobody can tell what it holds.
            LLMStopped: a provider refuses to show its files, or does not answer.
        """
        found = Found()
        files = self._files()
        with ThreadPoolExecutor(THREADS) as threads:
            trials = [f.path for f in files if is_trial(f.run_id) and f.path.endswith("/plan.json")]
            of_trials = (plan["spec_id"] for plan in threads.map(self._json, trials) if plan)
            specs = {*self._storage.folders("cache/"), *self._storage.folders("batches/"), *of_trials}
            by_id = [file for file in files if self._is_by_id(file)]
            hits = dict(zip(by_id, threads.map(partial(self._look, specs), by_id), strict=True))
            rows = self._rows_in_target()
            batches = list(self._batches())
            keys = {key for key, _ in rows if key}.union(self._keys_in(batches), *(hit.keys for hit in hits.values()))
            plans = [file for file in files if file.kind == "rows" and not is_trial(file.run_id)] if keys else []
            others = dict(zip(plans, threads.map(partial(self._others, keys), plans), strict=True))
            found.sharing = {file.dataset for file, held in others.items() if held} - {self._name}
            gone = keys.difference(self._shared_in_target(keys, Counter(key for key, _ in rows)), *others.values())
            theirs = self._theirs(files, keys, gone, others)
            by_key = [file for file in theirs if is_trial(file.run_id) or file.kind == "new"]
            counts = threads.map(lambda file: self._count(file, theirs[file], specs), by_key)
            lines = {file: hit.lines for file, hit in hits.items()} | dict(zip(by_key, counts, strict=True))
            named = threads.map(self._in_json, [f for f in files if f.kind == "json" and f.dataset == self._name])
            found.traces += [trace for trace in named if trace is not None]
        found.traces += [self._in_file(file, count, theirs[file]) for file, count in lines.items() if count]
        found.traces += self._in_batches(batches, gone)
        found.traces += self._in_history()
        self._in_cache(specs, keys, gone, found)
        if keys:
            self._at_provider(hits, keys, batches, found)
        if rows:
            found.traces.append(Trace(Place.TARGET, len(rows), self._delete_in_target))
            found.reviewed = sum(reviewed for _, reviewed in rows)
        return found

    # files of runs

    def _files(self) -> list[StoredFile]:
        """Return the files of all datasets' runs, but of other datasets' trials that may be at work."""
        files = []
        for folder in ("snapshots", "runs"):
            for path, _ in self._storage.list(f"{folder}/"):
                _, dataset, run_id, *name = path.split("/")
                for kind, pattern in _KINDS.items():
                    if len(name) == 1 and pattern.fullmatch(f"{folder}/{name[0]}"):
                        files.append(StoredFile(path, dataset, run_id, kind))
        with_texts = {f.dataset for f in files if is_trial(f.run_id) and f.kind in ("texts", "shard")} - {self._name}
        at_work = {(name, run_id) for name in with_texts for run_id in active_runs(self._storage, name)}
        return [f for f in files if not (is_trial(f.run_id) and (f.dataset, f.run_id) in at_work)]

    def _is_by_id(self, file: StoredFile) -> bool:
        """Return whether a file names the dataset's rows by their ids."""
        if file.dataset != self._name or file.kind in ("new", "json"):
            return False
        return not is_trial(file.run_id) or (file.run_id.startswith(EVALUATION) and file.kind in ("rows", "books"))

    def _look(self, specs: Collection[str], file: StoredFile) -> Hit:
        """Return what a file holds by the rows' ids; of texts, their keys under all specs."""
        hit = Hit()
        with opened_parquet(self._storage, file.path) as parquet:
            hit.of_batch_at = _of_batch_at(parquet) if file.kind == "books" else None
            for line in lines_of(parquet, Theirs(ids=self._names)):
                hit.lines += 1
                if key := line.get("key"):
                    hit.keys.add(key)
                if normalised := normalise(line.get("text") or ""):
                    hit.keys.update(text_key(spec, normalised) for spec in specs)
        return hit

    def _others(self, keys: Set[str], file: StoredFile) -> dict[str, str]:
        """Return which of the keys other rows of a plan have, each with the first such row."""
        held: dict[str, str] = {}
        for line in self._lines(file.path, Theirs(keys=keys)):
            if file.dataset != self._name or str(line["id"]) not in self._names:
                held.setdefault(line["key"], str(line["id"]))
        return held

    def _theirs(
        self,
        files: Collection[StoredFile],
        keys: set[str],
        gone: set[str],
        others: Mapping[StoredFile, Mapping[str, str]],
    ) -> dict[StoredFile, Theirs]:
        """Return what of each file that may hold lines of the rows is theirs."""
        of_run = defaultdict[str, dict[str, str]](dict)
        for file, held in others.items():
            if file.dataset == self._name:
                of_run[file.run_id] = {**held, **of_run[file.run_id]}
        theirs = {}
        for file in files:
            shared = of_run[file.run_id]
            if file.kind == "json":
                continue
            if is_trial(file.run_id):
                theirs[file] = Theirs(self._names if self._is_by_id(file) else frozenset(), gone)
            elif file.dataset == self._name:
                is_new = file.kind == "new"
                theirs[file] = Theirs(keys=keys - shared.keys()) if is_new else Theirs(self._names, others=shared)
        return theirs

    def _count(self, file: StoredFile, theirs: Theirs, specs: Collection[str]) -> int:
        """Return how many lines of a file are theirs. Texts of a trial, which was killed, have only their words."""
        if file.kind not in ("texts", "shard"):
            return sum(1 for _ in self._lines(file.path, theirs))
        with opened_parquet(self._storage, file.path) as parquet:
            texts = (text for part in parquet.iter_batches(500, columns=["text"]) for text in part[0].to_pylist())
            keys = ((text_key(spec, normalised) for spec in specs) for normalised in map(normalise, texts))
            return sum(not theirs.keys.isdisjoint(of_text) for of_text in keys)

    def _in_file(self, file: StoredFile, lines: int, theirs: Theirs) -> Trace:
        assert file.kind != "json"
        if is_trial(file.run_id) and file.kind in ("texts", "shard"):  # which a trial deletes when it ends
            return Trace(Place.SNAPSHOTS, lines, partial(self._storage.delete, file.path), file)
        place = Place.TRIALS if is_trial(file.run_id) else _PLACES[file.kind]
        keys = self._new_keys[file.dataset, file.run_id]
        return Trace(place, lines, partial(take_out, self._storage, file.path, file.kind, theirs, keys), file)

    def _json(self, path: str) -> Any:
        try:
            return json.loads(self._storage.get(path) or b"{}")
        except ValueError:
            raise StorageError(f"{self._storage.url}/{path}: damaged: run its step again, or delete it") from None

    def _in_json(self, file: StoredFile) -> Trace | None:
        content = self._json(file.path)
        left = without_names(content, self._names)
        if left == content:
            return None
        after = json.dumps(left, indent=2, ensure_ascii=False).encode()
        return Trace(Place.SUMMARIES, 1, partial(self._storage.put, file.path, after), file)

    def _in_history(self) -> Iterator[Trace]:
        """Yield a trace where the rollup says of a run why it failed, and names one of the rows."""
        rollup = None
        with suppress(StorageError):  # a damaged one is made anew
            rollup = read_rollup(self._storage, self._name)
        reasons = [run.summary.reason or "" for run in rollup.runs if run.summary] if rollup else []
        if any(in_words(reason, self._names) != reason for reason in reasons):
            oldest = datetime.min.replace(tzinfo=UTC)
            yield Trace(Place.SUMMARIES, 1, partial(update_rollup, self._storage, self._dataset, oldest))

    def _lines(self, path: str, theirs: Theirs) -> Iterator[dict[str, Any]]:
        with opened_parquet(self._storage, path) as parquet:
            yield from lines_of(parquet, theirs)

    # batches, cache, provider

    def _batches(self) -> Iterator[tuple[str, Batch | None]]:
        """Yield path and batch of each file of a batch's texts; None where a kill left the file alone."""
        for spec in self._storage.folders("batches/"):
            known = {batch.batch: batch for batch in Batches(self._storage, spec).all()}
            for path, _ in self._storage.list(f"batches/{spec}/"):
                if path.endswith(".parquet"):
                    yield path, known.get(PurePosixPath(path).stem)

    def _of_batch(self, batch: Batch | None, gone: Set[str] = frozenset()) -> Theirs:
        return Theirs(self._names if batch is not None and batch.dataset == self._name else frozenset(), gone)

    def _keys_in(self, batches: Sequence[tuple[str, Batch | None]]) -> set[str]:
        return {line["key"] for path, batch in batches for line in self._lines(path, self._of_batch(batch))}

    def _in_batches(self, batches: Sequence[tuple[str, Batch | None]], gone: Set[str]) -> Iterator[Trace]:
        for path, batch in batches:
            theirs = self._of_batch(batch, gone)
            if lines := sum(1 for _ in self._lines(path, theirs)):
                remove = partial(take_out, self._storage, path, "batch", theirs, new_keys())
                yield Trace(Place.BATCHES, lines, remove)

    def _in_cache(self, specs: Collection[str], keys: set[str], gone: set[str], found: Found) -> None:
        for spec in specs:
            cache = Cache(self._storage, spec, STAND_IN_MODEL)
            there = cache.find(keys)
            found.kept += len(there - gone)
            found.traces += [Trace(Place.CACHE, 1, partial(cache.remove, key)) for key in there & gone]

    def _at_provider(
        self,
        hits: Mapping[StoredFile, Hit],
        keys: set[str],
        batches: Sequence[tuple[str, Batch | None]],
        found: Found,
    ) -> None:
        run_ids, booked = set[str](), defaultdict[str, set[datetime]](set)
        for file, hit in hits.items():
            if hit.of_batch_at is not None:
                run_ids.add(file.run_id)
                for key in hit.keys:
                    booked[key].add(hit.of_batch_at)
        waiting = {batch.batch for _, batch in batches if batch is not None and not batch.collected}
        left: dict[str, str] = {}
        for conn_id in self._batch_connections(run_ids):
            try:
                client = openai_client(conn_id, self._connections)
            except InputError:
                found.not_looked_at.add(conn_id)
                continue
            with closing(client):
                for file_id in find_leftovers(BatchAPI(client), keys, booked, waiting):
                    left.setdefault(file_id, conn_id)
        for file_id, conn_id in left.items():
            found.traces.append(Trace(Place.PROVIDER, 1, partial(self._delete_at_provider, conn_id, file_id)))

    def _batch_connections(self, run_ids: Collection[str]) -> set[str]:
        """Return the connections that batches of the dataset are, or were, handed over by."""
        frozen = (self._json(f"runs/{self._name}/{run_id}/dataset.json") for run_id in run_ids)
        now = {self._dataset.llm.conn_id} if self._dataset.llm.mode == "batch" else set[str]()
        return now | {dataset["llm"]["conn_id"] for dataset in frozen if dataset}

    def _delete_at_provider(self, conn_id: str, file_id: str) -> None:
        with closing(openai_client(conn_id, self._connections)) as client:
            BatchAPI(client).delete(file_id)

    # target

    @contextmanager
    def _target(self) -> Iterator[tuple[sa.Connection, sa.Table | None]]:
        conn_id = self._dataset.target_conn_id
        with connecting(database(conn_id, self._connections), conn_id) as connection:
            target = existing_target(connection, self._dataset.target.table, self._id_type)
            connection.rollback()
            yield connection, target

    def _rows_in_target(self) -> list[tuple[str | None, bool]]:
        """Return the key of the last answer of each row of the target, and whether it holds a review."""
        with self._target() as (connection, target):
            if target is None:
                return []
            query = sa.select(target.c.cache_key, sa.case((is_reviewed(target), 1), else_=0))
            parts = (query.where(target.c.row_id.in_(part)) for part in _parts(self._ids))
            return [(key, bool(reviewed)) for part in parts for key, reviewed in connection.execute(part)]

    def _shared_in_target(self, keys: Collection[str], mine: Counter[str | None]) -> set[str]:
        """Return which of the keys other rows of the target hold; `mine` counts those of the rows."""
        with self._target() as (connection, target):
            if target is None:
                return set()
            query = sa.select(target.c.cache_key, sa.func.count()).group_by(target.c.cache_key)
            parts = (query.where(target.c.cache_key.in_(part)) for part in _parts(list(keys)))
            return {key for part in parts for key, rows in connection.execute(part) if rows > mine[key]}

    def _delete_in_target(self) -> None:
        with self._target() as (connection, target), only_writer(connection, self._dataset.target.table):
            assert target is not None
            for part in _parts(self._ids):
                connection.execute(target.delete().where(target.c.row_id.in_(part)))


def _of_batch_at(books: pq.ParquetFile) -> datetime | None:
    about = json.loads((books.schema_arrow.metadata or {}).get(b"tagger", b"{}"))
    return datetime.fromisoformat(about["started_at"]) if about.get("asked") == "batch" else None


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), VALUES_A_QUERY):
        yield values[start : start + VALUES_A_QUERY]
