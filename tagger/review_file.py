"""The file of a review: a CSV that a spreadsheet shows as it is, changes and saves again."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from tagger.exceptions import InputError
from tagger.tag_cells import are_tags, tags_in_cell

COLUMNS = ("row_id", "text", "tags", "confidence", "status", "reviewed_tags", "reviewed_by", "reviewed_at")

STATUSES = ("review", "tagged", "refused", "failed", "reviewed", "all")
"""What can be exported; `reviewed` are the rows that hold a review, whatever their status."""

CLEAR = "(clear)"
"""How a cell says that a review is taken back."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""How cells begin that a spreadsheet takes for a formula; the full-width ones where Excel speaks Japanese."""

LONGEST_TEXT = 32_000
"""Characters of a text in a file: Excel spills what a cell has over 32,767 into the rows below."""

LONGEST_NUMBER = 11
"""Digits of a number: Excel shows, and saves, a longer one as 1.23E+11."""

LONGEST_SHOWN = 64
"""Characters of a cell in a message: what is longer than any tag's id may be a text in the wrong column."""


@contextmanager
def writing(file: Path) -> Iterator[Any]:
    """Write a text file whole or not at all."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8-sig", errors="replace", newline="") as out:
            yield out
        unfinished.replace(file)
    except OSError as e:
        raise InputError(f"{file}: cannot be written: {e.strerror or type(e).__name__}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield number and cells of a CSV's rows, as a spreadsheet numbers them; cells over the header's have no name."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{file}: cannot be read: {e.strerror or type(e).__name__}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: byte {e.start} is not UTF-8: save it as `CSV UTF-8`, as it was exported") from None
    header = content.partition("\n")[0]
    reader = csv.reader(StringIO(content, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield from _named(file, reader)
    except csv.Error:
        raise InputError(f"{file}: line {reader.line_num} is no CSV (a quote that does not end?)") from None
    finally:
        csv.field_size_limit(before)  # it is the process's


def _named(file: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    names = [name.strip() for name in next(reader, [])]
    if missing := [f"`{name}`" for name in ("row_id", "reviewed_tags") if name not in names]:
        # others are not named: a file without a header has a text there
        known = ", ".join(f"`{name}`" for name in COLUMNS if name in names) or "none of those that are exported"
        raise InputError(f"{file}: has no column {', '.join(missing)} (it has {known})")
    for number, cells in enumerate(reader, 2):
        if any(cells):
            named = dict(zip(names, map(read_cell, [*cells, *[""] * len(names)]), strict=False))
            yield number, named | ({"": ""} if any(cells[len(names) :]) else {})


def cell_of(name: str, value: Any) -> str | float:
    """Return what stands in a column's cell for a value of the target, or for a row's text."""
    if value is None:
        return ""
    if name == "confidence":
        return float(value)
    if name in ("tags", "reviewed_tags"):
        is_plain = are_tags(value) and value != [CLEAR]
        value = tags_in_cell(value) if is_plain else json.dumps(value, ensure_ascii=False)
    elif isinstance(value, datetime):
        value = value.isoformat()
    elif isinstance(value, int):
        return value if abs(value) < 10**LONGEST_NUMBER else f"'{value}"
    text = str(value)
    if name == "text" and len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}…"
    # one apostrophe more where there is one, so that reading takes off none that was there
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def read_cell(cell: str) -> str:
    """Return what a cell held before it was kept from being a formula."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell


def shown(value: Any) -> str:
    """Return what a message may show of a cell, which may hold a text that stands in the wrong column."""
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN and text.isprintable() else f"({len(text):,} characters)"
