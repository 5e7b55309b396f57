"""The report: the run in figures, and whether it is acceptable."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import error
from tagger.cache import Cache, Record, Usage
from tagger.exceptions import InputError, LLMStopped, RunFailed, StorageError, TaggerError
from tagger.ledger import SCHEMA, Ledger
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import ErrorCount, Summary, describe, report
from tagger.runs import Estimate, Loaded, Plan, Run, Shard, Snapshot
from tagger.tag import tag
from tagger.window import Selection
from tests.databases import make_project, teach
from tests.project import Project

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SPEC = "0123456789ab"
REJECTED = error(400, "no", "odd_text")


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def prepare(
    project: Project,
    run_id: str = "one",
    *,
    selection: Selection | None = None,
    cached: int = 0,
    too_long: int = 0,
    new: int = 0,
    shards: int | None = None,
    plan_id: str = "plan",
    repeated: int = 0,
    estimate: Estimate | None = None,
    problem: str | None = None,
) -> Run:
    """Returns a run as it is after its plan."""
    run = project.open(run_id)
    run.freeze(project.dataset)
    run.write(
        "snapshot.json",
        Snapshot(
            rows_file="rows",
            rows=cached + too_long + new + 2,
            id_type="integer",
            selection=selection or Selection(rows="all", unfinished=True),
            taken_at=NOON,
            started_at=NOON,
            seconds=1.5,
        ),
    )
    count = (1 if new else 0) if shards is None else shards
    run.write(
        "plan.json",
        Plan(
            plan_id=plan_id,
            spec_id=SPEC,
            rows=cached + too_long + new + repeated,
            blank=2,
            texts=cached + too_long + new,
            cached=cached,
            too_long=too_long,
            new=new,
            estimate=estimate,
            problem=problem,
            estimated_usd=estimate.usd if estimate else None,
            shards=[Shard(shard=i + 1, of=count, texts=new // count) for i in range(count)],
            target_rows=0,
            older_spec_rows=0,
            planned_at=NOON,
            seconds=2.5,
        ),
    )
    return run


def load(run: Run, **counts: Any) -> None:
    defaults = dict.fromkeys(
        ("written", "deleted", "tagged", "refused", "failed", "skipped", "pending", "damaged", "seconds"), 0
    )
    run.write("load.json", Loaded(**{"tags": {}} | defaults | counts))


def record(status: str = "tagged", reason: str | None = None, cost_usd: float | None = 0.5) -> Record:
    return Record(
        status=status,  # type: ignore[arg-type]
        reason=reason,
        tags=[],
        model="offline-stand-in",
        usage=Usage(input=10),
        cost_usd=cost_usd,
        finish_reason="stop",
        created_at=NOON,
    )


def attempt(
    run: Run, *outcomes: tuple[str, str | None], shard: int = 1, plan_id: str = "plan", breaks: str | None = None
) -> None:
    """Lets an attempt at a shard answer texts 0, 1, …: each by status and kind, for 1,000 tokens in and 100 out."""
    try:
        with Ledger(run, plan_id, shard, run.dataset().llm.price) as ledger:
            for number, (status, kind) in enumerate(outcomes):
                key, row_id = f"key-{number}", f"row-{number}"
                ledger.spend(key, row_id, Usage(input=1000, cached_input=400, output=100))
                if status == "failed":
                    ledger.failed(key, row_id, kind or "", "it went wrong")
                elif status != "asked":
                    ledger.record(key, row_id, record(status, kind))
            if breaks is not None:
                raise TaggerError(breaks)
    except TaggerError:
        assert breaks is not None


TAGGED = ("tagged", None)
FAILED = ("failed", "timeout")
REFUSED = ("refused", "refusal")


# Figures


@pytest.mark.parametrize(
    ("planned", "loaded", "expected"),
    [
        ({}, {}, {}),
        ({"cached": 5}, {}, {"cached": 5}),
        ({"too_long": 3}, {}, {"refused": 3}),
        ({"new": 4}, {"tagged": 4}, {"tagged": 4}),
        (
            {"cached": 7, "too_long": 1, "new": 10},
            {"tagged": 4, "refused": 3, "failed": 1, "skipped": 2},
            {"cached": 7, "tagged": 4, "refused": 4, "failed": 1, "skipped": 2},
        ),
        ({"new": 4}, {"pending": 4}, {"pending": 4}),
        ({"cached": 7, "new": 1}, {"tagged": 1, "damaged": 2}, {"cached": 5, "tagged": 1, "failed": 2}),
    ],
)
def test_the_texts_add_up(
    project: Project, planned: dict[str, int], loaded: dict[str, int], expected: dict[str, int]
) -> None:
    project.change(limits={"max_failed_fraction": 1})
    run = prepare(project, **planned)  # type: ignore[arg-type]
    if run.plan().new:
        attempt(run, TAGGED)
    load(run, **loaded)

    summary = report(run)

    names = ("cached", "tagged", "refused", "failed", "skipped", "pending")
    assert {name: getattr(summary, name) for name in names} == dict.fromkeys(names, 0) | expected
    assert summary.texts == sum(getattr(summary, name) for name in names)
    assert (summary.rows, summary.blank) == (summary.texts, 2)


def test_money_and_tokens_are_summed_over_all_attempts(project: Project) -> None:
    run = prepare(project, new=2)
    attempt(run, TAGGED, FAILED, breaks="the worker fell ill")
    attempt(run, ("asked", None), TAGGED)
    load(run, tagged=2)

    summary = report(run)

    assert (summary.tagged, summary.failed) == (2, 0)
    assert summary.llm_requests == 4
    assert (summary.input_tokens, summary.cached_input_tokens, summary.output_tokens) == (4000, 1600, 400)
    # 1 USD a million tokens in (cached ones too, where no price is given), 10 USD a million out
    assert summary.cost_usd == pytest.approx(4 * (1000 * 1 + 100 * 10) / 1_000_000)


def test_cached_tokens_have_their_own_price(project: Project) -> None:
    project.change(llm={"price": {"cached_input": 0.1}})
    run = prepare(project, new=1)
    attempt(run, TAGGED)
    load(run, tagged=1)

    assert report(run).cost_usd == pytest.approx((600 * 1 + 400 * 0.1 + 100 * 10) / 1_000_000)


def test_without_a_price_the_cost_is_unknown(project: Project) -> None:
    project.change(llm={"price": None})
    run = prepare(project, new=1)
    attempt(run, TAGGED)
    load(run, tagged=1)

    summary = report(run)

    assert summary.cost_usd is None
    assert "an unknown amount spent" in "\n".join(describe(summary))


def test_what_an_earlier_plan_of_the_run_spent_is_counted(project: Project) -> None:
    run = prepare(project, new=1)
    attempt(run, TAGGED, plan_id="before")
    attempt(run, TAGGED)
    load(run, tagged=1)

    assert report(run).llm_requests == 2


def test_the_saving_is_the_cached_texts_times_their_mean_cost(project: Project) -> None:
    run = prepare(project, cached=10)
    cache = Cache(run.storage, SPEC, "offline-stand-in")
    cache.write("a" * 32, record(cost_usd=0.25))
    cache.write("b" * 32, record(cost_usd=0.75))
    load(run)

    assert report(run).saved_usd == pytest.approx(5.0)


def test_without_cached_texts_nothing_is_saved(project: Project) -> None:
    run = prepare(project)
    load(run)

    summary = report(run)

    assert (summary.saved_usd, summary.cost_usd) == (0, 0)


def test_the_saving_is_unknown_where_no_cost_is(project: Project) -> None:
    run = prepare(project, cached=1)
    Cache(run.storage, SPEC, "offline-stand-in").write("a" * 32, record(cost_usd=None))
    load(run)

    assert report(run).saved_usd is None


def test_rows_that_share_a_text_save_its_mean_cost(project: Project) -> None:
    run = prepare(project, cached=4, repeated=6)
    Cache(run.storage, SPEC, "offline-stand-in").write("a" * 32, record(cost_usd=0.25))
    load(run)

    summary = report(run)

    assert (summary.saved_usd, summary.saved_by_duplicates_usd, summary.total_saved_usd) == (1.0, 1.5, 2.5)


BATCH_ROW = {"key": "a", "row_id": "1", "status": "tagged", "requests": 1, "input_tokens": 3000, "output_tokens": 100}


def test_a_batch_saves_as_much_as_it_costs(project: Project) -> None:
    run = prepare(project, new=2)
    put_attempt(run, 1, "plan", [{**BATCH_ROW, "cached_input_tokens": 0, "cost_usd": 0.25}], asked="batch")
    put_attempt(run, 2, "plan", [{**BATCH_ROW, "key": "b", "cached_input_tokens": 0, "cost_usd": 1.0}])
    load(run, tagged=2)

    summary = report(run)

    assert (summary.cost_usd, summary.saved_by_batch_usd, summary.total_saved_usd) == (1.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("asked", "llm", "saved"),
    [
        ("online", {"price": {"cached_input": 0.1}}, 2000 * 0.9e-6),
        ("batch", {"price": {"cached_input": 0.1}}, 1000 * 0.9e-6),
        ("online", {"price": {"cached_input": 0.1}, "params": {"service_tier": "flex"}}, 1000 * 0.9e-6),
        ("online", {}, 0),
        ("online", {"price": None}, None),
    ],
    ids=["online", "batch", "flex", "no price of its own", "no price"],
)
def test_cached_input_saves_the_difference_at_the_tier_that_was_paid(
    project: Project, asked: str, llm: dict[str, Any], saved: float | None
) -> None:
    project.change(llm=llm)
    run = prepare(project, new=1)
    put_attempt(run, 1, "plan", [{**BATCH_ROW, "cached_input_tokens": 2000, "cost_usd": 0.0}], asked=asked)
    load(run, tagged=1)

    found = report(run).saved_by_prompt_caching_usd

    assert found == (None if saved is None else pytest.approx(saved))


@given(
    counts=st.tuples(*[st.integers(0, 1000)] * 3),
    mean_cost=st.none() | st.floats(0, 10),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_spent_and_saved_is_what_all_rows_would_have_cost(
    project: Project, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int, int], mean_cost: float | None
) -> None:
    cached, repeated, new = counts
    monkeypatch.setattr("tagger.report.Cache.mean_cost", lambda _: mean_cost)
    run = prepare(project, next(run_ids), cached=cached, repeated=repeated, new=new)
    if new:
        put_attempt(
            run, 1, "plan", [{**BATCH_ROW, "cached_input_tokens": 0, "cost_usd": mean_cost and new * mean_cost}]
        )
    load(run, tagged=new)

    summary = report(run)

    known = mean_cost is not None
    assert (summary.total_saved_usd is None) == (not known and cached + repeated > 0)
    assert (summary.cost_usd is None) == (not known and new > 0)
    if summary.total_saved_usd is not None and summary.cost_usd is not None and mean_cost is not None:
        assert summary.cost_usd + summary.total_saved_usd == pytest.approx((cached + repeated + new) * mean_cost)


# Estimate against actual


def estimate(usd: float | None, **changes: Any) -> Estimate:
    about: dict[str, Any] = {"low_usd": usd and usd * 0.5, "high_usd": usd and usd * 2, "basis": "records"}
    defaults = dict.fromkeys(("texts", "input_tokens", "cached_input_tokens", "output_tokens"), 0)
    return Estimate(**defaults | about | {"usd": usd, "seconds": None} | changes)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (estimate(0.003), "$0.0040 spent (estimated $0.0030, 25 % less; $0.0015 to $0.0060 by the spec's records), "),
        (
            estimate(0.05, basis="lengths"),
            "$0.0040 spent (estimated $0.0500, 1,150 % more; $0.0250 to $0.1000 by the texts' lengths alone), ",
        ),
        (estimate(0.004), "$0.0040 spent (estimated $0.0040, less than 1 % off; "),
        (estimate(0.0), "$0.0040 spent (estimated $0.00, 100 % less), "),
        (estimate(None), "$0.0040 spent, "),
        (None, "$0.0040 spent, "),
    ],
    ids=["less", "more", "right", "nothing", "no price", "old plan"],
)
def test_the_cost_is_told_beside_its_estimate(project: Project, expected: Estimate | None, words: str) -> None:
    run = prepare(project, new=2, estimate=expected)
    attempt(run, TAGGED, FAILED)
    load(run, tagged=1, failed=1)

    verdict(run)

    summary = project.summary(run)
    assert summary.estimate == expected
    assert f"  cost     {words}" in describe(summary)[4]


def test_a_run_that_left_texts_out_says_nothing_of_its_estimate(project: Project) -> None:
    run = prepare(project, new=2, estimate=estimate(1.0))
    attempt(run, TAGGED, breaks="budget reached")
    load(run, tagged=1, skipped=1)

    verdict(run)

    summary = project.summary(run)
    assert summary.estimate_error is None
    assert "(estimated $1.00; " in describe(summary)[4]


def test_an_estimate_is_compared_with_what_its_own_plan_cost(project: Project) -> None:
    run = prepare(project, new=1, estimate=estimate(0.004))
    attempt(run, TAGGED, TAGGED, plan_id="before")
    attempt(run, TAGGED)
    load(run, tagged=1)

    summary = report(run)

    assert summary.estimate_error == pytest.approx(1.0)
    assert (
        "$0.0060 spent, $0.0040 of it on earlier plans of the run (estimated $0.0040 for the rest, 100 % more; "
        in (describe(summary)[4])
    )


def test_a_first_run_and_a_second_are_compared_with_their_estimates(project: Project) -> None:
    for row_id in range(20):
        project.put(row_id, f"apple number {row_id}")
    assert project.run("one").estimate_error is not None
    for row_id in range(20, 40):
        project.put(row_id, f"apple number {row_id}")

    second = project.run("two")

    assert second.estimate_error is not None
    assert abs(second.estimate_error) < 0.1
    assert (second.saved_usd or 0) > 0


# Errors


def test_errors_are_counted_by_kind_with_a_row(project: Project) -> None:
    project.change(limits={"max_failed_fraction": 1})
    run = prepare(project, new=5)
    attempt(run, TAGGED, FAILED, FAILED, REFUSED, ("failed", "bad_answer"))
    load(run, tagged=1, failed=3, refused=1)

    errors = report(run).errors

    assert {kind: e.count for kind, e in errors.items()} == {"timeout": 2, "refusal": 1, "bad_answer": 1}
    assert errors["timeout"].row_id in ("row-1", "row-2")
    assert errors["bad_answer"] == ErrorCount(count=1, row_id="row-4")


def test_a_text_that_was_answered_in_the_end_is_no_error(project: Project) -> None:
    run = prepare(project, new=1)
    attempt(run, FAILED, breaks="the worker fell ill")
    attempt(run, TAGGED)
    load(run, tagged=1)

    assert report(run).errors == {}


def test_errors_are_of_the_texts_of_this_plan(project: Project) -> None:
    project.put(1, "a weird apple")
    teach(project.llm, weird=REJECTED)
    with pytest.raises(RunFailed):
        project.run("one")
    project.put(1, "zebra")

    again = project.run("one")

    assert (again.tagged, again.failed, again.errors) == (1, 0, {})
    assert again.llm_requests == 2


def test_too_long_texts_are_among_the_errors(project: Project) -> None:
    project.put(7, "apple " * 10)
    project.change(source={"max_chars": 50})

    assert project.run().errors == {"too_long": ErrorCount(count=1, row_id="7")}


def test_damaged_records_are_among_the_errors(project: Project) -> None:
    project.put(1, "apple")
    project.run()
    [record_path] = [path for path, _ in project.open("any").storage.list("cache/")]
    project.open("any").storage.put(record_path, b"garbage " * 30)
    project.put(2, "apple")

    summary = project.run()

    assert summary.failed == 1
    assert [(e.count, e.row_id) for e in summary.errors.values()] == [(1, "2")]


def test_seconds_are_told_by_step(project: Project) -> None:
    run = prepare(project, new=1)
    attempt(run, TAGGED)
    load(run, tagged=1, seconds=0.5)

    seconds = report(run).seconds

    assert list(seconds) == ["snapshot", "plan", "tag", "load", "report"]
    assert (seconds["snapshot"], seconds["plan"], seconds["load"]) == (1.5, 2.5, 0.5)
    assert 0 <= seconds["tag"] < 10


@pytest.mark.parametrize(
    ("zone", "selection", "day"),
    [
        ("UTC", Selection(rows="all", unfinished=True), "2026-07-01"),
        ("Pacific/Auckland", Selection(rows="all", unfinished=True), "2026-07-02"),
        (
            "Asia/Tokyo",
            Selection(
                rows="window",
                start=NOON - timedelta(days=2),
                end=datetime(2026, 6, 30, 16, tzinfo=UTC),
                unfinished=True,
            ),
            "2026-07-01",
        ),
        (
            "Asia/Tokyo",
            Selection(
                rows="day",
                start=datetime(2026, 6, 30, 15, tzinfo=UTC),
                end=datetime(2026, 7, 1, 15, tzinfo=UTC),
                unfinished=False,
            ),
            "2026-07-01",
        ),
    ],
)
def test_the_day_is_of_the_datasets_zone(project: Project, zone: str, selection: Selection, day: str) -> None:
    project.change(timezone=zone)
    run = prepare(project, selection=selection)
    load(run)

    summary = report(run)

    assert summary.day == day
    assert (summary.window.start, summary.window.end) == (selection.start, selection.end)


def test_the_summary_has_all_that_the_design_names_and_is_written(project: Project) -> None:
    project.put(1, "apple")

    summary = project.run("one")

    assert list(summary.model_dump()) == [
        *(
            "dataset",
            "run_id",
            "day",
            "window",
            "spec_id",
            "model",
            "mode",
            "spec_change",
            "dry_run",
            "state",
            "reason",
        ),
        *(
            "started_at",
            "finished_at",
            "rows",
            "blank",
            "texts",
            "cached",
            "tagged",
            "refused",
            "failed",
            "skipped",
            "pending",
        ),
        *("llm_requests", "input_tokens", "cached_input_tokens", "output_tokens"),
        *("estimate", "estimated_usd", "estimate_error", "cost_usd", "earlier_plans_usd"),
        *("saved_usd", "saved_by_duplicates_usd", "saved_by_batch_usd", "saved_by_prompt_caching_usd"),
        *("seconds", "tags", "review", "answered", "answered_refused", "answered_none", "answered_tags"),
        *("errors", "attempts", "drift"),
    ]
    assert project.summary(project.open("one")) == summary
    assert (summary.dataset, summary.run_id, summary.mode, summary.state) == ("notes", "one", "online", "success")
    assert summary.started_at < summary.finished_at


def put_attempt(
    run: Run, number: int, plan_id: str, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **about_it: str
) -> str:
    """Writes an attempt's file directly, and returns its path. Attempts start in the order of their numbers."""
    started = NOON + timedelta(minutes=number)
    about = {"plan_id": plan_id, "state": "done", "reason": None, "started_at": started.isoformat()}
    about |= {"ended_at": (started + timedelta(seconds=30)).isoformat(), **about_it}
    body = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"tagger": json.dumps(about)}))
    pq.write_table(table, body, compression="zstd", row_group_size=3)
    path = f"{run.files}shard-1-{number}.parquet"
    run.storage.put(path, body.getvalue())
    return path


