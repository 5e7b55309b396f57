"""Reviews: what people say stays, whatever runs come; out to a CSV and back."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import Reply, StandIn, completion
from tagger.check import check
from tagger.dataset_files import parse_dataset
from tagger.exceptions import InputError, RunFailed
from tagger.review import Imported, _rows, export_reviews, import_reviews, reviewed_labels
from tagger.review_file import CLEAR, FORMULA, LONGEST_TEXT, cell_of, read_cell
from tagger.tables import reflect
from tagger.tag_cells import NO_TAG, tags_in_cell, tags_of_cell
from tests.databases import make_project, put_rows
from tests.project import MINIMAL, Project, merged
from tests.test_cli import Shell, assert_complains, shell  # noqa: F401 - a fixture

TEXTS = {1: "an apple and a banana", 2: "a zebra", 3: "rain and a storm"}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def write(file: Path, rows: Sequence[dict[str, Any]], encoding: str = "utf-8-sig", delimiter: str = ",") -> Path:
    with file.open("w", encoding=encoding, newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def reviewed(project: Project, folder: Path, tags: dict[int, str], **how: Any) -> Any:
    file = write(folder / "in.csv", [{"row_id": row_id, "reviewed_tags": cell} for row_id, cell in tags.items()])
    options: dict[str, Any] = {"by": "aya", "overwrite": True} | how
    return import_reviews(project.dataset, file, project.connections, **options)


def effective(project: Project) -> dict[Any, tuple[list[str] | None, str]]:
    with project.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT row_id, tags, status FROM note_tags_effective")).all()
    return {r: (json.loads(tags) if isinstance(tags, str) else tags, status) for r, tags, status in rows}


def sure(value: float) -> Any:
    """Return a script of the stand-in: its first tag, with this confidence."""

    def answer(request: dict[str, Any]) -> Reply:
        items = request["response_format"]["json_schema"]["schema"]["properties"]["tags"]["items"]
        tag = items["properties"]["tag"]["enum"][0]
        return completion(json.dumps({"tags": [{"tag": tag, "confidence": value}]}))

    return answer


@pytest.fixture
def loaded(either: Project) -> Project:
    put_rows(either, TEXTS)
    either.change(limits={"max_deleted_fraction": 1.0})
    either.run(all_rows=True)
    return either


def test_a_correction_stays_through_every_kind_of_run(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather", 2: NO_TAG})

    def stays() -> None:
        row = loaded.target()[1]
        assert (row.reviewed_tags, row.reviewed_by) == (["weather"], "aya")
        assert row.reviewed_at is not None
        assert loaded.target()[2].reviewed_tags == []

    loaded.run(all_rows=True)
    stays()
    loaded.change(revision=2)  # all is tagged again
    loaded.run(all_rows=True)
    stays()
    loaded.change(prompt="You tag very short notes.")
    loaded.run(all_rows=True)
    stays()
    loaded.execute("DELETE FROM notes WHERE id IN (1, 3)")
    loaded.run(all_rows=True)
    stays()
    assert loaded.target()[1].status == "gone"
    assert set(loaded.target()) == {1, 2}
    assert set(effective(loaded)) == {2}
    loaded.put(1, TEXTS[1])  # and back
    loaded.run(all_rows=True)
    stays()
    assert loaded.target()[1].status == "tagged"
    assert effective(loaded) == {1: (["weather"], "reviewed"), 2: ([], "reviewed")}


def test_a_reviewed_row_whose_text_becomes_blank_is_gone_and_not_deleted(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather"})
    loaded.put(1, "  ")

    summary = loaded.run(all_rows=True)

    assert loaded.target()[1].status == "gone"
    assert loaded.target()[1].reviewed_tags == ["weather"]
    assert "fruit" not in summary.tags
    assert loaded.run(all_rows=True).state == "success"


def test_a_gone_row_counts_in_no_limit_and_is_no_work(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather"})
    loaded.execute("DELETE FROM notes WHERE id = 1")
    loaded.run(all_rows=True)
    loaded.change(limits={"max_deleted_fraction": 0.0}, prompt="Another prompt.")

    run = loaded.take(all_rows=True)
    summary = loaded.finish(run)

    assert (summary.state, run.plan().target_rows, run.plan().older_spec_rows) == ("success", 2, 2)


def test_gone_rows_make_no_room_for_more_to_be_deleted(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather"})
    loaded.execute("DELETE FROM notes WHERE id = 1")
    loaded.run(all_rows=True)
    loaded.change(limits={"max_deleted_fraction": 0.4})
    loaded.execute("DELETE FROM notes WHERE id = 2")

    with pytest.raises(RunFailed, match="1 of 2 rows of note_tags are gone"):
        loaded.run(all_rows=True)


def test_a_row_that_comes_back_is_not_left_to_a_later_run_of_a_rollout(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather"})
    loaded.execute("DELETE FROM notes WHERE id = 1")
    loaded.run(all_rows=True)
    loaded.put(1, TEXTS[1])
    loaded.change(prompt="Another prompt.", rollout={"texts_per_run": 1})

    loaded.run(all_rows=True)

    assert loaded.target()[1].status == "tagged"
    assert effective(loaded)[1] == (["weather"], "reviewed")


def test_a_review_taken_back_lets_a_gone_row_go(loaded: Project, tmp_path: Path) -> None:
    reviewed(loaded, tmp_path, {1: "weather"})
    loaded.execute("DELETE FROM notes WHERE id = 1")
    loaded.run(all_rows=True)
    assert reviewed(loaded, tmp_path, {1: CLEAR}).cleared == 1

    loaded.run(all_rows=True)

    assert set(loaded.target()) == {2, 3}


def test_rows_below_the_value_wait_for_a_review_until_they_have_one(
    either: Project, llm: StandIn, tmp_path: Path
) -> None:
    put_rows(either, TEXTS)
    either.change(confidence=True, review_below=0.5)
    llm.script(*[sure(0.4)] * 2, sure(0.9))

    summary = either.run(all_rows=True)

    rows = either.target()
    assert (summary.tagged, summary.review) == (3, 2)
    assert sorted((row.status, row.confidence) for row in rows.values()) == [
        ("review", 0.4),
        ("review", 0.4),
        ("tagged", 0.9),
    ]
    first = min(row_id for row_id, row in rows.items() if row.status == "review")
    reviewed(either, tmp_path, {first: "animal"})
    assert either.target()[first].status == "tagged"
    summary = either.run(all_rows=True)
    assert (summary.review, summary.cached, either.target()[first].status) == (1, 3, "tagged")
    either.change(review_below=0.95)  # no new spec: what is cached is judged again
    summary = either.run(all_rows=True)
    assert (summary.review, summary.cached) == (2, 3)
    either.change(review_below=None)
    assert either.run(all_rows=True).review == 0


def test_a_reviewed_row_that_is_tagged_again_with_doubt_waits_for_no_review(
    either: Project, llm: StandIn, tmp_path: Path
) -> None:
    put_rows(either, {1: TEXTS[1]})
    either.change(confidence=True, review_below=0.5)
    llm.script(sure(0.9), sure(0.3))
    either.run(all_rows=True)
    reviewed(either, tmp_path, {1: "weather"})
    either.change(revision=2)

    summary = either.run(all_rows=True)

    row = either.target()[1]
    assert (row.status, row.confidence, row.reviewed_tags, summary.review) == ("tagged", 0.3, ["weather"], 0)


def test_a_review_taken_back_leaves_a_row_in_doubt_to_be_reviewed(
    either: Project, llm: StandIn, tmp_path: Path
) -> None:
    put_rows(either, {1: TEXTS[1]})
    either.change(confidence=True, review_below=0.5)
    llm.script(sure(0.3))
    either.run(all_rows=True)
    reviewed(either, tmp_path, {1: "weather"})

    reviewed(either, tmp_path, {1: CLEAR})

    row = either.target()[1]
    assert (row.status, row.reviewed_tags, row.reviewed_by, row.reviewed_at) == ("review", None, None, None)


def test_an_older_snapshot_judges_no_row_again(either: Project, llm: StandIn) -> None:
    put_rows(either, {1: TEXTS[1]})
    either.change(confidence=True, review_below=0.5)
    llm.script(sure(0.3))
    either.run("newest", all_rows=True)
    either.change(review_below=0.1)
    older = either.take("older", all_rows=True)
    either.change(review_below=0.5)
    either.execute("UPDATE note_tags SET snapshot_at = '2100-01-01 00:00:00'")

    either.finish(older)

    assert (either.target()[1].status, either.target()[1].run_id) == ("review", "newest")


@pytest.mark.parametrize("status", ["tagged", "failed"])
def test_what_another_program_writes_by_sql_is_a_review(loaded: Project, status: str) -> None:
    loaded.execute("UPDATE note_tags SET reviewed_tags = '[\"weather\"]' WHERE row_id = 1")
    loaded.execute("UPDATE note_tags SET reviewed_at = '2026-11-01 00:00:00' WHERE row_id = 2")  # its tags are right
    loaded.execute("UPDATE note_tags SET reviewed_tags = 'null' WHERE row_id = 3")  # JSON's own null is none
    loaded.execute("UPDATE note_tags SET status = :status", status=status)

    assert effective(loaded) == {
        1: (["weather"], "reviewed"),
        2: (["animal"], "reviewed"),
        3: (["weather"], status),
    }
    assert reviewed_labels(loaded.dataset, loaded.connections) == {1: ["weather"]}
    loaded.execute("DELETE FROM notes WHERE id < 4")
    loaded.put(4, "a tiger")
    loaded.run(all_rows=True)
    assert {row_id: row.status for row_id, row in loaded.target().items()} == {1: "gone", 2: "gone", 4: "tagged"}
    assert reviewed_labels(loaded.dataset, loaded.connections) == {}


def test_reviewed_tags_that_are_no_list_are_named(loaded: Project) -> None:
    loaded.execute("UPDATE note_tags SET reviewed_tags = '\"weather\"' WHERE row_id = 2")

    with pytest.raises(InputError, match="row_id 2: `reviewed_tags` is no JSON array of tags"):
        reviewed_labels(loaded.dataset, loaded.connections)


def test_what_is_exported_comes_back_with_the_corrections(loaded: Project, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    assert export_reviews(loaded.dataset, file, loaded.connections, status="all") == 3
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = read(file)
    assert [(row["row_id"], row["text"], row["tags"]) for row in rows[:2]] == [
        ("1", TEXTS[1], "fruit"),
        ("2", TEXTS[2], "animal"),
    ]
    rows[0]["reviewed_tags"], rows[1]["reviewed_tags"] = "weather; fruit", NO_TAG

    done = import_reviews(loaded.dataset, write(file, rows), loaded.connections, by="aya")

    assert (done.reviewed, done.empty, done.problems) == (2, 1, [])
    assert loaded.target()[1].reviewed_tags == ["weather", "fruit"]
    assert reviewed_labels(loaded.dataset, loaded.connections) == {1: ["weather", "fruit"], 2: []}
    again = import_reviews(loaded.dataset, file, loaded.connections, by="aya")
    assert (again.reviewed, again.unchanged) == (0, 2)


@pytest.mark.parametrize(
    ("status", "rows"),
    [
        ("review", []),
        ("tagged", ["3"]),
        ("refused", ["1"]),
        ("failed", ["2"]),
        ("reviewed", ["3"]),
        ("all", ["1", "2", "3"]),
    ],
)
def test_rows_are_exported_by_their_status(loaded: Project, tmp_path: Path, status: str, rows: list[str]) -> None:
    reviewed(loaded, tmp_path, {3: "weather"})
    loaded.execute("UPDATE note_tags SET status = 'refused' WHERE row_id = 1")
    loaded.execute("UPDATE note_tags SET status = 'failed' WHERE row_id = 2")

    export_reviews(loaded.dataset, tmp_path / "out.csv", loaded.connections, status=status)

    assert [row["row_id"] for row in read(tmp_path / "out.csv")] == rows


NASTY = {
    "=1+1": '=HYPERLINK("http://x")',
    "-2": '- a list\r\n- of, "two"',
    "@me": "'=quoted'",
    "a;b": "one;two\tthree",
    "plain": "ends in a line\n",
    "林檎, 1": "林檎と\n動物",
    "\uff0bfull": "\uff1dwidth",
    "'x": "\rreturn",
}


def test_any_ids_and_texts_go_out_and_come_back(either: Project, tmp_path: Path) -> None:
    either.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, body TEXT)")
    for row_id, text in NASTY.items():
        either.execute("INSERT INTO texts VALUES (:id, :body)", id=row_id, body=text)
    either.change(source={"table": "texts"})
    either.run(all_rows=True)
    file = tmp_path / "out.csv"
    export_reviews(either.dataset, file, either.connections, status="all")
    rows = read(file)

    assert {read_cell(row["row_id"]): read_cell(row["text"]) for row in rows} == NASTY
    assert not any(cell.startswith(FORMULA) for row in rows for cell in row.values())
    write(file, [row | {"reviewed_tags": "weather"} for row in rows])
    assert import_reviews(either.dataset, file, either.connections).reviewed == len(NASTY)
    assert set(reviewed_labels(either.dataset, either.connections)) == set(NASTY)


def test_a_text_longer_than_a_cell_of_excel_is_cut(loaded: Project, tmp_path: Path) -> None:
    loaded.put(1, "apple " * LONGEST_TEXT)
    loaded.run(all_rows=True)

    export_reviews(loaded.dataset, tmp_path / "out.csv", loaded.connections, status="all", limit=1)

    text = read(tmp_path / "out.csv")[0]["text"]
    assert (len(text), text[-1], text[:6]) == (LONGEST_TEXT + 1, "…", "apple ")


def test_long_numbers_are_kept_from_being_rounded(loaded: Project, tmp_path: Path) -> None:
    long = 1234567890123456789
    loaded.put(long, "a tiger")
    loaded.run(all_rows=True)
    file = tmp_path / "out.csv"
    export_reviews(loaded.dataset, file, loaded.connections, status="all")
    rows = read(file)
    assert [row["row_id"] for row in rows] == ["1", "2", "3", f"'{long}"]  # Excel makes 1.23E+18 of a number

    import_reviews(loaded.dataset, write(file, [rows[3] | {"reviewed_tags": "weather"}]), loaded.connections)

    assert loaded.target()[long].reviewed_tags == ["weather"]


def test_without_texts_the_source_is_not_asked(loaded: Project, tmp_path: Path) -> None:
    loaded.execute("DROP TABLE notes")

    export_reviews(loaded.dataset, tmp_path / "out.csv", loaded.connections, status="all", limit=2, texts=False)

    assert [list(row) for row in read(tmp_path / "out.csv")] == [
        ["row_id", "tags", "confidence", "status", "reviewed_tags", "reviewed_by", "reviewed_at"]
    ] * 2


def test_a_file_with_problems_changes_nothing_and_names_each(loaded: Project, tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    filled = [(1, "weather"), (9, "fruit"), (2, "vegetable"), ("x", "fruit"), (3, "fruit"), (3, "animal")]
    write(file, [{"row_id": row_id, "reviewed_tags": tags} for row_id, tags in filled])

    with pytest.raises(InputError) as raised:
        import_reviews(loaded.dataset, file, loaded.connections)

    told = str(raised.value)
    for part in ("row_id 9: the target table has no such row", "no tag `vegetable`", "row 5", "row_id 3: stands there"):
        assert part in told
    assert all(row.reviewed_tags is None for row in loaded.target().values())
    done = import_reviews(loaded.dataset, file, loaded.connections, skip=True)
    assert (done.reviewed, len(done.problems)) == (1, 4)


@pytest.mark.parametrize("row_id", [2**63, "1e3", "1_0", "", "\uff11"])
def test_what_is_no_id_of_the_source_is_told(loaded: Project, tmp_path: Path, row_id: object) -> None:
    file = write(tmp_path / "in.csv", [{"row_id": row_id, "reviewed_tags": "fruit"}])

    with pytest.raises(InputError, match="row 2: `row_id` or `reviewed_at` is not as it was exported"):
        import_reviews(loaded.dataset, file, loaded.connections)


SECRET = "a zebra that nobody may read about, at some more length than a tag has"


@pytest.mark.parametrize(
    "body",
    [
        f"row_id,reviewed_tags\n1,{SECRET.replace(',', '')}\n",
        f"row_id,reviewed_tags\n{SECRET.replace(',', '')},fruit\n",
        f"row_id,text,reviewed_tags\n1,not quoted,{SECRET}\n",
        f"1,{SECRET},fruit\n",
        f'row_id,reviewed_tags\n1,"[""{SECRET}"", 3]"\n',
    ],
)
def test_a_text_in_the_wrong_column_is_not_shown(loaded: Project, tmp_path: Path, body: str) -> None:
    file = tmp_path / "in.csv"
    file.write_text(body)

    with pytest.raises(InputError) as raised:
        import_reviews(loaded.dataset, file, loaded.connections)

    assert "zebra" not in str(raised.value)


def test_a_row_id_that_cannot_be_printed_is_not_shown(tmp_path: Path) -> None:
    dataset = parse_dataset(merged(MINIMAL, {"storage": "s3://bucket"}), "notes.yaml")
    file, done = tmp_path / "in.csv", Imported()
    file.write_text('row_id,reviewed_tags\n"a\nb",fruit\n"a\nb",animal\n')

    assert _rows(file, dataset, "text", "ann", done) == []
    assert done.problems == ["row_id (3 characters): stands there twice with different `reviewed_tags`"]


def test_a_row_that_is_there_twice_with_the_same_tags_is_taken_once(loaded: Project, tmp_path: Path) -> None:
    file = write(tmp_path / "in.csv", [{"row_id": 1, "reviewed_tags": "weather"}] * 3)

    done = import_reviews(loaded.dataset, file, loaded.connections)

    assert (done.reviewed, done.repeated, done.problems) == (1, 2, [])


def test_reviewers_are_not_held_to_max_tags_or_allow_none(loaded: Project, tmp_path: Path) -> None:
    loaded.change(allow_none=False)

    reviewed(loaded, tmp_path, {1: "weather; fruit; animal", 2: NO_TAG})

    assert loaded.target()[1].reviewed_tags == ["weather", "fruit", "animal"]
    assert loaded.target()[2].reviewed_tags == []


def test_whose_review_it_is_says_the_file_then_the_option_then_the_system(
    loaded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "chie")
    columns = ("row_id", "reviewed_tags", "reviewed_by")
    named = [dict(zip(columns, cells, strict=True)) for cells in ((1, "weather", "aya"), (2, "weather", ""))]

    import_reviews(loaded.dataset, write(tmp_path / "in.csv", named), loaded.connections, by="ben")
    reviewed(loaded, tmp_path, {3: "fruit"}, by=None)

    assert [loaded.target()[row_id].reviewed_by for row_id in (1, 2, 3)] == ["aya", "ben", "chie"]


def test_where_no_file_can_be_written_is_told(loaded: Project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    for place in ("file/out.csv", "none/out.csv", "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            export_reviews(loaded.dataset, tmp_path / place, loaded.connections)


def test_what_somebody_else_reviewed_meanwhile_is_not_overwritten(loaded: Project, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    export_reviews(loaded.dataset, file, loaded.connections, status="all")
    reviewed(loaded, tmp_path, {1: "weather"}, by="ben")
    rows = read(file)
    rows[0]["reviewed_tags"] = "animal"
    write(file, rows)

    with pytest.raises(InputError, match="row_id 1: reviewed by ben since the file was written"):
        import_reviews(loaded.dataset, file, loaded.connections)

    assert loaded.target()[1].reviewed_tags == ["weather"]
    import_reviews(loaded.dataset, file, loaded.connections, overwrite=True)
    assert loaded.target()[1].reviewed_tags == ["animal"]


def test_a_file_saved_with_semicolons_is_read(loaded: Project, tmp_path: Path) -> None:
    file = write(tmp_path / "in.csv", [{"row_id": 1, "text": "", "reviewed_tags": "weather; fruit"}], delimiter=";")

    import_reviews(loaded.dataset, file, loaded.connections)

    assert loaded.target()[1].reviewed_tags == ["weather", "fruit"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("row_id,reviewed_tags\n1,天気\n".encode("cp932"), "is not UTF-8"),
        (b"row_id,tags\n1,weather\n", "has no column `reviewed_tags` .it has `row_id`, `tags`"),
        (b'row_id,reviewed_tags\n1,"weather\n2,fruit\n', "is no CSV"),
        (b"", "has no column `row_id`, `reviewed_tags`"),
        (b'row_id,reviewed_tags\n1,"[""weather"""\n', "no list of tags"),
    ],
)
def test_what_is_no_review_file_is_told(loaded: Project, tmp_path: Path, body: bytes, told: str) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes(body)

    with pytest.raises(InputError, match=told):
        import_reviews(loaded.dataset, file, loaded.connections)


