"""Labels: texts with the tags they should get, from a file or from reviewed rows, checked before anything is asked.

A label is called by its row: the source's row id where the labels have one, else its number in the file. In a CSV this
is the number that a spreadsheet shows, the header being row 1; in Parquet the first row is 1.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.exceptions import InputError
from tagger.review_file import shown
from tagger.spec import normalise
from tagger.tag_cells import are_tags, tags_of_cell
from tagger.trial import drawn, source_texts

SHOWN = 5
"""Rows named where there may be many."""

LONGEST_TAG = 64
"""Characters: no id of a dataset file is longer."""

LONGEST_CELL = 2**31 - 1

FORM = "a CSV or Parquet file with a column `tags` and a column `text` or `row_id`"


class Label(NamedTuple):
    """A text and its gold tags."""

    row: str
    text: str
    tags: frozenset[str]

    def __repr__(self) -> str:
        return f"Label({self.row})"


@dataclass(frozen=True)
class Labels:
    """The labels that can be used, and what became of the others."""

    labels: list[Label]
    """Each text once, unless disagreeing ones are kept; in the order in which the texts first appear."""
    rows: int
    """All there were."""
    unknown_rows: int = 0
    """Left out for a tag that the dataset has not."""
    blank: int = 0
    """Left out for want of a text."""
    examples: int = 0
    """Left out, for the prompt shows their text to the LLM, with its tags."""
    absent: list[str] = field(default_factory=list)
    """Ids that the source lacks."""
    repeated: int = 0
    """Rows whose text and tags stood there before; left out."""
    disagreeing: list[list[str]] = field(default_factory=list)
    """Rows of one text whose tags differ, text by text."""
    kept_disagreeing: bool = False
    over_max: int = 0
    """Used labels that no answer can meet: more tags than `max_tags`, or none without `allow_none`."""

    def sample(self, size: int, seed: int) -> "Labels":
        """Return so many of the labels, drawn at random; the same ones for the same labels and seed."""
        places = sorted(drawn(range(len(self.labels)), size, seed))
        return replace(self, labels=[self.labels[place] for place in places])

    def describe(self) -> list[str]:
        """Return what became of the rows that are not used as they stand, a line for each kind."""
        lines = []
        if self.unknown_rows:
            lines.append(f"{_rows(self.unknown_rows)} left out: tags that the dataset has not")
        if self.blank:
            lines.append(f"{_rows(self.blank)} left out: no text")
        if self.examples:
            lines.append(f"{_rows(self.examples)} left out: an example of the dataset file")
        if self.absent:
            lines.append(f"{_rows(len(self.absent))} left out: not in the source ({_some([*map(shown, self.absent)])})")
        if self.repeated:
            lines.append(f"{_rows(self.repeated)} left out: the text and the tags of another row")
        if self.disagreeing:
            done = "kept" if self.kept_disagreeing else "left out (`--keep-disagreeing` keeps them)"
            groups = _some(["/".join(map(shown, group)) for group in self.disagreeing], "; ")
            lines.append(
                f"{_rows(sum(map(len, self.disagreeing)))} {done}: different tags for one text (rows {groups})"
            )
        if self.over_max:
            lines.append(f"{_rows(self.over_max)} that no answer can meet, by `max_tags` and `allow_none`")
        return lines


@dataclass(frozen=True)
class _Row:
    name: str
    tags: list[str]
    text: str | None = field(default=None, repr=False)
    row_id: str | None = None
    """Where the text is the source's."""


def read_labels(
    path: Path,
    dataset: Dataset,
    connections: Connections,
    *,
    ignore_unknown: bool = False,
    keep_disagreeing: bool = False,
) -> Labels:
    """Read labels from a CSV (UTF-8) or Parquet file; the texts of a file without `text` are read from the source.

    `tags` holds ids separated by `;`, or a JSON array, or in Parquet a list; empty or `(none)` is no tag.

    Raises:
        InputError: the file is none of these, has unknown tags, or no label that can be used.
    """
    rows = [_row(path, number, cells) for number, cells in _read(path)]
    return _checked(rows, str(path), dataset, connections, ignore_unknown, keep_disagreeing)


def labels_of_rows(
    tags: Mapping[Any, Sequence[str]],
    dataset: Dataset,
    connections: Connections,
    *,
    ignore_unknown: bool = False,
    keep_disagreeing: bool = False,
) -> Labels:
    """Return the labels of rows of the source, given their tags by row id.

    Raises:
        InputError: there are unknown tags, or no label that can be used.
    """
    rows = [_Row(name=str(row_id), tags=list(each), row_id=str(row_id)) for row_id, each in tags.items()]
    return _checked(rows, "reviewed rows", dataset, connections, ignore_unknown, keep_disagreeing)