numbers = st.integers(0, 10**6)
outcome_rows = st.fixed_dictionaries(
    {
        "row_id": st.sampled_from(["7", "a", "記事"]),
        "status": st.sampled_from(["asked", "tagged", "refused", "failed"]),
        "kind": st.sampled_from([None, "timeout", "refusal", "bad_answer"]),
        **dict.fromkeys(("requests", "input_tokens", "cached_input_tokens", "output_tokens"), numbers),
        "cost_usd": st.floats(0, 1) | st.floats(0, 1) | st.floats(0, 1) | st.none(),
    }
)
some_attempts = st.lists(
    st.tuples(st.sampled_from(["plan", "before"]), st.dictionaries(st.integers(0, 6), outcome_rows)), max_size=4
)
run_ids = (f"random-{number}" for number in count())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_attempts)
def test_the_figures_are_those_of_a_plain_count(
    project: Project, attempts: list[tuple[str, dict[int, dict[str, Any]]]]
) -> None:
    run = prepare(project, next(run_ids), new=7)
    for number, (plan_id, texts) in enumerate(attempts, 1):
        put_attempt(run, number, plan_id, [{"key": f"key-{text}", **row} for text, row in texts.items()])

    with pytest.raises(RunFailed, match="load_back did not finish"):
        report(run)

    every = [row for _, texts in attempts for row in texts.values()]
    summary = project.summary(run)
    for figure, column in (("llm_requests", "requests"), *((n, n) for n in SCHEMA.names if n.endswith("_tokens"))):
        assert getattr(summary, figure) == sum(row[column] for row in every)
    costs = [row["cost_usd"] for row in every]
    assert summary.cost_usd == (None if None in costs else pytest.approx(sum(costs)))
    of_plan = {
        plan_id: [row["cost_usd"] for p, texts in attempts if p == plan_id for row in texts.values()]
        for plan_id in ("plan", "before")
    }
    assert summary.earlier_plans_usd == (None if None in of_plan["before"] else pytest.approx(sum(of_plan["before"])))
    last: dict[int, dict[str, Any]] = {}
    for plan_id, texts in attempts:
        for text, row in texts.items():
            rank = {"asked": 1, "failed": 2, "refused": 3, "tagged": 3}
            if plan_id == "plan" and (text not in last or rank[row["status"]] >= rank[last[text]["status"]]):
                last[text] = row
    statuses = [row["status"] for row in last.values()]
    ended = {status: statuses.count(status) for status in ("tagged", "refused", "failed")}
    assert {status: getattr(summary, status) for status in ended} == ended
    assert summary.skipped == 7 - sum(ended.values())
    kinds = [(row["kind"], row["row_id"]) for row in last.values() if row["kind"] is not None]
    assert list(summary.errors.items()) == [
        (kind, ErrorCount(count=[k for k, _ in kinds].count(kind), row_id=row_id))
        for kind, row_id in dict(kinds).items()
    ]


