"""What `docs/changes.md` says of a change of storage, names, tables and columns: what it costs, and what goes along."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from demo.stand_in import Fate
from tagger.check import check
from tagger.dataset_files import load_datasets
from tagger.exceptions import DatasetError, InputError, RunFailed
from tagger.history import history
from tagger.load import load_back
from tagger.plan import plan
from tagger.rollup import rolled_up
from tagger.runs import utc_now
from tagger.spend import spent_usd
from tagger.tag import tag
from tests.commands import aws_s3, fenced
from tests.conftest import REPOSITORY
from tests.databases import make_project, put_rows, watch
from tests.project import Project
from tests.test_cli import Shell, shell  # noqa: F401 - a fixture

PAGE = fenced("changes.md")
TEXTS = {1: "an apple", 2: "a zebra in the rain", 3: "an apple"}


def with_tags(project: Project) -> Project:
    """Tag some rows."""
    put_rows(project, TEXTS)
    project.run("before")
    assert len(project.llm.calls) == 2
    return project


@pytest.fixture
def tagged(request: pytest.FixtureRequest) -> Project:
    """A project whose rows are tagged."""
    return with_tags(make_project("sqlite", request))


@pytest.fixture
def each(either: Project) -> Project:
    """A project whose rows are tagged, over each of the databases in turn."""
    return with_tags(either)


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Project:
    """A project over PostgreSQL alone."""
    return make_project("postgresql", request)


def calls_of(project: Project, work: Callable[[], object]) -> int:
    """Return how many calls something makes."""
    before = len(project.llm.calls)
    work()
    return len(project.llm.calls) - before


def statement(title: str, **names: str) -> str:
    """Return the SQL below a heading of the page, with other names of tables and columns."""
    [sql] = [content for kind, content in PAGE[title] if kind == "sql"]
    for name, other in {"article_tags": "note_tags", "articles": "notes", **names}.items():
        sql = re.sub(rf"(\b|_){name}\b", rf"\g<1>{other}", sql).replace(f"{name}_2", f"{other}_2")
    return sql


def execute(project: Project, sql: str) -> int:
    with project.engine.begin() as connection:
        return connection.exec_driver_sql(sql).rowcount


def sync(project: Project, title: str, places: dict[str, str]) -> None:
    """Run the `aws` commands below a heading of the page, with other places for those that it names."""
    [commands] = [content for kind, content in PAGE[title] if kind == "sh"]
    for place, ours in places.items():
        commands = commands.replace(place, ours)
    for line in commands.splitlines():
        program, service, *words = line.split()
        assert (program, service) == ("aws", "s3")
        aws_s3(project.store.client(), words)


def review(project: Project, table: str, row_id: int, tag: str) -> None:
    """Review a row, as `tagger review import` does."""
    project.execute(
        f"UPDATE {table} SET reviewed_tags = :tags, reviewed_by = 'ann', reviewed_at = :at WHERE row_id = :row_id",
        tags=f'["{tag}"]',
        at=utc_now().isoformat(" ").removesuffix("+00:00"),
        row_id=row_id,
    )


def rows(project: Project) -> dict[object, tuple[object, ...]]:
    """Return status, tags and review of the target's rows."""
    return {
        row_id: (row.status, row.tags, row.reviewed_tags, row.reviewed_by) for row_id, row in project.target().items()
    }


# storage and names


def spent(project: Project, name: str) -> float:
    return spent_usd(project.open("any").storage, name, *(utc_now().replace(year=year) for year in (2020, 2040)))


def test_a_moved_storage_costs_nothing_and_keeps_the_months_books(tagged: Project) -> None:
    old, money, before = tagged.dataset.storage, spent(tagged, "notes"), rows(tagged)
    new = f"{old}/moved"
    tagged.change(storage=new)
    sync(tagged, "Move the storage", {"s3://old-bucket/tagger": old, "s3://new-bucket/tagger": new})

    assert calls_of(tagged, lambda: tagged.run("after")) == 0

    assert rows(tagged) == before
    assert spent(tagged, "notes") == money > 0
    [month] = history(rolled_up(tagged.open("any").storage, tagged.dataset), "month")
    assert (month.figures.runs, month.figures.tagged, month.figures.cached) == (2, 2, 2)
    assert [path for path, _ in tagged.open("any").storage.list("snapshots/notes/before")] == []


