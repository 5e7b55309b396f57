"""Reviews: what people say the tags should be, kept in the target beside what the LLM says, out to a CSV and back.

No run writes a review. A row is reviewed when its `reviewed_tags` is not NULL; `[]` says that no tag fits.
"""

import csv
import getpass
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from tagger.connections import Connections, database
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.runs import IdType
from tagger.snapshot import SourceTable, database_time
from tagger.tables import GONE, REVIEW, connecting, existing_target, id_type, is_reviewed, only_writer, reflect

COLUMNS = ("row_id", "text", "tags", "confidence", "status", "reviewed_tags", "reviewed_by", "reviewed_at")

NO_TAG = "(none)"
"""How a cell says that no tag fits."""

CLEAR = "(clear)"
"""How a cell says that a review is taken back."""

STATUSES = (REVIEW, "tagged", "refused", "failed", "reviewed", "all")
"""What can be exported; `reviewed` are the rows that hold a review, whatever their status."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How cells begin that a spreadsheet takes for a formula."""

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
    begin like a formula begin with an apostrophe.

    Raises:
        InputError: there is no target table, or the file cannot be written.
    """
    with _target(dataset, connections) as (connection, target, ids), _writing(file) as out:
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
                writer.writerow([_cell(name, cells[name]) for name in names])
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
                connection.execute(_update(target, row, now))
    done.reviewed = sum(row.tags is not None for row in changes)
    done.cleared = len(changes) - done.reviewed
    return done


def reviewed_labels(dataset: Dataset, connections: Connections) -> dict[Any, list[str]]:
    """Return the reviewed tags of the rows that are reviewed and still in the source, by row id."""
    with _target(dataset, connections) as (connection, target, _):
        query = sa.select(target.c.row_id, target.c.reviewed_tags).where(is_reviewed(target), target.c.status != GONE)
        rows = connection.execute(query.order_by(target.c.row_id))
        return {str(row_id) if isinstance(row_id, uuid.UUID) else row_id: list(tags) for row_id, tags in rows}


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


@contextmanager
def _writing(file: Path) -> Iterator[Any]:
    """Write a text file whole or not at all."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8-sig", errors="replace", newline="") as out:
            yield out
        unfinished.replace(file)
    except OSError as e:
        raise InputError(f"{file}: cannot be written: {e.strerror or type(e).__name__}") from None
    finally:
        unfinished.unlink(missing_ok=True)


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


def _cell(name: str, value: Any) -> str | float:
    if value is None:
        return ""
    if name == "confidence":
        return float(value)
    if name in ("tags", "reviewed_tags"):
        value = tags_in_cell(value)
    elif isinstance(value, datetime):
        value = value.isoformat()
    elif isinstance(value, int):
        return value
    text = str(value)
    # one apostrophe more where there is one, so that reading takes off none that was there
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def tags_in_cell(tags: Sequence[str]) -> str:
    """Return tags as they stand in a cell: `a; b`, or as JSON where that would not come back the same."""
    if not tags:
        return NO_TAG
    plain = "; ".join(tags)
    reads_the_same = not plain.startswith("[") and plain != CLEAR and _parsed(plain) == list(tags)
    return plain if reads_the_same else json.dumps(list(tags), ensure_ascii=False)


def _parsed(cell: str) -> list[str]:
    """Return the tags of a cell; raises ValueError where it is broken JSON."""
    if cell == NO_TAG:
        return []
    if cell.startswith("["):
        tags = json.loads(cell)
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError
        return tags
    return [tag.strip() for tag in cell.split(";") if tag.strip()]


def _read(cell: str | None) -> str:
    cell = cell or ""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell


def _told(file: Path, problems: list[str]) -> Iterator[str]:
    yield f"{file}: {len(problems)} rows cannot be taken, so none was (`--skip` takes the others)"
    yield from (f"  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    if len(problems) > PROBLEMS_SHOWN:
        yield f"  and {len(problems) - PROBLEMS_SHOWN} more"


def _rows(file: Path, dataset: Dataset, ids: IdType, by: str | None, done: Imported) -> list[_Row]:
    """Return the filled rows, each once; what is wrong with one goes into `done.problems`."""
    filled: dict[Any, _Row] = {}
    twice: Counter[Any] = Counter()
    for number, cells in _lines(file):
        cell = cells["reviewed_tags"].strip()
        if not cell:
            done.empty += 1
            continue
        try:
            row = _row(dataset, ids, cells, cell, by)
        except ValueError as e:
            done.problems.append(f"row {number} (row_id {cells['row_id']}): {e}")
            continue
        if row.row_id in filled and filled[row.row_id].tags != row.tags:
            twice[row.row_id] += 1
        filled[row.row_id] = row
    for row_id in twice:
        del filled[row_id]
        done.problems.append(f"row_id {row_id}: stands there twice with different `reviewed_tags`")
    return list(filled.values())


def _row(dataset: Dataset, ids: IdType, cells: dict[str, str], cell: str, by: str | None) -> _Row:
    tags = None
    if cell != CLEAR:
        try:
            tags = _parsed(cell)
        except ValueError:
            raise ValueError("`reviewed_tags` is no list of tags such as `a; b` or a JSON array") from None
        if unknown := [tag for tag in tags if tag not in dataset.tag_ids]:
            raise ValueError(f"`reviewed_tags`: the dataset has no tag `{unknown[0]}`")
        if len(set(tags)) < len(tags):
            raise ValueError("`reviewed_tags`: a tag twice")
    seen = cells.get("reviewed_at", "").strip()
    try:
        row_id: Any = {"integer": int, "uuid": uuid.UUID, "text": str}[ids](cells["row_id"])
        seen_at = datetime.fromisoformat(seen) if seen else None
    except ValueError:
        raise ValueError("`row_id` or `reviewed_at` is not as it was exported") from None
    return _Row(row_id, tags, cells.get("reviewed_by", "").strip() or by or _user(), seen_at)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _lines(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield number and cells of a CSV's rows, as a spreadsheet numbers them."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{file}: cannot be read: {e.strerror or type(e).__name__}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: byte {e.start} is not UTF-8: save it as `CSV UTF-8`, as it was exported") from None
    header = content.partition("\n")[0]
    reader = csv.reader(StringIO(content, newline=""), delimiter=max(",;\t", key=header.count))
    csv.field_size_limit(2**31 - 1)
    names = [name.strip() for name in next(reader, [])]
    if missing := [f"`{name}`" for name in ("row_id", "reviewed_tags") if name not in names]:
        raise InputError(f"{file}: has no column {', '.join(missing)} (it has {', '.join(names) or 'none'})")
    for number, cells in enumerate(reader, 2):
        if any(cells):
            named = dict(zip(names, map(_read, [*cells, *[""] * len(names)]), strict=False))
            yield number, named


def _changes(
    connection: sa.Connection, target: sa.Table, rows: Iterable[_Row], done: Imported, *, overwrite: bool
) -> Iterator[_Row]:
    """Yield the rows that say what the target has not."""
    left = iter(rows)
    while part := list(islice(left, ROWS_A_QUERY)):
        t = target.c
        query = sa.select(t.row_id, t.reviewed_tags, t.reviewed_by, t.reviewed_at)
        there = {row.row_id: row for row in connection.execute(query.where(t.row_id.in_([row.row_id for row in part])))}
        for row in part:
            held = there.get(row.row_id)
            if held is None:
                done.problems.append(f"row_id {row.row_id}: the target table has no such row")
            elif held.reviewed_tags == row.tags:
                done.unchanged += 1
            elif held.reviewed_at != row.seen_at and not overwrite:
                who = held.reviewed_by or "somebody"
                done.problems.append(
                    f"row_id {row.row_id}: reviewed by {who} since the file was written (`--overwrite` replaces that)"
                    if held.reviewed_at is not None
                    else f"row_id {row.row_id}: its review was taken back since the file was written (`--overwrite`)"
                )
            else:
                yield row


def _update(target: sa.Table, row: _Row, now: datetime) -> sa.Update:
    """Return what writes a review, or takes it back. A row that waited for a review has it."""
    t = target.c
    if row.tags is None:
        gone: dict[str, Any] = dict.fromkeys(("reviewed_tags", "reviewed_by", "reviewed_at"), sa.null())
        return target.update().where(t.row_id == row.row_id).values(**gone)
    status = sa.case((t.status == REVIEW, "tagged"), else_=t.status)
    values = {"reviewed_tags": row.tags, "reviewed_by": row.by, "reviewed_at": now, "status": status}
    return target.update().where(t.row_id == row.row_id).values(**values)
