"""Retention: what is past its age goes, what a run did and cost stays; a spec's records go when they are named."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.cache import Cache
from tagger.clean import clean, find_overdue
from tagger.dataset import Retention
from tagger.exceptions import InputError
from tagger.history import Figures, history
from tagger.load import load_back
from tagger.plan import plan
from tagger.report import report
from tagger.rollup import read_rollup, rolled_up
from tagger.runs import TRIAL, Run
from tagger.spec import spec_id
from tagger.spend import spent_usd
from tagger.storage import Storage
from tagger.stored_runs import active_runs, keep_age, stored_runs
from tagger.stored_specs import check_removable, stored_specs
from tagger.tag import tag
from tests.databases import make_project, watch
from tests.project import Project
from tests.servers import S3Store, written_at
from tests.test_cli import Shell, assert_complains, shell  # noqa: F401 - a fixture
from tests.test_history import summary
from tests.test_rollup import counted
from tests.test_spend import EVER, put_attempt
from tests.test_stored_runs import put_batch

NOW = datetime.now(UTC)
DAYS_14, DAYS_400 = timedelta(days=14), timedelta(days=400)
OLD, ANCIENT = timedelta(days=20), timedelta(days=500)


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Project:
    project = make_project("sqlite", request)
    project.change(retention={"snapshots": "14d", "runs": "400d"})
    return project


def storage_of(project: Project) -> Storage:
    return project.open("any").storage


def paths(project: Project, prefix: str = "") -> set[str]:
    return {path for path, _ in storage_of(project).list(prefix)}


def put_run(
    project: Project, run_id: str, age: timedelta, *costs: float | None, summed_up: bool = True, texts: bool = True
) -> Run:
    """Leave a run that did all its work so long ago."""
    run, at = Run(storage_of(project), project.dataset.dataset, run_id), NOW - age
    run.freeze(project.dataset)
    if texts:
        for name in ("snapshot.json", "rows-0.parquet", "shard-p-1.parquet"):
            run.storage.put(run.texts + name, b"texts")
    for name in ("plan.json", "rows-p.parquet", "new-p.parquet", "load.json"):
        run.storage.put(run.files + name, b"no texts")
    for shard, cost in enumerate(costs, 1):
        put_attempt(run, cost, at, shard=shard, state="done" if summed_up else "running")
    if summed_up:
        run.write("summary.json", summary(run_id, at, attempts=counted(run)))
    for prefix in (run.files, run.texts):
        written_at(project.store, prefix, at)
    return run


def cleaned(project: Project) -> list[str]:
    """Delete what is overdue by the dataset's file; return what is wrong with runs that could not be."""
    _, problems = clean(find_overdue(storage_of(project), project.dataset))
    return problems


def figures(project: Project) -> tuple[dict[str, Figures], float, list[str]]:
    """Return what must be the same before and after: days of the history, money of the budget, active runs."""
    storage, dataset = storage_of(project), project.dataset
    days = {day.period: day.figures for day in history(rolled_up(storage, dataset), "day")}
    return days, spent_usd(storage, dataset.dataset, *EVER), active_runs(storage, dataset.dataset)


# By age


def test_without_retention_nothing_is_overdue_and_no_request_is_made(project: Project) -> None:
    put_run(project, "ancient", ANCIENT, 1.0)
    project.change(retention={"snapshots": None, "runs": None})
    requests = watch(storage_of(project))

    found = find_overdue(storage_of(project), project.dataset)

    assert (found.snapshots, found.runs, found.active) == ([], [], [])
    assert requests.made == []


def test_a_run_past_the_age_of_snapshots_loses_its_texts_alone(project: Project) -> None:
    run = put_run(project, "old", OLD, 1.0)
    files = paths(project, run.files)

    assert cleaned(project) == []

    assert paths(project) == files


def test_a_run_past_the_age_of_runs_leaves_its_summary_and_what_it_spent(project: Project) -> None:
    run = put_run(project, "ancient", ANCIENT, 1.0, 10.0)

    assert cleaned(project) == []

    assert paths(project) == {f"{run.files}summary.json", f"{run.files}cleaned-1.json"}
    kept = json.loads(run.storage.get(f"{run.files}cleaned-1.json") or b"")
    assert [spend["cost_usd"] for spend in kept["attempts"]] == [1.0, 10.0]