def test_a_storage_without_its_cache_is_paid_for_again(tagged: Project) -> None:
    tagged.change(storage=f"{tagged.dataset.storage}/empty")

    assert calls_of(tagged, lambda: tagged.run("after")) == 2


def test_what_is_in_a_batch_is_collected_after_a_move(project: Project) -> None:
    project.change(llm={"mode": "batch"})
    put_rows(project, TEXTS)
    project.llm.script_batches(Fate(delay=0.5))
    run = project.take("before")
    plan(run, project.connections)
    with pytest.raises(RunFailed, match="has not ended"):
        tag(run, 1, project.connections)
    old = project.dataset.storage
    new = f"{old}/moved"
    sync(project, "Move the storage", {"s3://old-bucket/tagger": old, "s3://new-bucket/tagger": new})
    project.change(storage=new)
    while project.llm.submitted[0]["status"] != "completed":
        pass

    assert calls_of(project, lambda: project.run("after")) == 0

    assert len(project.llm.submitted) == 1
    assert {row.status for row in project.target().values()} == {"tagged"}
    assert spent(project, "notes") > 0


def test_a_renamed_dataset_costs_nothing_and_keeps_its_books(tagged: Project) -> None:
    money, before = spent(tagged, "notes"), rows(tagged)
    sync(tagged, "Rename a dataset", {"s3://my-bucket/tagger": tagged.dataset.storage, "/articles": "/notes"})
    tagged.change(dataset="papers")

    assert calls_of(tagged, lambda: tagged.run("after")) == 0

    assert rows(tagged) == before
    assert spent(tagged, "papers") == money > 0
    [month] = history(rolled_up(tagged.open("any").storage, tagged.dataset), "month")
    assert (month.dataset, month.figures.runs, month.figures.tagged) == ("papers", 2, 2)


def test_the_plan_of_a_renamed_dataset_knows_what_changed_since(tagged: Project) -> None:
    sync(tagged, "Rename a dataset", {"s3://my-bucket/tagger": tagged.dataset.storage, "/articles": "/notes"})
    tagged.change(dataset="papers", prompt="You tag papers.")

    assert plan(tagged.take("after"), tagged.connections).spec_change == "the prompt changed"


def test_two_datasets_with_one_target_are_refused(shell: Shell) -> None:  # noqa: F811
    shell.write("papers", dataset="papers")

    loaded = load_datasets(sorted(shell.folder.glob("*.yaml")))

    assert [isinstance(each, DatasetError) for each in loaded.values()] == [True, True]


# split and merge


def test_a_dataset_split_in_two_costs_nothing(tagged: Project) -> None:
    for name, where in (("low", "id < 3"), ("high", "id >= 3")):
        execute(tagged, f"CREATE VIEW {name} AS SELECT id, body, updated_at FROM notes WHERE {where}")
    review(tagged, "note_tags", 3, "weather")
    low = replace(tagged, content=tagged.content)
    low.change(dataset="low", source={"table": "low"}, limits={"max_deleted_fraction": 1})
    high = replace(tagged, content=tagged.content)
    high.change(dataset="high", source={"table": "high"}, target={"table": "high_tags"})

    assert calls_of(tagged, lambda: (high.run(all_rows=True), low.run(all_rows=True))) == 0

    assert {row_id: row[1] for row_id, row in rows(high).items()} == {3: ["fruit"]}
    assert {row_id: row[0] for row_id, row in rows(low).items()} == {1: "tagged", 2: "tagged", 3: "gone"}


