"""CSV and Parquet files of examples, labels and reviews: their rows, or one line that shows none of their texts."""

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tagger.dataset import Dataset
from tagger.dataset_files import load_dataset, parse_dataset
from tagger.exceptions import InputError
from tagger.labels import LONGEST_CELL, read_labels
from tagger.review import Imported, _rows
from tests.fuzz.hostile import MARKER, damaged, long, rarely, words
from tests.fuzz.promises import assert_clear
from tests.fuzz.rounds import Target, folder
from tests.project import MINIMAL, merged

DATASET = parse_dataset(merged(MINIMAL, {"storage": "s3://bucket"}), "notes.yaml")

COLUMNS = {
    "examples": (["text", "tags"], ["tags", "text", "note"]),
    "labels": (["text", "tags"], ["row_id", "text", "tags"], ["row_id", "tags"]),
    "reviews": (["row_id", "reviewed_tags"], ["row_id", "text", "reviewed_tags", "reviewed_by", "reviewed_at"]),
}

NAMED = ("row_id", "tags", "reviewed_tags", "reviewed_by", "reviewed_at")
"""Columns whose cells an error may show: a text that stands there is in the wrong place."""

TAGS = (
    "fruit",
    "fruit;animal",
    " animal ; fruit ",
    '["fruit"]',
    '["\\ud800"]',
    "(none)",
    "(clear)",
    "[[[",
    "",
    "hacked",
)

TOKENS = tuple(token.encode() for token in (",", ";", "\t", '"', '""', "\n", "\r", "\r\n", "\x00", "\ufeff", "'"))


def _csv(header: list[str], rows: list[list[str]], quoted: bool, ending: str) -> bytes:
    lines = [header, *rows]
    if not quoted:  # so that any comma, quote or line break in a cell makes it another file
        return ending.join([*map(",".join, lines), ""]).encode("utf-8", "surrogatepass")
    body = io.StringIO(newline="")
    csv.writer(body, lineterminator=ending).writerows(lines)
    return body.getvalue().encode("utf-8", "replace")


def _parquet(names: list[str], columns: list[list[object]]) -> bytes:
    body = io.BytesIO()
    height = min((len(column) for column in columns), default=0)
    try:
        pq.write_table(pa.table({n: pa.array(c[:height]) for n, c in zip(names, columns, strict=False)}), body)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # mixed types, halves of surrogate pairs
        return b"PAR1"
    return body.getvalue()


cells = rarely(long(words, 1_000_000), st.one_of(st.sampled_from(TAGS), st.sampled_from(TAGS), words), 80)
own_texts = st.one_of(cells, st.just(f"a {MARKER} text"))
"""What stands in a column `text`."""


def _csvs(kind: str) -> SearchStrategy[bytes]:
    headers = st.one_of(st.sampled_from(COLUMNS[kind]), st.sampled_from(COLUMNS[kind]), st.lists(words, max_size=3))
    forms = st.sampled_from((True, True, False)), st.sampled_from(("\n", "\r\n", "\r"))
    return headers.flatmap(lambda header: st.builds(_csv, st.just(header), _rows_below(header), *forms))


def _rows_below(header: list[str]) -> SearchStrategy[list[list[str]]]:
    row = st.tuples(*(own_texts if name == "text" else cells for name in header)).map(list)
    more = st.sampled_from(([], [], [], ["a cell too many"]))
    return st.lists(st.builds(list.__add__, row, more), max_size=4)


parquets = st.builds(
    _parquet,
    st.sampled_from((["text", "tags"], ["row_id", "tags"], ["row_id", "text", "tags"], ["tags"])),
    st.lists(
        st.one_of(
            st.lists(st.text(max_size=8), max_size=3),
            st.lists(st.lists(st.sampled_from(("fruit", "hacked")), max_size=2), max_size=3),
            st.lists(st.binary(max_size=4), max_size=3),
            st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            st.lists(st.floats(), max_size=3),
            st.lists(st.none(), max_size=3),
            st.lists(st.datetimes(), max_size=3),
        ),
        min_size=3,
        max_size=3,
    ),
)


def _examples(path: Path, body: bytes) -> Dataset:
    dataset_file = path.with_name("by_examples.yaml")
    if not dataset_file.exists():
        dataset_file.write_text(_DATASET_FILE)
    path.with_name("fuzz.csv").write_bytes(body)
    return load_dataset(dataset_file)


_DATASET_FILE = """\
dataset: by_examples
storage: s3://bucket
source: {conn_id: db, table: texts, id_column: id, text_columns: [body]}
target: {table: text_tags}
llm: {model: offline-stand-in}
prompt: You tag short notes.
tags: [{id: fruit}, {id: animal}]
examples: fuzz.csv
"""


def _labels(path: Path, body: bytes) -> None:
    path.write_bytes(body)
    for label in read_labels(path, DATASET, lambda _: None, ignore_unknown=True).labels:
        assert set(label.tags) <= set(DATASET.tag_ids), "a tag outside the enum"
        assert MARKER not in repr(label) or MARKER in label.row, "its repr shows the text"


def _reviews(path: Path, body: bytes) -> None:
    path.write_bytes(body)
    done = Imported()
    for row in _rows(path, DATASET, "text", "somebody", done):
        if row.tags is not None:
            assert set(row.tags) <= set(DATASET.tag_ids), "a tag outside the enum"
    for problem in done.problems:
        assert_clear(InputError(problem), may_show=_is_named(body))


def _is_named(body: bytes) -> bool:
    """Return whether the marker stands in a column of ids or of tags, which errors name."""
    lines = io.StringIO(body.decode("utf-8-sig", "replace"), newline="")
    header, *rows = [*_read_until_damage(lines)] or [[]]
    return any(MARKER in cell for row in rows for name, cell in zip(header, row, strict=False) if name.strip() in NAMED)


def _read_until_damage(lines: io.StringIO) -> Iterator[list[str]]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        with suppress(csv.Error):
            yield from csv.reader(lines, strict=True)
    finally:
        csv.field_size_limit(before)


READERS: dict[str, Callable[[Path, bytes], object]] = {"examples": _examples, "labels": _labels, "reviews": _reviews}


def check(case: tuple[str, bytes, str]) -> str:
    """Read a file as one of the three."""
    kind, body, suffix = case
    try:
        READERS[kind](folder("csv") / f"file{suffix}", body)
    except InputError as e:
        assert_clear(e, lines=str(e).count("\n") + 1 if kind == "examples" else 1, may_show=_is_named(body))
        return f"{kind}: refused"
    return f"{kind}: read"


@st.composite
def _cases(draw: DrawFn) -> tuple[str, bytes, str]:
    kind = draw(st.sampled_from(tuple(READERS)))
    body = draw(st.one_of(_csvs(kind), _csvs(kind), damaged(_csvs(kind), TOKENS), parquets, damaged(parquets)))
    return kind, body, ".parquet" if kind == "labels" and body.startswith(b"PAR1") else ".csv"


TARGET = Target("csv-files", _cases(), check, share=12_000)