def test_with_runs_alone_the_texts_go_with_the_rest(project: Project) -> None:
    project.change(retention={"snapshots": None})
    put_run(project, "ancient", ANCIENT)
    young = put_run(project, "old", OLD)

    cleaned(project)

    assert paths(project, "snapshots/") == {young.texts + name for name in ("snapshot.json", "rows-0.parquet")} | {
        f"{young.texts}shard-p-1.parquet"
    }


def test_a_run_is_as_old_as_the_newest_thing_that_it_wrote(project: Project) -> None:
    run = put_run(project, "old", OLD)
    written_at(project.store, f"{run.files}load.json", NOW - timedelta(days=13))
    before = paths(project)

    cleaned(project)

    assert paths(project) == before


@pytest.mark.parametrize("has_summary", [True, False])
def test_a_run_with_a_batch_that_is_not_collected_is_left_alone_and_named(project: Project, has_summary: bool) -> None:
    put_batch(put_run(project, "waits", ANCIENT, 1.0, summed_up=has_summary))
    before = paths(project)

    found = find_overdue(storage_of(project), project.dataset)
    clean(found)

    assert found.active == ["waits"]
    assert paths(project) == before


def test_a_trial_that_was_killed_loses_its_texts(project: Project) -> None:
    put_run(project, f"{TRIAL}evaluate_1", OLD, 1.0, summed_up=False)

    cleaned(project)

    assert paths(project, "snapshots/") == set()


def test_a_run_that_is_taken_up_again_while_others_are_deleted_is_left_alone(project: Project) -> None:
    put_run(project, "old", OLD)
    found = find_overdue(storage_of(project), project.dataset)
    project.open("old").freeze(project.dataset)
    before = paths(project)

    deleted, _ = clean(found)

    assert paths(project) == before
    assert deleted.objects == 0


def test_two_that_clean_at_once_keep_the_money_once(project: Project) -> None:
    put_run(project, "ancient", ANCIENT, 1.0, 10.0, summed_up=False)
    before = figures(project)
    found = find_overdue(storage_of(project), project.dataset)
    other = storage_of(project)._client.meta.events

    def meanwhile(params: dict[str, Any], model: Any, **_: object) -> None:
        if "cleaned-1" in params["Key"]:
            other.unregister("provide-client-params.s3.PutObject", meanwhile)
            clean(found)

    other.register("provide-client-params.s3.PutObject", meanwhile)
    clean(found)

    assert figures(project) == before
    assert len(paths(project)) == 1


def test_a_run_with_a_damaged_file_is_told_and_kept_and_the_others_go(project: Project) -> None:
    damaged = put_run(project, "a", ANCIENT, 1.0)
    damaged.storage.put(f"{damaged.files}shard-2-1.parquet", b"no parquet")
    written_at(project.store, damaged.files, NOW - ANCIENT)
    put_run(project, "b", ANCIENT, 1.0)

    [problem] = cleaned(project)

    assert re.search(r"runs/notes/a/shard-2-1\.parquet: damaged; delete it", problem)
    assert f"{damaged.files}shard-1-1.parquet" in paths(project)
    assert paths(project, "runs/notes/b/") == {f"runs/notes/b/{name}.json" for name in ("summary", "cleaned-1")}


def test_what_is_cleaned_is_not_listed_again(project: Project) -> None:
    put_run(project, "ancient", ANCIENT, 1.0)
    cleaned(project)

    found = find_overdue(storage_of(project), project.dataset)

    assert (found.snapshots, found.runs) == ([], [])


def test_a_cleaned_run_that_is_run_again_counts_its_old_money_and_its_new(project: Project) -> None:
    put_run(project, "one", ANCIENT, 1.0)
    cleaned(project)
    put_run(project, "one", ANCIENT - timedelta(days=1), 10.0)  # under the same names
    assert figures(project)[1] == 11
    before = figures(project)

    cleaned(project)

    assert figures(project) == before
    assert paths(project) == {f"runs/notes/one/{name}.json" for name in ("summary", "cleaned-1", "cleaned-2")}


