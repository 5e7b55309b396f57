"""The demo: the real DAGs in Airflow, on sample tables and embedded servers, over two days."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from demo import home as homes
from demo import show, tables
from demo.airflow import REPOSITORY
from demo.home import Home
from demo.mail import MailCatcher
from demo.postgresql import PostgreSQL
from demo.processes import Process, ServerError
from demo.shell import open_shell
from demo.ui import serve
from tagger.connections import Connection
from tagger.dataset_files import dataset_files, load_dataset
from tagger.report import Summary
from tagger.runs import Run
from tagger.storage import Storage

DAY_1 = datetime(2026, 11, 1, 16, tzinfo=UTC)
DAY_2 = datetime(2026, 11, 2, 16, tzinfo=UTC)
"""Firings of `articles`: 01:00 in Tokyo on 2 and 3 November."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def main() -> int:
    """Run the demo; return its exit code."""
    options = _options()
    if options.reset:
        print(f"Forgotten: {_shown(homes.root())}" if homes.forget() else "There was nothing to forget.")
        return 0
    home = Home(live=options.live)
    if options.live and not os.environ.get("OPENAI_API_KEY"):
        print("scripts/demo --live needs $OPENAI_API_KEY", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        return _run(home, options)
    except KeyboardInterrupt:
        print("\nStopped; everything it started has ended.")
        return 130
    except ServerError as e:
        print(f"scripts/demo: {e}", file=sys.stderr)
        return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/demo", description=__doc__)
    parser.add_argument("--ui", action="store_true", help="then start Airflow and keep it until Ctrl-C")
    parser.add_argument(
        "--shell", action="store_true", help="run no DAG; open a shell in which `tagger` works on the sample tables"
    )
    parser.add_argument("--live", action="store_true", help="ask the real OpenAI API ($OPENAI_API_KEY); costs money")
    parser.add_argument("--yes", action="store_true", help="with --live: do not ask before spending")
    parser.add_argument(
        "--reset", action="store_true", help="forget everything: tables, cache, runs, Airflow's database"
    )
    return parser.parse_args()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(home: Home, options: argparse.Namespace) -> int:
    home.prepare()
    if not home.lock():
        print("scripts/demo: another demo is running; end it first", file=sys.stderr)
        return 2
    if home.live and not options.shell and not _agreed(home, options.yes):
        return 0
    with ExitStack() as stack:
        console.print("Starting the S3 server (SeaweedFS)" + ("" if home.live else " and the offline LLM stand-in"))
        store = stack.enter_context(home.store())
        llm_url = None if home.live else stack.enter_context(_stand_in(home))
        if llm_url:
            show.stand_in_notice(console)
        mail = stack.enter_context(MailCatcher(home.mails))
        # in the web interface Airflow works on several runs at once, and SQLite has no row locks
        database_url = stack.enter_context(PostgreSQL(home.path / "postgresql")).url if options.ui else None
        environment = home.environment(store, llm_url, mail, database_url)
        Storage.connect(f"s3://{homes.BUCKET}", "aws_default", _connections(environment)).check(create=True)
        if options.shell:
            tables.fill(home.database)
            show.in_the_shell(console, live=home.live)
            return open_shell(environment, home.path / "shell")
        ok = _two_days(home, environment)
        if options.ui:
            home.shorten_catch_up()
            serve(environment, home.logs, _shown(home.mails), console)
        else:
            show.what_next(console, live=home.live)
        return 0 if ok else 1


def _two_days(home: Home, environment: dict[str, str]) -> bool:
    summaries: list[tuple[str, Summary]] = []
    tables.fill(home.database)
    with Runs(home, environment) as runs:
        for day, at in (("day 1", DAY_1), ("day 2", DAY_2)):
            if day == "day 2":
                show.changes(console, tables.change(home.database))
            for path in dataset_files(home.datasets):
                dataset = load_dataset(path)
                rows = "all" if day == "day 1" else "window"
                run_id = runs.run(f"tag_{dataset.dataset}", at, {"rows": rows})
                storage = Storage.connect(dataset.storage, dataset.storage_conn_id, _connections(environment))
                summary = Run(storage, dataset.dataset, run_id).read("summary.json", Summary)
                if summary is None:
                    console.print(f"[red]{dataset.dataset}, {day}: no summary; see {_shown(runs.log)}")
                    return False
                summaries.append((day, summary))
    show.runs(console, summaries)
    show.tagged_rows(console, home.database)
    for _, summary in summaries[-2:]:
        show.tag_counts(console, summary)
    failed = [summary for _, summary in summaries if summary.state == "failed"]
    for summary in failed:
        console.print(f"[red]{summary.dataset}: {summary.reason}; see {_shown(runs.log)}")
    return not failed


class Runs:
    """Airflow in a process of its own, which runs one DAG after the other."""

    def __init__(self, home: Home, environment: dict[str, str]) -> None:
        self.log = home.logs / "dag-runs.log"
        self._environment = environment

    def __enter__(self) -> "Runs":
        """Start Airflow."""
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "demo.dag_runs"],
                env=self._environment,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        with show.heartbeat(console, "Starting Airflow", lambda: _task(self.log)):
            self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        """End Airflow."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def run(self, dag_id: str, at: datetime, conf: dict[str, str]) -> str:
        """Run a DAG to its end; return the run id."""
        assert self._child.stdin is not None
        request = {"dag_id": dag_id, "logical_date": at.isoformat(), "conf": conf}
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        with show.heartbeat(console, f"Running the DAG {dag_id} for {at:%Y-%m-%d}", lambda: _task(self.log)):
            return str(self._answer()["run_id"])

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise ServerError(f"Airflow ended; its last words are in {_shown(self.log)}", self._child.wait())
        answer: dict[str, Any] = json.loads(line)
        return answer


def _task(log: Path) -> str:
    """Return the task that Airflow is at, from its log."""
    with log.open("rb") as lines:
        lines.seek(max(log.stat().st_size - 20_000, 0))
        running = [line for line in lines.read().decode("utf-8", "replace").splitlines() if "starting task_id=" in line]
    return running[-1].split("starting task_id=")[1].split()[0] if running else ""


@contextmanager
def _stand_in(home: Home) -> Iterator[str]:
    """Start the offline LLM stand-in as a process; yield its base URL."""
    port_file = home.path / "stand-in.port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "demo.stand_in", "--port", "0", "--port-file", str(port_file), "--latency", "0.05"]
    with Process(command, home.logs / "stand-in.log", ready=lambda: port_file.exists() and bool(port_file.read_text())):
        yield f"http://127.0.0.1:{port_file.read_text().strip()}/v1"


def _connections(environment: dict[str, str]) -> Any:
    def look_up(conn_id: str) -> Connection | None:
        fields = json.loads(environment[f"AIRFLOW_CONN_{conn_id.upper()}"])
        return Connection(
            conn_id, **{k: fields.get(k) for k in ("conn_type", "login", "password")}, extra=fields["extra"]
        )

    return look_up


def _agreed(home: Home, yes: bool) -> bool:
    """Say what the live demo will cost at most, and ask."""
    show.live_estimate(console, [load_dataset(path) for path in dataset_files(home.datasets)])
    if yes:
        return True
    if not sys.stdin.isatty():
        console.print("Nothing was spent. Give --yes to go on without a terminal.")
        return False
    return console.input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
