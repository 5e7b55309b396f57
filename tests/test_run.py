"""Whole runs: what the next day costs, what is left in the target, and that no text gets about."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.compat import HTTPHeaders

from demo.stand_in import Reply, StandIn, completion, error, token_usage
from tagger.exceptions import RunFailed
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.runs import Run
from tagger.tables import reflect
from tagger.tag import tag
from tagger.window import Options
from tests.databases import REFUSAL, failing_on, make_project, put_rows, teach
from tests.project import Project

REJECTED = error(400, "no", "odd_text")


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def tags(project: Project) -> dict[Any, Any]:
    return {row_id: row.tags for row_id, row in project.target().items()}


def test_second_run_over_the_same_rows_asks_nothing(project: Project) -> None:
    project.put(1, "apple pie")
    project.put(2, "a zebra in the rain")

    first, second = project.run(), project.run()

    assert (first.tagged, first.cached, first.llm_requests) == (2, 0, 2)
    assert (second.tagged, second.cached, second.llm_requests) == (0, 2, 0)
    assert tags(project) == {1: ["fruit"], 2: ["animal", "weather"]}


def test_an_empty_table_is_a_success_with_zeros(either: Project) -> None:
    summary = either.run()

    assert (summary.state, summary.rows, summary.texts, summary.llm_requests) == ("success", 0, 0, 0)
    assert either.target() == {}


# The next day


Change = Callable[[Project], None]


def add(project: Project) -> None:
    project.put(101, "a horse")
    project.put(102, "a storm")


def edit(project: Project) -> None:
    project.put(1, "a tiger")


def edit_white_space_only(project: Project) -> None:
    project.put(1, "  apple number 1 \n")


def duplicate(project: Project) -> None:
    project.put(101, "apple number 1")
    project.put(102, "ａｐｐｌｅ　ｎｕｍｂｅｒ　２")


def add_the_same_twice(project: Project) -> None:
    project.put(101, "a horse")
    project.put(102, "a horse")


def delete(project: Project) -> None:
    project.execute("DELETE FROM notes WHERE id = 20")


def swap(project: Project) -> None:
    project.put(1, "apple number 2")
    project.put(2, "apple number 1")


def all_of_it(project: Project) -> None:
    project.put(101, "a horse")
    project.put(102, "apple number 5")
    project.put(3, "a tiger")
    project.put(4, None)
    project.execute("DELETE FROM notes WHERE id = 20")


@pytest.mark.parametrize(
    ("change", "asked", "cached", "row_ids"),
    [
        (lambda _: None, [], 20, range(1, 21)),
        (add, ["a horse", "a storm"], 20, [*range(1, 21), 101, 102]),
        (edit, ["a tiger"], 19, range(1, 21)),
        (edit_white_space_only, [], 20, range(1, 21)),
        (duplicate, [], 20, [*range(1, 21), 101, 102]),
        (add_the_same_twice, ["a horse"], 20, [*range(1, 21), 101, 102]),
        (delete, [], 19, range(1, 20)),
        (swap, [], 20, range(1, 21)),
        (all_of_it, ["a horse", "a tiger"], 17, [1, 2, 3, *range(5, 20), 101, 102]),
    ],
)
def test_the_next_day_costs_its_new_and_changed_texts_and_no_more(
    project: Project, change: Change, asked: list[str], cached: int, row_ids: list[int]
) -> None:
    put_rows(project, {row_id: f"apple number {row_id}" for row_id in range(1, 21)})
    project.run()
    before = len(project.llm.calls)
    change(project)

    second = project.run()

    assert sorted(call.text or "" for call in project.llm.calls[before:]) == asked
    assert (second.llm_requests, second.tagged, second.cached) == (len(asked), len(asked), cached)
    assert sorted(project.target()) == list(row_ids)
    assert {row.status for row in project.target().values()} == {"tagged"}
    assert project.run().llm_requests == 0


def test_the_same_answer_of_a_hundred_people_costs_one_call(project: Project) -> None:
    answer = "ガソリンとリンゴ apple 100%"
    half_width = "ｶﾞｿﾘﾝとﾘﾝｺﾞ apple 100%"
    wide = "ガソリンとリンゴ ａｐｐｌｅ １００％"
    decomposed = unicodedata.normalize("NFD", answer)
    variants = [answer, half_width, wide, decomposed, f" {answer}\r\n"]
    put_rows(project, {row_id: variants[row_id % 5] for row_id in range(100)})

    summary = project.run()

    assert (summary.rows, summary.texts, summary.llm_requests) == (100, 1, 1)
    assert tags(project) == {row_id: ["fruit"] for row_id in range(100)}


def test_a_changed_text_is_tagged_again(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    either.put(1, "zebra")

    assert either.run().llm_requests == 1
    assert tags(either) == {1: ["animal"]}


def test_a_text_that_comes_back_costs_nothing(project: Project) -> None:
    for text in ("apple", "zebra"):
        project.put(1, text)
        project.run()
    project.put(1, "apple")

    assert project.run().llm_requests == 0
    assert tags(project) == {1: ["fruit"]}


def test_an_edited_description_tags_again_and_one_taken_back_costs_nothing(project: Project) -> None:
    project.put(1, "apple")
    first = project.run()
    content = project.content
    project.change(tags=[{"id": "fruit", "description": "apple"}])
    second = project.run()
    project.content = content
    third = project.run()

    assert [run.llm_requests for run in (first, second, third)] == [1, 1, 0]
    assert second.spec_id != first.spec_id == third.spec_id


def test_datasets_with_one_spec_share_their_answers(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    project.change(dataset="other_notes", target={"table": "other_tags"})

    assert project.run().llm_requests == 0
    assert tags(project) == {1: ["fruit"]}


def test_several_shards_together_tag_all(project: Project) -> None:
    put_rows(project, {row_id: f"apple number {row_id}" for row_id in range(10)})
    project.change(shards={"texts_per_shard": 3})

    summary = project.run()

    assert (summary.tagged, summary.llm_requests) == (10, 10)
    assert set(tags(project)) == set(range(10))


# Over the days


def day(number: int, hour: int = 0) -> datetime:
    return datetime(2026, 7, number, hour, tzinfo=UTC)


def make_daily(project: Project) -> Project:
    """Gives the project windows of one day, without lookback."""
    project.change(
        schedule="0 0 * * *", source={"updated_at": "updated_at", "lookback": "0d"}, limits={"max_failed_fraction": 1}
    )
    return project


@pytest.fixture
def daily(project: Project) -> Project:
    return make_daily(project)


def test_a_text_that_fails_for_days_is_tried_each_day_until_it_is_tagged(either: Project) -> None:
    daily = make_daily(either)
    daily.put(1, "a weird apple", day(1, 12).isoformat())
    teach(daily.llm, weird=REJECTED)
    statuses = []
    for number in (2, 5, 6):
        assert daily.run(end=day(number)).failed == 1
        statuses.append(daily.target()[1].status)
    teach(daily.llm)

    last = daily.run(end=day(7))

    assert statuses == ["failed"] * 3
    assert (last.rows, last.tagged) == (1, 1)
    assert (daily.target()[1].status, daily.target()[1].tags) == ("tagged", ["fruit"])
    assert daily.run(end=day(8)).rows == 0


def test_texts_of_a_broken_day_are_tagged_the_next(daily: Project) -> None:
    for row_id in range(3):
        daily.put(row_id, f"apple number {row_id}", day(1, 12).isoformat())
    daily.llm.script(*[error(401, "no", "invalid_api_key")] * 20)
    with pytest.raises(RunFailed):
        daily.run(end=day(2))
    daily.llm._script.clear()

    assert daily.run(end=day(5)).tagged == 3


def test_an_old_run_cleared_and_run_again_changes_no_newer_row(daily: Project) -> None:
    daily.put(1, "apple", day(1, 12).isoformat())
    daily.put(2, "apple", day(1, 12).isoformat())
    daily.run("one", end=day(2))
    daily.put(1, "zebra", day(2, 12).isoformat())
    daily.run("two", end=day(3))
    before = daily.target()

    again = daily.run("one", end=day(2))

    assert again.llm_requests == 1  # of its first try, which is still counted
    assert len(daily.llm.calls) == 2
    assert daily.target() == before


def test_consecutive_runs_leave_no_row_out(daily: Project) -> None:
    for number in range(1, 4):
        for row_id, hour in enumerate((0, 12, 23)):
            daily.put(10 * number + row_id, f"apple {number} {hour}", day(number, hour).isoformat())

    counts = [daily.run(end=day(number)).rows for number in (2, 3, 4)]

    assert counts == [3, 3, 3]
    assert len(daily.target()) == 9


def test_a_backfill_takes_its_window_and_nothing_else(daily: Project) -> None:
    daily.put(1, "a weird apple", day(1, 12).isoformat())
    daily.put(2, "zebra", day(2, 12).isoformat())
    teach(daily.llm, weird=REJECTED)
    daily.run(end=day(2))

    assert daily.run(end=day(3), kind="backfill").rows == 1


def test_a_day_is_of_the_datasets_zone(daily: Project) -> None:
    daily.put(1, "apple", "2026-06-30T15:30:00+00:00")
    daily.put(2, "zebra", "2026-07-01T15:30:00+00:00")
    daily.change(timezone="Asia/Tokyo")

    summary = daily.run(day=date(2026, 7, 1))

    assert list(daily.target()) == [1]
    assert summary.day == "2026-07-01"


def test_a_source_that_reads_empty_once_deletes_nothing_and_costs_nothing_after(either: Project) -> None:
    put_rows(either, {row_id: f"apple number {row_id}" for row_id in range(3)})
    either.run()
    either.execute("ALTER TABLE notes RENAME TO kept")
    either.execute("CREATE TABLE notes AS SELECT * FROM kept WHERE 1 = 0")

    empty = either.run()

    assert (empty.state, empty.rows) == ("success", 0)
    assert sorted(either.target()) == [0, 1, 2]
    either.execute("DROP TABLE notes")
    either.execute("ALTER TABLE kept RENAME TO notes")
    assert either.run().llm_requests == 0


# Privacy

MARK = "Xylographia"
"""A word that stands in every text, and nowhere else."""

QUOTED = f"cannot take: the weird {MARK} apple 0"


@contextmanager
def nothing(_: Project) -> Iterator[None]:
    yield


@contextmanager
def odd_answers(project: Project) -> Iterator[None]:
    wrong: dict[str, Reply] = {
        "refused": completion(None, refusal=f"I will not: {QUOTED}"),
        "garbled": completion(f"no JSON but {QUOTED}"),
        "unknown": completion(json.dumps({"tags": [QUOTED]})),
        "rejected": error(400, QUOTED, "odd_text"),
        "broken": error(500, QUOTED, headers={"Retry-After": "0"}),
        "filtered": completion(QUOTED, finish_reason="content_filter"),
        "cut": completion(QUOTED, finish_reason="length"),
        "html": Reply(200, f"<html>{QUOTED}</html>".encode()),
        "shapeless": Reply(200, {"choices": QUOTED}),
    }
    for row_id, word in enumerate(wrong, 100):
        project.put(row_id, f"{word} {MARK} apple")
    teach(project.llm, **wrong)
    yield


def every_call(reply: Reply) -> Callable[[Project], Any]:
    @contextmanager
    def answering(project: Project) -> Iterator[None]:
        teach(project.llm, **{MARK: reply})
        yield

    return answering


@contextmanager
def broken_target(project: Project) -> Iterator[None]:
    project.put(1, "of another kind")
    project.run()
    project.put(1, f"weird {MARK} apple 1")
    with failing_on(project, row_id=1, run_id="one"):
        yield


@contextmanager
def text_for_a_number(project: Project) -> Iterator[None]:
    project.execute("CREATE VIEW numbered AS SELECT id, body, CAST(body AS INTEGER) AS number FROM notes")
    project.change(source={"table": "numbered", "text_columns": ["body", "number"]})
    yield


@contextmanager
def bytes_for_a_text(project: Project) -> Iterator[None]:
    project.execute(f"INSERT INTO notes VALUES (7, CAST('{MARK}' AS BLOB), NULL)")
    yield


def full_disk(request: AWSRequest, **_: object) -> AWSResponse | None:
    """Answers a write to the cache as an S3 server with a full disk may."""
    url = str(request.url)
    if "/cache/" not in url:
        return None
    body = f"<Error><Code>EntityTooLarge</Code><Message>{QUOTED}</Message></Error>".encode()

    class Raw:
        def stream(self, **_: object) -> Iterator[bytes]:
            yield body

    return AWSResponse(url, 400, HTTPHeaders(), Raw())


SITUATIONS = {
    "good": nothing,
    "odd-answers": odd_answers,
    "wrong-key": every_call(error(401, QUOTED, "invalid_api_key")),
    "unknown-model": every_call(error(404, QUOTED, "model_not_found")),
    "no-schema": every_call(error(400, f"response_format: {QUOTED}", param="response_format")),
    "no-quota": every_call(error(429, f"insufficient_quota {QUOTED}", "insufficient_quota")),
    "unsupported-parameter": every_call(error(400, QUOTED, "unsupported_parameter", param="top_k")),
    "quoted-in-a-code": every_call(error(400, "no", QUOTED)),
    "quoted-in-a-parameter": every_call(error(400, "no", "unsupported_value", param=QUOTED)),
    "hangs-up": every_call(Reply(close=True)),
    "full-disk": nothing,
    "broken-target": broken_target,
    "text-for-a-number": text_for_a_number,
    "bytes-for-a-text": bytes_for_a_text,
}


def all_steps(project: Project, run: Run, errors: list[BaseException]) -> None:
    """Goes through all steps whatever happens, and keeps what they raise."""

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as e:
            errors.append(e)

    attempt(lambda: project.take(run.run_id))
    attempt(lambda: plan(run, project.connections))
    attempt(lambda: tag(run, 1, project.connections))
    attempt(lambda: load_back(run, project.connections))
    attempt(lambda: report(run))


def told_by(error: BaseException) -> str:
    """Returns all that an exception and those behind it say."""
    told, seen, left = "", set[int](), [error]
    while left:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            told += f"{each!r} {each} {each.args}\n"
            left += [behind for behind in (each.__cause__, each.__context__) if behind is not None]
    return told


@pytest.mark.parametrize(
    ("database", "situation"),
    [
        *(("sqlite", situation) for situation in SITUATIONS if situation != "text-for-a-number"),
        ("postgresql", "good"),
        ("postgresql", "broken-target"),
        ("postgresql", "text-for-a-number"),
        ("mysql", "good"),
        ("mysql", "broken-target"),
    ],
)
def test_no_text_gets_about(
    request: pytest.FixtureRequest,
    llm: StandIn,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    impatient: None,
    database: str,
    situation: str,
) -> None:
    project = make_project(database, request)
    caplog.set_level(logging.DEBUG, "tagger")
    put_rows(project, {row_id: f"weird {MARK} apple {row_id}" for row_id in range(3)})
    errors: list[BaseException] = []

    with SITUATIONS[situation](project):
        run = Project.open(project, "one")  # with a client of its own
        if situation == "full-disk":
            run.storage._client.meta.events.register("before-send.s3.PutObject", full_disk)  # type: ignore[arg-type]
        all_steps(project, run, errors)

    assert bool(errors) == (situation not in ("good", "bytes-for-a-text"))
    assert any(MARK in (call.text or "") for call in llm.calls) or situation.endswith(("number", "text"))
    out, err = capfd.readouterr()
    places = {
        "storage": project.everything_stored().decode(errors="replace"),
        "log": caplog.text,
        "output": out + err,
        "target": str(project.target()),
        "errors": "".join(str(e) for e in errors),
        "errors behind errors": "".join(map(told_by, errors)),
    }
    assert [place for place, content in places.items() if MARK in content] == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between the tries of a call, or of a write to S3, are not the subject here."""
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)
    monkeypatch.setattr("tagger.cache.PATIENCE_SECONDS", 1.0)


