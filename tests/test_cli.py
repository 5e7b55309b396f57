"""The console script: the same steps as the DAG, one clear line and exit code 2 for wrong input."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sysconfig
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.retries.standard import ExponentialBackoff

from demo.postgresql import PostgreSQL
from demo.processes import free_port
from demo.stand_in import StandIn, completion, error, token_usage
from tagger.cli import main
from tagger.history import DAYS_SHOWN
from tagger.ledger import read_attempts
from tagger.report import Summary
from tests.project import Project, merged
from tests.servers import S3Store
from tests.test_spend import put_attempt

DAY = "2026-11-20"


@dataclass
class Shell:
    """A user's shell: dataset files in a folder, connections in the environment, and what a command printed."""

    project: Project
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def write(self, name: str = "notes", **changes: Any) -> Path:
        """Write a dataset file: the project's content with changes."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(self.project.content, changes), allow_unicode=True))
        return path

    def connect(self, conn_id: str, **fields: Any) -> None:
        """Set a connection's variable."""
        self.monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    def connect_store(self, store: S3Store, **changes: str) -> None:
        """Set the connection of an S3 server."""
        fields = {"login": store.access_key, "password": store.secret_key, **changes}
        self.connect("aws_default", conn_type="aws", extra={"endpoint_url": store.endpoint}, **fields)

    def run(self, *arguments: str) -> int:
        """Run a command as the console script does, and keep its output."""
        self.capture.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as e:
            assert isinstance(e.code, int)
            code = e.code
        self.out, self.err = self.capture.readouterr()
        return code

    @property
    def complaints(self) -> list[str]:
        """The lines that the console script itself wrote to stderr; the steps' log aside."""
        return [line for line in self.err.splitlines() if line.startswith("tagger")]

    def summary(self) -> Summary:
        """Return the summary that is the last line of stdout."""
        return Summary.model_validate_json(self.out.splitlines()[-1])


