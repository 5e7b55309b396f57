"""Airflow's components as child processes on loopback, and a small client for its REST API."""

import json
import os
import secrets
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from cryptography.fernet import Fernet

from demo.processes import LOOPBACK, Process, ServerError, free_port

REPOSITORY = Path(__file__).resolve().parent.parent
USER = "admin"
START_SECONDS = 180.0
POLL_SECONDS = 0.5
WORKER = "worker-"
COMPONENTS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}
HEALTH = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}
"""What the API calls the components that report to the database."""


def settings(home: Path, database_url: str | None = None) -> dict[str, str]:
    """Return Airflow's settings: one user, nothing but loopback, everything below a folder or in the database."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        # Airflow would write one into its home, where components that start at the same time miss it
        "AIRFLOW__CORE__FERNET_KEY": _kept(home / "fernet.key", lambda: Fernet.generate_key().decode()),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database_url or f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
    }


def password(home: Path) -> str:
    """Return the password of the user, made once for a home."""
    passwords = _kept(home / "passwords.json", lambda: json.dumps({USER: secrets.token_urlsafe(9)}))
    return str(json.loads(passwords)[USER])


def _kept(file: Path, make: Callable[[], str]) -> str:
    if not file.exists():
        file.touch(0o600)
        file.write_text(make())
    return file.read_text()


class Airflow:
    """api-server, scheduler, dag-processor, triggerer and any number of Celery workers, over a database that exists.

    They end with `stop()` and at the end of the `with` block.
    """

    def __init__(self, environment: Mapping[str, str], logs: Path, *, workers: int = 0, slots: int = 4) -> None:
        """Describes the components; `start` starts them.

        Args:
            environment: Their whole environment, `settings` among it; the port is added here.
            logs: The folder for what they print, a file each.
            workers: Number of Celery workers.
            slots: Tasks that a worker runs at once.
        """
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self.environment = {
            **environment,
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
        }
        self.home = Path(environment["AIRFLOW_HOME"])
        self.logs = logs
        self.processes: dict[str, Process] = {}
        self._commands = dict(COMPONENTS)
        for number in range(1, workers + 1):
            name = f"{WORKER}{number}"
            pid_file = self.home / f"{name}.pid"  # the workers of one home have the same one by default
            self._commands[name] = ["celery", "worker", "--skip-serve-logs", "--without-gossip", "--without-mingle"]
            self._commands[name] += ["--celery-hostname", name, "--concurrency", str(slots), "--pid", str(pid_file)]

    def start(self) -> Self:
        """Start everything at once and return when all of it works.

        Raises:
            ServerError: A component ended, or did not report in time.
        """
        self.password = password(self.home)
        try:
            for name in self._commands:
                self._start(name)
            self.wait(lambda: not self.missing(), START_SECONDS, lambda: f"{', '.join(self.missing())} not ready")
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self, name: str) -> None:
        command = [sys.executable, "-m", "airflow", *self._commands[name]]
        log = self.logs / f"{name}.log"
        # a worker would wait for its tasks, and the triggerer 10 s for its child, which the signal reaches too
        end = signal.SIGKILL if name.startswith((WORKER, "triggerer")) else signal.SIGTERM
        process = Process(command, log, ready=lambda: True, env=self.environment, cwd=self.home, stop_signal=end)
        self.processes[name] = process.start()

    def check(self) -> None:
        """Raise `ServerError` if a component has ended."""
        for process in self.processes.values():
            process.check()

    def stop(self) -> None:
        """End everything, the tasks too."""
        children = [child for name in self.processes for child in self._children(name)]
        with ThreadPoolExecutor(len(self._commands)) as pool:
            list(pool.map(Process.stop, self.processes.values()))
        self.processes.clear()
        _kill(children)

    def kill(self, name: str) -> None:
        """End a component and all its children with SIGKILL, as if its machine had died."""
        children = self._children(name)
        process = self.processes.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        _kill(children)
        process.stop()

    def restart(self, name: str) -> None:
        """Kill a component, and start it again."""
        self.kill(name)
        self._start(name)

    def __enter__(self) -> Self:
        """Start everything."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End everything."""
        self.stop()

    def missing(self) -> list[str]:
        """Return the components that do not work yet, by what they told the database."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v2/monitor/health", timeout=5) as response:
                health = json.load(response)
        except OSError:
            return list(self._commands)
        missing = [name for name, called in HEALTH.items() if (health[called] or {}).get("status") != "healthy"]
        workers = [name for name in self._commands if name.startswith(WORKER)]
        return missing + [name for name in workers if f"celery@{name} ready" not in self.log(name)]

    def log(self, name: str) -> str:
        """Return what a component printed."""
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, holds: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
        """Wait until something holds, as long as all components run.

        Raises:
            ServerError: A component ended, with the end of its log; or it did not come to hold in this time, with what
                `otherwise` says.
        """
        deadline = time.monotonic() + seconds
        while not holds():
            for process in self.processes.values():
                process.check()
            if time.monotonic() > deadline:
                raise ServerError(f"after {seconds:g} s: {otherwise()}", None)
            time.sleep(POLL_SECONDS)

    def _children(self, name: str) -> list[psutil.Process]:
        # Airflow's tasks have process groups of their own
        try:
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def client(self) -> "Client":
        """Return a client with the rights of the user."""
        return Client(self)


class APIError(RuntimeError):
    """The REST API refused a request.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        """Keeps the status beside the message."""
        super().__init__(message)
        self.status = status


