"""Airflow's components as the demo starts them."""

import time
from pathlib import Path

from demo.airflow import Airflow, settings
from demo.processes import ServerError


def has_ended(airflow: Airflow, name: str) -> bool:
    try:
        airflow.processes[name].check()
    except ServerError:
        return True
    return False


def test_a_component_that_ended_is_started_again(tmp_path: Path) -> None:
    airflow = Airflow(settings(tmp_path), tmp_path)
    airflow._commands = {"scheduler": ["no-such-command"]}
    airflow._start("scheduler")
    try:
        first = airflow.processes["scheduler"].pid
        until = time.monotonic() + 60
        while not has_ended(airflow, "scheduler"):
            assert time.monotonic() < until
            time.sleep(0.1)

        assert airflow.start_ended() == ["scheduler"]
        assert airflow.processes["scheduler"].pid != first
        assert airflow.start_ended() == []
    finally:
        airflow.stop()
