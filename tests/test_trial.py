"""Trials: texts asked beside the daily run, through its plan, tree and cache, and nothing of them left but records."""

from __future__ import annotations

import logging
import uuid

import pytest

from demo.stand_in import completion, error
from tagger.exceptions import LLMStopped, RunFailed
from tagger.trial import Trial, drawn, run_trial, sample_of_source, source_texts
from tests.databases import REFUSAL, put_rows, teach
from tests.project import Project

TEXTS = ["an apple pie", "a zebra in the rain", "nothing of the kind"]


def trial(project: Project, texts: list[str], *, max_cost_usd: float | None = None) -> Trial:
    return run_trial(project.dataset, texts, project.connections, name="test", max_cost_usd=max_cost_usd)


def tags_of(trial: Trial) -> list[list[str] | None]:
    return [None if record is None else record.tags for record in trial.records]


def test_each_text_gets_its_record(project: Project) -> None:
    assert tags_of(trial(project, TEXTS)) == [["fruit"], ["animal", "weather"], []]


def test_one_text_in_several_rows_is_asked_once(project: Project) -> None:
    asked = trial(project, ["an apple", "  an apple\r\n", "an apple"])

    assert tags_of(asked) == [["fruit"]] * 3
    assert asked.requests == len(project.llm.calls) == 1


def test_a_second_trial_is_free(project: Project) -> None:
    first = trial(project, TEXTS)
    project.llm.calls.clear()

    second = trial(project, TEXTS)

    assert first.spent_usd
    assert (second.requests, second.spent_usd, second.plan.cached) == (0, 0, len(TEXTS))
    assert second.records == first.records
    assert len(project.llm.calls_per_key()) == len(TEXTS)


def test_what_a_trial_paid_for_the_daily_run_has_for_nothing(project: Project) -> None:
    trial(project, TEXTS)
    put_rows(project, dict(enumerate(TEXTS)))

    summary = project.run()

    assert (summary.cached, summary.llm_requests) == (len(TEXTS), 0)
    assert {row.status for row in project.target().values()} == {"tagged"}


def test_a_trial_loads_no_tag(project: Project) -> None:
    put_rows(project, dict(enumerate(TEXTS)))

    trial(project, TEXTS)

    assert project.target() == {}


def test_blank_texts_and_texts_that_are_too_long_are_not_asked(project: Project) -> None:
    project.change(source={"max_chars": 20})

    assert tags_of(trial(project, ["", " \n", "apple " * 10, "an apple"])) == [None, None, None, ["fruit"]]
    assert len(project.llm.calls) == 1


def test_a_text_that_fails_has_no_record_and_is_asked_the_next_time(project: Project) -> None:
    teach(project.llm, zebra=error(400, "bad"))
    assert tags_of(trial(project, TEXTS)) == [["fruit"], None, []]
    teach(project.llm)

    assert tags_of(trial(project, TEXTS)) == [["fruit"], ["animal", "weather"], []]


def test_a_refused_text_has_the_record_of_that(project: Project) -> None:
    teach(project.llm, zebra=REFUSAL)

    refused = trial(project, TEXTS).records[1]

    assert refused is not None and refused.status == "refused"


def test_what_would_cost_more_than_the_cap_is_not_asked(project: Project) -> None:
    with pytest.raises(RunFailed, match=r"budget reached: 3 new texts would cost about .* none was asked") as e:
        trial(project, TEXTS, max_cost_usd=1e-9)

    assert not project.llm.calls
    assert "--sample" in str(e.value) and "--limit" not in str(e.value)


def test_the_cap_is_instead_of_the_datasets(project: Project) -> None:
    project.change(limits={"max_cost_usd": 1e-9})

    assert trial(project, TEXTS, max_cost_usd=5).spent_usd


