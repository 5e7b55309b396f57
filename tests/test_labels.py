"""Labels: what is wrong with them is said by row, and never with a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tagger.exceptions import InputError
from tagger.labels import Labels, labels_of_rows, read_labels
from tests.databases import put_rows
from tests.project import Project


def read(project: Project, content: str | bytes | dict[str, Any], **options: bool) -> Labels:
    """Read labels of a file: CSV, or Parquet of these columns."""
    folder = Path(str(project.database_connection.host)).parent
    file = folder / "labels.csv"
    if isinstance(content, dict):
        file = folder / "labels.parquet"
        pq.write_table(pa.table(content), file)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_labels(file, project.dataset, project.connections, **options)


def complaint(project: Project, content: str | bytes | dict[str, Any], **options: bool) -> str:
    """Return the error's message, which is one line and holds no text."""
    with pytest.raises(InputError) as e:
        read(project, content, **options)
    assert "\n" not in str(e.value)
    assert "s3cret" not in str(e.value)
    return str(e.value)


def tags(labels: Labels) -> list[set[str]]:
    return [set(label.tags) for label in labels.labels]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("fruit", {"fruit"}),
        ("fruit;animal", {"fruit", "animal"}),
        (" fruit ; animal ;", {"fruit", "animal"}),
        ("fruit;fruit", {"fruit"}),
        ('"[""fruit"", ""animal""]"', {"fruit", "animal"}),
        ("[]", set()),
        ("", set()),
        ("(none)", set()),
    ],
)
def test_tags_are_ids_between_semicolons_or_a_json_array(project: Project, cell: str, expected: set[str]) -> None:
    assert tags(read(project, f"text,tags\nan apple,{cell}\n")) == [expected]


@pytest.mark.parametrize("cell", ['"[""fruit"""', "[1]", '"[""fruit"", null]"'])
def test_a_cell_that_is_no_json_array_is_named(project: Project, cell: str) -> None:
    assert "column `tags`: row 3 cannot be read" in complaint(project, f"text,tags\na,fruit\nb,{cell}\n")


def test_a_byte_order_mark_and_other_columns_do_not_matter(project: Project) -> None:
    labels = read(project, "\ufefftags,note,text\r\nfruit,x,林檎\r\n")

    assert [(label.row, label.text) for label in labels.labels] == [("2", "林檎")]


def test_rows_are_numbered_as_a_spreadsheet_does(project: Project) -> None:
    labels = read(project, 'text,tags\n"two\nlines",fruit\n\nthe next,animal\n')

    assert [label.row for label in labels.labels] == ["2", "4"]


def test_parquet_has_lists_or_texts_of_tags(project: Project) -> None:
    lists = read(project, {"text": ["a", "b", "c"], "tags": [["fruit", "animal"], [], None]})
    texts = read(project, {"text": ["a", "b"], "tags": ["fruit;animal", None]})

    assert tags(lists) == [{"fruit", "animal"}, set(), set()]
    assert tags(texts) == [{"fruit", "animal"}, set()]
    assert [label.row for label in lists.labels] == ["1", "2", "3"]


def test_texts_of_row_ids_are_the_sources(either: Project, tmp_path: Path) -> None:
    put_rows(either, {7: "an apple", 8: "a zebra"})
    file = tmp_path / "labels.csv"
    file.write_text("row_id,tags\n8,animal\n7,fruit\n")

    labels = read_labels(file, either.dataset, either.connections)

    assert [(label.row, label.text, set(label.tags)) for label in labels.labels] == [
        ("8", "a zebra", {"animal"}),
        ("7", "an apple", {"fruit"}),
    ]


def test_ids_in_parquet_may_be_numbers(project: Project) -> None:
    put_rows(project, {7: "an apple"})

    assert [label.text for label in read(project, {"row_id": [7], "tags": ["fruit"]}).labels] == ["an apple"]


def test_a_file_with_both_has_its_own_texts_and_is_called_by_row_ids(project: Project) -> None:
    put_rows(project, {7: "an apple"})
    labels = read(project, "row_id,text,tags\n7,a pear,fruit\n")

    assert [(label.row, label.text) for label in labels.labels] == [("7", "a pear")]


def test_unknown_tags_are_listed_with_their_counts(project: Project) -> None:
    told = complaint(
        project, "text,tags\ns3cret 1,fruits\ns3cret 2,fruits;animal\ns3cret 3,vegetable\ns3cret 4,fruit\n"
    )

    assert "found tags that the dataset has not: `fruits` 2x, `vegetable` 1x (first in row 2)" in told
    assert "--ignore-unknown" in told