def test_an_attempt_that_is_kept_counts_once_though_its_file_is_written_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `tagger forget` does with what a killed deletion left."""
    run = put_run(project, "ancient", ANCIENT, 1.0, 10.0)
    before = figures(project)
    with killed_at(monkeypatch, run.storage, 5):  # after three texts, and what is kept of the run
        cleaned(project)
    assert f"{run.files}shard-2-1.parquet" in paths(project)
    file = run.storage.get(f"{run.files}shard-2-1.parquet") or b""
    table = pq.read_table(io.BytesIO(file))
    again = io.BytesIO()
    pq.write_table(table.set_column(1, "row_id", pa.array(["forgotten"])), again)
    run.storage.put(f"{run.files}shard-2-1.parquet", again.getvalue())
    written_at(project.store, run.files, NOW - ANCIENT)

    assert figures(project) == before
    assert cleaned(project) == []

    assert figures(project) == before
    assert paths(project) == {f"{run.files}summary.json", f"{run.files}cleaned-1.json"}


def test_what_is_kept_of_a_run_and_damaged_is_told(project: Project) -> None:
    run = put_run(project, "ancient", ANCIENT, 1.0)
    cleaned(project)
    run.storage.put(f"{run.files}cleaned-1.json", b"{")

    [rolled] = rolled_up(storage_of(project), project.dataset).runs

    assert "cleaned-1.json: damaged" in (rolled.problem or "")
    assert [spent.cost_usd for spent in rolled.spent] == [None]


# Whatever there is, and wherever it is killed


@dataclass(frozen=True)
class Past:
    """A run as it may lie there."""

    age: timedelta
    costs: tuple[float | None, ...]
    kind: str
    has_batch: bool
    has_texts: bool
    is_rewritten: bool
    """Whether `tagger forget` wrote some of its objects again."""


ages = st.sampled_from([0, 1, 25, 27]) | st.integers(24, 430 * 24) | st.sampled_from([d * 24 + 1 for d in (2, 14, 400)])
pasts = st.builds(
    Past,
    age=st.builds(lambda hours: timedelta(hours=hours, minutes=30), ages),
    costs=st.lists(st.none() | st.floats(0, 5), max_size=3).map(tuple),
    kind=st.sampled_from(["summed up", "summed up", "killed", "trial"]),
    has_batch=st.sampled_from([False, False, False, True]),
    has_texts=st.booleans(),
    is_rewritten=st.booleans(),
)
retentions = st.sampled_from([("14d", "400d"), ("14d", "14d"), ("2d", None), (None, "30d"), (None, None)])
names = (f"notes_{number}" for number in count())


class Killed(Exception):
    """The process is gone."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, storage: Storage, at: int) -> Iterator[None]:
    """Make the process die before the write or the deletion of this number; of many at once, each is one."""
    left = iter(range(at))

    def die(model: Any, **_: object) -> None:
        if model.name in ("PutObject", "DeleteObject") and next(left, None) is None:
            raise Killed

    def one_by_one(storage: Storage, paths: Any) -> None:
        for path in sorted(paths, key=lambda path: path[::-1]):  # S3 does many in any order
            storage.delete(path)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Storage, "delete_many", one_by_one)
        storage._client.meta.events.register("provide-client-params.s3", die, unique_id="die")
        try:
            yield
        finally:
            storage._client.meta.events.unregister("provide-client-params.s3", unique_id="die")


def rewrite(run: Run) -> None:
    """Write some of a run's objects again, as `tagger forget` does."""
    [stored] = [stored for stored in stored_runs(run.storage, run.dataset_name) if stored.run.run_id == run.run_id]
    there = [path for prefix in (run.files, run.texts) for path, _ in run.storage.list(prefix)]
    again = {path for path in there if re.search(r"/(rows|shard)-", path)}
    keep_age(stored, again)
    for path in again:
        run.storage.put(path, run.storage.get(path) or b"")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(pasts, max_size=4), retentions, st.integers(0, 40))
