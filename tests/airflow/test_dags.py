"""The DAGs, run in Airflow with `dag.test()`."""

import json
import os
import runpy
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.models.asset import AssetEvent
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization
from airflow.utils.session import create_session
from sqlalchemy import select

from demo.mail import MailCatcher
from demo.stand_in import completion, error
from tests.conftest import AIRFLOW_HOME, REPOSITORY
from tests.databases import REFUSAL, teach
from tests.project import Project, merged

NIGHT = datetime(2026, 11, 5, 1, tzinfo=UTC)

Dags = Callable[[], dict[str, Any]]


@pytest.fixture(scope="session")
def airflow_database() -> Path:
    from airflow.utils.db import initdb

    initdb()
    return AIRFLOW_HOME / "airflow.db"


@pytest.fixture
def dags(project: Project, tmp_path: Path, airflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dags]:
    """Return a function that parses the DAG file over a folder with the project's dataset file."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    monkeypatch.setenv("TAGGER_DATASETS", str(folder))
    for conn_id in ("db", "aws_default", "openai_default"):
        connection = project.connections(conn_id)
        assert connection is not None
        fields = {name: getattr(connection, name) for name in ("conn_type", "host", "login", "password", "extra")}
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    def parse() -> dict[str, Any]:
        (folder / "notes.yaml").write_text(yaml.safe_dump(project.content, allow_unicode=True), encoding="utf-8")
        found = runpy.run_path(str(REPOSITORY / "dags" / "tagging.py"))
        return {name: value for name, value in found.items() if name.startswith("tag_")}

    yield parse


@pytest.fixture
def catcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MailCatcher]:
    """An SMTP server that is Airflow's `smtp_default`."""
    with MailCatcher(tmp_path / "mails") as server:
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps(server.airflow_connection))
        yield server


def states(run: Any) -> dict[str, list[str]]:
    """Return the states of a run's task instances by task."""
    found: dict[str, list[str]] = {}
    for instance in run.get_task_instances():
        found.setdefault(instance.task_id, []).append(str(instance.state))
    return found


def test_run_tags_every_text_and_names_its_shards(project: Project, dags: Dags) -> None:
    project.change(shards={"texts_per_shard": 2})
    for n, body in enumerate(["apple", "zebra", "storm", "nothing"]):
        project.put(n, body)

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "success"
    assert len(project.llm.calls) == 4
    assert {row.status for row in project.target().values()} == {"tagged"}
    names = {i.rendered_map_index for i in run.get_task_instances() if i.task_id == "tag"}
    assert names == {"shard 1/2 · 2 texts", "shard 2/2 · 2 texts"}


def test_next_day_without_news_skips_tag_and_still_loads_and_reports(project: Project, dags: Dags) -> None:
    project.put(1, "apple")
    dag = dags()["tag_notes"]
    dag.test(logical_date=NIGHT)

    run = dag.test(logical_date=NIGHT + timedelta(days=1))

    assert str(run.state) == "success"
    assert states(run) == {
        "snapshot": ["success"],
        "plan": ["success"],
        "tag": ["skipped"],
        "shards_ended": ["success"],
        "load_back": ["skipped"],  # no row changed
        "load_ended": ["success"],
        "report": ["success"],
    }
    assert len(project.llm.calls) == 1


def test_failed_texts_below_the_threshold_leave_the_run_green(project: Project, dags: Dags) -> None:
    project.change(limits={"max_failed_fraction": 0.5})
    project.put(1, "apple")
    project.put(2, "zebra")
    teach(project.llm, apple=completion("no json"))

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "success"
    assert sorted(row.status for row in project.target().values()) == ["failed", "tagged"]


def test_too_many_failed_texts_fail_the_run_at_report_after_loading_the_rest(project: Project, dags: Dags) -> None:
    project.put(1, "apple")
    project.put(2, "zebra")
    teach(project.llm, apple=completion("no json"))

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "failed"
    assert states(run)["tag"] == ["success"]
    assert states(run)["report"] == ["failed"]
    assert sorted(row.status for row in project.target().values()) == ["failed", "tagged"]


