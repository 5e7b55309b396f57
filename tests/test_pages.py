"""What the pages show of a dataset, and the pages as one self-contained file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.stand_in import error
from tagger.exceptions import InputError
from tagger.history import Figures, history
from tagger.pages.data import NO_SUMMARY, RUNS_SHOWN, Card, DatasetPage, Day, card_of, page_of
from tagger.pages.html import STATIC, Data, html, write_html
from tagger.plan import plan
from tagger.rollup import RolledRun, Rollup, rolled_up, rollup_of
from tagger.window import Options
from tests.databases import make_project, teach
from tests.project import Project
from tests.test_history import put_run, summary
from tests.test_rollup import happen, happenings, zones
from tests.test_spend import kill_an_attempt, put_attempt

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
ONE_DAY = timedelta(days=1)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def rollup(project: Project) -> Rollup:
    return rolled_up(project.open("any").storage, project.dataset)


def card(project: Project, now: datetime = NOON) -> Card:
    return card_of(rollup(project), now)


def page(project: Project, start: date | None = None, end: date | None = None) -> DatasetPage:
    found = rollup(project)
    return page_of(found, start, end, card_of(found, NOON))


def days(project: Project) -> list[Day]:
    return page(project).days


# Cards


def test_a_dataset_without_runs_has_a_card_that_says_so(project: Project) -> None:
    assert card(project) == Card(
        dag_id="tag_notes", dataset="notes", state="none", spent_month_usd=0.0, saved_month_usd=0.0
    )


def test_a_card_tells_of_the_last_run_and_of_the_present_month(project: Project) -> None:
    project.change(limits={"max_cost_usd_per_month": 20})
    put_run(project, "before", datetime(2026, 10, 31, 12, tzinfo=UTC), 7.0)
    put_run(project, "one", NOON - ONE_DAY, 1.0, texts=20, cached=5)
    put_run(project, "two", NOON, 2.0, 3.0, state="failed", reason="8 of 9 texts failed")

    assert card(project) == Card(
        dag_id="tag_notes",
        dataset="notes",
        state="failed",
        reason="8 of 9 texts failed",
        last_run_id="two",
        last_run_at=NOON,
        texts=10,
        cached=6,
        cached_share=0.6,
        spent_month_usd=6.0,
        saved_month_usd=4.5,
        budget_month_usd=20.0,
        budget_left_usd=14.0,
    )


@pytest.mark.parametrize(
    ("zone", "spent"), [("UTC", 1.0), ("Asia/Tokyo", 10.0), ("America/Los_Angeles", 1.0)], ids=["UTC", "Tokyo", "LA"]
)
def test_the_month_is_one_of_the_datasets_zone(project: Project, zone: str, spent: float) -> None:
    project.change(timezone=zone)
    put_attempt(project.open("november"), 1.0, datetime(2026, 11, 30, 14, 59, tzinfo=UTC))
    put_attempt(project.open("december"), 10.0, datetime(2026, 12, 1, 9, tzinfo=UTC))

    assert card(project, datetime(2026, 11, 30, 15, tzinfo=UTC)).spent_month_usd == spent


@pytest.mark.parametrize(("costs", "left"), [([], 5.0), ([1.5], 3.5), ([4.0, 4.0], 0.0), ([1.0, None], None)], ids=str)
def test_the_budget_left_is_the_limit_without_what_was_spent(
    project: Project, costs: list[float | None], left: float | None
) -> None:
    project.change(limits={"max_cost_usd_per_month": 5})
    put_run(project, "one", NOON, *costs)

    assert card(project).budget_left_usd == left


def test_a_dry_run_is_not_the_last_run_of_a_card(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    put_run(project, "dry", NOON + ONE_DAY, dry_run=True, texts=99)

    assert (card(project).last_run_id, card(project).texts) == ("one", 10)


def test_where_an_attempt_is_damaged_what_is_left_is_not_known(project: Project) -> None:
    project.change(limits={"max_cost_usd_per_month": 5})
    put_attempt(project.open("one"), 1.0, NOON)
    project.open("one").storage.put("runs/notes/one/shard-1-1.parquet", b"x")

    found = card(project, datetime.now(UTC))

    assert (found.spent_month_usd, found.budget_left_usd) == (None, None)
    assert "runs/notes/one/shard-1-1.parquet: damaged" in (found.problem or "")


def test_a_run_without_texts_has_no_cached_share(project: Project) -> None:
    put_run(project, "one", NOON, texts=0, cached=0)

    assert (card(project).texts, card(project).cached_share) == (0, None)


def test_a_run_without_a_summary_has_failed_as_far_as_anybody_knows(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    put_attempt(project.open("killed"), 1.0, NOON + timedelta(minutes=1), state="running")

    found = card(project)

    assert (found.state, found.reason, found.last_run_id) == ("failed", NO_SUMMARY, "killed")
    assert (found.texts, found.cached) == (10, 6)


def test_a_card_names_the_damage_and_shows_the_rest(project: Project) -> None:
    put_run(project, "one", NOON, 1.0)
    put_run(project, "two", NOON, 10.0)
    for run_id in ("one", "two"):
        project.open("any").storage.put(f"runs/notes/{run_id}/summary.json", b"x")
    put_run(project, "three", NOON, 100.0)

    found = card(project)

    assert re.fullmatch(r"s3://.*/runs/notes/(one|two)/summary\.json: .* \(and 1 more\)", found.problem or "")
    assert (found.spent_month_usd, found.last_run_id, found.state) == (111.0, "three", "success")


# Days


def test_a_day_has_all_that_its_runs_did(project: Project) -> None:
    put_run(
        project,
        "one",
        NOON - timedelta(hours=2),
        1.0,
        errors={"timeout": {"count": 2, "row_id": "7"}},
        seconds={"tag": 2.0, "plan": 50.0},
        tags={"fruit": 1},
        cost_usd=1.5,
        earlier_plans_usd=0.5,
        estimate_error=-0.5,
    )
    put_run(
        project,
        "two",
        NOON,
        10.0,
        errors={"timeout": {"count": 1, "row_id": "8"}, "refusal": {"count": 1, "row_id": "9"}},
        seconds={"tag": 2.0},
        tags={"fruit": 5, "animal": 6},
        saved_by_batch_usd=0.125,
        saved_by_prompt_caching_usd=0.0625,
        cost_usd=10.0,
        estimate_error=-0.95,
    )

    [day] = days(project)

    assert day.model_dump(mode="json") == {
        **{"day": "2026-11-30", "runs": 2, "rows": 24, "texts": 20, "cached": 12, "tagged": 4, "refused": 2},
        **{"failed": 2, "skipped": 0, "pending": 0},
        **{"requests": 4, "input_tokens": 180, "cached_input_tokens": 20, "output_tokens": 20, "spent_usd": 11.0},
        **{"saved_usd": 4.0, "saved_by_duplicates_usd": 0.5},
        **{"saved_by_batch_usd": 0.125, "saved_by_prompt_caching_usd": 0.0625},
        **{"estimated_usd": 1.0, "estimated_actual_usd": 11.0, "seconds": 4.0, "texts_per_second": 2.0},
        **{"errors": {"timeout": 3, "refusal": 1}, "tags": {"fruit": 5, "animal": 6}},
        **{"model": "gpt-5-mini", "spec_id": "0123456789ab", "changes": []},
    }


def test_what_is_not_known_of_a_day_is_null(project: Project) -> None:
    put_attempt(project.open("killed"), None, NOON)
    put_run(project, "one", NOON - ONE_DAY, saved_usd=None, saved_by_batch_usd=None, estimated_usd=None, cost_usd=None)

    before, killed = days(project)

    assert (before.saved_usd, before.saved_by_batch_usd, before.saved_by_duplicates_usd) == (None, None, 0.25)
    assert (before.estimated_usd, before.estimated_actual_usd, before.texts_per_second) == (0.0, 0.0, None)
    assert (killed.runs, killed.spent_usd, killed.model, killed.spec_id, killed.tags) == (1, None, None, None, {})


def test_the_tags_of_a_day_are_those_of_its_last_run_that_loaded(project: Project) -> None:
    put_run(project, "one", NOON, tags={"fruit": 1})
    put_run(project, "two", NOON + timedelta(hours=1), tags={"fruit": 2})
    put_run(project, "three", NOON + timedelta(hours=2), tags={})

    assert [day.tags for day in days(project)] == [{"fruit": 2}]


def test_an_estimate_is_held_against_what_the_runs_cost_that_asked_all_of_it(project: Project) -> None:
    put_run(project, "one", NOON, cost_usd=3.0, estimated_usd=2.5, estimate_error=-0.2)
    put_run(project, "two", NOON, cost_usd=8.0, estimated_usd=None)
    put_run(project, "over-budget", NOON, cost_usd=0.0, estimated_usd=100.0)
    put_run(project, "three", NOON + ONE_DAY, cost_usd=None, estimated_usd=2.5, estimate_error=-0.2)

    assert [(day.estimated_usd, day.estimated_actual_usd) for day in days(project)] == [(2.5, 3.0), (2.5, None)]


def test_the_speed_is_that_of_texts_that_were_asked_one_by_one(project: Project) -> None:
    too_long, damaged = {"count": 1, "row_id": "1"}, {"count": 1, "row_id": "2"}
    put_run(project, "one", NOON, seconds={"tag": 2.0}, errors={"too_long": too_long, "damaged_record": damaged})
    put_run(project, "handed-over", NOON, seconds={"tag": 7200.0}, mode="batch")
    put_run(project, "batch", NOON + ONE_DAY, seconds={"tag": 7200.0}, mode="batch")

    assert [(day.seconds, day.texts_per_second) for day in days(project)] == [(7202.0, 1.0), (7200.0, None)]


def changes(project: Project, *runs: dict[str, Any]) -> list[list[str]]:
    """Return the changes of days with a run each."""
    for number, told in enumerate(runs):
        put_run(project, f"run-{number}", NOON + number * ONE_DAY, **told)
    return [day.changes for day in days(project)]


A, B, C = "aaaa11111111", "bbbb22222222", "cccc33333333"


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"model": "a", "spec_id": A}, []),
        ({"model": "a", "spec_id": A, "spec_change": "the prompt changed"}, []),
        ({"model": "b", "spec_id": B}, ["model `a` → `b`"]),
        ({"model": "b", "spec_id": B, "spec_change": "the model changed"}, ["model `a` → `b`"]),
        (
            {"model": "b", "spec_id": B, "spec_change": "the prompt and the model changed"},
            ["model `a` → `b`", "the prompt and the model changed"],
        ),
        ({"model": "a", "spec_id": B, "spec_change": "the prompt changed"}, ["the prompt changed"]),
        ({"model": "a", "spec_id": B}, ["spec aaaa → bbbb"]),
    ],
    ids=["none", "older rows alone", "model", "model by the plan", "both", "prompt", "unknown"],
)
def test_changes_of_model_and_spec_are_told_in_words(project: Project, after: dict[str, Any], told: list[str]) -> None:
    assert changes(project, {"model": "a", "spec_id": A}, after) == [[], told]


def test_changes_are_against_the_last_run_before_that_was_no_dry_run(project: Project) -> None:
    first, tried, then = ({"spec_id": spec} for spec in (A, B, C))

    assert changes(project, first, tried | {"dry_run": True}, then) == [[], ["spec aaaa → cccc"]]


def test_changes_are_against_the_run_before_though_it_is_out_of_range(project: Project) -> None:
    changes(project, {"spec_id": A}, {"spec_id": B})

    [day] = page(project, start=NOON.date() + ONE_DAY).days

    assert day.changes == ["spec aaaa → bbbb"]


def test_all_changes_of_a_day_are_told(project: Project) -> None:
    for number, spec in enumerate((A, B, A)):
        put_run(project, f"run-{number}", NOON + timedelta(hours=number), spec_id=spec)

    [day] = days(project)

    assert (day.changes, day.spec_id) == (["spec aaaa → bbbb", "spec bbbb → aaaa"], A)


names = (f"paged_{number}" for number in count())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings, zones, st.dates(date(2025, 12, 28), date(2026, 2, 5)), st.integers(0, 40))
def test_days_agree_with_the_history(
    project: Project, happened: list[tuple[Any, ...]], zone: str, start: date, length: int
) -> None:
    project.change(dataset=next(names), timezone=zone)
    for each in happened:
        happen(project, *each)
    end = start + timedelta(days=length)

    everything = page(project)
    in_range = page(project, start, end)

    expected = {day: figures for _, day, figures in history(rollup(project), "day")}
    assert [str(day.day) for day in everything.days] == list(expected)
    assert in_range.days == [day for day in everything.days if start <= day.day <= end]
    assert in_range.runs == [run for run in everything.runs if start <= run.day <= end]
    for day in everything.days:
        shown = {name: value for name, value in vars(day).items() if name in Figures.__dataclass_fields__}
        shown |= {"total_saved_usd": total_saved(day)}
        shown |= {"estimated_usd": expected[str(day.day)].estimated_usd}  # here of all runs
        assert shown == approximately(expected[str(day.day)])
    bounds = (everything.first_day, everything.last_day)
    assert bounds == ((everything.days[0].day, everything.days[-1].day) if expected else (None, None))
    assert (in_range.first_day, in_range.last_day) == bounds


def total_saved(day: Day) -> float | None:
    parts = (day.saved_usd, day.saved_by_duplicates_usd, day.saved_by_batch_usd, day.saved_by_prompt_caching_usd)
    return None if None in parts else sum(part or 0 for part in parts)


def approximately(figures: Figures) -> dict[str, Any]:
    return {name: None if value is None else pytest.approx(value) for name, value in vars(figures).items()}


# Pages


def test_a_page_without_runs_is_empty(project: Project) -> None:
    project.change(timezone="Asia/Tokyo")

    found = page(project)

    assert found == DatasetPage(card=card(project), tags=["fruit", "animal", "weather"])
    assert (found.days, found.runs, found.first_day, found.last_day) == ([], [], None, None)


@pytest.mark.parametrize(
    ("start", "end", "shown"),
    [
        (None, None, [29, 30, 1]),
        (date(2026, 11, 30), None, [30, 1]),
        (None, date(2026, 11, 30), [29, 30]),
        (date(2026, 11, 30), date(2026, 11, 30), [30]),
        (date(2026, 12, 2), date(2026, 12, 3), []),
        (date(2026, 12, 2), date(2026, 11, 1), []),
        (date.min, date.max, [29, 30, 1]),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Etc/GMT+12"])
def test_a_range_has_the_days_from_its_first_to_its_last(
    project: Project, zone: str, start: date | None, end: date | None, shown: list[int]
) -> None:
    project.change(timezone=zone)
    offset = NOON.astimezone(project.dataset.zone).utcoffset() or timedelta()
    for number in (-1, 0, 1):
        put_run(project, f"run{number}", NOON - offset + number * ONE_DAY, 1.0)

    found = page(project, start, end)

    assert [day.day.day for day in found.days] == shown
    assert [run.day.day for run in found.runs] == shown[::-1]
    assert (found.first_day, found.last_day) == (date(2026, 11, 29), date(2026, 12, 1))


def test_midnight_is_of_the_day_that_begins(project: Project) -> None:
    put_run(project, "one", datetime(2026, 12, 1, tzinfo=UTC))

    before, after = page(project, end=date(2026, 11, 30)), page(project, start=date(2026, 12, 1))

    assert (before.days, before.runs) == ([], [])
    assert ([day.day.day for day in after.days], [run.day.day for run in after.runs]) == ([1], [1])


def test_runs_are_listed_newest_first_with_what_each_did(project: Project) -> None:
    put_run(project, "one", NOON, 1.0, state="failed", reason="no", seconds={"tag": 2.5})
    put_run(project, "dry", NOON + ONE_DAY, dry_run=True)
    put_attempt(project.open("killed"), 3.0, NOON - ONE_DAY)

    dry, one, killed = page(project).runs

    assert one.model_dump(mode="json") == {
        **{"run_id": "one", "day": "2026-11-30", "state": "failed", "reason": "no", "dry_run": False},
        **{"texts": 10, "cached": 6, "tagged": 2, "refused": 1, "failed": 1, "skipped": 0, "pending": 0},
        **{"spent_usd": 1.0, "estimated_usd": 0.5, "seconds": 2.5},
    }
    assert (dry.run_id, dry.dry_run, dry.state, dry.spent_usd) == ("dry", True, "success", 0.0)
    assert killed.model_dump() == {
        **dict.fromkeys(("texts", "cached", "tagged", "refused", "failed", "skipped", "pending")),
        **{"run_id": "killed", "day": date(2026, 11, 29), "state": "failed", "reason": NO_SUMMARY, "dry_run": False},
        **{"spent_usd": 3.0, "estimated_usd": None, "seconds": None},
    }


def test_no_more_than_the_last_runs_are_listed(project: Project) -> None:
    told = [summary(f"run-{number}", NOON + timedelta(minutes=number)) for number in range(RUNS_SHOWN + 5)]
    runs = [
        RolledRun(
            run_id=each.run_id,
            ended_at=each.finished_at,
            version="",
            summary=each.model_dump(exclude={"attempts"}),  # type: ignore[arg-type]
            spent=[],
        )
        for each in told
    ]
    found = rollup_of(project.dataset, runs)

    listed = page_of(found, None, None, card_of(found, NOON)).runs

    assert [run.run_id for run in listed] == [f"run-{number}" for number in reversed(range(5, RUNS_SHOWN + 5))]


def test_a_damaged_run_is_listed_with_its_problem(project: Project) -> None:
    put_run(project, "one", NOON - ONE_DAY, 1.0)
    project.open("any").storage.put("runs/notes/two/summary.json", b"x")

    by_id = {run.run_id: run for run in page(project).runs}

    assert by_id["two"].state == "failed"
    assert "runs/notes/two/summary.json: " in (by_id["two"].reason or "")


def test_real_runs_are_shown_as_their_summaries_tell(project: Project) -> None:
    project.change(limits={"max_failed_fraction": 1})
    teach(project.llm, tiger=error(400, "no", "odd_text"))
    project.put(1, "apple")
    project.put(2, "apple")
    project.put(3, "a tiger")
    first = project.run("one")
    project.change(prompt="You tag long notes.")
    second = project.run("two")
    killed = project.take("three")
    plan(killed, project.connections)
    kill_an_attempt(killed, 0.25)
    project.run("dry", options=Options(dry_run=True))

    now = datetime.now(UTC)
    found = page_of(rollup(project), None, None, card_of(rollup(project), now))

    both = (first, second)
    texts, costs = sum(s.texts for s in both), sum(s.cost_usd or 0 for s in both)
    assert sum(day.texts for day in found.days) == texts
    assert sum(day.spent_usd or 0 for day in found.days) == pytest.approx(costs + 0.25)
    assert found.days[-1].tags == second.tags
    assert [change for day in found.days for change in day.changes] == ["the prompt changed"]
    assert {kind: n for day in found.days for kind, n in day.errors.items()}.keys() == first.errors.keys()
    assert [run.run_id for run in found.runs] == ["dry", "three", "two", "one"]
    assert (found.card.last_run_id, found.card.state) == ("three", "failed")


def test_the_figures_are_light_to_import() -> None:
    code = (
        "import sys, tagger.pages.data\n"
        "heavy = {'airflow', 'boto3', 'botocore', 'gokart', 'openai', 'pyarrow', 'sqlalchemy', 'tagger.rollup'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# One file

SHELL = """<!doctype html>
<html lang="en" data-root="{{root}}">
<head>
<meta charset="utf-8">
<title>Tagging</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{{root}}static/look.css">
<script src="{{root}}static/first.js" defer></script>
<script src="{{root}}static/second.min.js" defer></script>
</head>
<body>
<main id="main"></main>
</body>
</html>
"""


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """A folder with a small page."""
    folder = tmp_path / "static"
    folder.mkdir()
    files = {"page.html": SHELL, "look.css": "p::after { content: '{{root}}' }\n", "first.js": "globalThis.one = 1;\n"}
    files |= {"second.min.js": r'globalThis.two = "\\1 \g<0> 寿司 {{root}}".replace(/&amp;/, "");', "other.js": "no();"}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


class Elements(HTMLParser):
    """The elements of a page, as a browser finds them: name, attributes and what stands directly in them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.comments: list[str] = []
        self._open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))

        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, tag: str, **attributes: str) -> Iterator[tuple[dict[str, str | None], str]]:
        for name, found, text in self.found:
            if name == tag and attributes.items() <= found.items():
                yield found, text

    @property
    def data(self) -> Any:
        [(_, text)] = self.all("script", type="application/json", id="data")
        return json.loads(text)

    @property
    def scripts(self) -> list[str]:
        return [text for found, text in self.all("script") if "type" not in found]

    @property
    def policy(self) -> dict[str, list[str]]:
        [(found, _)] = self.all("meta", **{"http-equiv": "Content-Security-Policy"})
        parts = (part.split() for part in (found["content"] or "").split(";"))
        return {name: sources for name, *sources in parts}