def test_an_old_window_does_not_reach_the_present(project: Project) -> None:
    project.put(1, "apple", (day(1) + timedelta(days=300)).isoformat())
    project.change(source={"updated_at": "updated_at"})

    assert project.run(end=day(2)).rows == 0


# Runs with options


def statuses(project: Project) -> dict[Any, str]:
    return {row_id: row.status for row_id, row in project.target().items()}


def test_a_limited_run_skips_the_rest_and_the_next_run_asks_for_it(either: Project) -> None:
    for row_id, text in enumerate(["apple", "zebra", "rain"]):
        either.put(row_id, text)

    tried = either.run(options=Options(limit=2))
    next_run = either.run(end=datetime(2000, 1, 1, tzinfo=UTC))  # a window without rows

    assert (tried.state, tried.tagged, tried.skipped) == ("success", 2, 1)
    assert (next_run.tagged, next_run.skipped, next_run.llm_requests) == (1, 0, 1)
    assert set(statuses(either).values()) == {"tagged"}


def test_a_limited_run_deletes_nothing_that_is_gone_from_the_source(either: Project) -> None:
    either.change(limits={"max_deleted_fraction": 1})
    either.put(1, "apple")
    either.put(2, "zebra")
    either.run()
    either.execute("DELETE FROM notes WHERE id = 1")

    either.run(options=Options(limit=1))
    kept = set(either.target())
    either.run()

    assert (kept, set(either.target())) == ({1, 2}, {2})