def test_a_target_of_before_there_were_reviews_is_completed_when_asked(loaded: Project) -> None:
    loaded.execute("DROP VIEW note_tags_effective")
    for name in ("confidence", "reviewed_tags", "reviewed_by", "reviewed_at"):
        loaded.execute(f"ALTER TABLE note_tags DROP COLUMN {name}")
    with pytest.raises(InputError, match=r"has no column `confidence`.*`tagger check DATASET --create`"):
        loaded.run(all_rows=True)

    lines = list(check(loaded.dataset, loaded.connections, create=True))

    assert [line for line in lines if "column" in line or "view" in line] == [
        f"target note_tags: {what} made"
        for what in (
            "column confidence",
            "column reviewed_tags",
            "column reviewed_by",
            "column reviewed_at",
            "view note_tags_effective",
        )
    ]
    assert loaded.run(all_rows=True).state == "success"
    assert effective(loaded)[1] == (["fruit"], "tagged")


def test_check_completes_no_table_that_is_not_a_target(loaded: Project) -> None:
    loaded.execute("CREATE TABLE customers (row_id BIGINT PRIMARY KEY, name TEXT)")
    loaded.change(target={"table": "customers"})

    with pytest.raises(InputError, match="table customers exists, but has no column `tags`"):
        list(check(loaded.dataset, loaded.connections, create=True))

    with loaded.engine.connect() as connection:
        found = reflect(connection, "customers")
        assert found is not None
        assert found.columns.keys() == ["row_id", "name"]
        assert reflect(connection, "customers_effective") is None