def test_exactly_what_is_past_its_age_goes_and_what_it_did_and_cost_stays_wherever_that_is_killed(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    there: list[Past],
    retention: tuple[str | None, str | None],
    kill: int,
) -> None:
    project.change(dataset=next(names), retention=dict(zip(("snapshots", "runs"), retention, strict=True)))
    limits = Retention.model_validate(project.content["retention"])
    left, snapshots = set[str](), dict[str, set[str]]()
    for number, past in enumerate(there):
        run_id = f"{TRIAL}{number}" if past.kind == "trial" else f"run-{number}"
        run = put_run(project, run_id, past.age, *past.costs, summed_up=past.kind == "summed up", texts=past.has_texts)
        if past.has_batch:
            put_batch(run, spec=project.dataset.dataset)
        if past.is_rewritten:
            rewrite(run)
        files, texts = paths(project, run.files), paths(project, run.texts)
        snapshots[run.texts] = texts
        if limits.runs is not None and past.age > limits.runs and not past.has_batch:
            files = {f"{run.files}summary.json"} & files
            files |= {f"{run.files}cleaned-1.json"} if past.costs else set()
            texts = set()
        elif limits.snapshots is not None and past.age > limits.snapshots and not past.has_batch:
            texts = set()
        left |= files | texts
    before = figures(project)

    with killed_at(monkeypatch, storage_of(project), kill):
        cleaned(project)
    assert figures(project) == before
    for folder, whole in snapshots.items():
        assert paths(project, folder) == whole or f"{folder}snapshot.json" not in paths(project, folder)

    assert cleaned(project) == []
    assert figures(project) == before
    name = project.dataset.dataset
    assert paths(project, f"runs/{name}/") | paths(project, f"snapshots/{name}/") == left


# By the report


def aged(project: Project, run: Run, age: timedelta) -> None:
    for prefix in (run.files, run.texts):
        written_at(project.store, prefix, NOW - age)