def test_texts_in_the_wrong_column_are_not_shown(project: Project) -> None:
    assert "are the two columns swapped?" in complaint(project, "tags,text\ns3cret 1,fruit\ns3cret 2,animal\n")
    assert "a value of 139 characters 1x" in complaint(project, f"tags,text\n{'s3cret ' * 20},a note\n")
    many = "".join(f"s3cret {n},a note\n" for n in range(11))
    assert "has not: 11 different values (first in row 2)" in complaint(project, f"tags,text\n{many}")


def test_a_file_without_a_header_shows_no_text(project: Project) -> None:
    told = complaint(project, "i like the s3cret apples,fruit\n果物s3cret,fruit\n")

    assert "found the columns a name that is not shown, `fruit`; expected a column `tags`" in told


def test_rows_with_unknown_tags_are_left_out_where_that_is_asked(project: Project) -> None:
    labels = read(project, "text,tags\na,fruits\nb,fruits;animal\nc,animal\n", ignore_unknown=True)

    assert (tags(labels), labels.unknown_rows) == ([{"animal"}], 2)
    assert labels.describe() == ["2 rows left out: tags that the dataset has not"]


def test_rows_without_a_text_are_left_out_and_counted(project: Project) -> None:
    labels = read(project, 'text,tags\n,fruit\n" \t",fruit\nan apple,fruit\n')

    assert (len(labels.labels), labels.blank, labels.rows) == (1, 2, 3)
    assert labels.describe() == ["2 rows left out: no text"]


def test_rows_without_an_id_or_whose_source_text_is_blank_have_no_text(project: Project) -> None:
    put_rows(project, {1: "an apple", 2: None})

    labels = read(project, "row_id,tags\n1,fruit\n2,fruit\n,fruit\n")

    assert (len(labels.labels), labels.blank, labels.absent) == (1, 2, [])


def test_ids_that_the_source_lacks_are_counted_and_five_are_named(project: Project) -> None:
    put_rows(project, {1: "an apple"})
    lines = "".join(f"{row_id},fruit\n" for row_id in [1, *range(10, 16), "x"])

    labels = read(project, f"row_id,tags\n{lines}")

    assert labels.absent == ["10", "11", "12", "13", "14", "15", "x"]
    assert labels.describe() == ["7 rows left out: not in the source (10, 11, 12, 13, 14 and 2 more)"]


def test_labels_that_agree_count_once(project: Project) -> None:
    labels = read(project, "text,tags\nan apple,fruit\n an apple ,fruit\nan apple,fruit\n")

    assert ([label.row for label in labels.labels], labels.repeated) == (["2"], 2)
    assert labels.describe() == ["2 rows left out: the text and the tags of another row"]


DISAGREEING = "text,tags\ns3cret,fruit\nb,animal\ns3cret,animal\ns3cret,fruit\n"


def test_labels_that_disagree_are_named_and_left_out(project: Project) -> None:
    labels = read(project, DISAGREEING)

    assert ([label.row for label in labels.labels], labels.disagreeing) == (["3"], [["2", "4", "5"]])
    [told] = labels.describe()
    assert "3 rows left out (`--keep-disagreeing` keeps them): different tags for one text (rows 2/4/5)" in told


@pytest.mark.parametrize(
    "rows", ["\x00,a,fruit\n\x00,a,animal\n", '"x\ny",a,fruit\n"x\ny",a,animal\n', "\x00,a,hacked\n"]
)
def test_row_ids_that_cannot_be_printed_are_not_shown(project: Project, rows: str) -> None:
    assert complaint(project, f"row_id,text,tags\n{rows}").isprintable()


def test_labels_that_disagree_are_kept_where_that_is_asked(project: Project) -> None:
    labels = read(project, DISAGREEING, keep_disagreeing=True)

    assert sorted(label.row for label in labels.labels) == ["2", "3", "4", "5"]
    assert "3 rows kept: different tags for one text" in labels.describe()[0]


def test_a_text_that_the_prompt_shows_with_its_tags_measures_nothing(project: Project) -> None:
    project.change(examples=[{"text": "An ａpple ", "tags": ["fruit"]}, {"text": "unlabelled", "tags": []}])

    labels = read(project, "text,tags\nAn apple,fruit\nAn apple,animal\na zebra,animal\n")

    assert (tags(labels), labels.examples, labels.disagreeing) == ([{"animal"}], 2, [])
    assert labels.describe() == ["2 rows left out: an example of the dataset file"]