@pytest.fixture
def shell(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """A shell with a dataset `notes` of two rows and all that it needs."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    shell = Shell(project, folder, monkeypatch, capsys)
    monkeypatch.setenv("TAGGER_DATASETS", str(folder))
    shell.connect("db", conn_type="sqlite", host=project.database_connection.host)
    shell.connect("openai_default", conn_type="openai", host=project.llm.base_url, password="key")
    shell.connect_store(project.store)
    shell.write()
    project.put(1, "apple pie", f"{DAY}T10:00:00")
    project.put(2, "a zebra in the rain", "2026-11-21T10:00:00")
    return shell


def assert_complains(shell: Shell, complaint: str) -> None:
    __tracebackhide__ = True
    assert len(shell.complaints) == 1, shell.err
    assert re.search(complaint, shell.complaints[0]), shell.err
    assert "Traceback" not in shell.err
    assert "s3cret-Pa55word" not in shell.err


# commands


def test_check_says_what_is_in_order(shell: Shell) -> None:
    assert shell.run("check", "notes") == 0

    assert "notes: source notes: there, its ids are integer" in shell.out
    assert "notes: target note_tags: missing" in shell.out
    assert f"notes: storage s3://{shell.project.store.bucket}: there" in shell.out
    assert "answers, and has offline-stand-in" in shell.out
    assert not shell.complaints
    assert not shell.project.llm.calls
    assert not shell.project.target()


def test_check_without_a_name_looks_at_all_files(shell: Shell) -> None:
    shell.write("others", dataset="others", target={"table": "other_tags"})

    assert shell.run("check") == 0
    assert {line.split(":")[0] for line in shell.out.splitlines()} == {"notes", "others"}


def test_check_goes_on_after_a_file_that_is_wrong(shell: Shell) -> None:
    shell.write("a_wrong", dataset="wrong", target={"table": "wrong_tags"}, max_tags=0)

    assert shell.run("check") == 2
    assert "a_wrong.yaml: `max_tags`: found 0" in shell.err
    assert "notes: source notes: there" in shell.out


def test_check_create_makes_bucket_and_target_table(shell: Shell) -> None:
    bucket = f"{shell.project.store.bucket}-new"
    shell.write(storage=f"s3://{bucket}/below")

    assert shell.run("check", "notes", "--create") == 0
    assert "notes: target note_tags: made" in shell.out
    assert f"notes: storage s3://{bucket}/below: made" in shell.out
    shell.project.store.client().head_bucket(Bucket=bucket)
    with shell.project.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM note_tags").scalar_one() == 0
    assert shell.run("check", "notes", "--create") == 0
    assert "note_tags: there" in shell.out


def test_check_tells_of_mails_and_of_a_pool_it_cannot_see(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "none"))
    shell.write(alerts={"to": ["team@example.com"]}, llm={"pool": "llm"})

    assert shell.run("check", "notes") == 0
    assert "notes: pool llm: not checked, no Airflow here" in shell.out
    assert "airflow pools set llm 16" in shell.out
    assert "notes: alerts: mails are off: no connection `smtp_default`" in shell.out

    monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", '{"conn_type": "smtp", "host": "mail.example.com"}')
    assert shell.run("check", "notes") == 0
    assert "notes: alerts: mails to team@example.com through `smtp_default`" in shell.out


@pytest.mark.parametrize("name", ["mine", "my_file", "path"])
def test_dataset_is_given_by_its_name_its_file_or_its_path(shell: Shell, name: str) -> None:
    path = shell.write("my_file", dataset="mine", target={"table": "my_tags"})

    assert shell.run("check", str(path) if name == "path" else name) == 0
    assert "my_file: target my_tags: missing" in shell.out


def test_run_tags_the_rows_and_prints_its_summary_last(shell: Shell) -> None:
    assert shell.run("run", "notes", "--run-id", "first", "--json") == 0

    summary = shell.summary()
    assert (summary.run_id, summary.state, summary.texts, summary.tagged) == ("first", "success", 2, 2)
    assert summary == shell.project.summary(shell.project.open("first"))
    assert {row_id: row.tags for row_id, row in shell.project.target().items()} == {
        1: ["fruit"],
        2: ["animal", "weather"],
    }
    assert "Traceback" not in shell.err


def test_run_without_json_prints_nothing_to_stdout(shell: Shell) -> None:
    shell.project.execute("DELETE FROM notes")

    assert shell.run("run", "notes") == 0
    assert shell.out == ""


def test_steps_by_hand_equal_a_run(shell: Shell) -> None:
    shell.write("by_hand", dataset="by_hand", target={"table": "hand_tags"}, revision=2, shards={"texts_per_shard": 1})
    shell.write(shards={"texts_per_shard": 1})
    assert shell.run("run", "notes", "--run-id", "id", "--json") == 0
    whole = shell.summary()

    for step in (["snapshot"], ["plan"], ["tag", "--shard", "2"], ["tag", "--shard", "1"], ["load"]):
        assert shell.run(step[0], "by_hand", "--run-id", "id", *step[1:]) == 0
        assert shell.out == ""
    assert shell.run("report", "by_hand", "--run-id", "id", "--json") == 0
    parts = shell.summary()

    of_each = {"dataset", "spec_id", "started_at", "finished_at", "seconds", "attempts"}
    assert parts.model_dump(exclude=of_each) == whole.model_dump(exclude=of_each)
    tables = []
    for table in ("note_tags", "hand_tags"):
        with shell.project.engine.connect() as connection:
            query = f"SELECT row_id, tags, status, error, model, run_id FROM {table} ORDER BY row_id"
            tables.append(connection.exec_driver_sql(query).all())
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]


def test_steps_of_a_run_read_the_frozen_dataset_and_tag_takes_all_shards(shell: Shell) -> None:
    shell.write(shards={"texts_per_shard": 1})
    shell.run("snapshot", "notes", "--run-id", "id")
    shell.write(tags=[{"id": "other", "description": "apple zebra"}])
    for step in ("plan", "tag", "load"):
        assert shell.run(step, "notes", "--run-id", "id") == 0

    assert [row.tags for row in shell.project.target().values()] == [["fruit"], ["animal", "weather"]]


def test_day_takes_the_rows_of_that_day(shell: Shell) -> None:
    shell.write(source={"updated_at": "updated_at"})

    assert shell.run("run", "notes", "--day", DAY, "--json") == 0
    assert (shell.summary().day, shell.summary().rows) == (DAY, 1)
    assert list(shell.project.target()) == [1]


def test_all_takes_all_rows_however_old(shell: Shell) -> None:
    shell.write(source={"updated_at": "updated_at"})
    shell.project.put(3, "old cherry", "1999-01-01T00:00:00")

    assert shell.run("run", "notes", "--all", "--json") == 0
    assert shell.summary().rows == 3


def test_report_shows_the_latest_run(shell: Shell) -> None:
    shell.project.execute("DELETE FROM notes")
    shell.run("run", "notes", "--run-id", "z-first")
    shell.run("run", "notes", "--run-id", "a-second")

    assert shell.run("report", "notes") == 0
    assert "a-second · success" in shell.out
    assert "0 distinct" in shell.out
    assert shell.run("report", "notes", "--json") == 0
    assert shell.summary().run_id == "a-second"


def test_report_without_a_name_shows_every_dataset(shell: Shell) -> None:
    shell.write("others", dataset="others", target={"table": "other_tags"})
    shell.project.execute("DELETE FROM notes")
    shell.run("run", "notes", "--run-id", "first")

    assert shell.run("report") == 0
    assert "first · success" in shell.out
    assert "others: no run yet" in shell.err


def test_report_of_one_dataset_goes_on_with_its_history(shell: Shell) -> None:
    for number in range(DAYS_SHOWN + 3):
        at = datetime(2025, 10, 20, 12, tzinfo=UTC) + timedelta(days=number)
        put_attempt(shell.project.open(f"killed-{number}"), 1.0, at, state="running")

    assert shell.run("report", "notes") == 0
    *unfinished, last = shell.err.splitlines()
    assert unfinished[0] == (
        f"notes: run killed-{DAYS_SHOWN + 2} is at work, or was killed before its report: "
        "2 requests and $1.00 until 2025-11-05 12:00 UTC"
    )
    assert (len(unfinished), last) == (DAYS_SHOWN + 3, "notes: no finished run yet")
    shell.run("run", "notes", "--run-id", "first")
    assert shell.run("report", "notes") == 0

    latest, days, months = (part.splitlines() for part in shell.out.split("\n\n"))
    assert latest[0].endswith(" · first · success")
    assert days[0].split()[:3] == ["dataset", "day", "runs"]
    assert len(days) == 1 + DAYS_SHOWN
    assert [line.split()[:3] for line in months[:3]] == [
        ["dataset", "month", "runs"],
        ["notes", "2025-10", "12"],
        ["notes", "2025-11", "5"],
    ]


def test_report_of_all_datasets_is_of_their_latest_runs_alone(shell: Shell) -> None:
    shell.run("run", "notes", "--run-id", "first")

    assert shell.run("report") == 0
    assert "first · success" in shell.out
    assert "month" not in shell.out


def test_history_of_one_or_all_datasets_in_each_form(shell: Shell) -> None:
    shell.write("others", dataset="others", target={"table": "other_tags"}, revision=2, llm={"price": None})
    shell.run("run", "notes", "--run-id", "first", "--json")
    spent = shell.summary().cost_usd
    shell.run("run", "others", "--run-id", "second")

    assert shell.run("report", "--by", "month", "--json") == 0
    [notes, others] = json.loads(shell.out.splitlines()[-1])
    assert (notes["dataset"], notes["runs"], notes["texts"], notes["spent_usd"]) == ("notes", 1, 2, spent)
    assert (others["dataset"], others["runs"], others["texts"], others["spent_usd"]) == ("others", 1, 2, None)
    assert shell.run("report", "notes", "--by", "day", "--csv") == 0
    [row] = csv.DictReader(io.StringIO(shell.out))
    assert (row["dataset"], row["day"][:7], row["texts"]) == ("notes", notes["month"], "2")
    assert shell.run("report", "--by", "day") == 0
    assert [line.split()[0] for line in shell.out.splitlines()] == ["dataset", "notes", "others"]
    assert "unknown" in shell.out


def test_history_without_a_run_is_empty(shell: Shell) -> None:
    for form, shown in (["--json"], "[]\n"), (["--csv"], None), ([], ""):
        assert shell.run("report", "notes", "--by", "day", *form) == 0
        assert "notes: no run yet" in shell.err
        assert shell.out == shown or (shown is None and shell.out.startswith("dataset,day,runs,"))
        assert shell.out.count("\n") <= 1


def test_damaged_attempt_is_one_clear_line_after_the_latest_run(shell: Shell) -> None:
    shell.run("run", "notes", "--run-id", "first")
    shell.project.open("broken").storage.put("runs/notes/broken/shard-1-1.parquet", b"x")

    assert shell.run("report", "notes") == 1
    assert "first · success" in shell.out
    assert_complains(shell, r"runs/notes/broken/shard-1-1\.parquet: damaged; delete it")


def test_damage_of_one_dataset_does_not_hide_the_others(shell: Shell) -> None:
    shell.write("others", dataset="others", target={"table": "other_tags"})
    for name in ("notes", "others"):
        shell.run("run", name, "--run-id", f"{name}-first")
    storage = shell.project.open("any").storage
    storage.put("runs/notes/broken/summary.json", b"x")

    assert shell.run("report") == 1
    assert "notes-first · success" in shell.out
    assert "others-first · success" in shell.out
    assert_complains(shell, r"runs/notes/broken/summary\.json: damaged")
    assert shell.run("report", "--by", "day", "--csv") == 1
    assert shell.out == ""


def test_history_leaves_the_rollup_to_the_reports(shell: Shell) -> None:
    for number in range(3):
        shell.run("run", "notes", "--run-id", f"run-{number}")
    storage = shell.project.open("any").storage
    before = storage.get("history/notes.json.gz")

    assert shell.run("report", "notes", "--by", "day", "--json") == 0

    assert [day["runs"] for day in json.loads(shell.out)] == [3]
    assert storage.get("history/notes.json.gz") == before is not None


# the page as a file


def page_in(file: Path) -> dict[str, Any]:
    """Return the figures that a file shows."""
    [found] = re.findall(r'<script type="application/json" id="data">(.*)</script>', file.read_text(encoding="utf-8"))
    figures: dict[str, Any] = json.loads(found)
    return figures


def test_report_as_a_page_is_one_file(shell: Shell) -> None:
    shell.write("others", dataset="others", target={"table": "other_tags"})
    shell.run("run", "notes", "--run-id", "first")
    file = shell.folder / "page.html"

    assert shell.run("report", "notes", "--html", str(file)) == 0
    assert (shell.out, shell.err) == ("", "")
    [notes] = page_in(file)["datasets"]
    assert (notes["card"]["dag_id"], notes["card"]["state"], notes["card"]["last_run_id"]) == (
        *("tag_notes", "success"),
        "first",
    )
    assert notes["card"]["next_run_at"] is None
    assert [day["texts"] for day in notes["days"]] == [2]
    assert shell.run("report", "--html", str(file)) == 0
    assert [page["card"]["state"] for page in page_in(file)["datasets"]] == ["success", "none"]
    assert not shell.project.llm.calls[2:]


def test_a_page_says_what_could_not_be_read_and_shows_the_rest(shell: Shell) -> None:
    shell.run("run", "notes", "--run-id", "first")
    shell.project.open("any").storage.put("runs/notes/broken/summary.json", b"x")
    shell.write("away", dataset="away", target={"table": "away_tags"}, storage="s3://not-there")
    shell.write("torn", dataset="torn", target={"table": "torn_tags"}, max_tags=0)
    file = shell.folder / "page.html"

    assert shell.run("report", "--html", str(file)) == 2

    problems = {page["card"]["dag_id"]: page["card"]["problem"] for page in page_in(file)["datasets"]}
    assert "no bucket `not-there`" in problems["tag_away"]
    assert "runs/notes/broken/summary.json: damaged" in problems["tag_notes"]
    assert "`max_tags`: found 0" in problems["tag_torn"]
    assert [line for line in shell.complaints if not any(told in line for told in problems.values())] == []
    assert len(shell.complaints) == 3


def test_a_page_of_a_damaged_run_is_written_and_the_exit_code_tells(shell: Shell) -> None:
    shell.run("run", "notes", "--run-id", "first")
    shell.project.open("any").storage.put("runs/notes/broken/shard-1-1.parquet", b"x")
    file = shell.folder / "page.html"

    assert shell.run("report", "notes", "--html", str(file)) == 1

    assert_complains(shell, r"runs/notes/broken/shard-1-1\.parquet: damaged")
    assert [day["texts"] for day in page_in(file)["datasets"][0]["days"]] == [2]


def test_no_page_is_written_of_which_nothing_could_be_read(shell: Shell) -> None:
    shell.write(storage="s3://not-there")
    file = shell.folder / "page.html"

    assert shell.run("report", "notes", "--html", str(file)) == 2
    assert_complains(shell, "no bucket `not-there`")
    assert not file.exists()


def test_a_page_in_a_folder_that_is_not_there_is_one_clear_line(shell: Shell) -> None:
    assert shell.run("report", "--html", str(shell.folder / "missing" / "page.html")) == 2
    assert_complains(shell, r"`--html .*/missing/page\.html`: No such file or directory; name a file in a folder")


def test_empty_table_is_a_success_with_zeros(shell: Shell) -> None:
    shell.project.execute("DELETE FROM notes")

    assert shell.run("run", "notes", "--json") == 0
    summary = shell.summary()
    assert summary.state == "success"
    assert (summary.rows, summary.texts, summary.tagged, summary.llm_requests, summary.cost_usd) == (0, 0, 0, 0, 0.0)
    assert shell.project.target() == {}


def test_environment_of_the_sdks_serves_without_connections(shell: Shell) -> None:
    for name in ("AIRFLOW_CONN_AWS_DEFAULT", "AIRFLOW_CONN_OPENAI_DEFAULT"):
        shell.monkeypatch.delenv(name)
    store = shell.project.store
    shell.monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.endpoint)
    shell.monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.access_key)
    shell.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_key)
    shell.monkeypatch.setenv("OPENAI_API_KEY", "key")
    shell.monkeypatch.setenv("OPENAI_BASE_URL", shell.project.llm.base_url)

    assert shell.run("run", "notes", "--json") == 0
    assert shell.summary().tagged == 2


# exit code 1: the work failed


def test_too_many_failed_texts_exit_1_with_the_summary(shell: Shell) -> None:
    shell.project.llm.script(error(400, "No."), error(400, "No."))

    assert shell.run("run", "notes", "--json") == 1
    assert (shell.summary().state, shell.summary().failed) == ("failed", 2)
    assert_complains(shell, "2 of 2 texts failed")


def test_plan_beyond_the_budget_exits_1_before_the_first_call(shell: Shell) -> None:
    shell.write(llm={"price": {"input": 1000.0, "output": 1000.0}}, limits={"max_cost_usd": 0.01})

    assert shell.run("run", "notes") == 1
    assert_complains(shell, r"budget reached: 2 new texts would cost about \$.*limits.max_cost_usd.*\$0.01")
    assert shell.project.llm.calls == []


def test_reached_budget_exits_1(shell: Shell) -> None:
    shell.write(llm={"concurrency": 1}, limits={"max_cost_usd": 0.01})
    shell.project.llm.script(completion('{"tags": ["fruit"]}', usage=token_usage(10_000_000, 5)))  # of some hundred

    assert shell.run("run", "notes", "--json") == 1
    assert (shell.summary().tagged, shell.summary().skipped) == (1, 1)
    assert_complains(shell, "budget reached")


def test_key_that_is_refused_after_the_first_answer_exits_1(shell: Shell) -> None:
    shell.write(llm={"concurrency": 1})
    shell.project.llm.script(completion('{"tags": ["fruit"]}'), error(401, "Expired.", "invalid_api_key"))

    assert shell.run("run", "notes", "--json") == 1
    assert (shell.summary().tagged, shell.summary().skipped) == (1, 1)
    assert_complains(shell, "refuses the API key")


# exit code 2: the input is wrong, or something is unreachable

Break = Callable[[Shell], object]


def missing_connection(shell: Shell) -> None:
    shell.monkeypatch.delenv("AIRFLOW_CONN_DB")


def bad_connection(shell: Shell) -> None:
    shell.monkeypatch.setenv("AIRFLOW_CONN_DB", "postgres://user:s3cret-Pa55word@host:port/db")


def missing_file(shell: Shell) -> None:
    shell.connect("db", conn_type="sqlite", host="missing.db")


def file_that_is_no_database(shell: Shell) -> None:
    path = shell.folder / "text.db"
    path.write_text("This is a text, and no database at all. " * 100)
    shell.connect("db", conn_type="sqlite", host=str(path))


def closed_postgresql(shell: Shell) -> None:
    shell.connect("db", conn_type="postgres", host="127.0.0.1", port=free_port(), login="u", password="s3cret-Pa55word")


def closed_s3(shell: Shell) -> None:
    store = shell.project.store
    shell.connect_store(S3Store(f"http://127.0.0.1:{free_port()}", store.access_key, store.secret_key, store.bucket))
    # botocore pauses between its tries, for half a minute in all
    shell.monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)


def no_s3_keys(shell: Shell) -> None:
    shell.connect("aws_default", conn_type="aws", extra={"endpoint_url": shell.project.store.endpoint})


def no_llm_key(shell: Shell) -> None:
    shell.monkeypatch.delenv("AIRFLOW_CONN_OPENAI_DEFAULT")


def wrong_llm_key(shell: Shell) -> None:
    shell.project.llm.api_key = "another"


def foreign_target(shell: Shell) -> None:
    shell.project.execute("CREATE TABLE note_tags (id INTEGER)")


def changed(**changes: Any) -> Break:
    return lambda shell: shell.write(**changes)


BAD: dict[str, tuple[Break, str]] = {
    "unknown key": (changed(max_tag=3), "notes.yaml: `max_tag`: found an unknown key, expected `max_tags`"),
    "missing table": (changed(source={"table": "missing"}), "`source.table`: .*`missing`"),
    "missing id column": (changed(source={"id_column": "nr"}), "`source.id_column`: .*`nr`.*it has id, body"),
    "missing text column": (changed(source={"text_columns": ["text"]}), "`source.text_columns`: .*`text`"),
    "missing time column": (changed(source={"updated_at": "at"}), "`source.updated_at`: .*`at`"),
    "missing database file": (missing_file, "connection `db`: no SQLite file missing.db"),
    "file that is no database": (file_that_is_no_database, "connection `db`: .*not a database"),
    "unreachable PostgreSQL": (closed_postgresql, "connection `db`: the database does not answer"),
    "missing connection": (missing_connection, r"no connection `db`: .*\$AIRFLOW_CONN_DB"),
    "bad connection": (bad_connection, r"\$AIRFLOW_CONN_DB is neither"),
    "missing bucket": (changed(storage="s3://no-such-bucket"), "no bucket `no-such-bucket`.*tagger check --create"),
    "unreachable S3": (closed_s3, "s3://.*: S3 does not answer at http://127.0.0.1"),
    "no S3 keys": (no_s3_keys, "s3://.*credentials"),
    "no API key": (no_llm_key, "no API key: .*`openai_default`"),
    "wrong API key": (wrong_llm_key, "LLM endpoint http://127.0.0.1:.* refuses the API key .HTTP 401"),
    "target of another shape": (foreign_target, "`target.table`: table note_tags exists, but has no column `row_id`"),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("spoil", "complaint"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_2(
    shell: Shell, command: str, spoil: Break, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(shell)

    assert shell.run(command, "notes") == 2, shell.err
    assert_complains(shell, complaint)


def test_unreachable_llm_is_one_clear_line_and_exit_2(shell: Shell) -> None:
    shell.connect("openai_default", conn_type="openai", host=f"http://127.0.0.1:{free_port()}/v1", password="key")

    assert shell.run("check", "notes") == 2
    assert_complains(shell, r"LLM endpoint http://127.0.0.1:\d+/v1/ does not answer")


def test_model_that_the_endpoint_does_not_have_exits_2(shell: Shell) -> None:
    shell.write(llm={"model": "gpt-unknown"})

    assert shell.run("check", "notes") == 2
    assert_complains(shell, "has no model `gpt-unknown`")


def test_stand_in_that_answers_for_another_model_exits_2_and_records_nothing(shell: Shell) -> None:
    shell.write(llm={"model": "gpt-5-mini"})

    assert shell.run("run", "notes") == 2
    assert_complains(shell, "offline stand-in, which is no LLM")
    assert b"cache/" not in shell.project.everything_stored()


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("wrong", [{"password": "wrong"}, {"login": "unknown"}], ids=["secret", "key"])
def test_wrong_s3_keys_are_one_clear_line_and_exit_2(
    shell: Shell, seaweedfs: S3Store, command: str, wrong: dict[str, str]
) -> None:
    shell.write(storage=f"s3://{seaweedfs.bucket}")
    shell.connect_store(seaweedfs, **wrong)

    assert shell.run(command, "notes") == 2
    assert_complains(shell, r"s3://tagger: .*access denied")


def test_wrong_password_of_postgresql_exits_2(shell: Shell, postgresql: PostgreSQL) -> None:
    shell.connect(
        "db",
        conn_type="postgres",
        host="127.0.0.1",
        port=postgresql.database.port,
        login=postgresql.user,
        password="s3cret-Pa55word",
        schema="postgres",
    )

    assert shell.run("run", "notes") == 2
    assert_complains(shell, "connection `db`: .*password authentication failed")


def test_missing_database_of_postgresql_exits_2(shell: Shell, postgresql: PostgreSQL) -> None:
    shell.monkeypatch.setenv("AIRFLOW_CONN_DB", postgresql.airflow_uri.replace("/postgres", "/missing"))

    assert shell.run("run", "notes") == 2
    assert_complains(shell, 'connection `db`: .*database "missing" does not exist')


ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "unknown dataset": (["run", "nots"], r"no dataset `nots` in .*there: notes.*\$TAGGER_DATASETS"),
    "missing file": (["run", "missing.yaml"], "no dataset file missing.yaml"),
    "unknown dataset to check": (["check", "nots"], "no dataset `nots`"),
    "bad run id": (["run", "notes", "--run-id", "a/b"], "run id 'a/b': only letters"),
    "empty run id": (["plan", "notes", "--run-id", ""], "run id ''"),
    "unknown run id, plan": (["plan", "notes", "--run-id", "nope"], "run `nope` of `notes` has no .*tagger snapshot"),
    "unknown run id, tag": (["tag", "notes", "--run-id", "nope"], "run `nope` of `notes` has no"),
    "unknown run id, load": (["load", "notes", "--run-id", "nope"], "run `nope` of `notes` has no"),
    "unknown run id, report": (["report", "notes", "--run-id", "nope"], "run `nope` of `notes` has no"),
    "run id without a dataset": (["report", "--run-id", "x"], "`--run-id` needs a DATASET"),
    "CSV of a run": (["report", "notes", "--csv"], "`--csv` needs `--by day` or `--by month`"),
    "history in two forms": (["report", "notes", "--by", "day", "--json", "--csv"], "not allowed with argument"),
    "history of one run": (["report", "notes", "--by", "day", "--run-id", "x"], "argument --run-id: not allowed with"),
    "history by week": (["report", "notes", "--by", "week"], "invalid choice: 'week'"),
    "page of one run": (["report", "notes", "--html", "x.html", "--run-id", "x"], "--run-id: not allowed with"),
    "page and history": (["report", "notes", "--html", "x.html", "--by", "day"], "--by: not allowed with"),
    "page as JSON": (["report", "notes", "--html", "x.html", "--json"], "`--html` and `--json` do not go together"),
    "page as CSV": (["report", "notes", "--html", "x.html", "--csv"], "`--csv` needs `--by day` or `--by month`"),
    "bad day": (["run", "notes", "--day", "yesterday"], "'yesterday' is no date such as 2026-11-30"),
    "day that does not exist": (["run", "notes", "--day", "2026-02-30"], "'2026-02-30' is no date"),
    "day with all": (["run", "notes", "--day", DAY, "--all"], "not allowed with"),
    "day without updated_at": (["run", "notes", "--day", DAY], "needs `source.updated_at`"),
    "step without a run id": (["plan", "notes"], "--run-id"),
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "'fly'"),
    "bad shard": (["tag", "notes", "--run-id", "x", "--shard", "one"], "'one'"),
}


@pytest.mark.parametrize(("arguments", "complaint"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments_are_one_clear_line_and_exit_2(shell: Shell, arguments: list[str], complaint: str) -> None:
    assert shell.run(*arguments) == 2
    assert_complains(shell, complaint)
    assert not shell.project.llm.calls


def test_shard_that_the_plan_does_not_have_exits_2(shell: Shell) -> None:
    shell.run("snapshot", "notes", "--run-id", "id")
    shell.run("plan", "notes", "--run-id", "id")

    assert shell.run("tag", "notes", "--run-id", "id", "--shard", "2") == 2
    assert_complains(shell, "has 1 shards, no shard 2")


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
def test_day_at_the_end_of_the_calendar_gives_no_traceback(shell: Shell, day: str) -> None:
    shell.write(source={"updated_at": "updated_at"}, timezone="Asia/Tokyo")

    assert shell.run("run", "notes", "--day", day) in (0, 2)


def test_folder_without_datasets_exits_2(shell: Shell) -> None:
    (shell.folder / "notes.yaml").unlink()

    assert shell.run("check") == 2
    assert_complains(shell, r"no dataset files in .*\$TAGGER_DATASETS")


def test_every_mistake_of_a_file_has_its_line(shell: Shell) -> None:
    shell.write(max_tags=0, max_tag=3)

    assert shell.run("run", "notes") == 2
    assert "`max_tags`: found 0" in shell.err
    assert "`max_tag`: found an unknown key" in shell.err


# the installed script


def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(sysconfig.get_path("scripts"), "tagger")
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, timeout=60)


def test_installed_script_shows_its_commands() -> None:
    done = installed("--help")

    assert (done.returncode, done.stderr) == (0, "")
    for command in ("check", "snapshot", "plan", "tag", "load", "run", "report"):
        assert f"\n    {command} " in done.stdout


def test_installed_script_complains_in_one_line() -> None:
    done = installed("run", "no_such_dataset")

    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tagger: no dataset `no_such_dataset`")


# interruption

TEXTS = 20


@dataclass
class Process:
    """The installed script, at work on many texts."""

    popen: subprocess.Popen[str]
    llm: StandIn

    def wait_for_calls(self, count: int) -> None:
        """Wait until the endpoint was asked so often."""
        until = time.monotonic() + 90
        while len(self.llm.calls) < count:
            assert self.popen.poll() is None, self.popen.communicate()
            assert time.monotonic() < until, "no calls"
            time.sleep(0.02)

    def end(self, number: signal.Signals, within: float = 20.0) -> tuple[int, list[str]]:
        """Send a signal; return the exit code and the lines of stderr."""
        self.popen.send_signal(number)
        _, err = self.popen.communicate(timeout=within)
        return self.popen.returncode, err.splitlines()


def _hear_ctrl_c() -> None:
    """Undo what a shell does to the jobs in its background, of which the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def script_at_work(shell: Shell, *arguments: str) -> Iterator[Process]:
    """Run the installed script; four calls at a time, of which each takes as long as the stand-in's latency."""
    script = Path(sysconfig.get_path("scripts"), "tagger")
    with subprocess.Popen(
        [str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_ctrl_c,
    ) as popen:
        try:
            yield Process(popen, shell.project.llm)
        finally:
            popen.kill()


@pytest.fixture
def busy(shell: Shell) -> Shell:
    """A shell with a planned run `id` of many texts, and an endpoint that takes its time."""
    for row_id in range(3, TEXTS + 1):
        shell.project.put(row_id, f"apple number {row_id}")
    shell.write(llm={"concurrency": 4})
    shell.run("snapshot", "notes", "--run-id", "id")
    shell.run("plan", "notes", "--run-id", "id")
    shell.project.llm.latency = 3.0
    return shell


def records(shell: Shell) -> int:
    return shell.project.everything_stored(but="runs/").count(b"cache/")


def only_complaint(lines: list[str]) -> str:
    """Return the one line that the console script itself wrote."""
    assert not [line for line in lines if "Traceback" in line], lines
    [complaint] = [line for line in lines if line.startswith("tagger: ")]
    return complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "complaint"),
    [(signal.SIGTERM, 143, "tagger: stopped by SIGTERM"), (signal.SIGINT, 130, "tagger: interrupted")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_an_interrupted_tag_makes_no_new_call_and_keeps_what_is_answered(
    busy: Shell, number: signal.Signals, code: int, complaint: str
) -> None:
    llm = busy.project.llm
    with script_at_work(busy, "tag", "notes", "--run-id", "id") as process:
        process.wait_for_calls(4)
        exit_code, lines = process.end(number)

    assert exit_code == code, lines
    assert only_complaint(lines).startswith(complaint)
    assert len(llm.calls) == 4
    assert records(busy) == 4
    [attempt] = read_attempts(busy.project.open("id"))
    assert attempt.state == "broken"
    assert [outcome.status for outcome in attempt.outcomes] == ["tagged"] * 4

    llm.latency = 0.0
    assert busy.run("tag", "notes", "--run-id", "id") == 0
    assert set(llm.calls_per_key().values()) == {1}
    assert len(llm.calls) == TEXTS


@pytest.mark.slow
def test_an_interrupted_tag_says_so_in_one_line(busy: Shell) -> None:
    with script_at_work(busy, "tag", "notes", "--run-id", "id") as process:
        process.wait_for_calls(4)
        code, lines = process.end(signal.SIGTERM)

    assert code == 143
    assert [line for line in lines if not re.match(r"[\d:]{8} INFO ", line)] == [only_complaint(lines)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_an_interrupted_run_does_not_go_on_with_load(busy: Shell, number: signal.Signals) -> None:
    with script_at_work(busy, "run", "notes", "--run-id", "whole", "--json") as process:
        process.wait_for_calls(4)
        code, lines = process.end(number)

    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], lines
    assert only_complaint(lines)
    assert records(busy) == len(busy.project.llm.calls) == 4
    assert busy.project.target() == {}
    assert busy.project.open("whole").storage.get("runs/notes/whole/load.json") is None
    assert busy.project.open("whole").storage.get("runs/notes/whole/summary.json") is None


@pytest.mark.slow
def test_an_endpoint_that_hangs_holds_up_no_end(busy: Shell) -> None:
    busy.project.llm.latency = 120.0
    with script_at_work(busy, "tag", "notes", "--run-id", "id") as process:
        process.wait_for_calls(4)
        code, lines = process.end(signal.SIGTERM)

    assert code == 143, lines
    assert only_complaint(lines).startswith("tagger: stopped by SIGTERM")
    [attempt] = read_attempts(busy.project.open("id"))
    assert attempt.state == "broken"
    assert len(busy.project.llm.calls) == 4


@pytest.mark.slow
def test_a_pause_after_a_429_is_over_when_the_process_is_told_to_end(busy: Shell) -> None:
    llm = busy.project.llm
    llm.script(*[replace(error(429, "Busy.", headers={"Retry-After": "100"}), delay=1.0)] * 4)
    with script_at_work(busy, "tag", "notes", "--run-id", "id") as process:
        process.wait_for_calls(4)
        time.sleep(2.0)
        code, _ = process.end(signal.SIGTERM, within=10)

    assert code == 143
    assert len(llm.calls) == 4


# progress


def on_terminal(*arguments: str) -> tuple[int, str]:
    """Run the installed script with a terminal for stderr; return its exit code and what the terminal shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    script = Path(sysconfig.get_path("scripts"), "tagger")
    shown = b""
    with subprocess.Popen([str(script), *arguments], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        with suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
        return process.wait(60), shown.decode()


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_neither_text_nor_answer(shell: Shell) -> None:
    llm = shell.project.llm
    for row_id in range(3, 13):
        shell.project.put(row_id, f"apple number {row_id}, told to nobody")
    llm.script(*[error(400, "Cannot process: told to nobody")] * 3)
    llm.latency = 0.5
    shell.write(llm={"concurrency": 4}, limits={"max_failed_fraction": 1.0})

    code, shown = on_terminal("run", "notes", "--run-id", "id")

    assert code == 0, shown
    assert re.search(r"shard 1/1 100%\|█+\| 12/12 texts", shown)
    assert len(re.findall(r"[\r\n][\d:]{8} WARNING row \d+ failed: rejected: HTTP 400 *\r", shown)) == 3
    assert "told to nobody" not in shown
    assert "zebra" not in shown


# options of a run


def test_a_dry_run_says_what_the_run_would_cost(shell: Shell) -> None:
    shell.project.put(1, "apple")

    assert shell.run("run", "notes", "--dry-run", "--json") == 0
    summary = Summary.model_validate_json(shell.out.splitlines()[-1])
    assert (summary.dry_run, summary.skipped, summary.llm_requests) == (True, summary.texts, 0)
    assert summary.estimated_usd is not None and summary.estimated_usd > 0
    assert shell.project.target() == {}


def test_a_limit_and_a_budget_of_this_run(shell: Shell) -> None:
    for row_id in range(5):
        shell.project.put(row_id, f"apple {row_id}")
    shell.write(llm={"concurrency": 1})

    assert shell.run("run", "notes", "--limit", "2", "--json") == 0
    assert Summary.model_validate_json(shell.out.splitlines()[-1]).tagged == 2
    assert shell.run("run", "notes", "--max-cost-usd", "0.0000001") == 1
    assert "budget reached" in shell.err
    assert shell.run("run", "notes", "--retry-refused") == 0
    assert {row.status for row in shell.project.target().values()} == {"tagged"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--limit", "0"], "`limit`: found 0, expected greater than or equal to 1"),
        (["--max-cost-usd", "-1"], "`max_cost_usd`: found -1.0, expected greater than 0"),
        (["--max-cost-usd", "nan"], "`max_cost_usd`: found nan, expected .*"),
    ],
)
def test_an_option_out_of_its_range_is_one_clear_line(shell: Shell, options: list[str], complaint: str) -> None:
    assert shell.run("run", "notes", *options) == 2
    assert_complains(shell, complaint)
    assert not shell.project.llm.calls
