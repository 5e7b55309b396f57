"""Reviews: what people say the tags should be, kept in the target beside what the LLM says, out to a CSV and back.

No run writes a review. `reviewed_tags` of `[]` say that no tag fits. A reviewer is not held to `max_tags` and
`allow_none`, which are rules for the LLM's answers.
"""

import csv
import getpass
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.review_file import CLEAR, COLUMNS, cell_of, read_rows, shown, writing
from tagger.runs import IdType
from tagger.snapshot import SourceTable, database_time
from tagger.tables import (
    GONE,
    REVIEW,
    connecting,
    existing_target,
    has_reviewed_tags,
    id_type,
    is_reviewed,
    only_writer,
    reflect,
)
from tagger.tag_cells import are_tags, tags_of_cell

PROBLEMS_SHOWN = 20
ROWS_A_QUERY = 500


class _Row(NamedTuple):
    """A filled row of a review file. `tags` is None where the review is to be taken back."""

    row_id: Any
    tags: list[str] | None
    by: str | None
    seen_at: datetime | None
    """When the row had been reviewed as the file was written."""


@dataclass
class Imported:
    """What became of a review file's rows."""

    reviewed: int = 0
    cleared: int = 0
    unchanged: int = 0
    """They say what the target has."""
    repeated: int = 0
    """The same row with the same tags stood there before."""
    empty: int = 0
    problems: list[str] = field(default_factory=list)
    """Rows that were not taken, and why."""


def export_reviews(
    dataset: Dataset,
    file: Path,
    connections: Connections,
    *,
    status: str = REVIEW,
    limit: int | None = None,
    texts: bool = True,
) -> int:
    """Write rows of the target to a CSV for a spreadsheet, in the order of their ids; return how many.

    The texts come from the source. The file is UTF-8 with a byte order mark, so that Excel shows Japanese; cells that
    begin like a formula begin with an apostrophe. Texts are cut after `LONGEST_TEXT` characters.

    Raises:
        InputError: there is no target table, or the file cannot be written.
    """
    with _target(dataset, connections) as (connection, target, ids), writing(file) as out:
        columns = [target.c[name] for name in COLUMNS if name != "text"]
        query = sa.select(*columns).where(_wanted(target, status)).order_by(target.c.row_id).limit(limit)
        rows = iter(connection.execution_options(yield_per=ROWS_A_QUERY).execute(query).mappings())
        writer = csv.writer(out)
        names = [name for name in COLUMNS if texts or name != "text"]
        writer.writerow(names)
        written = 0
        while part := list(islice(rows, ROWS_A_QUERY)):
            found = _texts(dataset, [row["row_id"] for row in part], ids, connections) if texts else {}
            for row in part:
                cells = {**row, "text": found.get(str(row["row_id"]), "")}
                writer.writerow([cell_of(name, cells[name]) for name in names])
            written += len(part)
    return written


def import_reviews(
    dataset: Dataset,
    file: Path,
    connections: Connections,
    *,
    by: str | None = None,
    overwrite: bool = False,
    skip: bool = False,
) -> Imported:
    """Take the filled `reviewed_tags` of a CSV into the target, in one transaction; `by` is whose they are.

    A row has a problem whose id the target or whose tag the dataset has not, which is there twice with different tags,
    or which was reviewed since the file was written (but with `overwrite`). With `skip` such rows are left out.

    Raises:
        InputError: the file is no such CSV, or without `skip` a row has a problem; nothing is written.
    """
    done = Imported()
    with _target(dataset, connections) as (connection, target, ids):
        rows = _rows(file, dataset, ids, by, done)
        with only_writer(connection, dataset.target.table):
            now = database_time(connection)
            changes = list(_changes(connection, target, rows, done, overwrite=overwrite))
            if done.problems and not skip:
                raise InputError("\n".join(_told(file, done.problems)))
            for row in changes:
                connection.execute(_update(target, row, now, dataset.review_below))
    done.reviewed = sum(row.tags is not None for row in changes)
    done.cleared = len(changes) - done.reviewed
    return done


def reviewed_labels(dataset: Dataset, connections: Connections) -> dict[Any, list[str]]:
    """Return the reviewed tags of the rows that have such and are still in the source, by row id.

    Raises:
        InputError: there is no target table, or another program wrote what are no tags.
    """
    with _target(dataset, connections) as (connection, target, _):
        t = target.c
        query = sa.select(t.row_id, t.reviewed_tags).where(has_reviewed_tags(target), t.status != GONE)
        labels = {}
        for row_id, tags in connection.execute(query.order_by(t.row_id)):
            if not are_tags(tags):
                raise InputError(f"table {target.fullname}: row_id {row_id}: `reviewed_tags` is no JSON array of tags")
            labels[str(row_id) if isinstance(row_id, uuid.UUID) else row_id] = tags
        return labels


@contextmanager
def _target(dataset: Dataset, connections: Connections) -> Iterator[tuple[sa.Connection, sa.Table, IdType]]:
    conn_id, name = dataset.target_conn_id, dataset.target.table
    with connecting(database(conn_id, connections), conn_id) as connection:
        found = reflect(connection, name)
        if found is None or "row_id" not in found.columns:
            raise InputError(
                f"connection `{conn_id}` has no target table `{name}` yet: the dataset's first run makes it"
            )
        ids = id_type(found.c.row_id)
        target = existing_target(connection, name, ids)
        assert target is not None
        connection.rollback()
        yield connection, target, ids


def _wanted(target: sa.Table, status: str) -> sa.ColumnElement[bool]:
    if status == "all":
        return target.c.status != GONE
    return is_reviewed(target) if status == "reviewed" else target.c.status == status


