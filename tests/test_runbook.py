"""The runbook's commands: each symptom is produced, the first commands show it, and after the others it is gone."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.stand_in import Fate, completion
from tagger.connections import Connections
from tagger.drift import Drift
from tagger.exceptions import RunFailed
from tagger.load import load_back
from tagger.plan import plan
from tagger.tag import tag
from tests.commands import Block, aws_s3, blocks, redis_cli
from tests.databases import shared_client, teach
from tests.project import merged
from tests.servers import RedisServer
from tests.test_clean import OLD, put_run, put_specs
from tests.test_cli import Shell, closed_s3, missing_file, script_at_work, shell  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

BLOCKS = [block for block in blocks("runbook.md") if not block.wants_airflow]


@dataclass
class OnCall:
    """Who has the runbook: a shell, the environment that its commands name, and what they printed."""

    shell: Shell
    block: Block
    caplog: pytest.LogCaptureFixture
    request: pytest.FixtureRequest
    content: dict[str, Any]
    """Of the dataset file."""

    def set(self, **variables: str) -> None:
        """Set variables of the environment."""
        for name, value in variables.items():
            self.shell.monkeypatch.setenv(name, value)

    def write(self, **changes: Any) -> None:
        """Edit the dataset file."""
        self.content = merged(self.content, changes)
        (self.shell.folder / "notes.yaml").write_text(yaml.safe_dump(self.content, allow_unicode=True))

    def edit(self) -> None:
        """Edit the dataset file as the runbook says."""
        assert self.block.edit
        self.write(**self.block.edit)

    def run(self, line: str) -> tuple[int, str]:
        """Run a command; return its exit code and what it printed and logged."""
        self.caplog.clear()
        program, *words = shlex.split(os.path.expandvars(line), comments=True)
        if program == "tagger":
            with self.caplog.at_level(logging.INFO, "tagger"):
                code = self.shell.run(*words)
            return code, f"{self.shell.out}{self.shell.err}\n{self.caplog.text}"
        if program == "redis-cli":
            return 0, redis_cli(words)
        if program == "aws":
            assert words.pop(0) == "s3"
            aws_s3(self.shell.project.store.client(), words)
            return 0, ""
        done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def look(self) -> str:
        """Run the commands that look; return what they print."""
        printed = "\n".join(self.run(line)[1] for line in self.block.look)
        assert "usage: tagger" not in printed, printed
        return printed

    def mend(self) -> None:
        """Run the commands that mend."""
        for line in self.block.mend:
            code, printed = self.run(line)
            assert code == 0, f"{line}\n{printed}"

    def latest(self) -> Any:
        """Return the latest summary."""
        assert self.shell.run("report", "notes", "--json") == 0
        return self.shell.summary()

    @property
    def statuses(self) -> dict[Any, str]:
        """The target's rows."""
        return {row_id: row.status for row_id, row in self.shell.project.target().items()}