def test_a_dry_run_asks_and_writes_nothing_and_reports_what_it_would_cost(either: Project) -> None:
    either.put(1, "apple")
    either.run()
    before = either.target()
    either.execute("DELETE FROM notes WHERE id = 1")
    either.put(2, "zebra")

    dry = either.run(options=Options(dry_run=True))

    assert (dry.state, dry.dry_run, dry.tagged, dry.skipped, dry.llm_requests) == ("success", True, 0, 1, 0)
    assert dry.estimated_usd is not None and dry.estimated_usd > 0 and dry.cost_usd == 0
    assert len(either.llm.calls) == 1
    assert either.target() == before


def test_a_dry_run_does_not_even_make_the_target_table(either: Project) -> None:
    either.put(1, "apple")

    either.run(options=Options(dry_run=True))

    with either.engine.connect() as connection:
        assert reflect(connection, either.dataset.target.table) is None


def test_refused_texts_are_asked_again_when_that_is_asked_for(either: Project) -> None:
    either.put(1, "apple")
    either.put(2, "zebra, secretly")
    teach(either.llm, secretly=REFUSAL)
    either.run()
    teach(either.llm)
    again = Options(retry_refused=True)

    as_usual = either.run()
    retried = either.run(end=datetime(2000, 1, 1, tzinfo=UTC), options=again)
    calls = len(either.llm.calls)
    once_more = either.run(options=again)

    assert (as_usual.cached, as_usual.llm_requests) == (2, 0)
    assert (retried.tagged, retried.refused, retried.llm_requests) == (1, 0, 1)
    assert statuses(either) == {1: "tagged", 2: "tagged"}
    assert tags(either)[2] == ["animal"]
    assert (once_more.llm_requests, len(either.llm.calls)) == (0, calls)