@pytest.mark.slow
def test_an_execution_timeout_ends_the_tag_step_soon_and_keeps_what_was_answered(project: Project, dags: Dags) -> None:
    texts, concurrency = 200, 4
    project.change(llm={"concurrency": concurrency}, tasks={"tag": {"timeout": "8s", "retries": 0}})
    for n in range(texts):
        project.put(n, f"apple {n}")
    project.llm.latency = 0.5
    dag = dags()["tag_notes"]

    run = dag.test(logical_date=NIGHT)
    asked = len(project.llm.calls)
    project.llm.latency = 0.0

    [tag] = [instance for instance in run.get_task_instances() if instance.task_id == "tag"]
    assert (str(run.state), str(tag.state)) == ("failed", "failed")
    assert (tag.end_date - tag.start_date).total_seconds() < 8 + 20
    tagged = [row for row in project.target().values() if row.status == "tagged"]
    assert 0 < len(tagged) == asked < texts  # also those in flight when the time was over

    assert str(dag.test(logical_date=NIGHT + timedelta(days=1)).state) == "success"
    assert len(project.llm.calls) == texts


def test_broken_shard_does_not_keep_the_other_shards_tags_from_the_table(project: Project, dags: Dags) -> None:
    project.change(shards={"texts_per_shard": 1}, llm={"concurrency": 1})
    project.put(1, "apple")
    project.put(2, "zebra")
    project.llm.script(error(401, "no", "invalid_api_key"))

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "failed"
    assert sorted(states(run)["tag"]) == ["failed", "success"]
    assert (states(run)["load_back"], states(run)["report"]) == (["success"], ["failed"])
    assert sorted(row.status for row in project.target().values()) == ["skipped", "tagged"]


def test_failed_plan_fails_the_run_and_loads_nothing(project: Project, dags: Dags) -> None:
    project.put(1, "apple")
    project.change(limits={"max_cost_usd": 1}, llm={"price": None, "model": "a-model-without-a-price"})

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "failed"
    assert states(run)["plan"] == ["failed"]
    assert states(run)["load_back"] == states(run)["report"] == ["upstream_failed"]
    assert project.target() == {}


def test_target_date_takes_that_day_alone(project: Project, dags: Dags) -> None:
    project.change(source={"updated_at": "updated_at"})
    project.put(1, "apple", "2026-10-01 12:00:00")
    project.put(2, "zebra", "2026-10-02 12:00:00")

    dags()["tag_notes"].test(logical_date=NIGHT, run_conf={"target_date": "2026-10-02"})

    assert list(project.target()) == [2]


def test_edit_of_the_file_in_mid_run_changes_nothing(project: Project, dags: Dags, tmp_path: Path) -> None:
    project.put(1, "apple")
    run = project.take("manual__1")
    project.change(tags=[{"id": "other", "description": "apple"}])
    dags()

    project.finish(run)

    assert project.target()[1].tags == ["fruit"]


def test_wrong_file_gives_a_broken_dag_and_leaves_the_others_alone(
    project: Project, dags: Dags, tmp_path: Path
) -> None:
    (tmp_path / "datasets" / "bad.yaml").write_text("dataset: weekly\nschedule: '0 3 * * *'\nsource: {}\n")
    (tmp_path / "datasets" / "worse.yaml").write_text("- [")

    found = dags()

    assert set(found) == {"tag_notes", "tag_weekly", "tag_worse"}
    assert "broken" in found["tag_weekly"].tags
    assert "`source.conn_id`: found nothing" in found["tag_weekly"].doc_md
    assert str(found["tag_weekly"].test().state) == "failed"
    assert "broken" not in found["tag_notes"].tags


def test_a_broken_file_mails_its_own_people_or_those_of_the_other_files(
    project: Project, dags: Dags, tmp_path: Path, catcher: MailCatcher
) -> None:
    project.change(alerts={"to": ["notes@example.com"]})
    (tmp_path / "datasets" / "bad.yaml").write_text("dataset: weekly\nalerts: {to: [weekly@example.com]}\nsource: {}\n")
    (tmp_path / "datasets" / "worse.yaml").write_text("- [")
    found = dags()

    for name in ("tag_weekly", "tag_worse"):
        found[name].test(logical_date=NIGHT)

    assert [str(mail["to"]) for mail in catcher.mails()] == ["weekly@example.com", "notes@example.com"]
    assert [str(mail["subject"]) for mail in catcher.mails()] == [
        "[tagger] weekly, 2026-11-05: dataset file cannot be used",
        "[tagger] worse, 2026-11-05: dataset file cannot be used",
    ]
    assert "`storage`: found nothing" in catcher.mails()[0].get_body(("plain",)).get_content()  # type: ignore