def test_an_attempt_that_is_damaged_inside_is_named(project: Project) -> None:
    run = prepare(project, new=1)
    path = put_attempt(run, 1, "plan", [{"key": f"key-{number:032x}", "row_id": "1"} for number in range(1000)])
    body = run.storage.get(path) or b""
    run.storage.put(path, body[:2000] + b"\xff" * 1000 + body[3000:])

    with pytest.raises(StorageError, match=r"shard-1-1\.parquet: damaged"):
        report(run)


def test_an_attempt_with_other_columns_is_named(project: Project) -> None:
    run = prepare(project, new=1)
    put_attempt(run, 1, "plan", [], SCHEMA.append(pa.field("mood", pa.string())))

    with pytest.raises(StorageError, match=r"shard-1-1\.parquet: damaged"):
        report(run)


# The verdict


def verdict(run: Run) -> str:
    """Returns why a run is not acceptable, as the error and the written summary tell."""
    with pytest.raises(RunFailed) as caught:
        report(run)
    summary = run.read("summary.json", Summary)
    assert summary is not None
    assert summary.state == "failed"
    assert str(caught.value) == f"notes: {summary.reason}"
    return summary.reason or ""


def test_a_broken_shard_fails_the_run(project: Project) -> None:
    run = prepare(project, new=2)
    attempt(run, TAGGED, ("asked", None), breaks="the endpoint refuses the API key")
    load(run, tagged=1, skipped=1)

    assert "the endpoint refuses the API key" in verdict(run)