def test_a_lost_view_stops_no_run_and_is_made_by_check(loaded: Project) -> None:
    loaded.execute("DROP VIEW note_tags_effective")
    assert loaded.run(all_rows=True).state == "success"
    told = list(check(loaded.dataset, loaded.connections))
    assert "target note_tags: there, but not its view note_tags_effective; `--create` makes it" in told

    told = list(check(loaded.dataset, loaded.connections, create=True))

    assert "target note_tags: view note_tags_effective made" in told
    assert effective(loaded)[2] == (["animal"], "tagged")
    assert "target note_tags: there" in list(check(loaded.dataset, loaded.connections))


def test_the_view_lies_in_the_tables_schema(request: pytest.FixtureRequest) -> None:
    postgres = make_project("postgresql", request)
    postgres.put(1, "apple")
    postgres.execute('CREATE SCHEMA "My Tags"')
    postgres.change(target={"table": "My Tags.note_tags"})
    postgres.run()

    with postgres.engine.connect() as connection:
        assert reflect(connection, "My Tags.note_tags_effective") is not None


# the commands


def test_what_the_commands_print(shell: Shell) -> None:  # noqa: F811
    assert shell.run("run", "notes", "--all") == 0
    file = shell.folder / "out.csv"

    assert shell.run("review", "export", "notes", str(file), "--status", "all") == 0
    assert shell.out.splitlines()[0] == f"{file}: 2 rows (all)"
    assert f"{file} holds the rows' texts: keep it as you keep the table" in shell.err.splitlines()
    assert shell.run("review", "export", "notes", str(file), "--status", "all", "--no-text") == 0
    assert "holds the rows' texts" not in shell.err

    write(file, [row | {"reviewed_tags": "weather"} for row in read(file)])
    assert shell.run("review", "import", "notes", str(file), "--by", "aya") == 0
    assert shell.out == (
        "2 rows reviewed, 0 reviews taken back, 0 as they were, 0 without `reviewed_tags`, 0 left out\n"
    )