def test_what_it_will_cost_is_said_before(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tagger"):
        trial(project, TEXTS)

    lines = [record.getMessage() for record in caplog.records]
    cost = next(i for i, line in enumerate(lines) if "estimated cost: $" in line)
    assert cost < next(i for i, line in enumerate(lines) if line.startswith("shard 1/1"))


def test_its_money_counts_toward_the_months(project: Project) -> None:
    spent = trial(project, TEXTS).spent_usd
    assert spent
    project.change(limits={"max_cost_usd_per_month": spent})

    with pytest.raises(RunFailed, match=r"`limits.max_cost_usd_per_month` leaves this run \$0.00"):
        trial(project, ["a tiger"])

    project.put(1, "a tiger")
    with pytest.raises(RunFailed, match=r"`limits.max_cost_usd_per_month` leaves this run \$0.00"):
        project.run()


def test_no_text_stays_in_storage(project: Project) -> None:
    trial(project, TEXTS)

    stored = project.everything_stored(but="none")
    assert b"cache/" in stored
    assert not any(text.encode() in stored for text in TEXTS)
    assert b"snapshots/" not in stored


def test_no_text_stays_in_storage_where_a_trial_fails(project: Project) -> None:
    project.llm.script(*[error(401, "no", code="invalid_api_key")] * 50)

    with pytest.raises(LLMStopped):
        trial(project, TEXTS)

    assert b"snapshots/" not in project.everything_stored(but="none")


def test_no_text_stays_in_storage_where_the_cap_is_reached(project: Project) -> None:
    with pytest.raises(RunFailed):
        trial(project, TEXTS, max_cost_usd=1e-9)

    assert b"snapshots/" not in project.everything_stored(but="none")


def test_a_dataset_in_batch_mode_is_tried_online(project: Project) -> None:
    project.change(llm={"mode": "batch"})

    asked = trial(project, TEXTS)

    assert {record.asked for record in asked.records if record} == {"online"}
    assert not project.llm.submitted


def test_the_log_calls_texts_as_they_are_named(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    teach(project.llm, zebra=completion("no JSON"))

    run_trial(project.dataset, TEXTS, project.connections, name="test", row_ids=["a-1", "a-2", "a-3"])

    assert any("row a-2 failed" in record.getMessage() for record in caplog.records)


def test_texts_are_found_in_the_source_by_id_or_by_its_text(either: Project) -> None:
    put_rows(either, {1: "apple", 2: "pear", 3: None})

    texts = source_texts(either.dataset, [1, "2", "3", "4", "x", "1.0", "9" * 19, "9" * 30], either.connections)

    assert texts == {1: "apple", "2": "pear", "3": ""}


def test_ids_of_a_text_column_are_taken_as_they_are(project: Project) -> None:
    project.execute("DROP TABLE notes")
    project.execute("CREATE TABLE notes (id TEXT PRIMARY KEY, body TEXT, updated_at TEXT)")
    put_rows(project, {"a": "apple", "07": "pear"})

    assert source_texts(project.dataset, ["a", "07", "7"], project.connections) == {"a": "apple", "07": "pear"}


def test_uuids_are_found_in_any_spelling(either: Project) -> None:
    if either.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no uuid")
    row_id = uuid.uuid4()
    either.execute("DROP TABLE notes")
    either.execute("CREATE TABLE notes (id UUID PRIMARY KEY, body TEXT, updated_at TIMESTAMPTZ)")
    put_rows(either, {row_id: "apple"})
    spelling = str(row_id).upper()

    assert source_texts(either.dataset, [spelling, "no uuid"], either.connections) == {spelling: "apple"}


def test_a_sample_of_the_source_is_the_same_for_a_seed(project: Project) -> None:
    put_rows(project, {n: f"text {n}" for n in range(100)})

    samples = [sample_of_source(project.dataset, 10, seed, project.connections) for seed in (1, 1, 2)]

    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 10
    assert all(text == f"text {row_id}" for row_id, text in samples[0].items())


def test_a_sample_larger_than_the_source_is_all_of_it(project: Project) -> None:
    put_rows(project, {1: "apple", 2: "pear"})

    assert sample_of_source(project.dataset, 10, 0, project.connections) == {1: "apple", 2: "pear"}


def test_every_item_is_drawn_as_often_as_any_other() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for item in drawn(range(10), 3, seed):
            counts[item] += 1

    assert all(abs(count - 600) < 110 for count in counts)  # 5 standard deviations of a binomial