def _checked(
    rows: list[_Row],
    where: str,
    dataset: Dataset,
    connections: Connections,
    ignore_unknown: bool,
    keep_disagreeing: bool,
) -> Labels:
    known = set(dataset.tag_ids)
    unknown = [row for row in rows if not known.issuperset(row.tags)]
    if unknown and not ignore_unknown:
        raise InputError(_unknown_tags(where, unknown, known))
    usable = [row for row in rows if known.issuperset(row.tags)]
    ids = [row.row_id for row in usable if row.text is None and row.row_id is not None]
    texts = source_texts(dataset, ids, connections) if ids else {}
    absent = [row_id for row_id in ids if row_id not in texts]
    found = [row if row.row_id is None else replace(row, text=texts.get(row.row_id)) for row in usable]
    groups: dict[str, list[Label]] = {}
    for row in found:
        if row.text is not None and (same := normalise(row.text)):
            groups.setdefault(same, []).append(Label(row.name, row.text, frozenset(row.tags)))
    with_text = sum(map(len, groups.values()))
    examples = sum(len(groups.pop(normalise(example.text), ())) for example in dataset.examples)
    labels, disagreeing, repeated = [], [], 0
    for group in groups.values():
        distinct = {label.tags: label for label in reversed(group)}
        if len(distinct) > 1:
            disagreeing.append([label.row for label in group])
        if len(distinct) == 1:
            repeated += len(group) - 1
            labels.append(group[0])
        elif keep_disagreeing:
            labels += group
    result = Labels(
        labels=labels,
        rows=len(rows),
        unknown_rows=len(unknown),
        blank=len(usable) - len(absent) - with_text,
        examples=examples,
        absent=absent,
        repeated=repeated,
        disagreeing=disagreeing,
        kept_disagreeing=keep_disagreeing,
        over_max=sum(len(each.tags) > dataset.max_tags or not (each.tags or dataset.allow_none) for each in labels),
    )
    if not labels:
        why = "; ".join(result.describe()) or "there are none"
        raise InputError(f"{where}: no label that can be used: {why}")
    return result


def _unknown_tags(where: str, rows: list[_Row], known: set[str]) -> str:
    counts = Counter(tag for row in rows for tag in set(row.tags) - known)
    found = ", ".join(f"{_tag_shown(tag)} {count:,}x" for tag, count in counts.most_common(10))
    if len(counts) > 10:
        found += f" and {len(counts) - 10:,} more"
    # ids that nobody has heard of are named, but no texts that stand in the wrong column
    if any(row.text is not None and row.text.strip() in known for row in rows):
        found = "none of its tags, but some in the column `text`; are the two columns swapped?"
    elif len(counts) > max(10, len(known)):
        found = f"{len(counts):,} different values"
    return (
        f"{where}: column `tags`: found tags that the dataset has not: {found} (first in row {shown(rows[0].name)}); "
        "expected ids of `tags` in the dataset file: mend them, or leave these rows out with `--ignore-unknown`"
    )


def _tag_shown(tag: str) -> str:
    return f"`{tag}`" if len(tag) <= LONGEST_TAG and tag.isprintable() else f"a value of {len(tag):,} characters"


def _column_shown(name: str) -> str:
    # a file without a header has a text there
    return f"`{name}`" if re.fullmatch(r"[A-Za-z_][\w.-]{0,40}", name, re.ASCII) else "a name that is not shown"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more


def _row(path: Path, number: int, cells: dict[str, Any]) -> _Row:
    row_id, text = cells.get("row_id"), cells.get("text")
    row_id = None if row_id is None else str(row_id).strip() or None
    name = row_id or str(number)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{path}: column `text`: found {type(text).__name__} in row {number}; expected text")
    tags = _tags(cells["tags"])
    if tags is None:
        raise InputError(
            f"{path}: column `tags`: row {number} cannot be read; expected ids separated by `;`, "
            f'a JSON array of ids such as ["a", "b"], or nothing where no tag fits'
        )
    return _Row(name, tags, text, row_id if "text" not in cells else None)


def _tags(cell: Any) -> list[str] | None:
    """Return the ids in a cell, each once; None where it holds something else."""
    if isinstance(cell, str):
        try:
            cell = tags_of_cell(cell)
        except ValueError:
            return None
    cell = [] if cell is None else cell
    return list(dict.fromkeys(stripped for tag in cell if (stripped := tag.strip()))) if are_tags(cell) else None


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the cells of each row."""
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError as e:
        raise InputError(f"{path}: {os.strerror(e.errno or 0)}; expected {FORM}") from None
    if path.suffix.lower() in (".parquet", ".pq") and not is_parquet:
        raise InputError(f"{path}: no Parquet file; expected {FORM}")
    yield from _read_parquet(path) if is_parquet else _read_csv(path)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=columns):
                for cells in batch.to_pylist():
                    number += 1
                    yield number, cells
    except (pa.ArrowException, OSError):
        raise InputError(f"{path}: a damaged Parquet file; expected {FORM}") from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: Iterable[list[str]] = csv.reader(file, strict=True)
            header: list[str] | None = None
            for number, row in enumerate(rows, 1):
                if header is None:
                    header = [name.strip() for name in row]
                    columns = _columns(path, header)
                elif row:
                    if len(row) != len(header):
                        raise InputError(
                            f"{path}: row {number} has {len(row)} cells, the header has {len(header)}; "
                            "expected quotes around a cell with a comma, a quote or a line break"
                        )
                    cells = dict(zip(header, row, strict=True))
                    yield number, {name: cells[name] for name in columns}
            if header is None:
                raise InputError(f"{path}: empty; expected {FORM}")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{path}: no UTF-8 (byte {e.object[e.start]:#04x} after row {number}); expected {FORM}, in UTF-8"
        ) from None
    except csv.Error:
        raise InputError(f"{path}: row {number + 1} is no CSV (a quote that does not end); expected {FORM}") from None
    finally:
        csv.field_size_limit(before)


def _columns(path: Path, names: list[str]) -> list[str]:
    """Return those of the columns that are labels."""
    wanted: list[str] = [name for name in ("row_id", "text", "tags") if name in names]
    if "tags" not in wanted or len(wanted) < 2:
        found = ", ".join(map(_column_shown, names[:10]))
        raise InputError(f"{path}: found the columns {found}; expected a column `tags` and a column `text` or `row_id`")
    if twice := next((name for name in wanted if names.count(name) > 1), None):
        raise InputError(f"{path}: column `{twice}` is there twice; expected it once")
    return wanted