def test_a_file_with_problems_ends_the_command_with_2_and_names_at_most_20(shell: Shell) -> None:  # noqa: F811
    assert shell.run("run", "notes", "--all") == 0
    file = write(shell.folder / "in.csv", [{"row_id": n, "reviewed_tags": "fruit"} for n in range(1, 26)])

    assert shell.run("review", "import", "notes", str(file)) == 2
    assert "23 rows cannot be taken, so none was (`--skip` takes the others)" in shell.err
    assert shell.err.count("the target table has no such row") == 20
    assert "and 3 more" in shell.err
    assert {row.reviewed_tags for row in shell.project.target().values()} == {None}
    assert shell.run("review", "import", "notes", str(file), "--skip") == 0
    assert shell.out.startswith("2 rows reviewed,")
    assert shell.out.count("the target table has no such row") == 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "--by", "aya"), "`--by` does not go with `review export`"),
        (("import", "--limit", "3"), "`--limit` does not go with `review import`"),
        (("export",), "has no target table `note_tags` yet"),
        (("import",), "has no target table `note_tags` yet"),
    ],
)
def test_what_review_cannot_do_is_one_line(shell: Shell, arguments: tuple[str, ...], told: str) -> None:  # noqa: F811
    direction, *options = arguments

    assert shell.run("review", direction, "notes", "in.csv", *options) == 2

    assert_complains(shell, told)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(words.filter(lambda tag: tag == tag.strip() and tag.isprintable()), unique=True, max_size=3))
@settings(max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])
def test_any_tags_come_back_out_of_a_cell(tags: list[str]) -> None:
    assert tags_of_cell(read_cell(str(cell_of("tags", tags))).strip()) == tags
    assert tags_of_cell(tags_in_cell(tags)) == tags


@given(words)
@settings(max_examples=500)
def test_no_cell_begins_like_a_formula_and_any_text_comes_back(text: str) -> None:
    cell = str(cell_of("text", text))

    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"))
    assert read_cell(cell) == text


def test_json_that_is_nested_too_deep_is_no_list_of_tags(loaded: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no list of tags"):
        reviewed(loaded, tmp_path, {1: "[" * 100_000})
