"""Airflow's components as the demo starts them."""

import time
from pathlib import Path

import pytest

from demo.airflow import Airflow, settings
from demo.processes import ServerError


def test_a_component_that_ended_is_told(tmp_path: Path) -> None:
    airflow = Airflow(settings(tmp_path), tmp_path)
    airflow._commands = {"scheduler": ["no-such-command"]}
    airflow._start("scheduler")
    airflow.check()
    try:
        with pytest.raises(ServerError, match="scheduler"):
            for _ in range(600):
                airflow.check()
                time.sleep(0.1)
    finally:
        airflow.stop()