def test_a_failed_run_mails_once_and_a_run_with_failures_says_so(
    project: Project, dags: Dags, catcher: MailCatcher
) -> None:
    project.change(
        alerts={"to": ["notes@example.com"]},
        limits={"max_failed_fraction": 0.5},
        source={"updated_at": "updated_at"},
    )
    project.put(1, "apple")
    project.put(2, "zebra")
    teach(project.llm, apple=completion("no json"))
    dags()["tag_notes"].test(logical_date=NIGHT)
    project.change(limits={"max_failed_fraction": 0.0})
    dags()["tag_notes"].test(logical_date=NIGHT + timedelta(days=1))
    project.change(source={"text_columns": ["no_such_column"]})
    dags()["tag_notes"].test(logical_date=NIGHT + timedelta(days=2))

    assert [str(mail["subject"]) for mail in catcher.mails()] == [
        "[tagger] notes, 2026-11-05: finished with failures",
        "[tagger] notes, 2026-11-06: run failed at report",
        "[tagger] notes, 2026-11-07: run failed at snapshot",
    ]


def test_a_run_without_an_smtp_connection_says_once_that_mails_are_off(
    project: Project, dags: Dags, caplog: pytest.LogCaptureFixture
) -> None:
    project.change(alerts={"to": ["notes@example.com"]}, limits={"max_failed_fraction": 1})
    project.put(1, "apple")

    run = dags()["tag_notes"].test(logical_date=NIGHT)

    assert str(run.state) == "success"
    assert caplog.text.count("alerts: mails are off: no connection `smtp_default`") == 1


# The form


def test_the_form_offers_what_the_design_names(project: Project, dags: Dags) -> None:
    project.change(limits={"max_cost_usd": 12.5}, timezone="Asia/Tokyo")

    params = dags()["tag_notes"].params

    assert list(params) == ["target_date", "rows", "limit", "dry_run", "retry_refused", "max_cost_usd"]
    assert params.dump() == {
        "target_date": None,
        "rows": "window",
        "limit": None,
        "dry_run": False,
        "retry_refused": False,
        "max_cost_usd": None,
    }
    described = {name: params.get_param(name) for name in params}
    assert all(param.description and param.schema["title"] for param in described.values())
    assert "Asia/Tokyo" in str(described["target_date"].description)
    assert "$12.5" in str(described["max_cost_usd"].description)


@pytest.mark.parametrize(
    "conf",
    [
        {"target_date": "yesterday"},
        {"target_date": "2026-02-30"},
        {"rows": "some"},
        {"limit": 0},
        {"limit": 1.5},
        {"limit": "many"},
        {"dry_run": "yes"},
        {"retry_refused": 1},
        {"max_cost_usd": 0},
        {"max_cost_usd": -1},
    ],
    ids=str,
)
def test_the_form_takes_no_value_out_of_its_range(project: Project, dags: Dags, conf: dict[str, Any]) -> None:
    dag = dags()["tag_notes"]
    [(name, value)] = conf.items()

    with pytest.raises(ParamValidationError):
        dag.params.get_param(name).resolve(value)


def test_a_limited_run_then_a_dry_one(project: Project, dags: Dags) -> None:
    for n, body in enumerate(["apple", "zebra", "storm"]):
        project.put(n, body)
    dag = dags()["tag_notes"]

    limited = dag.test(logical_date=NIGHT, run_conf={"limit": 1, "rows": "all"})
    rows = {row.row_id: row.status for row in project.target().values()}
    dry = dag.test(logical_date=NIGHT + timedelta(days=1), run_conf={"dry_run": True})

    assert str(limited.state) == str(dry.state) == "success"
    assert rows == {0: "tagged", 1: "skipped", 2: "skipped"}
    assert states(dry)["tag"] == states(dry)["load_back"] == ["skipped"]
    assert states(dry)["report"] == ["success"]
    assert len(project.llm.calls) == 1
    assert {row.row_id: row.status for row in project.target().values()} == rows


