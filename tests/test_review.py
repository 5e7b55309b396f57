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
from tagger.exceptions import InputError
from tagger.review import (
    CLEAR,
    NO_TAG,
    _cell,
    _parsed,
    _read,
    export_reviews,
    import_reviews,
    reviewed_labels,
    tags_in_cell,
)
from tagger.tables import reflect
from tests.databases import make_project, put_rows
from tests.project import Project

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
        (b"row_id,tags\n1,weather\n", "has no column `reviewed_tags`"),
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


def test_the_view_lies_in_the_tables_schema(request: pytest.FixtureRequest) -> None:
    postgres = make_project("postgresql", request)
    postgres.put(1, "apple")
    postgres.execute('CREATE SCHEMA "My Tags"')
    postgres.change(target={"table": "My Tags.note_tags"})
    postgres.run()

    with postgres.engine.connect() as connection:
        assert reflect(connection, "My Tags.note_tags_effective") is not None


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(words.filter(lambda tag: tag == tag.strip() and tag.isprintable()), unique=True, max_size=3))
@settings(max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])
def test_any_tags_come_back_out_of_a_cell(tags: list[str]) -> None:
    assert _parsed(_read(str(_cell("tags", tags))).strip()) == tags
    assert _parsed(tags_in_cell(tags)) == tags


@given(words)
@settings(max_examples=500)
def test_no_cell_begins_like_a_formula_and_any_text_comes_back(text: str) -> None:
    cell = str(_cell("text", text))

    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert _read(cell) == text