class Client:
    """A user of the REST API."""

    def __init__(self, airflow: Airflow) -> None:
        """Logs in."""
        self._airflow = airflow
        self._token = ""
        login = {"username": USER, "password": airflow.password}
        self._token = self._request("POST", "/auth/token", login)["access_token"]

    def get(self, path: str, **query: Any) -> Any:
        """Return what is at a path below `/api/v2`."""
        return self._request("GET", f"/api/v2{path}" + (f"?{urllib.parse.urlencode(query)}" if query else ""))

    def post(self, path: str, **content: Any) -> Any:
        """Post to a path below `/api/v2`."""
        return self._request("POST", f"/api/v2{path}", content)

    def patch(self, path: str, **content: Any) -> Any:
        """Change what is at a path below `/api/v2`."""
        return self._request("PATCH", f"/api/v2{path}", content)

    def wait_for_dag(self, dag_id: str, seconds: float = 120) -> None:
        """Wait until a DAG's file has been parsed."""
        self._airflow.wait(
            lambda: self._has_dag(dag_id), seconds, lambda: f"no DAG {dag_id}; {self.get('/importErrors')}"
        )

    def unpause(self, dag_id: str) -> None:
        """Let a DAG's runs start."""
        self.patch(f"/dags/{dag_id}", is_paused=False)

    def trigger(self, dag_id: str, logical_date: str | None = None, **conf: Any) -> str:
        """Start a run with these parameters; return its id."""
        return str(self.post(f"/dags/{dag_id}/dagRuns", logical_date=logical_date, conf=conf)["dag_run_id"])

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Return a DAG's runs."""
        return list(self.get(f"/dags/{dag_id}/dagRuns")["dag_runs"])

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return a run."""
        return dict(self.get(f"/dags/{dag_id}/dagRuns/{_quoted(run_id)}"))

    def wait_for_run(self, dag_id: str, run_id: str, seconds: float = 300) -> str:
        """Wait until a run has ended; return its state."""
        self._airflow.wait(
            lambda: self.run(dag_id, run_id)["state"] in ("success", "failed"),
            seconds,
            lambda: f"{run_id} of {dag_id} has not ended: {self.states(dag_id, run_id)}",
        )
        return str(self.run(dag_id, run_id)["state"])

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return a run's task instances."""
        return list(self.get(f"/dags/{dag_id}/dagRuns/{_quoted(run_id)}/taskInstances", limit=100)["task_instances"])

    def states(self, dag_id: str, run_id: str) -> dict[str, list[str]]:
        """Return the states of a run's task instances by task."""
        states: dict[str, list[str]] = {}
        for task in self.tasks(dag_id, run_id):
            states.setdefault(task["task_id"], []).append(str(task["state"]))
        return states

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """Return the log of a task's attempt, one JSON object a line."""
        path = f"/dags/{dag_id}/dagRuns/{_quoted(run_id)}/taskInstances/{task_id}/logs/{try_number}"
        lines = self.get(path, map_index=map_index)["content"]
        return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)

    def _has_dag(self, dag_id: str) -> bool:
        try:
            self.get(f"/dags/{dag_id}")
        except APIError as error:
            if error.status != 404:
                raise
            return False
        return True

    def _request(self, method: str, path: str, content: object = None) -> Any:
        request = urllib.request.Request(
            f"{self._airflow.url}{path}",
            None if content is None else json.dumps(content).encode(),
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._token}"} if self._token else {}),
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read().decode(errors="replace")[:1000]
            raise APIError(f"{method} {path}: {error.code} {reason}", error.code) from None


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _quoted(run_id: str) -> str:
    return urllib.parse.quote(run_id, safe="")