def test_a_text_refused_again_stays_refused_and_costs_the_next_run_nothing(either: Project) -> None:
    either.put(1, "zebra, secretly")
    teach(either.llm, secretly=REFUSAL)
    either.run()

    retried = either.run(options=Options(retry_refused=True))
    next_run = either.run()

    assert (retried.refused, retried.llm_requests) == (1, 1)
    assert (next_run.cached, next_run.llm_requests) == (1, 0)
    assert statuses(either) == {1: "refused"}


def test_a_cleared_run_that_retries_refused_texts_asks_them_once_each_time(project: Project) -> None:
    project.put(1, "zebra, secretly")
    teach(project.llm, secretly=REFUSAL)
    project.run()
    again = Options(retry_refused=True)

    project.run("again", options=again)
    calls = len(project.llm.calls)
    summary = project.run("again", options=again)

    assert len(project.llm.calls) == calls + 1
    assert (summary.refused, summary.texts) == (1, 1)


def test_the_budget_of_one_run_may_differ_from_the_files(project: Project) -> None:
    for row_id in range(20):
        project.put(row_id, f"apple {row_id}")
    project.change(limits={"max_cost_usd": 100}, llm={"concurrency": 1})

    with pytest.raises(RunFailed, match="budget reached: 20 new texts"):
        project.run("one", options=Options(max_cost_usd=0.000001))

    assert project.llm.calls == []
    assert project.run().tagged == 20


def test_a_budget_that_the_estimate_is_below_stops_calls_and_the_rest_comes_first(project: Project) -> None:
    for row_id in range(20):
        project.put(row_id, f"apple {row_id}")
    project.change(llm={"concurrency": 1})
    project.llm.script(completion('{"tags": ["fruit"]}', usage=token_usage(10_000_000, 5)))

    with pytest.raises(RunFailed, match="budget reached"):
        project.run("one", options=Options(max_cost_usd=1.0))

    summary = project.summary(project.open("one"))
    assert (summary.tagged, summary.skipped) == (1, 19)
    project.put(-1, "a new apple, of the lowest id")
    limited = project.run(options=Options(limit=19))
    assert (limited.tagged, limited.skipped) == (19, 1)
    assert project.target()[-1].status == "skipped"