def data_of(*pages: DatasetPage) -> Data:
    return Data(generated_at=NOON, datasets=list(pages))


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_file_holds_style_scripts_and_figures(project: Project, static: Path) -> None:
    put_run(project, "one", NOON, 1.0, tags={"果物": 3})

    found = Elements(html(data_of(page(project)), static))

    assert found.scripts == [(static / name).read_text(encoding="utf-8") for name in ("first.js", "second.min.js")]
    assert [text for _, text in found.all("style")] == [(static / "look.css").read_text(encoding="utf-8")]
    assert found.data["generated_at"] == "2026-11-30T12:00:00Z"
    assert [DatasetPage.model_validate(each) for each in found.data["datasets"]] == [page(project)]
    assert found.data["datasets"][0]["days"][0]["tags"] == {"果物": 3}


def test_the_file_needs_no_other(static: Path) -> None:
    written = html(data_of(), static)

    found = Elements(written)
    addresses = [(a.get("src"), a.get("href")) for _, a, _ in found.found if "src" in a or "href" in a]
    assert addresses == [(None, "data:,")]
    [(root, _)] = found.all("html")
    assert root["data-root"] == ""


def test_scripts_stand_behind_the_data_and_all_that_is_on_the_page(static: Path) -> None:
    names = [tag for tag, _, _ in Elements(html(data_of(), static)).found]

    assert names == ["html", "head", "meta", "title", "link", "meta", "style", "body", "main", *["script"] * 3]