def test_max_cost_stops_the_run_and_retry_refused_asks_again(project: Project, dags: Dags) -> None:
    project.change(llm={"concurrency": 1})
    project.put(1, "apple")
    project.put(2, "zebra, secretly")
    teach(project.llm, secretly=REFUSAL)

    stopped = dags()["tag_notes"].test(logical_date=NIGHT, run_conf={"max_cost_usd": 0.0000001})
    calls = len(project.llm.calls)
    dags()["tag_notes"].test(logical_date=NIGHT + timedelta(days=1))  # test() leaves its parameters in the DAG
    teach(project.llm)
    again = dags()["tag_notes"].test(logical_date=NIGHT + timedelta(days=2), run_conf={"retry_refused": True})

    assert (str(stopped.state), calls) == ("failed", 0)
    assert (states(stopped)["tag"], states(stopped)["report"]) == (["skipped"], ["failed"])
    assert str(again.state) == "success"
    assert {row.row_id: row.status for row in project.target().values()} == {1: "tagged", 2: "tagged"}
    assert len(project.llm.calls) == 3


def test_a_mistyped_parameter_costs_nothing(project: Project, dags: Dags) -> None:
    project.put(1, "apple")

    run = dags()["tag_notes"].test(logical_date=NIGHT, run_conf={"dryrun": True})

    assert str(run.state) == "failed"
    assert states(run)["snapshot"] == ["failed"]
    assert not project.llm.calls


# Resources


def test_each_step_has_its_own_settings_and_the_default_ones(project: Project, dags: Dags) -> None:
    project.change(
        max_active_runs=3,
        llm={"pool": "llm"},
        tasks={
            "default": {"queue": "safe", "timeout": "1h", "retries": 5},
            "tag": {"queue": "spot", "executor_config": {"KubernetesExecutor": {"image": "tag"}}},
            "report": {"retries": 0, "queue": None},
        },
    )

    dag = dags()["tag_notes"]

    assert dag.max_active_runs == 3
    tasks = {name: dag.task_dict[name] for name in ("snapshot", "plan", "tag", "load_back", "report")}
    assert {name: task.queue for name, task in tasks.items()} == {
        "snapshot": "safe",
        "plan": "safe",
        "tag": "spot",
        "load_back": "safe",
        "report": "default",
    }
    assert {name: task.retries for name, task in tasks.items()} == dict.fromkeys(tasks, 5) | {"report": 0}
    assert {task.execution_timeout for task in tasks.values()} == {timedelta(hours=1)}
    assert {name: task.pool for name, task in tasks.items()} == dict.fromkeys(tasks, "default_pool") | {"tag": "llm"}
    assert tasks["tag"].executor_config == {"KubernetesExecutor": {"image": "tag"}}
    assert all(task.doc_md for task in dag.tasks)


POD = {
    "spec": {"containers": [{"name": "base", "resources": {"limits": {"memory": "4Gi"}}}], "nodeSelector": {"a": "b"}}
}


def test_a_pod_override_is_a_pod_in_the_task_and_after_serialisation(project: Project, dags: Dags) -> None:
    project.change(tasks={"tag": {"executor_config": {"pod_override": POD}}})

    dag = dags()["tag_notes"]

    pod = dag.task_dict["tag"].executor_config["pod_override"]
    assert (pod.spec.node_selector, pod.spec.containers[0].resources.limits) == ({"a": "b"}, {"memory": "4Gi"})
    DagSerialization.from_dict(DagSerialization.to_dict(dag))


