"""How rows are taken out of the files of a run: what the run did and spent stays as its books have it."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tagger.runs import opened_parquet, writing_parquet
from tagger.storage import Storage

FORGOTTEN = "forgotten"
"""What stands where the id of a row stood."""

Kind = Literal["texts", "shard", "rows", "new", "books", "batch"]
"""Of a Parquet file: a snapshot's rows, a shard's texts, a plan's rows, its new keys, an attempt, a batch's texts."""

_OUTCOME = ("tags", "error", "answered_at", "confidence")
"""Columns of an attempt's file that tell of the text. Its money, its status and the kind of a failure stay."""

_ROW_NAMES = frozenset({"row_id", "too_long_row", "damaged_row"})
"""Keys of a run's JSON files that name a row as an example."""


@dataclass(frozen=True)
class Theirs:
    """Tells the lines of the rows: by the rows' ids, and by keys of texts that no other row has."""

    ids: Set[str] = frozenset()
    keys: Set[str] = frozenset()
    others: Mapping[str, str] = field(default_factory=dict)
    """Of the texts that other rows of the run have: one of these rows by key. Their lines become that row's."""

    def marked(self, table: pa.Table) -> pa.ChunkedArray:
        """Return for each line whether it is one of theirs."""
        marks = pa.chunked_array([pa.nulls(table.num_rows, pa.bool_()).fill_null(False)])
        for name, values in (("id", self.ids), ("row_id", self.ids), ("key", self.keys)):
            if values and name in table.column_names:
                known = pa.array(list(values), pa.string())
                marks = pc.or_(marks, pc.is_in(pc.cast(table.column(name), pa.string()), value_set=known))
        return marks


def lines_of(file: pq.ParquetFile, theirs: Theirs) -> Iterator[dict[str, Any]]:
    """Yield id, key and text of those lines of a file that are theirs, as far as it has them; a row group at a time."""
    names = [name for name in ("id", "row_id", "key") if name in file.schema_arrow.names]
    wanted = [*names, *(name for name in ("text",) if name in file.schema_arrow.names)]
    for group in range(file.num_row_groups):
        marks = theirs.marked(file.read_row_group(group, names))
        if pc.any(marks).as_py():
            yield from file.read_row_group(group, wanted).filter(marks).to_pylist()


def take_out(storage: Storage, path: str, kind: Kind, theirs: Theirs, new: defaultdict[str, str]) -> None:
    """Write a Parquet object again without their lines, in the same row groups; it is replaced whole.

    `new` gives the keys that stand for those that go, where a line stays for its money.
    """
    with (
        opened_parquet(storage, path) as file,
        writing_parquet(storage, path, file.schema_arrow) as rewritten,
    ):
        for group in range(file.num_row_groups):
            left = _left(file.read_row_group(group), kind, theirs, new)
            if left.num_rows:
                rewritten.write(dict(zip(left.column_names, left.columns, strict=True)))


def _left(table: pa.Table, kind: Kind, theirs: Theirs, new: defaultdict[str, str]) -> pa.Table:
    marks = theirs.marked(table)
    if kind in ("texts", "rows", "batch"):
        return table.filter(pc.invert(marks))
    keys, marked = table.column("key").to_pylist(), marks.to_pylist()
    if kind == "new":
        return _with(table, "key", [new[key] if mark else key for key, mark in zip(keys, marked, strict=True)])
    going = [mark and key not in theirs.others for key, mark in zip(keys, marked, strict=True)]
    row_ids = [
        (theirs.others.get(key, FORGOTTEN) if mark else row_id)
        for row_id, key, mark in zip(table.column("row_id").to_pylist(), keys, marked, strict=True)
    ]
    table = _with(table, "row_id", row_ids)
    if kind == "shard":
        return table.filter(pa.array([not gone for gone in going]))
    table = _with(table, "key", [new[key] if gone else key for key, gone in zip(keys, going, strict=True)])
    kept = pa.array([None if gone else i for i, gone in enumerate(going)], pa.int64())
    for name in _OUTCOME:
        if name in table.column_names:
            table = _with(table, name, table.column(name).take(kept))
    return table


def _with(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return a table with other values in a column."""
    place = table.column_names.index(name)
    column = values if isinstance(values, pa.ChunkedArray) else pa.array(values, table.schema.field(place).type)
    return table.set_column(place, table.schema.field(place), column)


def new_keys() -> defaultdict[str, str]:
    """Return keys that stand for others and tell nothing of them, each made when it is first asked for."""
    return defaultdict(lambda: uuid.uuid4().hex)


def without_names(content: Any, ids: Collection[str]) -> Any:
    """Return the content of one of a run's JSON files without the ids of rows that it names as examples."""
    if isinstance(content, list):
        return [without_names(item, ids) for item in content]
    if not isinstance(content, dict):
        return content
    return {name: _without_names(name, value, ids) for name, value in content.items()}


def _without_names(name: str, value: Any, ids: Collection[str]) -> Any:
    if not isinstance(value, str):
        return without_names(value, ids)
    if name in _ROW_NAMES:
        return FORGOTTEN if value in ids else value
    return in_words(value, ids) if name == "reason" else value


def in_words(reason: str, ids: Collection[str]) -> str:
    """Return why a run failed without the rows that it names as examples."""
    for row_id in ids:
        reason = reason.replace(f"(row {row_id})", f"(row {FORGOTTEN})")
    return reason
