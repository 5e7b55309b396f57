"""The runbook's commands of Airflow, over a database with a run that waits and then failed; no scheduler runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import blocks
from tests.conftest import REPOSITORY
from tests.project import MINIMAL

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from airflow.utils.db import initdb
initdb()
from airflow.cli.cli_parser import get_parser
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.utils.session import create_session
from sqlalchemy import select, update
parser = get_parser()
def run(words):
    print("$", *words, flush=True)
    arguments = parser.parse_args(words)
    arguments.func(arguments)
run(["dags", "reserialize"])
run(["dags", "trigger", "tag_notes", "--run-id", "night"])
for words in json.load(sys.stdin):
    if "clear" in words:
        with create_session() as session:
            session.execute(update(DagRun).filter_by(run_id="night").values(_state="failed"))
            session.execute(update(TaskInstance).filter_by(run_id="night").values(state="failed"))
    run(words)
    if "clear" in words:
        with create_session() as session:
            states = session.scalars(select(TaskInstance.state).filter_by(run_id="night"))
            print("after:", session.scalar(select(DagRun.state).filter_by(run_id="night")), set(states))
"""
"""Runs commands one after the other, for importing Airflow takes most of the time of each."""


def test_each_command_does_what_the_runbook_says(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "notes.yaml").write_text(yaml.safe_dump(MINIMAL, allow_unicode=True))
    lines = [line for block in blocks("runbook.md") for line in block.look + block.mend if line.startswith("airflow ")]
    named = [line.replace("$DATASET", "notes").replace("$RUN", "night") for line in lines]
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path / 'airflow.db'}",
        "TAGGER_DATASETS": str(tmp_path / "datasets"),
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "300",
    }

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([shlex.split(line, comments=True)[1:] for line in named]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    printed = {
        part.splitlines()[0].strip(): " ".join(part.split()) for part in done.stdout.split("$ ")
    }  # the last of each
    assert "tag_notes | night | queued" in printed["dags list-runs tag_notes --state queued"]
    assert "| tag |" in printed["tasks states-for-dag-run tag_notes night"]
    assert "after: queued {None}" in printed["dags clear tag_notes --run-id night --yes"]
    assert printed['dags trigger tag_notes --conf {"max_cost_usd": 40}'].count("tag_notes") >= 2
    assert "Pool llm created" in printed["pools set llm 16 tag steps"]
    assert "tag_notes" in printed["dags pause tag_notes"]
    assert "tag_notes" in printed["dags unpause tag_notes"]
