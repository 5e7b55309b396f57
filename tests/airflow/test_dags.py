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

from demo.stand_in import completion, error
from tests.conftest import AIRFLOW_HOME, REPOSITORY
from tests.databases import teach
from tests.project import Project

pytestmark = pytest.mark.xdist_group("airflow")

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
        "load_back": ["success"],
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
    project.change(llm={"concurrency": concurrency})
    for n in range(texts):
        project.put(n, f"apple {n}")
    project.llm.latency = 0.5
    dag = dags()["tag_notes"]
    dag.task_dict["tag"].partial_kwargs |= {"execution_timeout": timedelta(seconds=4), "retries": 0}

    run = dag.test(logical_date=NIGHT)
    asked = len(project.llm.calls)
    project.llm.latency = 0.0

    [tag] = [instance for instance in run.get_task_instances() if instance.task_id == "tag"]
    assert (str(run.state), str(tag.state)) == ("failed", "failed")
    assert (tag.end_date - tag.start_date).total_seconds() < 4 + 20
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
    assert all(task.retries for task in dag.tasks if task.task_id != "shards_ended")


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