def _texts(dataset: Dataset, row_ids: list[Any], ids: IdType, connections: Connections) -> dict[str, str]:
    conn_id = dataset.source.conn_id
    with connecting(database(conn_id, connections), conn_id) as connection:
        source = SourceTable(connection, dataset)
        asked = [str(row_id) for row_id in row_ids] if source.id_type == "uuid" or ids == "uuid" else row_ids
        return {str(row_id): text for row_id, text in source.texts(asked).items()}


def _told(file: Path, problems: list[str]) -> Iterator[str]:
    yield f"{file}: {len(problems)} rows cannot be taken, so none was (`--skip` takes the others)"
    yield from (f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    if len(problems) > PROBLEMS_SHOWN:
        yield f"  and {len(problems) - PROBLEMS_SHOWN} more"


def _rows(file: Path, dataset: Dataset, ids: IdType, by: str | None, done: Imported) -> list[_Row]:
    """Return the filled rows, each once; what is wrong with one goes into `done.problems`."""
    filled: dict[Any, _Row] = {}
    twice: Counter[Any] = Counter()
    for number, cells in read_rows(file):
        cell = cells["reviewed_tags"].strip()
        if not cell:
            done.empty += 1
            continue
        try:
            row = _row(dataset, ids, cells, cell, by)
        except ValueError as e:
            done.problems.append(f"row {number}: {e}")
            continue
        if row.row_id not in filled:
            filled[row.row_id] = row
        elif filled[row.row_id].tags == row.tags:
            done.repeated += 1
        else:
            twice[row.row_id] += 1
    for row_id in twice:
        del filled[row_id]
        done.problems.append(f"row_id {shown(row_id)}: stands there twice with different `reviewed_tags`")
    return list(filled.values())


def _row(dataset: Dataset, ids: IdType, cells: dict[str, str], cell: str, by: str | None) -> _Row:
    if "" in cells:
        raise ValueError("it has more cells than the header: is a text there without its quotes?")
    seen = cells.get("reviewed_at", "").strip()
    try:
        row_id = _id(ids, cells["row_id"])
        seen_at = datetime.fromisoformat(seen) if seen else None
    except ValueError:
        raise ValueError("`row_id` or `reviewed_at` is not as it was exported") from None
    tags = None
    if cell != CLEAR:
        try:
            tags = tags_of_cell(cell)
        except (ValueError, RecursionError):
            raise ValueError(
                f"row_id {shown(row_id)}: `reviewed_tags` is no list of tags such as `a; b` or a JSON array"
            ) from None
        if unknown := [tag for tag in tags if tag not in dataset.tag_ids]:
            raise ValueError(f"row_id {shown(row_id)}: `reviewed_tags`: the dataset has no tag `{shown(unknown[0])}`")
        if len(set(tags)) < len(tags):
            raise ValueError(f"row_id {shown(row_id)}: `reviewed_tags`: a tag twice")
    return _Row(row_id, tags, cells.get("reviewed_by", "").strip() or by or _user(), seen_at)


def _id(ids: IdType, cell: str) -> Any:
    """Return a row id as the target has it; raises ValueError where it can be none."""
    if ids == "text":
        return cell
    cell = cell.strip().removeprefix("'")
    if ids == "uuid":
        return uuid.UUID(cell)
    if not re.fullmatch(r"-?[0-9]{1,19}", cell) or not -(2**63) <= int(cell) < 2**63:
        raise ValueError
    return int(cell)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _changes(
    connection: sa.Connection, target: sa.Table, rows: Iterable[_Row], done: Imported, *, overwrite: bool
) -> Iterator[_Row]:
    """Yield the rows that say what the target has not."""
    left = iter(rows)
    while part := list(islice(left, ROWS_A_QUERY)):
        t = target.c
        query = sa.select(t.row_id, t.reviewed_tags, t.reviewed_by, t.reviewed_at)
        # nobody else writes them until the transaction ends, where the database can lock rows
        query = query.where(t.row_id.in_([row.row_id for row in part])).order_by(t.row_id).with_for_update()
        there = {row.row_id: row for row in connection.execute(query)}
        for row in part:
            held = there.get(row.row_id)
            if held is None:
                done.problems.append(f"row_id {shown(row.row_id)}: the target table has no such row")
            elif held.reviewed_tags == row.tags and (row.tags is not None or held.reviewed_at is None):
                done.unchanged += 1
            elif held.reviewed_at != row.seen_at and not overwrite:
                name, who = shown(row.row_id), shown(held.reviewed_by or "somebody")
                done.problems.append(
                    f"row_id {name}: reviewed by {who} since the file was written (`--overwrite` replaces that)"
                    if held.reviewed_at is not None
                    else f"row_id {name}: its review was taken back since the file was written (`--overwrite`)"
                )
            else:
                yield row


def _update(target: sa.Table, row: _Row, now: datetime, below: float | None) -> sa.Update:
    """Return what writes a review, or takes it back. A row that waited for one has it, or waits again."""
    t = target.c
    if row.tags is None:
        is_unsure = sa.false() if below is None else t.confidence < below
        status = sa.case((sa.and_(t.status == "tagged", is_unsure), REVIEW), else_=t.status)
        values: dict[str, Any] = dict.fromkeys(("reviewed_tags", "reviewed_by", "reviewed_at"), sa.null())
    else:
        status = sa.case((t.status == REVIEW, "tagged"), else_=t.status)
        values = {"reviewed_tags": row.tags, "reviewed_by": row.by, "reviewed_at": now}
    return target.update().where(t.row_id == row.row_id).values(status=status, **values)