@pytest.mark.parametrize(
    ("pod", "told"),
    [
        ({"spec": {"node_selector": {"a": "b"}, "containers": [{"name": "base"}]}}, "Kubernetes understands"),
        ({"spec": {"containers": [{}]}}, "no pod as Kubernetes knows it"),
        ("a pod", "Kubernetes understands"),
    ],
    ids=["snake case", "nameless", "text"],
)
def test_what_is_no_pod_breaks_its_own_dag_and_no_other(
    project: Project, dags: Dags, tmp_path: Path, pod: Any, told: str
) -> None:
    bad = merged(project.content, {"dataset": "bad", "target": {"table": "bad_tags"}})
    bad = merged(bad, {"tasks": {"tag": {"executor_config": {"pod_override": pod}}}})
    (tmp_path / "datasets" / "bad.yaml").write_text(yaml.safe_dump(bad))

    found = dags()

    assert "broken" in found["tag_bad"].tags
    assert "`tasks.tag.executor_config.pod_override`" in found["tag_bad"].doc_md
    assert told in found["tag_bad"].doc_md
    assert "broken" not in found["tag_notes"].tags


# Assets


def asset_events(run: Any) -> list[tuple[str, dict[str, Any]]]:
    with create_session() as session:
        events = session.scalars(select(AssetEvent).where(AssetEvent.source_run_id == run.run_id)).all()
        return [(event.uri, event.extra) for event in events]


def test_new_tags_update_the_targets_asset_with_the_counts(project: Project, dags: Dags) -> None:
    project.put(1, "apple")
    dag = dags()["tag_notes"]

    assert [asset.uri for asset in dag.task_dict["snapshot"].inlets] == ["x-tagger://db/notes"]
    run = dag.test(logical_date=NIGHT)
    nothing_new = dag.test(logical_date=NIGHT + timedelta(days=1))

    [(uri, extra)] = asset_events(run)
    assert uri == "x-tagger://db/note_tags"
    counts = {"written": 1, "deleted": 0, "tagged": 1, "refused": 0, "failed": 0, "skipped": 0, "pending": 0}
    assert {name: extra[name] for name in counts} == counts
    assert asset_events(nothing_new) == []


def test_an_asset_schedule_that_airflow_does_not_take_breaks_the_dag(project: Project, dags: Dags) -> None:
    project.change(schedule={"assets": ["airflow://a"]})

    assert "`schedule.assets`: " in dags()["tag_notes"].doc_md


def test_two_files_of_one_name_do_not_hide_each_other(project: Project, dags: Dags, tmp_path: Path) -> None:
    (tmp_path / "datasets" / "again.yaml").write_text(yaml.safe_dump(project.content))

    assert all("broken" in dag.tags for dag in dags().values())


@pytest.mark.parametrize(
    ("changes", "catchup", "cron"),
    [
        ({"schedule": "0 1 * * *", "source": {"updated_at": "updated_at"}}, True, "0 1 * * *"),
        ({"schedule": "0 1 * * *"}, False, "0 1 * * *"),
    ],
)
def test_catch_up_is_on_where_updated_at_is_known(
    project: Project, dags: Dags, changes: dict[str, Any], catchup: bool, cron: str
) -> None:
    project.change(**changes)

    dag = dags()["tag_notes"]

    assert dag.catchup is catchup
    assert dag.max_active_runs == 1
    assert dag.timetable.summary == cron


def test_no_text_reaches_airflows_database(project: Project, dags: Dags, airflow_database: Path) -> None:
    secret = "the patient ate an apple in the storm"
    project.put(1, secret)
    project.put(2, f"{secret}, twice")
    project.llm.script(completion(f'{{"tags": ["{secret}"]}}'), error(400, secret, "odd"))
    project.change(limits={"max_failed_fraction": 0.1})

    dags()["tag_notes"].test(logical_date=NIGHT)

    with sqlite3.connect(airflow_database) as connection:
        dump = "\n".join(connection.iterdump())
    assert "tag_notes" in dump
    assert secret not in dump


def test_dag_file_is_parsed_without_the_heavy_libraries() -> None:
    code = (
        "import runpy, sys, airflow.sdk, airflow.timetables.trigger\n"
        "import airflow.providers.standard.operators.empty\n"
        f"found = runpy.run_path({str(REPOSITORY / 'dags' / 'tagging.py')!r})\n"
        "assert {'tag_articles', 'tag_survey_answers'} <= set(found), found\n"
        "heavy = {'gokart', 'luigi', 'pandas', 'boto3', 'botocore', 'openai', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TAGGER_DATASETS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