def test_a_shard_that_did_not_start_fails_the_run(project: Project) -> None:
    run = prepare(project, new=4, shards=2)
    attempt(run, TAGGED, TAGGED)
    load(run, tagged=2, skipped=2)

    assert verdict(run) == "shard 2/2 · 2 texts: did not start"


def test_shards_that_broke_for_one_reason_are_told_of_once(project: Project) -> None:
    run = prepare(project, new=6, shards=3)
    for shard in (1, 2):
        attempt(run, shard=shard, breaks="out of quota")
    load(run, skipped=6)

    assert verdict(run) == "2 of 3 shards: out of quota; shard 3/3 · 2 texts: did not start"


def test_a_run_that_answered_nothing_saved_nothing_by_duplicates(project: Project) -> None:
    run = prepare(project, new=2, shards=0, repeated=3, problem="budget reached: no money")
    load(run, skipped=2)

    assert verdict(run) == "budget reached: no money"
    assert project.summary(run).total_saved_usd == 0


def test_a_batch_that_was_not_collected_fails_the_run(project: Project) -> None:
    run = prepare(project, new=1)
    put_attempt(run, 1, "plan", [], asked="batch", state="running")
    load(run, pending=1)

    assert verdict(run) == "shard 1/1 · 1 texts: its batch was not collected"


