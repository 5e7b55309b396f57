"""Drift: a report names the shares that jumped, and seldom one that did not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from demo.stand_in import completion
from tagger.drift import FALSE_ALARMS, Count, Drift, drift_of, find_drift, p_values
from tagger.report import Summary, describe
from tagger.runs import TRIAL
from tests.databases import make_project, teach
from tests.project import Project
from tests.test_history import put_run, summary

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
SHARES = (0.1, 0.003, 0.01, 0.02, 0.05, 0.08, 0.12, 0.15, 0.2, 0.3)
TAGS = [f"tag-{n}" for n in range(len(SHARES))]


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    return make_project("sqlite", request)


def answered(
    run_id: str, days: float, texts: int | None, *, refused: int = 0, none: int = 0, **changes: Any
) -> Summary:
    """Return a run that ended so many days before noon and had so many texts answered."""
    tags = changes.pop("tags_of_texts", {})
    figures = {"answered": texts, "answered_refused": refused, "answered_none": none, "answered_tags": tags}
    return summary(run_id, NOON - timedelta(days=days), **(figures | changes))


def quiet(*, runs: int = 10, texts: int = 100, **changes: Any) -> list[Summary]:
    """Return runs in which a tenth of the texts has each of the three tags, and a twentieth is refused."""
    tags = dict.fromkeys(("fruit", "animal", "weather"), texts // 10)
    return [
        answered(f"run-{n}", runs - n, texts, tags_of_texts=tags, refused=texts // 20, none=texts // 5, **changes)
        for n in range(runs)
    ]


def now(texts: int = 100, *, refused: int | None = None, none: int | None = None, **tags: int) -> Summary:
    """Return a run like the quiet ones but for the counts given."""
    usual = dict.fromkeys(("fruit", "animal", "weather"), texts // 10)
    return answered(
        "now",
        0,
        texts,
        refused=texts // 20 if refused is None else refused,
        none=texts // 5 if none is None else none,
        tags_of_texts=usual | tags,
    )


def found(summary: Summary, before: Sequence[Summary]) -> list[Drift]:
    return drift_of(summary, before, ["fruit", "animal", "weather"])


# What is told


def test_a_run_like_those_before_has_no_drift() -> None:
    assert found(now(), quiet()) == []


def test_a_tag_that_jumped_is_named_with_its_shares() -> None:
    [shift] = found(now(fruit=40), quiet())

    assert (shift.what, shift.tag, shift.share, shift.before, shift.texts) == ("tag", "fruit", 0.4, 0.1, 100)
    assert 0 < shift.p <= FALSE_ALARMS


def test_a_tag_that_fell_is_named() -> None:
    assert [shift.tag for shift in found(now(1000, weather=10), quiet(texts=1000))] == ["weather"]


def test_refusals_and_texts_without_a_tag_are_compared_too() -> None:
    assert [(shift.what, shift.tag) for shift in found(now(refused=40, none=60), quiet())] == [
        ("refused", None),
        ("none", None),
    ]


def test_a_sure_but_small_change_is_not_told() -> None:
    before = quiet(runs=20, texts=20_000)

    assert found(now(20_000, fruit=2400), before) == []
    assert [shift.tag for shift in found(now(20_000, fruit=3100), before)] == ["fruit"]


def test_a_rare_tag_is_told_of_when_it_doubles() -> None:
    before = quiet(runs=20, texts=20_000)
    for run in before:
        run.answered_tags["weather"] = 200

    [shift] = found(now(20_000, weather=700), before)

    assert (shift.tag, shift.share, shift.before) == ("weather", 0.035, 0.01)


def test_what_varies_by_itself_is_not_told() -> None:
    before = quiet(runs=12)
    for number, run in enumerate(before):
        run.answered_tags["fruit"] = 0 if number % 2 else 40

    assert found(now(fruit=40), before) == []


def test_words_of_a_jump() -> None:
    shift = Drift(what="tag", tag="cardiology", share=0.312, before=0.118, p=0.000312, texts=1210, spec_changed=False)

    assert str(shift) == ("tag cardiology on 31 % of 1,210 new texts, 12 % in the 28 days before (p = 0.0003)")
    other = shift.model_copy(update={"what": "none", "tag": None, "before": 0.004, "p": 1e-9, "spec_changed": True})
    assert str(other) == (
        "no tag on 31 % of 1,210 new texts, 0.4 % in the 28 days before (p < 0.0001); the spec changed since"
    )


def test_another_spec_before_is_told() -> None:
    before = quiet()
    before[3] = before[3].model_copy(update={"spec_id": "ba9876543210"})

    assert [shift.spec_changed for shift in found(now(fruit=40), before)] == [True]


# What is compared


@pytest.mark.parametrize(
    ("texts", "runs", "texts_before", "is_told"),
    [(30, 5, 100, True), (29, 5, 100, False), (100, 4, 100, False), (100, 20, 10, True), (100, 12, 10, False)],
)
def test_with_too_little_to_compare_nothing_is_told(texts: int, runs: int, texts_before: int, is_told: bool) -> None:
    assert bool(found(now(texts, fruit=texts), quiet(runs=runs, texts=texts_before))) == is_told


def test_the_baseline_is_the_28_days_before_without_dry_runs_trials_and_what_has_no_figures(project: Project) -> None:
    """Each run left out would hide the jump, for it has the tag on all texts."""
    before = quiet(runs=6)
    all_of_it: dict[str, Any] = {"tags_of_texts": {"fruit": 5000}}
    left_out = [
        answered("dry", 1, 5000, dry_run=True, **all_of_it),
        answered(f"{TRIAL}evaluate", 1, 5000, **all_of_it),
        answered("old", 28.01, 5000, **all_of_it),
        answered("later", -1, 5000, **all_of_it),
        answered("now", 0, 5000, **all_of_it),
        answered("unknown", 1, None, **all_of_it),
        answered("nothing", 1, 0),
    ]
    for run in [*before, *left_out]:
        put_run(project, run.run_id, run.finished_at, **run.model_dump(exclude={"run_id", "finished_at"}))
    project.run("rolls-up")

    [shift] = find_drift(project.open("any").storage, project.dataset, now(fruit=60))

    assert (shift.tag, shift.before) == ("fruit", 0.1)


@pytest.mark.parametrize("rollup", [None, b"damaged"])
def test_without_a_rollup_nothing_is_compared(
    project: Project, rollup: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    storage = project.open("any").storage
    if rollup:
        storage.put("history/notes.json.gz", rollup)

    assert find_drift(storage, project.dataset, now(fruit=60)) == []
    assert ("not compared" in caplog.text) == bool(rollup)


# How often it is wrong, and how often right


def simulated(
    chance: np.random.Generator, dispersion: float, *, texts: int = 200, runs: int = 28, jump: float | None = None
) -> list[Drift]:
    """Return the drift in a report after random runs; with `jump` the first tag's share is that in the last run.

    Counts are binomial, or where `dispersion` is above 1 beta-binomial with so many times the variance.
    """

    def run(number: int, texts: int, shares: Sequence[float]) -> Summary:
        counts = []
        for share in (*shares, 0.02, 0.1):
            if dispersion > 1:
                alike = (texts - 1) / (dispersion - 1) - 1
                share = chance.beta(share * alike, (1 - share) * alike)
            counts.append(int(chance.binomial(texts, share)))
        *of_tags, refused, none = counts
        tags = dict(zip(TAGS, of_tags, strict=True))
        return answered(f"run-{number}", runs - number, texts, refused=refused, none=none, tags_of_texts=tags)

    before = [run(number, int(chance.integers(texts // 2, 2 * texts)), SHARES) for number in range(runs)]
    last = run(runs, texts, SHARES if jump is None else (jump, *SHARES[1:]))
    return drift_of(last, before, TAGS)


@pytest.mark.parametrize("dispersion", [1, 2, 5])
def test_false_alarms_are_as_rare_as_said(dispersion: float) -> None:
    """Of 400 reports 4 may be wrong; more than 9 would be by chance in one of 100 such tests."""
    chance = np.random.default_rng(20261127)

    alarms = sum(bool(simulated(chance, dispersion)) for _ in range(400))

    assert alarms <= 9


@pytest.mark.parametrize(("dispersion", "least"), [(1, 0.95), (2, 0.9)])
def test_a_tag_that_goes_from_a_tenth_to_three_is_found_in_200_texts(dispersion: float, least: float) -> None:
    chance = np.random.default_rng(7)

    named = Counter(shift.tag for _ in range(100) for shift in simulated(chance, dispersion, jump=0.3))

    assert named[TAGS[0]] >= 100 * least


# In a report


TOPICS = ("apple pie", "zebra herd", "heavy rain")


def put_texts(project: Project, run: int, topic: Callable[[int], str], texts: int = 60) -> None:
    project.execute("DELETE FROM notes")
    for number in range(texts):
        project.put(1000 * run + number, f"{topic(number)} {run} {number}")


def run_seven(project: Project) -> Summary:
    """Let six runs have texts of all topics alike, and a seventh nearly all of one."""
    project.change(limits={"max_deleted_fraction": 1})
    for run in range(6):
        put_texts(project, run, lambda number: TOPICS[number % 3])
        assert project.run(f"run-{run}").drift == []
    put_texts(project, 6, lambda number: TOPICS[0 if number % 12 else 1])
    return project.run("run-6")


def test_a_run_with_many_texts_of_one_topic_warns_of_its_tag(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    told = run_seven(project)

    assert told.state == "success"
    assert told.answered == told.tagged == 60
    assert told.answered_tags["fruit"] == 55
    assert "fruit" in {shift.tag for shift in told.drift}
    [shift] = [shift for shift in told.drift if shift.tag == "fruit"]
    line = f"{shift}"
    assert line.startswith("tag fruit on 92 % of 60 new texts, 33 % in the 28 days before (p")
    assert f"  drift    {line}" in describe(told)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"drift: {line}" in warned
    assert project.summary(project.open("run-6")) == told


def test_what_is_cached_is_not_compared(project: Project) -> None:
    put_texts(project, 0, lambda number: TOPICS[number % 3])
    assert project.run("one").answered == 60

    again = project.run("two", all_rows=True)

    assert (again.answered, again.answered_tags) == (0, {})


def test_refused_and_untagged_texts_are_counted(project: Project) -> None:
    teach(project.llm, apple=completion("", finish_reason="content_filter"), zebra=completion('{"tags": []}'))
    put_texts(project, 0, lambda number: TOPICS[number % 3], texts=9)

    told = project.run("one")

    assert (told.answered, told.answered_refused, told.answered_none) == (9, 3, 3)
    assert told.answered_tags == {"weather": 3}


def test_p_value_of_a_share_that_nothing_ever_had_is_one() -> None:
    assert p_values([Count(0, 50)], [[Count(0, 50)] * 6]) == [1.0]