def test_nothing_can_run_or_be_loaded_but_what_is_in_the_file(static: Path) -> None:
    found = Elements(html(data_of(), static))

    styles = [text for _, text in found.all("style")]
    assert found.policy == {
        "default-src": ["'none'"],
        "script-src": [sha256(script) for script in found.scripts],
        "style-src": [sha256(style) for style in styles],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


EVIL = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "-->",
    "]]>",
    "&lt;b&gt; &amp;",
    "line\u2028 and\u2029 ends",
    "\"quotes\" 'both' \\ and \\u003c",
    "<img src=x onerror=alert(1)>",
    "{{root}}",
    "果物 🍎 e\u0301",
]


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_markup_in_names_stays_data(static: Path, evil: str) -> None:
    shown = DatasetPage(card=Card(dag_id=evil, dataset=evil, problem=evil, reason=evil), tags=[evil])
    harmless = Elements(html(data_of(), static))

    written = html(data_of(shown), static)

    found = Elements(written)
    assert [tag for tag, _, _ in found.found] == [tag for tag, _, _ in harmless.found]
    assert found.comments == []
    assert found.scripts == harmless.scripts
    assert [DatasetPage.model_validate(each) for each in found.data["datasets"]] == [shown]
    [(_, text)] = found.all("script", id="data")
    assert not set("<>&\u2028\u2029") & set(text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_any_name_comes_through(text: str) -> None:
    shown = DatasetPage(card=Card(dag_id="tag_x", dataset="x", problem=text), tags=[text])

    found = Elements(html(data_of(shown), STATIC))

    assert [DatasetPage.model_validate(each) for each in found.data["datasets"]] == [shown]


def test_the_real_page_is_whole() -> None:
    written = html(data_of())

    found = Elements(written)
    shell = (STATIC / "page.html").read_text(encoding="utf-8")
    named = re.findall(r"static/([\w.-]+\.js)", shell)
    assert found.scripts == [(STATIC / name).read_text(encoding="utf-8") for name in named]
    assert len(found.scripts) > 1
    assert all("src" not in a for _, a, _ in found.found)
    assert "static/" not in "".join(text for tag, _, text in found.found if tag not in ("script", "style"))
    assert [href for a, _ in found.all("link") if (href := a["href"]) is not None] == ["data:,"]
    assert found.policy["script-src"] == [sha256(script) for script in found.scripts]
    assert found.policy["style-src"] == [sha256(text) for _, text in found.all("style")]
    assert found.policy["style-src"]


@pytest.mark.parametrize("file", sorted(STATIC.glob("*.*")), ids=lambda file: file.name)
def test_no_static_file_ends_its_element(file: Path) -> None:
    text = file.read_text(encoding="utf-8").lower()

    if file.suffix == ".js":
        assert "</script" not in text
        assert "<!--" not in text
    if file.suffix == ".css":
        assert "</style" not in text
        assert "url(" not in text.replace("url(data:", "")


# Written whole, or not at all


def test_the_file_replaces_the_one_before(static: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "page.html"
    file.parent.mkdir()
    file.write_text("before")

    write_html(file, data_of(), static)

    assert file.read_bytes() == html(data_of(), static).encode()
    assert list(file.parent.iterdir()) == [file]


def test_a_link_stays_a_link(static: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "page.html")

    write_html(link, data_of(), static)

    assert link.is_symlink()
    assert link.read_text(encoding="utf-8") == html(data_of(), static)


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return {
        "missing": (folder / "missing" / "page.html", "No such file or directory; name a file in a folder that"),
        "in a file": (folder / "file" / "page.html", "Not a directory; name a file in a folder that is there"),
        "a folder": (folder / "folder", "not a file that could be replaced"),
        "a device": (Path("/dev/null"), "not a file that could be replaced"),
        "read-only": (Path("/proc/page.html"), "name a file in a folder that is there and may be written"),
        "too long": (folder / f"{'x' * 300}.html", "File name too long"),
    }


@pytest.mark.parametrize("place", ["missing", "in a file", "a folder", "a device", "read-only", "too long"])
def test_a_place_that_cannot_be_written_is_one_clear_error(static: Path, tmp_path: Path, place: str) -> None:
    file, complaint = places(tmp_path)[place]
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(InputError, match=re.escape(complaint)) as raised:
        write_html(file, data_of(), static)

    assert str(raised.value).startswith(f"`--html {file}`: ")
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_clear_error(static: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o500)

    with pytest.raises(InputError, match="Permission denied; name a file in a folder"):
        write_html(folder / "page.html", data_of(), static)
