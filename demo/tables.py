"""The demo's source tables: filled on day 1, changed on day 2."""

import csv
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

DATA = Path(__file__).parent / "data"

TABLES = {
    "articles": "CREATE TABLE articles (id INTEGER PRIMARY KEY, title TEXT, body TEXT, updated_at TIMESTAMP)",
    "survey_answers": "CREATE TABLE survey_answers (answer_id TEXT PRIMARY KEY, answer TEXT, answered_at TIMESTAMP)",
}


@contextmanager
def _connected(database: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database)) as connection, connection:
        yield connection


def _rows(file: str) -> Iterator[dict[str, str]]:
    with (DATA / file).open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def fill(database: Path) -> None:
    """Make the tables as they are on day 1."""
    with _connected(database) as connection:
        for table, create in TABLES.items():
            connection.execute(f"DROP TABLE IF EXISTS {table}")
            connection.execute(create)
            for row in _rows(f"{table}.csv"):
                _put(connection, table, row)


def change(database: Path) -> dict[str, Counter[str]]:
    """Add, edit, duplicate and delete rows as on day 2; return the number of each by table."""
    changes: dict[str, Counter[str]] = {}
    with _connected(database) as connection:
        for table in TABLES:
            changes[table] = Counter()
            for row in _rows(f"{table}.day2.csv"):
                kind = row.pop("change")
                changes[table][kind] += 1
                if kind == "delete":
                    key = next(iter(row))
                    connection.execute(f"DELETE FROM {table} WHERE {key} = ?", (row[key],))
                else:
                    _put(connection, table, row)
    return changes


def _put(connection: sqlite3.Connection, table: str, row: dict[str, str]) -> None:
    columns, marks = ", ".join(row), ", ".join("?" * len(row))
    connection.execute(f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))


def tagged_rows(database: Path, table: str, target: str, key: str, text: str, ids: list[str]) -> list[tuple[str, str]]:
    """Return text and tags (JSON) of some rows, in the order of `ids`."""
    with _connected(database) as connection:
        query = f"SELECT s.{text}, t.tags FROM {table} s JOIN {target} t ON t.row_id = s.{key} WHERE s.{key} = ?"
        found = (connection.execute(query, (row_id,)).fetchone() for row_id in ids)
        return [row for row in found if row is not None]


def sample(table: str, columns: list[str], *, day2: bool) -> list[tuple[str, str]]:
    """Return id and text of a sample table's rows as on day 1, or all that were there on either day."""
    files = (f"{table}.csv", f"{table}.day2.csv") if day2 else (f"{table}.csv",)
    rows = [row for file in files for row in _rows(file)]
    key = next(name for name in rows[0] if name.endswith("id"))
    return [(row[key], "\n\n".join(row[column] for column in columns if row[column].strip())) for row in rows]
