"""Why texts are new, and what the plan says of an edited spec."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from tagger.cache import Cache
from tagger.changes import ROWS_A_QUERY
from tagger.plan import describe, plan
from tagger.runs import Plan, Run
from tagger.spec import spec_id
from tagger.window import Options
from tests.databases import REFUSAL, make_project, put_all, put_rows, teach, watch
from tests.project import Project


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def make_plan(project: Project, **options: Any) -> Plan:
    return plan(project.take(all_rows=True, options=Options(**options)), project.connections)


def told(project: Project, run: Run | None = None) -> str:
    """Returns what the plan says of older specs."""
    run = run or project.take()
    planned = plan(run, project.connections)
    [line] = [line for line in describe(planned, project.dataset, run.snapshot()) if "hold an older spec" in line]
    return line


def test_without_a_target_all_texts_are_new(project: Project) -> None:
    put_all(project, "apple", "zebra", "apple")

    assert make_plan(project).why == {"new text": 2}


def test_each_new_text_has_its_reason(either: Project) -> None:
    teach(either.llm, secretly=REFUSAL)
    put_all(either, "apple", "zebra", "rain", "storm", "apple, secretly")
    either.run()
    either.put(1, "zebra at night")
    either.put(9, "tiger")
    spec = spec_id(either.dataset)
    cache = Cache(either.open("any").storage, spec, either.dataset.llm.model)
    cache.remove(either.target()[3].cache_key)
    either.execute("UPDATE note_tags SET status = 'failed' WHERE row_id = 2")
    cache.remove(either.target()[2].cache_key)

    planned = make_plan(either, retry_refused=True)

    assert planned.why == {
        "new text": 1,
        "changed text": 1,
        "record gone from the cache": 1,
        "asked before and not answered": 1,
        "refused before": 1,
    }
    assert planned.new == sum(planned.why.values())


def test_a_text_is_new_by_the_spec_only_where_it_has_not_changed(either: Project) -> None:
    put_all(either, "apple", "zebra", "rain")
    either.run()
    either.change(revision=2)
    either.put(0, " ａｐｐｌｅ\r\n")  # the same, for the cache
    either.put(1, "zebra at night")
    either.put(3, "storm")

    assert make_plan(either).why == {"new spec": 2, "changed text": 1, "new text": 1}


def test_a_text_that_a_further_row_waits_for_is_not_new_by_the_spec_alone(project: Project) -> None:
    put_all(project, "apple", "zebra")
    project.run()
    project.change(revision=2)
    project.put(7, "apple")

    assert make_plan(project).why == {"new text": 1, "new spec": 1}


def test_rows_are_compared_over_many_groups_and_queries(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.snapshot.ROWS_A_WRITE", 7)
    monkeypatch.setattr("tagger.changes.ROWS_A_QUERY", 3)
    put_all(project, *(f"text {i}" for i in range(20)), None)
    project.run()
    project.change(revision=2)
    put_rows(project, {100 + i: f"other {i}" for i in range(11)})
    for i in range(5):
        project.put(i, f"text {i} changed")

    assert make_plan(project).why == {"new spec": 15, "new text": 11, "changed text": 5}


@pytest.mark.parametrize(
    ("database", "declared", "ids"),
    [
        ("postgresql", "UUID", [f"8d8ac610-566d-4ef0-9c22-186b2a5ed79{i}" for i in range(3)]),
        ("postgresql", "TEXT", ["00042", "記事 1", "B"]),
        ("mysql", "TEXT", ["00042", "記事 1", "B"]),
        ("sqlite", "TEXT", ["00042", "記事 1", "B"]),
    ],
)
def test_rows_are_found_by_ids_of_any_kind(
    request: pytest.FixtureRequest, database: str, declared: str, ids: list[str]
) -> None:
    project = make_project(database, request)
    project.execute("DROP TABLE notes")
    project.execute(f"CREATE TABLE notes (id {declared} PRIMARY KEY, body TEXT, updated_at TEXT)")
    for row_id in ids[:2]:
        project.put(row_id, f"apple {row_id}")
    project.run()
    project.change(revision=2)
    project.put(ids[2], "zebra")
    project.put(ids[1], "rain")

    assert make_plan(project).why == {"new spec": 1, "new text": 1, "changed text": 1}


def test_the_target_is_not_read_where_nothing_is_new(project: Project) -> None:
    put_all(project, "apple")
    project.run()
    statements: list[str] = []

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    try:
        run = project.take()
        statements.clear()
        assert plan(run, project.connections).why == {}
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert not [statement for statement in statements if "row_id IN" in statement]
    assert ROWS_A_QUERY <= 32_766  # SQLite's limit of parameters


# What changed in the spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "You tag long notes."}, "the prompt changed: "),
        ({"tags": [{"id": "fruit"}, {"id": "animal"}]}, "the tags changed: "),
        ({"llm": {"params": {"temperature": 1}}}, "`llm.params` changed: "),
        ({"max_tags": 1}, "`max_tags` changed: "),
        ({"allow_none": False}, "`allow_none` changed: "),
        ({"revision": 2}, "`revision` changed: "),
        ({"prompt": "You tag.", "max_tags": 1}, "the prompt and `max_tags` changed: "),
        ({"llm": {"model": "gpt-5-mini"}}, "the model changed: "),
    ],
)
def test_the_plan_says_what_changed_in_the_spec(project: Project, changes: dict[str, Any], words: str) -> None:
    put_all(project, "apple")
    project.run()
    project.change(**changes)

    assert told(project).startswith(f"{words}1 of 1 rows hold an older spec; ")


def test_a_change_whose_run_is_gone_is_told_in_general(project: Project) -> None:
    put_all(project, "apple")
    project.run("old")
    project.open("old").storage.delete("runs/notes/old/dataset.json")
    project.change(revision=2)

    assert told(project).startswith("the prompt, the tags or the model changed: 1 of 1 rows")


def test_a_run_that_froze_another_spec_by_now_is_no_witness(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    put_all(project, "apple")
    project.run()
    monkeypatch.setattr("tagger.spec.INSTRUCTIONS_VERSION", 2)  # an upgrade

    assert told(project).startswith("the instructions of tagger changed: 1 of 1 rows")


def test_the_spec_of_most_rows_is_compared(project: Project) -> None:
    put_all(project, "apple")
    project.run()
    project.change(revision=2, source={"updated_at": "updated_at"})
    put_rows(project, {10 + i: f"zebra {i}" for i in range(3)})
    project.execute("UPDATE notes SET updated_at = '2020-01-01'")
    project.execute("UPDATE notes SET updated_at = NULL WHERE id >= 10")
    project.run()
    project.change(prompt="You tag.")
    project.execute("UPDATE notes SET updated_at = '2020-01-01'")

    assert told(project).startswith("the prompt changed: 4 of 4 rows")


def test_old_rows_that_a_later_run_skipped_do_not_name_its_spec(project: Project) -> None:
    put_all(project, "apple", "zebra")
    project.run()
    project.change(max_tags=1)
    project.run(options=Options(limit=1))

    assert told(project).startswith("the prompt, the tags or the model changed: 1 of 2 rows")


# What all of it would cost


def older(project: Project, **changes: Any) -> float:
    """Tags 20 texts, lets them age, and changes the spec; returns what they cost."""
    put_rows(project, {i: f"apple {i}" for i in range(20)}, "2020-01-01 00:00:00+00:00")
    cost = project.run().cost_usd
    project.change(source={"updated_at": "updated_at"}, **changes)
    assert cost
    return cost


def test_the_cost_of_all_goes_by_the_older_specs_records(either: Project) -> None:
    cost = older(either, revision=2)
    run = either.take()

    planned = plan(run, either.connections)

    assert planned.new == 0
    assert planned.older_spec_usd == pytest.approx(cost, rel=0.05)
    [line] = [line for line in describe(planned, either.dataset, run.snapshot()) if "older spec" in line]
    assert line == (
        "`revision` changed: 20 of 20 rows hold an older spec; "
        f"`rows: all` (--all) would cost about ${planned.older_spec_usd:.4f}"
    )


def test_the_cost_of_all_goes_by_this_runs_texts(project: Project) -> None:
    older(project, revision=2)
    put_rows(project, {100 + i: "apple" * (i + 1) for i in range(4)})

    planned = make_window_plan(project)

    assert planned.estimated_usd
    assert planned.older_spec_usd == pytest.approx(planned.estimated_usd / 4 * 20)


def test_the_cost_of_all_goes_by_this_specs_records(project: Project) -> None:
    older(project, revision=2)
    put_rows(project, {100: "apple, a longer one"})
    cost = project.run().cost_usd

    planned = make_window_plan(project)

    assert cost and planned.new == 0
    assert planned.older_spec_usd == pytest.approx(cost * 20)


def test_the_cost_of_all_is_left_out_where_nothing_tells_of_it(project: Project) -> None:
    older(project, revision=2, llm={"price": None})

    assert make_window_plan(project).older_spec_usd is None
    assert told(project).endswith("; `rows: all` (--all) would tag them all again")


def test_records_of_another_model_are_not_taken_for_damaged_ones(project: Project) -> None:
    older(project, llm={"model": "gpt-5-mini"})
    storage = project.open("any").storage
    before = sorted(path for path, _ in storage.list("cache/"))

    assert make_window_plan(project).older_spec_usd
    assert sorted(path for path, _ in storage.list("cache/")) == before


def test_a_run_over_all_rows_takes_the_older_ones(project: Project) -> None:
    older(project, revision=2)

    assert told(project, project.take(all_rows=True)).endswith("; this run takes them all")


def make_window_plan(project: Project) -> Plan:
    return plan(project.take(), project.connections)


def test_a_plan_with_nothing_new_and_nothing_older_samples_no_records(project: Project) -> None:
    put_all(project, *(f"text {i}" for i in range(30)))
    project.run()
    run = project.take()
    requests = watch(run.storage)

    plan(run, project.connections)

    assert requests.of("GetObject", "cache/") == []


SHOWN = [{"text": "an apple", "tags": ["fruit"]}, {"text": "a rock", "tags": []}]


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ({}, {"examples": SHOWN}, "the examples"),
        ({"examples": SHOWN}, {"examples": SHOWN[:1]}, "the examples"),
        ({"examples": SHOWN}, {"examples": []}, "the examples"),
        ({}, {"confidence": True}, "`confidence`"),
        ({"confidence": True}, {"confidence": False}, "`confidence`"),
        ({"examples": SHOWN}, {"examples": [], "confidence": True}, "the examples and `confidence`"),
    ],
)
def test_examples_and_confidence_are_told_where_they_come_change_and_go(
    project: Project, before: dict[str, Any], after: dict[str, Any], what: str
) -> None:
    project.change(**before)
    put_all(project, "apple", "zebra")
    project.run()
    project.change(**after)

    assert told(project).startswith(f"{what} changed: 2 of 2 rows hold an older spec; ")


def test_a_threshold_for_review_makes_no_text_new(project: Project) -> None:
    project.change(confidence=True)
    put_all(project, "apple", "zebra")
    project.run()
    project.change(review_below=0.9)

    assert make_plan(project).new == 0