@pytest.fixture
def on_call(
    shell: Shell,  # noqa: F811
    block: Block,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> OnCall:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tagger.storage.s3_client", quick_s3_client)
    on_call = OnCall(shell, block, caplog, request, shell.project.content)
    on_call.set(DATASET="notes", RUN="night")
    return on_call


def quick_s3_client(conn_id: str, connections: Connections) -> Any:
    """Return a client as tagger makes it, one for all commands: making one takes longer than all else that they do."""
    connection = connections(conn_id)
    assert connection is not None
    return shared_client(connection.extra["endpoint_url"], connection.login or "", connection.password or "")


Scenario = Callable[[OnCall], Generator[None, str, None]]
"""Produces a symptom, is sent what the looking commands print, does what is to be done by hand, and after the mending
commands says that the symptom is gone."""

SCENARIOS: dict[str, Scenario] = {}


def of(block: str) -> Callable[[Scenario], Scenario]:
    """Say which block of the runbook a scenario is of."""

    def add(scenario: Scenario) -> Scenario:
        SCENARIOS[block] = scenario
        return scenario

    return add


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_symptom_is_seen_and_mended(on_call: OnCall, block: Block) -> None:
    scenario = SCENARIOS[str(block)](on_call)

    next(scenario)
    scenario.send(on_call.look())
    on_call.mend()

    with pytest.raises(StopIteration):
        next(scenario)


def test_there_is_no_scenario_without_a_block() -> None:
    assert {str(block) for block in BLOCKS} == set(SCENARIOS)


def kill_in_mid_run(on_call: OnCall, *arguments: str, calls: int) -> None:
    """Kill a command's process when so many calls are in flight."""
    llm = on_call.shell.project.llm
    llm.latency = 60.0
    with script_at_work(on_call.shell, *arguments) as process:
        process.wait_for_calls(calls)
        process.popen.kill()
        process.popen.wait()
    llm.latency = 0.0


@of("A shard is dead (2)")
def a_shard_is_dead(on_call: OnCall) -> Generator[None, str, None]:
    for step in ("snapshot", "plan"):
        assert on_call.shell.run(step, "notes", "--run-id", "night") == 0
    folder = on_call.shell.folder / "tmp"
    folder.mkdir()
    with on_call.shell.monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        kill_in_mid_run(on_call, "tag", "notes", "--run-id", "night", calls=2)
    assert list(folder.iterdir()) == []
    assert on_call.shell.run("report", "notes") == 0
    assert "run night is at work, or was killed before its report: 0 requests" in on_call.shell.err
    on_call.shell.run("load", "notes", "--run-id", "night")
    assert on_call.shell.run("report", "notes", "--run-id", "night") == 1
    seen = yield
    assert "night · failed: shard 1/1 · 2 texts: was killed" in seen
    assert set(on_call.statuses.values()) == {"skipped"}
    yield
    assert on_call.latest().state == "success"
    assert set(on_call.statuses.values()) == {"tagged"}


@of("Texts wait for a lock")
def texts_wait_for_a_lock(on_call: OnCall) -> Generator[None, str, None]:
    server: RedisServer = on_call.request.getfixturevalue("redis_server")
    on_call.request.getfixturevalue("redis_default")
    url = f"redis://:{server.password}@{server.host}:{server.port}/3"
    on_call.shell.monkeypatch.setenv("AIRFLOW_CONN_REDIS_DEFAULT", url)
    on_call.write(lock={"conn_id": "redis_default"})
    on_call.shell.project.execute("DELETE FROM notes WHERE id = 2")
    kill_in_mid_run(on_call, "run", "notes", calls=1)
    with server.client(3) as client:
        [lock] = client.keys("*")
    assert isinstance(lock, bytes)
    on_call.set(REDIS_URL=url, LOCK=lock.decode())
    seen = yield
    key, left = seen.split("\n")
    assert key == lock.decode()
    assert 0 < int(left) <= 50_000
    yield
    began = time.monotonic()
    assert on_call.shell.run("run", "notes") == 0
    assert time.monotonic() - began < int(left) / 1000
    assert on_call.statuses == {1: "tagged"}


@of("Redis is away")
def redis_is_away(on_call: OnCall) -> Generator[None, str, None]:
    with RedisServer(on_call.shell.folder / "redis") as server:
        on_call.shell.monkeypatch.setenv("AIRFLOW_CONN_REDIS_DEFAULT", f"redis://{server.host}:{server.port}/3")
        on_call.write(lock={"conn_id": "redis_default"})
        server.kill()
        assert on_call.shell.run("run", "notes") == 2
        seen = yield
        assert "connection `redis_default`: Redis at 127.0.0.1:" in seen
        assert "does not answer" in seen
        assert on_call.shell.project.llm.calls == []
        server.start()
        yield
        assert set(on_call.statuses.values()) == {"tagged"}


@of("Budget reached")
def budget_reached(on_call: OnCall) -> Generator[None, str, None]:
    on_call.write(limits={"max_cost_usd": 0.000001}, source={"updated_at": "updated_at"})
    on_call.shell.project.execute("UPDATE notes SET updated_at = :now", now=datetime.now(UTC).isoformat())
    assert on_call.shell.run("run", "notes") == 1
    seen = yield
    assert "failed: budget reached: 2 new texts would cost about" in seen
    assert "plan: why new: 2 asked before and not answered" in seen
    assert set(on_call.statuses.values()) == {"skipped"}
    yield
    assert on_call.latest().state == "success"
    assert set(on_call.statuses.values()) == {"tagged"}


@of("The bill is too high")
def the_bill_is_too_high(on_call: OnCall) -> Generator[None, str, None]:
    """A column counts how often a text was shown, and was taken for a part of it."""
    on_call.shell.project.execute("ALTER TABLE notes ADD COLUMN seen TEXT")
    on_call.write(source={"text_columns": ["body", "seen"]})
    for day in range(3):
        on_call.shell.project.execute("UPDATE notes SET seen = :seen", seen=f"seen {day} times")
        if day < 2:
            assert on_call.shell.run("run", "notes") == 0
    calls = len(on_call.shell.project.llm.calls)
    seen = yield
    assert "why new: 2 changed text" in seen
    assert re.search(rf"^notes +\d{{4}}-\d\d-\d\d +2 .* {calls} +[\d,]+ +\$", seen, re.MULTILINE)  # two runs, the calls
    on_call.write(source={"text_columns": ["body"]})
    yield
    on_call.shell.project.execute("UPDATE notes SET seen = 'seen often'")
    assert on_call.shell.run("run", "notes") == 0
    assert (on_call.latest().cached, on_call.latest().tagged) == (2, 0)


@of("A storm of 429s")
def a_storm_of_429s(on_call: OnCall) -> Generator[None, str, None]:
    on_call.shell.monkeypatch.setattr("tagger.throttle.GIVE_UP_SECONDS", 0.5)
    on_call.shell.monkeypatch.setattr("tagger.throttle.SHORTEST_PAUSE", 0.1)
    on_call.shell.project.llm.rate_429 = 1.0
    code, logged = on_call.run("tagger run notes")
    assert code == 2
    assert "the endpoint answers HTTP 429: no call for" in logged
    seen = yield
    assert "has answered HTTP 429 to every call for 10 minutes: set `llm.requests_per_minute`" in seen
    assert set(on_call.statuses.values()) == {"skipped"}
    on_call.shell.project.llm.rate_429 = 0.0
    on_call.edit()
    yield
    assert on_call.latest().state == "success"
    assert set(on_call.statuses.values()) == {"tagged"}


@of("The endpoint refuses every call")
def the_endpoint_refuses_every_call(on_call: OnCall) -> Generator[None, str, None]:
    on_call.shell.project.llm.api_key = "renewed"
    assert on_call.shell.run("run", "notes") == 2
    seen = yield
    assert seen.count("refuses the API key (HTTP 401") == 2
    assert set(on_call.statuses.values()) == {"skipped"}
    on_call.shell.connect(
        "openai_default", conn_type="openai", host=on_call.shell.project.llm.base_url, password="renewed"
    )
    yield
    assert set(on_call.statuses.values()) == {"tagged"}


@of("Single texts fail")
def single_texts_fail(on_call: OnCall) -> Generator[None, str, None]:
    teach(on_call.shell.project.llm, zebra=completion("certainly, here are your tags"))
    assert on_call.shell.run("run", "notes") == 1
    seen = yield
    assert "1 of 2 texts failed, more than `limits.max_failed_fraction`" in seen
    assert "errors   bad_answer 1 (such as row 2)" in seen
    teach(on_call.shell.project.llm)
    yield
    assert on_call.statuses == {1: "tagged", 2: "tagged"}


@of("Rows are skipped, or none is taken")
def none_is_taken(on_call: OnCall) -> Generator[None, str, None]:
    on_call.write(source={"updated_at": "updated_at"})
    on_call.shell.project.execute("UPDATE notes SET updated_at = '2020-01-01'")
    assert on_call.shell.run("run", "notes") == 0
    seen = yield
    assert "rows     0 with a text" in seen
    assert "plan: 0 rows" in seen
    assert "plan: 2 rows" in seen
    yield
    assert on_call.statuses == {1: "tagged", 2: "tagged"}


@of("A batch does not end")
def a_batch_does_not_end(on_call: OnCall) -> Generator[None, str, None]:
    project = on_call.shell.project
    on_call.write(llm={"mode": "batch"})
    project.change(llm={"mode": "batch"})
    project.llm.script_batches(Fate(delay=20.0))
    run = project.take("night")
    plan(run, project.connections)
    with pytest.raises(RunFailed, match="has not ended"):
        tag(run, 1, project.connections)
    load_back(run, project.connections)
    assert set(on_call.statuses.values()) == {"pending"}
    on_call.set(OPENAI_BASE_URL=project.llm.base_url, OPENAI_API_KEY="key")
    seen = yield
    assert "2 in batches that have not ended" in seen
    [batch] = set(re.findall(r'"id": ?"(batch_\w+)"', seen))
    on_call.set(BATCH=batch)
    yield
    assert [batch["status"] for batch in project.llm.submitted] == ["cancelled", "completed"]
    assert set(on_call.statuses.values()) == {"tagged"}


@of("Tags look wrong")
def tags_look_wrong(on_call: OnCall) -> Generator[None, str, None]:
    """An edit of the file reached the rows that changed since."""
    on_call.write(source={"updated_at": "updated_at"})
    assert on_call.shell.run("run", "notes", "--all") == 0
    before = on_call.content
    on_call.write(
        prompt="You tag.",
        tags=[{"id": "fruit", "description": "zebra, tiger"}, {"id": "animal", "description": "rain"}],
    )
    on_call.shell.project.put(2, "a zebra in the rain", datetime.now(UTC).isoformat())
    assert on_call.shell.run("run", "notes") == 0
    assert on_call.shell.project.target()[2].tags == ["fruit", "animal"]
    calls = len(on_call.shell.project.llm.calls)
    seen = yield
    assert "the prompt and the tags changed: 1 of 2 rows hold an older spec" in seen
    assert "a zebra in the rain" in Path("wrong.csv").read_text(encoding="utf-8-sig")
    on_call.content = before
    on_call.write()
    yield
    assert on_call.shell.project.target()[2].tags == ["animal", "weather"]
    assert len(on_call.shell.project.llm.calls) == calls


@of("Tags look wrong (2)")
def tags_of_a_row_look_wrong(on_call: OnCall) -> Generator[None, str, None]:
    assert on_call.shell.run("run", "notes") == 0
    yield
    with Path("wrong.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1]["reviewed_tags"] = "animal"
    with Path("wrong.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    yield
    with on_call.shell.project.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT row_id, tags FROM note_tags_effective ORDER BY row_id").all()
    assert [(row_id, json.loads(tags)) for row_id, tags in found] == [(1, ["fruit"]), (2, ["animal"])]


@of("A mail about drift")
def a_mail_about_drift(on_call: OnCall) -> Generator[None, str, None]:
    assert on_call.shell.run("run", "notes", "--run-id", "night") == 0
    run = on_call.shell.project.open("night")
    jump = Drift(what="tag", tag="fruit", share=0.92, before=0.33, texts=60, p=0.0003, spec_changed=False)
    run.write("summary.json", on_call.latest().model_copy(update={"drift": [jump]}))
    seen = yield
    assert "drift    tag fruit on 92 % of 60 new texts, 33 % in the 28 days before" in seen
    assert "apple pie" in Path("drift.csv").read_text(encoding="utf-8-sig")
    yield


@of("Rows would be deleted")
def rows_would_be_deleted(on_call: OnCall) -> Generator[None, str, None]:
    for row_id in range(3, 9):
        on_call.shell.project.put(row_id, f"apple number {row_id}")
    assert on_call.shell.run("run", "notes") == 0
    on_call.shell.project.execute("DELETE FROM notes WHERE id > 4")
    assert on_call.shell.run("run", "notes") == 1
    seen = yield
    assert "4 of 8 rows of note_tags are gone from the source, more than `limits.max_deleted_fraction`" in seen
    assert len(on_call.statuses) == 8
    on_call.edit()
    yield
    assert on_call.latest().state == "success"
    assert sorted(on_call.statuses) == [1, 2, 3, 4]


@of("S3 is away")
def s3_is_away(on_call: OnCall) -> Generator[None, str, None]:
    closed_s3(on_call.shell)
    assert on_call.shell.run("run", "notes") == 2
    seen = yield
    assert "S3 does not answer at http://127.0.0.1" in seen
    assert on_call.shell.project.llm.calls == []
    on_call.shell.connect_store(on_call.shell.project.store)
    yield
    assert set(on_call.statuses.values()) == {"tagged"}


@of("A database is away")
def a_database_is_away(on_call: OnCall) -> Generator[None, str, None]:
    for step in ("snapshot", "plan", "tag"):
        assert on_call.shell.run(step, "notes", "--run-id", "night") == 0
    calls = len(on_call.shell.project.llm.calls)
    missing_file(on_call.shell)
    assert on_call.shell.run("load", "notes", "--run-id", "night") == 2
    seen = yield
    assert "connection `db`: no SQLite file" in seen
    on_call.shell.connect("db", conn_type="sqlite", host=on_call.shell.project.database_connection.host)
    yield
    assert set(on_call.statuses.values()) == {"tagged"}
    assert on_call.latest().state == "success"
    assert len(on_call.shell.project.llm.calls) == calls


@of("A worker's disk is full")
def a_workers_disk_is_full(on_call: OnCall) -> Generator[None, str, None]:
    folder = on_call.shell.folder / "tmp"
    folder.mkdir()
    on_call.set(TMPDIR=str(folder))
    script = Path(sysconfig.get_path("scripts"), "tagger")
    full = ["sh", "-c", f"ulimit -f 0; exec '{script}' run notes"]  # no byte can be written to a file
    done = subprocess.run(full, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"temporary files: No usable temporary directory found in ['{folder}'" in done.stderr
    assert "Traceback" not in done.stderr
    seen = yield
    assert "Mounted on" in seen
    yield
    assert set(on_call.statuses.values()) == {"tagged"}


@of("The dataset file cannot be used")
def the_dataset_file_cannot_be_used(on_call: OnCall) -> Generator[None, str, None]:
    assert on_call.shell.run("run", "notes") == 0
    on_call.shell.project.execute("ALTER TABLE notes RENAME COLUMN body TO content")
    assert on_call.shell.run("run", "notes") == 2
    seen = yield
    assert "`source.text_columns`: table notes has no column `body` (it has id, content, updated_at)" in seen
    on_call.write(source={"text_columns": ["content"]})
    yield
    assert "2 cached, 0 new" in on_call.caplog.text


@of("No mails come")
def no_mails_come(on_call: OnCall) -> Generator[None, str, None]:
    on_call.write(alerts={"to": ["team@example.com"]})
    seen = yield
    assert "alerts: mails are off: no connection `smtp_default`" in seen
    on_call.set(AIRFLOW_CONN_SMTP_DEFAULT='{"conn_type": "smtp", "host": "mail.example.com"}')
    yield
    assert "alerts: mails to team@example.com through `smtp_default`" in on_call.shell.out


@of("A file in the bucket is damaged")
def a_file_in_the_bucket_is_damaged(on_call: OnCall) -> Generator[None, str, None]:
    assert on_call.shell.run("run", "notes", "--run-id", "night") == 0
    path = "runs/notes/night/shard-1-1.parquet"
    on_call.shell.project.open("night").storage.put(path, b"PAR1 and no more")
    seen = yield
    assert f"{path}: damaged; delete it" in seen
    on_call.set(DAMAGED=f"{on_call.shell.project.dataset.storage}/{path}")
    yield
    assert on_call.statuses == {1: "tagged", 2: "tagged"}


@of("The bucket grows")
def the_bucket_grows(on_call: OnCall) -> Generator[None, str, None]:
    project = on_call.shell.project
    old, new = put_specs(on_call.shell)
    put_run(project, "old", OLD)
    on_call.content = project.content
    seen = yield
    assert "retention: snapshots, which hold texts, are kept for ever, runs for ever" in seen
    assert f"spec {old}: 2 records" in seen
    assert "used by no dataset file" in seen
    on_call.set(SPEC=old)
    on_call.edit()
    yield
    storage = project.open("any").storage
    assert list(storage.list("snapshots/notes/old/")) == []
    assert {path.split("/")[1] for path, _ in storage.list("cache/")} == {new}
    assert len(list(storage.list("snapshots/notes/second/"))) > 0


@of("A person asks for erasure")
def a_person_asks_for_erasure(on_call: OnCall) -> Generator[None, str, None]:
    assert on_call.shell.run("run", "notes") == 0
    on_call.shell.project.execute("DELETE FROM notes WHERE id = 1")
    on_call.set(ID="1")
    seen = yield
    assert "target: 1 row" in seen
    assert "cache: 1 record" in seen
    assert sorted(on_call.statuses) == [1, 2]
    yield
    assert on_call.shell.out.splitlines() == ["notes: row 1", "  nothing is left"]
    assert sorted(on_call.statuses) == [2]
