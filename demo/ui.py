"""Airflow's web interface, on loopback only, until Ctrl-C."""

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from demo import show
from demo.airflow import USER, Airflow


def serve(environment: Mapping[str, str], logs: Path, mails: Path, console: Console) -> None:
    """Start Airflow, say how to get in, and wait for SIGINT or SIGTERM."""
    airflow = Airflow(environment, logs)
    try:
        with show.heartbeat(console, "Starting Airflow", lambda: f"waiting for {', '.join(airflow.missing())}"):
            airflow.start()
        console.print(
            f"\nAirflow is at [bold]{airflow.url}[/]   user [bold]{USER}[/]   password [bold]{airflow.password}[/]\n"
            "The DAGs are paused. Trigger one with `rows: all`, or the target date 2026-11-02, and let it unpause.\n"
            "Tagging, in the navigation, shows what the datasets cost, what the cache saved, and their tags.\n"
            f"The mails that a failed or late run sends are written to {mails}\n"
            "Ctrl-C ends everything."
        )
        while True:
            time.sleep(1)
            airflow.check()
    finally:
        airflow.stop()
