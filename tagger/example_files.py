"""Examples in a CSV beside the dataset file: columns `text` and `tags`, a row for each.

What is told of a mistake is its row and column, never what stands there: it may be a text.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from tagger.exceptions import Mistake
from tagger.tag_cells import tags_of_cell

FORM = "a list of {text, tags}, or the name of a CSV beside this file, such as examples.csv"

COLUMNS = ("text", "tags")


class WrongExamples(Exception):
    """A file of examples cannot be used. `args[0]` is the mistake."""

    def __init__(self, key: str, found: str, expected: str) -> None:
        super().__init__(Mistake(key, found, expected))


@dataclass(frozen=True)
class ExampleFile:
    """A file of examples: its name, and what its rows hold. They are numbered as in a spreadsheet: the header is 1."""

    name: str
    rows: list[int]
    examples: list[dict[str, Any]]

    def where(self, number: int, column: str) -> str:
        """Return where the example of this number (from 0) stands."""
        return _where(self.name, self.rows[number], column)


def _where(name: str, row: int, column: str = "") -> str:
    return f"{name}, row {row}" + (f", {column}" if column else "")


def read_examples(name: str, folder: Path) -> ExampleFile:
    """Read a file of examples, given as the dataset file names it.

    Raises:
        WrongExamples: the file or a row of it cannot be used.
    """
    if not name.lower().endswith(".csv") or not name.isprintable():
        raise WrongExamples("examples", "text that is no file's name", FORM)
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise WrongExamples("examples", repr(name), "a CSV in the folder of this file, or below it")
    try:
        text = (folder / name).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise WrongExamples("examples", f"{name}: {e.strerror or type(e).__name__}", "a readable file") from None
    except UnicodeDecodeError as e:
        raise WrongExamples(name, f"byte {e.start} is not UTF-8", "UTF-8") from None
    return _parsed(name, text)


def _parsed(name: str, text: str) -> ExampleFile:
    lines = io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n"), newline="\n")
    header, found, number = list[str](), ExampleFile(name, [], []), 0
    try:
        for number, cells in enumerate(csv.reader(lines, strict=True), 1):
            if number == 1:
                header = [cell.strip() for cell in cells]
                _check_header(name, header)
            elif any(cell.strip() for cell in cells):
                found.rows.append(number)
                found.examples.append(_example(name, number, header, cells))
    except csv.Error as e:
        raise WrongExamples(_where(name, number + 1), f"no valid CSV ({e})", 'CSV with `,` and `"`') from None
    _check_header(name, header)
    return found


def _check_header(name: str, header: list[str]) -> None:
    for column in COLUMNS:
        if header.count(column) != 1:
            found = f"{header.count(column)} columns `{column}`"
            raise WrongExamples(
                _where(name, 1), found, "one column `text` and one column `tags`, with `,` between them"
            )


def _example(name: str, row: int, header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        expected = f"{len(header)}, as in row 1 (a comma in a text needs quotes around it)"
        raise WrongExamples(_where(name, row), f"{len(cells)} cells", expected)
    values = dict(zip(header, cells, strict=True))
    return {"text": values["text"], "tags": _tags(values["tags"], _where(name, row, "tags"))}


def _tags(cell: str, where: str) -> list[str]:
    try:
        return tags_of_cell(cell)
    except ValueError:
        raise WrongExamples(where, "`[` and no JSON array of ids", 'ids with `;` between them, or ["…", "…"]') from None
