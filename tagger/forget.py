"""Erasure: all that is kept of some rows goes, once they are gone from the source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError, RunFailed
from tagger.review_file import shown
from tagger.snapshot import SourceTable
from tagger.storage import Storage
from tagger.stored_runs import active_runs, keep_age, stored_runs
from tagger.tables import connecting
from tagger.traces import Found, Place, Search, StoredFile
from tagger.trial import id_in

IDS_SHOWN = 5

TEXTS_A_QUERY = 50
"""Of the source, which returns ids with their texts: one may have megabytes."""

ENDS_WITHIN = timedelta(hours=24)
"""Of a batch, from when it was handed over."""


class Erasure:
    """Rows of a dataset that are to be forgotten: the source has them no more, and nothing is at work on them."""

    def __init__(self, dataset: Dataset, given: Sequence[str], connections: Connections) -> None:
        """Check that the rows may be forgotten.

        Raises:
            InputError: an id is none of the source's kind, the source still has the row, its text is in a batch that is
                not collected, or a run of the dataset may be at work.
        """
        self._name = dataset.dataset
        self._storage = Storage.connect(dataset.storage, dataset.storage_conn_id, connections)
        conn_id = dataset.source.conn_id
        with connecting(database(conn_id, connections), conn_id) as connection:
            source = SourceTable(connection, dataset)
            ids = list(dict.fromkeys(_ids(given, source)))
            _check_gone(source, ids, dataset)
        self._ids = ids
        self._search = Search(dataset, self._storage, ids, source.id_type, connections)
        self._check_idle()

    def _check_idle(self) -> None:
        for batch, ids in self._search.waiting():
            raise InputError(
                f"{rows_in_words(ids)} of `{self._name}`: in batch {batch.remote or batch.batch} of run "
                f"`{batch.run_id}`, which is not collected; it ends by "
                f"{batch.intended_at + ENDS_WITHIN:%Y-%m-%d %H:%M} UTC: let a run collect it, and come back"
            )
        for run_id in active_runs(self._storage, self._name):
            raise InputError(
                f"run `{run_id}` of `{self._name}` may be at work: come back when it has ended, or 26 hours after "
                "it was killed"
            )

    def find(self) -> Found:
        """Return all that is left of the rows; nothing is changed."""
        return self._search.find()

    def remove(self, found: Found) -> None:
        """Take out what was found, and look again.

        Raises:
            RunFailed: something is left, for others wrote meanwhile.
        """
        self._keep_ages([trace.file for trace in found.traces if trace.file is not None])
        for trace in sorted(found.traces, key=lambda trace: trace.place):
            trace.remove()
        if left := self.find().traces:
            places = ", ".join(sorted({_PLACES[trace.place] for trace in left}))
            raise RunFailed(f"`{self._name}`: others wrote meanwhile, and something is left ({places}): run it again")

    def _keep_ages(self, files: Sequence[StoredFile]) -> None:
        for dataset in {file.dataset for file in files}:
            for stored in stored_runs(self._storage, dataset):
                if paths := {f.path for f in files if (f.dataset, f.run_id) == (dataset, stored.run.run_id)}:
                    keep_age(stored, paths)

    def describe(self, found: Found) -> Iterator[str]:
        """Yield in lines what was found, and what is beyond reach."""
        yield f"{self._name}: {rows_in_words(self._ids)}"
        lines, objects = Counter[str](), Counter[str]()
        for trace in found.traces:
            lines[_PLACES[trace.place]] += trace.lines
            objects[_PLACES[trace.place]] += 1
        for place in dict.fromkeys(_PLACES.values()):
            if lines[place]:
                reviewed = f", {found.reviewed:,} with a review" if place == "target" and found.reviewed else ""
                yield f"  {place}: {_amount(place, lines[place], objects[place])}{reviewed}"
        if not found.traces:
            yield "  nothing is left"
        if found.kept:
            others = ", ".join(["other rows", *(f"rows of `{name}`" for name in sorted(found.sharing))])
            yield f"  left alone: {_count(found.kept, 'record')}, for {others} have the same text"
        for conn_id in sorted(found.not_looked_at):
            yield f"  not looked at: the files of batches by connection `{conn_id}`, which is not there any more"
        keeps_versions = self._storage.keeps_versions()
        if keeps_versions is not False:
            told = "keeps" if keeps_versions else "may keep (to see that, s3:GetBucketVersioning is needed)"
            yield f"  beyond reach: old versions, which the bucket {told} until a lifecycle rule deletes them"


_PLACES = {
    Place.TARGET: "target",
    Place.SNAPSHOTS: "snapshots",
    Place.TRIALS: "runs",
    Place.BOOKS: "runs",
    Place.SUMMARIES: "runs",
    Place.ROWS: "runs",
    Place.BATCHES: "batches",
    Place.CACHE: "cache",
    Place.PROVIDER: "provider",
}
"""How lists call them."""


def _amount(place: str, lines: int, objects: int) -> str:
    if place in ("cache", "provider"):
        return _count(objects, "record" if place == "cache" else "file")
    if place == "target":
        return _count(lines, "row")
    return f"{_count(lines, 'text' if place == 'snapshots' else 'line')} in {_count(objects, 'file')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def rows_in_words(ids: Sequence[Any]) -> str:
    """Return "rows 7, 9 and 11"."""
    named = [shown(row_id) for row_id in ids[:IDS_SHOWN]]
    more = f" and {len(ids) - IDS_SHOWN:,} more" if len(ids) > IDS_SHOWN else ""
    return f"row{'s' * (len(ids) != 1)} {', '.join(named)}{more}"


def _ids(given: Sequence[str], source: SourceTable) -> Iterator[Any]:
    """Yield ids as the source has them."""
    for cell in given:
        row_id = id_in(source.id_type, cell)
        if row_id is None or re.search("[\ud800-\udfff]", cell):  # bytes of an argument that are no UTF-8
            raise InputError(f"`{shown(cell)}` is no id of the source, whose ids are {source.id_type}")
        yield row_id


def _check_gone(source: SourceTable, ids: Sequence[Any], dataset: Dataset) -> None:
    for start in range(0, len(ids), TEXTS_A_QUERY):
        if there := list(source.texts(list(ids[start : start + TEXTS_A_QUERY]))):
            raise InputError(
                f"{rows_in_words(there)} of `{dataset.dataset}`: still in the source `{dataset.source.table}`, so that "
                "the next run would tag and pay for it again: delete it there first"
            )