def test_a_report_deletes_what_is_past_its_age_and_says_how_much(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    project.put(1, "apple")
    for run_id in ("ancient", "old"):
        project.run(run_id)
    for run_id, age in (("ancient", ANCIENT), ("old", OLD)):
        aged(project, project.open(run_id), age)
    texts = paths(project, "snapshots/")

    with caplog.at_level(logging.INFO, "tagger"):
        project.run("new")

    assert {path.split("/")[2] for path in paths(project, "snapshots/")} == {"new"}
    assert paths(project, "runs/notes/ancient/") == {
        f"runs/notes/ancient/{name}.json" for name in ("summary", "cleaned-1")
    }
    [told] = [record.message for record in caplog.records if "retention" in record.message]
    assert re.fullmatch(r"retention: \d+ objects of 2 runs, [\d,]+ bytes deleted", told)
    assert len(texts) == 5  # ancient asked a text, and had a shard


def test_after_a_report_the_rollup_has_the_runs_that_were_cleaned(project: Project) -> None:
    project.put(1, "apple")
    project.run("ancient")
    cost = project.summary(project.open("ancient")).cost_usd
    aged(project, project.open("ancient"), ANCIENT)

    project.run("new")

    rollup = read_rollup(storage_of(project), "notes")
    assert rollup is not None
    [(run_id, spent)] = [(run.run_id, run.spent) for run in rollup.runs if run.spent]
    assert (run_id, spent[0].cost_usd) == ("ancient", cost)
    assert rolled_up(storage_of(project), project.dataset).runs[0].spent == spent


def test_the_run_that_is_reported_is_left_alone(project: Project) -> None:
    run = project.take("one")
    plan(run, project.connections)
    load_back(run, project.connections)
    aged(project, run, ANCIENT)

    report(run)

    assert run.snapshot()


def refuse(storage: Storage, operation: str) -> Callable[[], None]:
    """Let S3 deny an operation until the returned function is called."""

    def denied(**_: object) -> Any:
        answer = {"Error": {"Code": "AccessDenied", "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        return SimpleNamespace(status_code=403), answer

    events = storage._client.meta.events
    events.register(f"before-call.s3.{operation}", denied, unique_id="refuse")
    return lambda: events.unregister(f"before-call.s3.{operation}", unique_id="refuse")


def test_a_report_that_cannot_delete_warns_and_does_not_fail(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    project.run("old")
    aged(project, project.open("old"), OLD)
    allow = refuse(storage_of(project), "DeleteObjects")

    try:
        assert project.run("new").state == "success"
    finally:
        allow()

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search("retention: the next report tries again.*access denied", caplog.text)
    project.run("newer")
    assert {path.split("/")[2] for path in paths(project, "snapshots/")} == {"new", "newer"}


def test_a_run_that_started_long_before_its_report_deletes_nothing(project: Project) -> None:
    project.run("old")
    aged(project, project.open("old"), OLD)
    run = project.take("cleared")
    run.write("snapshot.json", run.snapshot().model_copy(update={"started_at": NOW - timedelta(hours=27)}))

    project.finish(run)

    assert "snapshots/notes/old/snapshot.json" in paths(project)


# A run whose files are gone


@pytest.mark.parametrize("step", [plan, lambda run, connections: tag(run, 1, connections), load_back])
def test_a_step_of_a_run_whose_snapshot_is_gone_says_so(project: Project, step: Callable[[Run, Any], object]) -> None:
    project.put(1, "apple")
    project.run("old")
    run = project.open("old")
    aged(project, run, OLD)
    cleaned(project)
    before = paths(project)

    with pytest.raises(InputError, match=r"its snapshot\.json is gone \(`retention`\).*clear its task `snapshot` too"):
        step(run, project.connections)

    assert paths(project) == before
    assert project.run("old").state == "success"


@pytest.mark.parametrize("step", [plan, lambda run, connections: tag(run, 1, connections), load_back])
def test_a_step_of_a_run_whose_files_are_gone_says_so(project: Project, step: Callable[[Run, Any], object]) -> None:
    project.put(1, "apple")
    project.run("ancient")
    run = project.open("ancient")
    aged(project, run, ANCIENT)
    cleaned(project)

    with pytest.raises(InputError, match=r"its dataset\.json is gone \(`retention`\)"):
        step(run, project.connections)


def test_a_run_that_never_had_a_snapshot_is_told_so(project: Project) -> None:
    run = project.open("new")
    run.freeze(project.dataset)

    with pytest.raises(InputError, match=r"has no snapshot\.json: `tagger snapshot` has not succeeded"):
        plan(run, project.connections)


# The command


def keep(shell: Shell, name: str = "notes", **retention: str) -> None:  # noqa: F811
    """Write a dataset file with this retention."""
    shell.project.content["retention"] = retention
    shell.write(name, dataset=name, target={"table": f"{name}_tags"})


def test_clean_lists_and_deletes_nothing_without_yes(shell: Shell) -> None:  # noqa: F811
    keep(shell, snapshots="14d", runs="400d")
    put_run(shell.project, "old", OLD)
    put_run(shell.project, "ancient", ANCIENT, 1.0)
    put_batch(put_run(shell.project, "waits", OLD))
    before = paths(shell.project)

    assert shell.run("clean") == 0

    assert shell.out.splitlines() == [
        "notes: snapshots, which hold texts, are kept for 14d, runs for 400d",
        "  snapshots past that: 3 objects of 1 run, 15 bytes",
        *re.findall(r"  runs past that: 9 objects of 1 run, [\d,]+ bytes", shell.out),
        "  left alone: run `waits`, which has a batch that is not collected",
        *re.findall(r"nothing is deleted without `--yes`, which deletes 12 objects of 2 runs, .*", shell.out),
    ]
    assert paths(shell.project) == before


def test_clean_deletes_with_yes_and_then_there_is_nothing_left(shell: Shell) -> None:  # noqa: F811
    keep(shell, snapshots="14d", runs="400d")
    put_run(shell.project, "old", OLD)
    put_run(shell.project, "ancient", ANCIENT, 1.0)

    assert shell.run("clean", "notes", "--yes") == 0
    assert re.search(r"^deleted: 12 objects of 2 runs, ", shell.out, re.MULTILINE)
    assert shell.run("clean", "notes", "--yes") == 0
    assert "deleted: 0 objects of 0 runs, 0 bytes" in shell.out
    assert shell.run("clean") == 0
    assert "--yes" not in shell.out


def test_clean_goes_through_all_datasets_and_says_which_keep_everything(shell: Shell) -> None:  # noqa: F811
    keep(shell, "others", runs="400d")
    keep(shell)
    put_run(shell.project, "ancient", ANCIENT)

    assert shell.run("clean", "--yes") == 0

    assert "notes: snapshots, which hold texts, are kept for ever, runs for ever" in shell.out
    assert "others: snapshots, which hold texts, are kept for 400d, runs for 400d" in shell.out
    assert "snapshots/notes/ancient/snapshot.json" in paths(shell.project)


def test_clean_with_a_broken_file_deletes_nothing(shell: Shell) -> None:  # noqa: F811
    keep(shell, snapshots="14d")
    shell.write("wrong", dataset="wrong", target={"table": "wrong_tags"}, max_tags=0)
    put_run(shell.project, "old", OLD)

    assert shell.run("clean", "--yes") == 2

    assert_complains(shell, r"wrong\.yaml: `max_tags`")
    assert "snapshots/notes/old/snapshot.json" in paths(shell.project)


def test_clean_tells_of_damaged_runs_and_fails(shell: Shell) -> None:  # noqa: F811
    keep(shell, runs="400d")
    run = put_run(shell.project, "ancient", ANCIENT)
    run.storage.put(f"{run.files}shard-1-1.parquet", b"")
    written_at(shell.project.store, run.files, NOW - ANCIENT)

    assert shell.run("clean", "--yes") == 1

    assert "shard-1-1.parquet: damaged" in shell.complaints[0]
    assert shell.complaints[1:] == ["tagger: the files of 1 run could not be deleted"]


@pytest.mark.parametrize(
    ("retention", "complaint"),
    [
        ({"snapshots": "1d"}, r"`retention\.snapshots`: found '1d', expected 2d or more"),
        ({"runs": "47h"}, r"`retention\.runs`: found '47h', expected 2d or more"),
        (
            {"snapshots": "14d", "runs": "13d"},
            r"`retention\.runs`: found '13d', expected 14d or more, as `snapshots` is: a run's files go last",
        ),
        ({"snapshots": 14}, r"`retention\.snapshots`: found 14 \(a number\), expected a duration such as"),
        ({"snapshot": "14d"}, r"`retention\.snapshot`: found an unknown key, expected `snapshots`\?"),
    ],
)
def test_a_retention_that_cannot_be_is_told(shell: Shell, retention: dict[str, Any], complaint: str) -> None:  # noqa: F811
    keep(shell, **retention)

    assert shell.run("clean", "notes") == 2

    assert_complains(shell, complaint)


@pytest.mark.parametrize(
    ("retention", "line"),
    [
        ({}, "snapshots, which hold texts, are kept for ever, runs for ever"),
        ({"snapshots": "36h"}, None),
        ({"snapshots": "60h"}, "snapshots, which hold texts, are kept for 2.5d, runs for ever"),
        ({"snapshots": "14d", "runs": "400d"}, "snapshots, which hold texts, are kept for 14d, runs for 400d"),
    ],
)
def test_check_says_how_long_texts_are_kept(shell: Shell, retention: dict[str, Any], line: str | None) -> None:  # noqa: F811
    keep(shell, **retention)

    assert shell.run("check", "notes") == (2 if line is None else 0)

    assert line is None or f"notes: retention: {line}" in shell.out.splitlines()


# Specs


def put_specs(shell: Shell) -> tuple[str, str]:  # noqa: F811
    """Leave the records of two specs: one that no file has any more, and that of `notes`."""
    project = shell.project
    project.run("first")
    project.change(prompt="You tag long notes.")
    shell.write()
    project.run("second")
    old, new = spec_id(replace_prompt(project)), spec_id(project.dataset)
    assert {path.split("/")[1] for path in paths(project, "cache/")} == {old, new}
    return old, new


def replace_prompt(project: Project) -> Any:
    return project.dataset.model_copy(update={"prompt": "You tag short notes."})


def test_specs_are_listed_with_what_they_hold_cost_and_who_uses_them(shell: Shell) -> None:  # noqa: F811
    old, new = put_specs(shell)
    cost = shell.project.summary(shell.project.open("first")).cost_usd

    assert shell.run("clean", "notes", "--spec") == 0

    first, second, last = shell.out.splitlines()
    today = rf"{datetime.now(UTC):%Y-%m-%d}"
    told = rf"last used {today}, used by no dataset file, cost \${cost:.4f}, as its runs say"
    assert re.fullmatch(rf"spec {old}: 2 records, \d+ bytes, {told}", first)
    assert re.fullmatch(rf"spec {new}: 2 records, .* used now by notes, cost .*", second)
    assert "2 specs" in last


def test_a_spec_whose_runs_do_not_tell_of_all_records_costs_what_a_sample_does(shell: Shell) -> None:  # noqa: F811
    old, _ = put_specs(shell)
    project = shell.project
    for name in ("summary.json", "cleaned-1.json"):
        storage_of(project).delete(f"runs/notes/first/{name}")

    [found] = stored_specs(storage_of(project), [project.dataset], [old])

    mean = Cache(storage_of(project), old, "offline-stand-in").mean_cost()
    assert mean is not None
    assert found.spent_usd is None
    assert found.repeat_usd == pytest.approx(2 * mean)
    assert "by a sample" in str(found)


def test_a_spec_was_last_used_when_a_run_ended_or_else_when_a_record_was_written(shell: Shell) -> None:  # noqa: F811
    old, _ = put_specs(shell)
    project = shell.project
    written_at(project.store, "cache/", NOW - OLD)
    [found] = stored_specs(storage_of(project), [], [old])
    assert found.used_at == project.summary(project.open("first")).finished_at

    for path in paths(project, "runs/"):
        storage_of(project).delete(path)
    [found] = stored_specs(storage_of(project), [], [old])

    assert found.used_at == (NOW - OLD).replace(microsecond=0)


def test_a_spec_is_removed_with_yes_and_its_texts_are_then_asked_again(shell: Shell) -> None:  # noqa: F811
    old, new = put_specs(shell)
    project = shell.project
    put_batch(project.open("first"), collected=True, spec=old)
    before = paths(project)

    assert shell.run("clean", "notes", "--spec", old) == 0
    again = r"a dataset that comes back to it pays for its 2 texts again: about \$0\.\d+$"
    assert re.search(rf"^spec {old}: not removed without `--yes`; {again}", shell.out, re.MULTILINE)
    assert paths(project) == before

    assert shell.run("clean", "notes", "--spec", old, "--yes") == 0
    assert re.search(rf"^spec {old}: removed; {again}", shell.out, re.MULTILINE)
    assert paths(project, f"cache/{old}/") | paths(project, f"batches/{old}/") == set()
    assert len(paths(project, f"cache/{new}/")) == 2
    project.change(prompt="You tag short notes.")
    assert project.run("third").tagged == 2


def test_a_spec_that_a_file_has_now_is_refused_even_a_file_of_another_folder(shell: Shell) -> None:  # noqa: F811
    _, new = put_specs(shell)
    elsewhere = shell.folder.parent / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "other.yaml"
    path.write_text(shell.write().read_text().replace("You tag long notes.", "Another one."))
    before = paths(shell.project)

    for dataset in ("notes", str(path)):
        assert shell.run("clean", dataset, "--spec", new, "--yes") == 2
        assert_complains(shell, rf"spec `{new}` is that of notes: its records are in use")

    assert paths(shell.project) == before


def test_a_spec_that_is_not_there_is_refused_and_none_of_those_named_goes(shell: Shell) -> None:  # noqa: F811
    old, _ = put_specs(shell)
    before = paths(shell.project)

    assert shell.run("clean", "notes", "--spec", old, "000000000000", "--yes") == 2

    assert_complains(shell, "no spec `000000000000`; `tagger clean DATASET --spec` lists those it has")
    assert shell.out == ""
    assert paths(shell.project) == before


def test_a_spec_of_a_run_at_work_is_refused(shell: Shell) -> None:  # noqa: F811
    old, _ = put_specs(shell)
    project = shell.project
    project.change(prompt="You tag short notes.")
    project.take("at-work")

    assert shell.run("clean", "notes", "--spec", old, "--yes") == 2

    assert_complains(shell, rf"spec `{old}` is that of run `at-work` of `notes`, which may be at work")
    assert len(paths(project, f"cache/{old}/")) == 2


def test_a_spec_with_a_batch_that_is_not_collected_is_refused(shell: Shell) -> None:  # noqa: F811
    old, _ = put_specs(shell)
    put_batch(shell.project.open("second"), spec=old)

    assert shell.run("clean", "notes", "--spec", old, "--yes") == 2

    assert_complains(shell, rf"spec `{old}`: 1 batches of it are not collected yet")


@pytest.mark.parametrize("arguments", [["--spec"], ["notes", "notes", "--spec"], ["notes", "--yes", "--spec"]])
def test_specs_want_one_dataset_and_their_removal_ids(shell: Shell, arguments: list[str]) -> None:  # noqa: F811
    assert shell.run("clean", *arguments) == 2

    assert_complains(shell, r"expected one DATASET")


def test_a_removal_that_was_killed_half_way_is_gone_on_with(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        project.put(number, f"apple {number}")
    project.run("one")
    storage, spec = storage_of(project), spec_id(project.dataset)
    with killed_at(monkeypatch, storage, 10):
        Cache(storage, spec, "any").clear()
    [left] = stored_specs(storage, [], [spec])
    assert 0 < left.extent.records < 40

    check_removable(storage, [left])
    Cache(storage, spec, "any").clear()

    assert stored_specs(storage, []) == []


# Many objects at once


@pytest.fixture(params=["moto_server", "seaweedfs"])
def store(request: pytest.FixtureRequest) -> S3Store:
    found: S3Store = request.getfixturevalue(request.param)
    return found


def test_objects_are_deleted_a_thousand_a_request_and_need_not_exist(store: S3Store) -> None:
    storage = Storage(f"s3://{store.bucket}/delete+many", store.client())
    there = [f"runs/a:b+c é/{number}" for number in range(3)]
    for path in [*there, "other"]:
        storage.put(path, b"x")
    requests = watch(storage)

    storage.delete_many([*there, *(f"missing-{number}" for number in range(1500))])

    assert requests.counts == {"DeleteObjects": 2}
    assert [path for path, _ in storage.list("")] == ["other"]


def test_deleting_nothing_makes_no_request(store: S3Store) -> None:
    storage = Storage(f"s3://{store.bucket}", store.client())
    requests = watch(storage)

    storage.delete_many([])

    assert requests.made == []


def test_an_object_that_may_not_be_deleted_is_an_error(project: Project) -> None:
    storage = storage_of(project)

    def locked(parsed: dict[str, Any], **_: object) -> None:
        parsed["Errors"] = [{"Key": "x", "Code": "AccessDenied", "Message": "locked"}]

    storage._client.meta.events.register("after-call.s3.DeleteObjects", locked, unique_id="locked")
    try:
        with pytest.raises(InputError, match="deleting x and others: access denied"):
            storage.delete_many(["x"])
    finally:
        storage._client.meta.events.unregister("after-call.s3.DeleteObjects", unique_id="locked")


def test_folders_are_those_right_below(store: S3Store) -> None:
    storage = Storage(f"s3://{store.bucket}/folders", store.client())
    for path in ("cache/b b/00/x", "cache/a+é/00/x", "cache/a+é/01/x", "cache/file", "other/c/x"):
        storage.put(path, b"x")

    assert sorted(storage.folders("cache/")) == ["a+é", "b b"]
    assert storage.folders("nothing/") == []


def test_a_spec_whose_records_are_all_removed_is_not_listed(store: S3Store) -> None:
    storage = Storage(f"s3://{store.bucket}/specs", store.client())
    cache = Cache(storage, "0123456789ab", "any")
    for key in ("0" * 32, "a" * 32, "b" * 32):
        storage.put(cache.path(key), b"{}" + b" " * 100)
    storage.put("cache/0123456789ab/other", b"x")
    assert [spec.extent.records for spec in stored_specs(storage, [])] == [3]

    cache.clear()

    assert stored_specs(storage, []) == []
    assert list(storage.list("")) == []