def test_every_row_is_used_or_counted(project: Project) -> None:
    put_rows(project, {1: "an apple", 2: "an apple", 3: None, 4: "x", 5: "x", 6: "y"})
    rows = "1,fruit\n2,fruit\n3,fruit\n4,fruit\n5,animal\n6,what\n99,fruit\n,fruit\n"

    labels = read(project, f"row_id,tags\n{rows}", ignore_unknown=True)

    left_out = labels.unknown_rows + labels.blank + len(labels.absent) + labels.repeated
    left_out += sum(map(len, labels.disagreeing))
    assert labels.rows == len(labels.labels) + left_out == 8


def test_labels_that_no_answer_can_meet_are_counted(project: Project) -> None:
    project.change(max_tags=1, allow_none=False)

    assert read(project, "text,tags\na,fruit;animal\nb,\nc,fruit\n").over_max == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "labels.csv: empty"),
        ("text,tags\n", "no label that can be used: there are none"),
        ("text,tags\n,fruit\n", "no label that can be used: 1 row left out: no text"),
        ("text,labels\ns3cret,fruit\n", "found the columns `text`, `labels`; expected a column `tags` and"),
        ("body,tags\ns3cret,fruit\n", "found the columns `body`, `tags`; expected a column `tags` and"),
        ("text,tags,text\ns3cret,fruit,s3cret\n", "column `text` is there twice"),
        ("text,tags\na,fruit\ns3cret, and more,fruit\n", "row 3 has 3 cells, the header has 2"),
        ('text,tags\na,fruit\n"s3cret,fruit\n', "row 3 is no CSV"),
        ("text,tags\na,fruit\n果物,fruit\n".encode("cp932"), r"no UTF-8 \(byte 0x89 after row \d\)"),
        (b"PAR1 and then no Parquet s3cret", "a damaged Parquet file"),
    ],
)
def test_a_file_that_is_no_labels_gets_one_line(project: Project, content: str | bytes, told: str) -> None:
    import re

    assert re.search(told, complaint(project, content))


def test_a_parquet_file_without_the_columns_gets_one_line(project: Project) -> None:
    assert "found the columns `body`; expected a column `tags`" in complaint(project, {"body": ["s3cret"]})


def test_a_parquet_text_that_is_none_gets_one_line(project: Project) -> None:
    assert "column `text`: found int in row 1" in complaint(project, {"text": [5], "tags": ["fruit"]})


def test_a_file_named_parquet_that_is_none_gets_one_line(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "labels.parquet"
    file.write_text("text,tags\n")

    with pytest.raises(InputError, match="no Parquet file"):
        read_labels(file, project.dataset, project.connections)


def test_a_file_that_is_not_there_gets_one_line(project: Project, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(InputError, match=r"(No such file|Is a directory).*; expected a CSV or Parquet file"):
            read_labels(path, project.dataset, project.connections)


def test_a_sample_is_the_same_for_a_seed_and_in_the_files_order(project: Project) -> None:
    labels = read(project, "text,tags\n" + "".join(f"text {n},fruit\n" for n in range(50)))

    samples = [[int(label.row) for label in labels.sample(10, seed).labels] for seed in (1, 1, 2)]

    assert samples[0] == samples[1] != samples[2]
    assert samples[0] == sorted(samples[0])
    assert len(labels.sample(500, 1).labels) == 50


def test_reviewed_rows_are_labels(project: Project) -> None:
    put_rows(project, {1: "an apple", 2: "a zebra"})

    labels = labels_of_rows({1: ["fruit"], 2: [], 3: ["fruit"]}, project.dataset, project.connections)

    assert [(each.row, each.text, set(each.tags)) for each in labels.labels] == [
        ("1", "an apple", {"fruit"}),
        ("2", "a zebra", set()),
    ]
    assert labels.absent == ["3"]


def test_no_text_shows_in_a_labels_repr(project: Project) -> None:
    assert "s3cret" not in repr(read(project, "text,tags\ns3cret,fruit\n"))


def test_long_texts_are_read(project: Project) -> None:
    [label] = read(project, f"text,tags\n{'x' * 200_000},{json.dumps('fruit')}\n").labels

    assert len(label.text) == 200_000