def test_two_datasets_merged_into_one_cost_nothing(postgres: Project) -> None:
    postgres.execute("CREATE TABLE more_notes (id BIGINT PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    postgres.execute("INSERT INTO more_notes VALUES (1, 'a tiger', NULL), (2, 'an apple', NULL)")
    put_rows(postgres, TEXTS)
    postgres.run()
    more = replace(postgres, content=postgres.content)
    more.change(dataset="more", source={"table": "more_notes"}, target={"table": "more_tags"})
    more.run()
    execute(postgres, statement("Split and merge", more_articles="more_notes"))
    postgres.change(dataset="everything", source={"table": "everything"}, target={"table": "everything_tags"})

    assert calls_of(postgres, lambda: postgres.run(all_rows=True)) == 0

    assert {row_id: row[1] for row_id, row in rows(postgres).items()} == {
        **{"a1": ["fruit"], "a2": ["animal", "weather"], "a3": ["fruit"]},
        **{"b1": ["animal"], "b2": ["fruit"]},
    }


# ids and targets


def test_another_id_column_costs_nothing_and_reviews_follow(each: Project) -> None:
    each.execute("ALTER TABLE notes ADD COLUMN code VARCHAR(9)")
    for row_id in TEXTS:
        each.execute("UPDATE notes SET code = :code WHERE id = :id", code=f"N{row_id}", id=row_id)
    review(each, "note_tags", 2, "weather")
    each.change(source={"id_column": "code"}, target={"table": "note_tags_2"})

    assert calls_of(each, lambda: each.run(all_rows=True)) == 0
    assert execute(each, statement("Change the id column")) == 1
    assert calls_of(each, lambda: each.run(all_rows=True)) == 0

    assert rows(each) == {
        "N1": ("tagged", ["fruit"], None, None),
        "N2": ("tagged", ["animal", "weather"], ["weather"], "ann"),
        "N3": ("tagged", ["fruit"], None, None),
    }


def test_a_target_that_is_copied_is_gone_on_with(each: Project) -> None:
    review(each, "note_tags", 2, "weather")
    before = rows(each)
    each.change(target={"table": "note_tags_2"})
    assert "target note_tags_2: made" in list(check(each.dataset, each.connections, create=True))
    assert execute(each, statement("Move the target")) == 3
    run = each.take(all_rows=True)
    assert plan(run, each.connections).new == 0
    requests = watch(run.storage)

    assert load_back(run, each.connections).written == 0

    assert rows(each) == before
    assert {row.run_id for row in each.target().values()} == {"before"}
    assert requests.of("GetObject", "cache/") == []


# columns of the source


def test_a_renamed_text_column_costs_nothing(tagged: Project) -> None:
    tagged.execute("ALTER TABLE notes RENAME COLUMN body TO content")
    before = rows(tagged)
    tagged.change(source={"text_columns": ["content"]})

    assert calls_of(tagged, lambda: tagged.run(all_rows=True)) == 0
    assert rows(tagged) == before


def test_a_text_column_that_is_gone_stops_a_run_before_anything_is_written(each: Project) -> None:
    each.execute("ALTER TABLE notes RENAME COLUMN body TO content")
    before = rows(each)

    with pytest.raises(InputError, match=r"^`source.text_columns`: table notes has no column `body` \(it has id, "):
        each.run("after")

    assert rows(each) == before
    assert [path for path, _ in each.open("any").storage.list("snapshots/notes/after/rows")] == []


def test_a_text_column_more_makes_other_texts_of_the_rows_that_have_it_and_the_plan_tells(tagged: Project) -> None:
    tagged.execute("ALTER TABLE notes ADD COLUMN title TEXT")
    tagged.execute("UPDATE notes SET title = 'A title' WHERE id = 2")
    tagged.change(source={"text_columns": ["title", "body"]})

    planned = plan(tagged.take(all_rows=True), tagged.connections)

    assert (planned.new, planned.why) == (1, {"changed text": 1})
    assert planned.estimated_usd is not None
    assert planned.estimated_usd > 0
    assert calls_of(tagged, lambda: tagged.run(all_rows=True)) == 1


# the spec


def test_a_renamed_tag_is_paid_for_once_as_the_plan_says_and_reviews_can_follow(postgres: Project) -> None:
    fruit, *others = postgres.content["tags"]
    postgres.change(tags=[fruit | {"id": "heart"}, *others])
    put_rows(postgres, TEXTS)
    postgres.run()
    review(postgres, "note_tags", 2, "heart")
    postgres.change(tags=[fruit | {"id": "cardiology"}, *others])

    planned = plan(postgres.take(all_rows=True), postgres.connections)
    assert (planned.new, planned.spec_change) == (2, "the tags changed")
    assert calls_of(postgres, lambda: postgres.run(all_rows=True)) == 2
    assert calls_of(postgres, lambda: postgres.run(all_rows=True)) == 0
    assert execute(postgres, statement("Change tags, prompt or model", articles="articles")) == 1

    assert rows(postgres)[2] == ("tagged", ["animal", "weather"], ["cardiology"], "ann")
    assert rows(postgres)[1] == ("tagged", ["cardiology"], None, None)


# the page


def test_the_tests_that_the_page_names_are_there() -> None:
    page = (REPOSITORY / "docs" / "changes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
