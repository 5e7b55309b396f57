"""Airflow's own servers, on loopback only, until Ctrl-C."""

import signal
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console

from demo import home as homes
from demo import show
from demo.home import Home
from demo.processes import Process, free_port

COMPONENTS = {
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}


def serve(home: Home, environment: dict[str, str], stack: ExitStack, console: Console) -> None:
    """Start Airflow, say how to get in, and wait for SIGINT or SIGTERM. `stack` ends what was started."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    password = home.password()
    environment = environment | {
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
    }

    def start(name: str, arguments: list[str], ready: Callable[[], bool]) -> None:
        command = [sys.executable, "-m", "airflow", *arguments]
        log = home.logs / f"{name}.log"
        with show.heartbeat(console, f"Starting Airflow's {name}"):
            stack.enter_context(Process(command, log, ready=ready, timeout=120, env=environment, cwd=home.path))

    start("api-server", ["api-server"], lambda: _answers(f"{url}/api/v2/monitor/health"))
    for name, arguments in COMPONENTS.items():
        start(name, arguments, lambda: True)
    console.print(f"\nAirflow is at [bold]{url}[/]   user [bold]{homes.USER}[/]   password [bold]{password}[/]")
    console.print(
        "The DAGs are paused. Trigger one with `rows: all`, or with the target date 2026-11-02, and let it unpause.\n"
        "Ctrl-C ends everything."
    )
    signal.pause()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