def test_an_attempt_of_an_earlier_plan_does_not_count_as_a_start(project: Project) -> None:
    run = prepare(project, new=1)
    attempt(run, TAGGED, plan_id="before")
    load(run, tagged=1)

    assert "did not start" in verdict(run)


def test_a_killed_shard_fails_the_run(project: Project) -> None:
    run = prepare(project, new=1)
    with Ledger(run, "plan", 1, None):
        [books] = [path for path, _ in run.storage.list(run.files) if "shard-1-1" in path]
        as_killed = run.storage.get(books) or b""
    run.storage.put(books, as_killed)
    load(run, skipped=1)

    assert verdict(run) == "shard 1/1 · 1 texts: was killed"


def test_a_shard_that_succeeds_in_the_end_does_not_fail_the_run(project: Project) -> None:
    run = prepare(project, new=1)
    attempt(run, FAILED, breaks="the worker fell ill")
    attempt(run, TAGGED)
    load(run, tagged=1)

    assert report(run).state == "success"


def test_all_that_is_wrong_is_told(project: Project) -> None:
    run = prepare(project, new=4, shards=2)
    attempt(run, FAILED, FAILED, breaks="out of quota")
    load(run, failed=2, skipped=2, problem="5 of 9 rows are gone")

    told = verdict(run)

    for words in (
        "shard 1/2 · 2 texts: out of quota",
        "shard 2/2",
        "did not start",
        "5 of 9 rows",
        "2 of 2 texts failed",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("limit", "tagged", "refused", "failed", "state"),
    [
        (0.01, 99, 0, 1, "success"),
        (0.01, 50, 49, 1, "success"),
        (0.01, 98, 0, 1, "failed"),
        (0.01, 0, 0, 0, "success"),
        (0, 100, 0, 0, "success"),
        (0, 100, 0, 1, "failed"),
        (1, 0, 0, 5, "success"),
    ],
)
def test_the_run_fails_when_more_than_the_allowed_part_of_the_attempted_texts_failed(
    project: Project, limit: float, tagged: int, refused: int, failed: int, state: str
) -> None:
    project.change(limits={"max_failed_fraction": limit})
    run = prepare(project, cached=1000, too_long=1000, new=tagged + refused + failed + 50)
    attempt(run, *[FAILED] * failed)
    load(run, tagged=tagged, refused=refused, failed=failed, skipped=50)

    if state == "success":
        assert report(run).state == "success"
    else:
        told = verdict(run)
        assert f"{failed} of {tagged + refused + failed} texts failed" in told
        assert f"timeout {failed} (row row-0)" in told


def test_without_load_back_the_run_fails(project: Project) -> None:
    run = prepare(project, cached=3, new=1)
    attempt(run, TAGGED)

    assert "load_back did not finish" in verdict(run)


def test_texts_that_were_tagged_count_as_tagged_though_load_back_failed(project: Project) -> None:
    project.put(1, "apple")
    project.put(2, "zebra")
    run = project.take()
    plan(run, project.connections)
    tag(run, 1, project.connections)

    assert "load_back did not finish" in verdict(run)

    summary = project.summary(run)
    assert (summary.texts, summary.tagged, summary.skipped) == (2, 2, 0)


def test_a_run_without_a_plan_has_no_report(project: Project) -> None:
    with pytest.raises(InputError, match=r"no plan\.json"):
        report(project.take())


def test_a_refused_key_is_told_in_the_verdict(project: Project) -> None:
    project.put(1, "apple")
    run = project.take()
    plan(run, project.connections)
    project.llm.script(error(401, "no", "invalid_api_key"))
    with pytest.raises(LLMStopped):
        tag(run, 1, project.connections)
    load(run, skipped=1)

    assert "refuses the API key (HTTP 401" in verdict(run)


# Reading it


def test_a_summary_reads_well(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tagger")
    run = prepare(project, cached=1234, new=3)
    attempt(run, TAGGED, FAILED, REFUSED)
    load(run, tagged=1, failed=1, refused=1, tags={"fruit": 200, "weather": 7})

    told = verdict(run)

    lines = describe(project.summary(run))
    assert lines[0] == f"notes 2026-07-01 · one · failed: {told}"
    assert lines[1:5] == [
        "  rows     1,237 with a text, 2 blank",
        "  texts    1,237 distinct: 1,234 cached, 1 tagged, 1 refused, 1 failed, 0 skipped, 0 pending",
        "  LLM      3 requests, 3,000 tokens in (1,200 cached), 300 out, offline-stand-in",
        "  cost     $0.0060 spent, an unknown amount saved",
    ]
    assert lines[5].startswith("  seconds  snapshot 1.5, plan 2.5, tag ")
    assert lines[6:] == [
        "  tags     fruit 200, weather 7",
        "  errors   timeout 1 (such as row row-1), refusal 1 (such as row row-2)",
    ]
    assert [line for line in lines if line not in caplog.text] == []


def test_what_was_saved_is_told_by_its_parts(project: Project) -> None:
    project.change(llm={"price": {"cached_input": 0.5}})
    run = prepare(project, cached=10, new=2, repeated=1)
    Cache(run.storage, SPEC, "offline-stand-in").write("a" * 32, record(cost_usd=2.0))
    put_attempt(run, 1, "plan", [{**BATCH_ROW, "cached_input_tokens": 2000, "cost_usd": 0.25}], asked="batch")
    load(run, tagged=2)

    assert describe(report(run))[4:6] == [
        "  cost     $0.2500 spent, $22.25 saved",
        "  saved    $20.00 by the cache, $2.00 by duplicates, $0.2500 by the Batch API, $0.0005 by prompt caching",
    ]


def test_a_summary_of_an_earlier_version_is_read(project: Project) -> None:
    run = prepare(project, cached=3)
    load(run)
    written = json.loads(report(run).model_dump_json())
    new = ("estimate", "estimate_error", "earlier_plans_usd", "attempts")
    for name in [name for name in written if name in new or name.startswith("saved_by_")]:
        del written[name]
    written |= {"saved_usd": 0.5, "cost_usd": 0.25, "estimated_usd": 0.25}
    run.storage.put(f"{run.files}summary.json", json.dumps(written).encode())

    assert describe(project.summary(run))[4:6] == [
        "  cost     $0.2500 spent (estimated $0.2500), $0.5000 saved",
        "  saved    $0.5000 by the cache",
    ]


def test_a_run_reported_again_replaces_its_summary(project: Project) -> None:
    run = prepare(project)
    load(run)
    first = report(run)

    second = report(run)

    assert project.summary(run) == second
    assert second.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})


@pytest.mark.parametrize("news", ["an attempt", "a damaged summary", "a plan", "a load"])
def test_a_run_that_went_on_finishes_anew(project: Project, news: str) -> None:
    project.put(1, "apple")
    first = project.run("one")
    run = project.open("one")
    if news == "an attempt":
        put_attempt(run, 9, "plan", [])
    elif news == "a damaged summary":
        run.storage.put(f"{run.files}summary.json", b"x")
    elif news == "a plan":
        plan(run, project.connections)
    if news in ("a plan", "a load"):
        load_back(run, project.connections)

    assert report(run).finished_at > first.finished_at
