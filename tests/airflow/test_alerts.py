"""The mails about runs, as an SMTP server gets them; contexts as Airflow builds them."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import structlog
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from airflow.callbacks.callback_requests import DagCallbackRequest, TaskCallbackRequest
from airflow.dag_processing.processor import _execute_callbacks
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG
from airflow.sdk.api.datamodels._generated import DagRun, TaskInstance, TIRunContext
from airflow.sdk.definitions.deadline import DeadlineReference
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.serialization.serialized_objects import DagSerialization
from airflow.triggers.callback import CallbackTrigger

from demo.mail import MailCatcher
from demo.processes import LOOPBACK
from demo.stand_in import completion
from tagger.airflow.alerts import DIED, RunFailedMail, deadline_alert, finished_with_warnings
from tagger.airflow.mails import mails_off
from tagger.airflow.mails.smtp import RETRY_LIMIT, TIMEOUT_SECONDS, _Hook
from tagger.dataset_files import parse_dataset
from tagger.drift import Drift
from tagger.exceptions import BUDGET_REACHED, RunFailed, Unreachable
from tagger.report import Summary
from tests.databases import teach
from tests.project import MINIMAL, Project, merged
from tests.servers import Authority
from tests.test_drift import run_seven
from tests.test_history import summary

TO = ["team@example.com", "night@example.com"]
NIGHT = datetime(2026, 11, 21, 16, tzinfo=UTC)
"""The 22nd in Tokyo."""

RUN_ID = "scheduled__2026-11-21T16:00:00+00:00"
PASSWORD = "correct-horse"


@pytest.fixture
def catcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MailCatcher]:
    """An SMTP server that is Airflow's `smtp_default`."""
    with MailCatcher(tmp_path / "mails") as server:
        connect(monkeypatch, server.airflow_connection)
        yield server


@pytest.fixture(autouse=True)
def xcoms(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """The XComs of the run, by task and key, in place of Airflow's API."""
    kept: dict[tuple[str, str], Any] = {}

    def pull(_self: Any, task_ids: str | list[str], key: str = "return_value") -> Any:
        return kept.get((task_ids, key)) if isinstance(task_ids, str) else [kept.get((one, key)) for one in task_ids]

    def push(self: Any, key: str, value: Any) -> None:
        kept[self.task_id, key] = value

    monkeypatch.setattr(RuntimeTaskInstance, "xcom_pull", pull)
    monkeypatch.setattr(RuntimeTaskInstance, "xcom_push", push)
    return kept


def connect(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any], conn_id: str = "smtp_default") -> None:
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))


def unencrypted(port: int, **extra: Any) -> dict[str, Any]:
    plain = {"disable_ssl": True, "disable_tls": True, "from_email": "tagger@example.com", "timeout": 20}
    return {"conn_type": "smtp", "host": LOOPBACK, "port": port, "extra": plain | extra}


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as free:
        return int(free.getsockname()[1])


def notifier(**changes: Any) -> RunFailedMail:
    return RunFailedMail(**{"to": TO, "dataset": "notes", "timezone": "Asia/Tokyo"} | changes)


def dag_of(*tasks: str, callback: Any = None) -> DAG:
    with DAG("tag_notes", schedule=None) as dag:
        for task_id in tasks:
            EmptyOperator(task_id=task_id, on_failure_callback=callback)
    return dag


def run_of(**changes: Any) -> DagRun:
    fields: dict[str, Any] = {name: None for name in DagRun.model_fields if name != "clear_number"}
    fields |= {"dag_id": "tag_notes", "run_id": RUN_ID, "logical_date": NIGHT, "run_after": NIGHT}
    fields |= {"run_type": "scheduled", "state": "running", "consumed_asset_events": []}
    return DagRun(**fields | changes)


def instance_of(task_id: str, run: DagRun) -> TaskInstance:
    return TaskInstance(
        id=uuid4(),
        task_id=task_id,
        dag_id="tag_notes",
        run_id=run.run_id,
        try_number=4,
        dag_version_id=uuid4(),
    )


def context_of(task_id: str, error: BaseException | None = None, **run: Any) -> Any:
    """Return a task's context as the worker has it when callbacks run."""
    dag_run = run_of(**run)
    runtime = RuntimeTaskInstance.model_construct(
        **instance_of(task_id, dag_run).model_dump(exclude_unset=True),
        map_index=-1,
        task=dag_of(task_id).get_task(task_id),
        _ti_context_from_server=TIRunContext.model_construct(dag_run=dag_run, max_tries=3),
    )
    context: Any = runtime.get_template_context()
    context["exception"] = error
    return context


def parts(mail: EmailMessage) -> tuple[str, str]:
    """Return a mail's plain text and its HTML, which stand in this order."""
    assert mail.get_content_type() == "multipart/alternative"
    plain, html = mail.iter_parts()
    assert (plain.get_content_type(), html.get_content_type()) == ("text/plain", "text/html")
    return plain.get_content(), html.get_content()


def only(catcher: MailCatcher) -> tuple[EmailMessage, str, str]:
    [mail] = catcher.mails()
    return mail, *parts(mail)


def alert_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("tagger.airflow")]


def test_failed_step_is_mailed_with_its_reason_and_its_log(catcher: MailCatcher) -> None:
    error = AirflowFailException("connection `db`: no table `notes`\nsecond line")

    notifier()(context_of("plan", error))

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: run failed at plan"
    assert (mail["from"], mail["to"]) == ("tagger@example.com", ", ".join(TO))
    assert mail["auto-submitted"] == "auto-generated"
    log = "http://localhost:8080/dags/tag_notes/runs/scheduled__2026-11-21T16%3A00%3A00%2B00%3A00/tasks/plan"
    for part in (plain, html):
        assert "connection `db`: no table `notes`" in part
        assert "second line" not in part
        assert RUN_ID in part
        assert "scheduled" in part
        assert f"{log}?try_number=4" in part
        assert "Nothing has been paid for yet" in " ".join(part.split())
        assert "Counts" not in part
    assert "\nStep      plan\n" in plain
    assert "src=" not in html and "<link" not in html and "url(" not in html


def test_failed_report_is_mailed_with_the_runs_counts(
    catcher: MailCatcher, project: Project, monkeypatch: pytest.MonkeyPatch, xcoms: dict[tuple[str, str], Any]
) -> None:
    summary, error = failed_run(project, monkeypatch, xcoms)

    notifier()(context_of("report", error, run_id=summary.run_id))

    mail, plain, html = only(catcher)
    assert mail["subject"] == f"[tagger] notes, {summary.day}: run failed at report"
    lines = [line.split() for line in plain.splitlines()]
    for counted in (
        ["Rows", "3"],
        ["Texts", "3"],
        ["tagged", "2"],
        ["failed", "1"],
        ["Cost", f"${summary.cost_usd:.4f}"],
    ):
        assert counted in lines
    numbers = [line for line in plain.splitlines() if line.split()[:1] in (["Rows"], ["cached"], ["Cost"], ["Saved"])]
    assert len({len(line) for line in numbers}) == 1  # aligned
    [(kind, failures)] = summary.errors.items()
    assert [kind, "1", "such", "as", "row", failures.row_id] in lines
    for shown in (">Rows<", ">pending<", ">Requests<", ">Saved<", f">{kind}<", f"such as row {failures.row_id}<"):
        assert shown in html


def failed_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, xcoms: dict[tuple[str, str], Any]
) -> tuple[Summary, AirflowFailException]:
    """Let a run of three texts fail for one of them, and its task instances find it."""
    for n, body in enumerate(["apple", "zebra", "storm"]):
        project.put(n, body)
    teach(project.llm, apple=completion("no json"))
    where = {"dataset": "notes", "storage": project.dataset.storage, "conn_id": "aws_default"}
    connection = project.connections("aws_default")
    assert connection is not None
    fields = {name: getattr(connection, name) for name in ("conn_type", "login", "password", "extra")}
    connect(monkeypatch, fields, "aws_default")
    xcoms["snapshot", "return_value"] = where
    run = project.take()
    with pytest.raises(RunFailed) as raised:
        project.finish(run)
    return project.summary(run), AirflowFailException(str(raised.value))


def test_reached_budget_has_a_subject_of_its_own(catcher: MailCatcher) -> None:
    error = AirflowFailException(f"notes: shard 1/2 · 9 texts: {BUDGET_REACHED}: `limits.max_cost_usd` is spent")

    notifier()(context_of("report", error))

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: budget reached"
    for part in (plain, html):
        assert "raise the limit that the reason names in the dataset file and clear" in " ".join(part.split())
        assert "Counts" not in part  # no summary was found, and the mail goes out without


def call_back_from_the_dag_processor(request: Any, dag: DAG) -> None:
    dags: Any = SimpleNamespace(dags={"tag_notes": dag})
    _execute_callbacks(dags, [request], structlog.get_logger())


REQUEST = {"filepath": "tagging.py", "bundle_name": "dags-folder", "bundle_version": None, "msg": "task_failure"}


def of_task(task_id: str) -> TaskCallbackRequest:
    run = run_of()
    context = {"dag_run": run.model_dump(), "max_tries": 3}
    instance = instance_of(task_id, run).model_dump()
    return TaskCallbackRequest.model_validate(REQUEST | {"ti": instance, "context_from_server": context})


def of_dag(task_id: str) -> DagCallbackRequest:
    run = run_of()
    context = {"dag_run": run.model_dump(), "last_ti": instance_of(task_id, run).model_dump()}
    ids = {"dag_id": "tag_notes", "run_id": RUN_ID}
    return DagCallbackRequest.model_validate(REQUEST | ids | {"context_from_server": context})


def test_killed_worker_is_mailed_from_the_dag_processor(catcher: MailCatcher) -> None:
    call_back_from_the_dag_processor(of_task("snapshot"), dag_of("snapshot", callback=[notifier()]))

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: run failed at snapshot"
    assert DIED in plain and DIED in html
    assert "/tasks/snapshot?try_number=4" in plain


@pytest.mark.parametrize("task_callbacks", [0, 1, 2])
def test_killed_task_is_mailed_once_whatever_airflow_calls(catcher: MailCatcher, task_callbacks: int) -> None:
    dag = dag_of("plan", callback=[notifier()])
    dag.on_failure_callback = [notifier()]

    for _ in range(task_callbacks):  # none where only the task's process was killed; Airflow may send one twice
        call_back_from_the_dag_processor(of_task("plan"), dag)
    call_back_from_the_dag_processor(of_dag("plan"), dag)

    mail, plain, _ = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: run failed at plan"
    assert DIED in plain


def test_dags_callback_is_silent_after_the_workers_mail(catcher: MailCatcher) -> None:
    dag = dag_of("plan", "tag", callback=[notifier()])
    dag.on_failure_callback = [notifier()]

    notifier()(context_of("plan", Unreachable("no answer")))
    call_back_from_the_dag_processor(of_dag("tag"), dag)

    _, plain, _ = only(catcher)
    assert "no answer" in plain


def test_broken_dataset_file_is_mailed(catcher: MailCatcher) -> None:
    context = context_of("dataset_file", AirflowFailException("notes.yaml: `source`: found nothing"))

    notifier()(context)

    mail, plain, _ = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: dataset file cannot be used"
    assert "notes.yaml: `source`: found nothing" in plain


def test_run_without_logical_date_or_with_a_target_date_is_of_that_day(catcher: MailCatcher) -> None:
    error = Unreachable("no answer")

    notifier()(context_of("plan", error, logical_date=None, run_type="asset_triggered"))
    notifier()(context_of("plan", error, run_type="manual", conf={"target_date": "2026-10-01"}))

    asset, manual = catcher.mails()
    assert asset["subject"] == "[tagger] notes, 2026-11-22: run failed at plan"
    assert "\nKind      asset\n" in parts(asset)[0]
    assert manual["subject"] == "[tagger] notes, 2026-10-01: run failed at plan"


def test_message_of_an_unknown_error_is_not_mailed(catcher: MailCatcher) -> None:
    notifier()(context_of("plan", ValueError("the patient ate a mango")))

    _, plain, html = only(catcher)
    assert "unexpected ValueError; the log has more" in plain
    assert "mango" not in plain + html


def test_markup_is_escaped_and_the_subject_is_one_line(catcher: MailCatcher) -> None:
    error = AirflowFailException("row <script>alert('記事')</script> & more" + "x" * 1000)

    notifier(dataset="notes\r\nBcc: all@example.com")(context_of("plan", error))

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes Bcc: all@example.com, 2026-11-22: run failed at plan"
    assert mail["bcc"] is None
    assert "row <script>alert('記事')</script> & more" in plain
    assert "row &lt;script&gt;alert(&#39;記事&#39;)&lt;/script&gt; &amp; more" in html
    assert max(map(len, plain.splitlines())) <= 500


def test_without_a_connection_one_line_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__EMAIL__EMAIL_CONN_ID", "our_mails")

    notifier()(context_of("plan", Unreachable("no answer")))

    assert alert_lines(caplog) == ["alerts: mails are off: no connection `our_mails`"]


def test_mails_go_through_the_configured_connection(catcher: MailCatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__EMAIL__EMAIL_CONN_ID", "our_mails")
    connect(monkeypatch, catcher.airflow_connection, "our_mails")
    monkeypatch.delenv("AIRFLOW_CONN_SMTP_DEFAULT")

    notifier()(context_of("plan", Unreachable("no answer")))

    assert len(catcher.mails()) == 1


@pytest.mark.parametrize("login", ["tagger@example.org", "tagger"])
def test_sender_is_the_login_where_it_is_an_address(
    catcher: MailCatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, login: str
) -> None:
    connection = catcher.airflow_connection
    del connection["extra"]["from_email"]
    connect(monkeypatch, connection | {"login": login})

    notifier()(context_of("plan", Unreachable("no answer")))

    assert [mail["from"] for mail in catcher.mails()] == [sender for sender in [login] if "@" in sender]
    assert ["no `from_email`" in line for line in alert_lines(caplog)] == [True for _ in [login] if "@" not in login]


def test_refused_connection_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    connect(monkeypatch, unencrypted(port) | {"login": "tagger", "password": PASSWORD})

    notifier()(context_of("plan", Unreachable("no answer")))

    assert alert_lines(caplog) == [f"alerts: no mail is sent: {LOOPBACK}:{port}: ConnectionRefusedError"]
    assert PASSWORD not in caplog.text and "Traceback" not in caplog.text


def test_server_that_never_answers_holds_the_worker_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        port = silent.getsockname()[1]
        connect(monkeypatch, unencrypted(port, timeout=1))
        clock = time.monotonic()

        notifier()(context_of("plan", Unreachable("no answer")))

    assert time.monotonic() - clock < 1 + RETRY_LIMIT + 10
    assert alert_lines(caplog) == [f"alerts: no mail is sent: {LOOPBACK}:{port}: TimeoutError"]


def test_patience_is_ours_unless_the_connection_sets_its_own() -> None:
    def patience(**extra: Any) -> tuple[int, int]:
        hook = _Hook("smtp_default", "")
        hook.smtp_connection = SimpleNamespace(extra_dejson=extra)  # type: ignore[assignment]
        return hook.timeout, hook.smtp_retry_limit

    assert patience() == (TIMEOUT_SECONDS, RETRY_LIMIT)
    assert patience(timeout=60, retry_limit=3) == (60, 3)


@pytest.mark.parametrize("password", [PASSWORD, "wrong"])
def test_triggerer_mails_over_starttls_with_a_login(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, password: str
) -> None:
    got: list[bool] = []
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    server = starttls_server(got, authority)
    server.start()
    try:
        connection = unencrypted(server.port, disable_tls=False)
        connect(monkeypatch, connection | {"login": "tagger", "password": password})

        missed()
    finally:
        server.stop()

    if password == PASSWORD:
        assert got == [True]
        assert alert_lines(caplog) == []
    else:
        assert got == []
        expected = f"alerts: no mail is sent: {LOOPBACK}:{server.port}: SMTPAuthenticationError 535"
        assert alert_lines(caplog) == [expected]
        assert password not in caplog.text


def starttls_server(got: list[bool], authority: Authority) -> Controller:
    """Return a server that wants STARTTLS and a login, and adds to `got` for each mail whether it had both."""

    class Handler:
        async def handle_DATA(self, _server: Any, session: Any, _envelope: Any) -> str:
            got.append(session.ssl is not None and session.authenticated)
            return "250 Kept"

    def login(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=data.password == PASSWORD.encode(), handled=False)

    return Controller(
        Handler(),
        hostname=LOOPBACK,
        port=free_port(),
        tls_context=authority.server(),
        require_starttls=True,
        authenticator=login,
    )


def test_failures_of_a_green_run_are_mailed(
    catcher: MailCatcher, project: Project, monkeypatch: pytest.MonkeyPatch, xcoms: dict[tuple[str, str], Any]
) -> None:
    summary, _ = failed_run(project, monkeypatch, xcoms)

    finished_with_warnings(summary, context_of("report"), TO)

    mail, plain, html = only(catcher)
    assert mail["subject"] == f"[tagger] notes, {summary.day}: finished with failures"
    for part in (plain, html):
        assert "1 of 3 texts failed" in part
        assert "/tasks/report?try_number=4" in part
        assert next(iter(summary.errors)) in part
        assert "Saved" in part


def test_failures_are_not_mailed_where_nobody_should_be_told(
    catcher: MailCatcher, project: Project, monkeypatch: pytest.MonkeyPatch, xcoms: dict[tuple[str, str], Any]
) -> None:
    summary, _ = failed_run(project, monkeypatch, xcoms)

    finished_with_warnings(summary, context_of("report", run_type="backfill"), TO)
    finished_with_warnings(summary, context_of("report"), [])
    finished_with_warnings(summary.model_copy(update={"failed": 0}), context_of("report"), TO)

    assert catcher.mails() == []


DRIFT = [
    Drift(what="tag", tag=tag, share=0.31, before=0.12, p=0.0003, texts=210, spec_changed=True)
    for tag in ("cardiology", "<b>surgery", "oncology", "dentistry")
]


def test_drift_of_a_green_run_is_mailed(catcher: MailCatcher) -> None:
    told = summary("one", NIGHT, failed=0, drift=[DRIFT[0]])

    finished_with_warnings(told, context_of("report"), TO)

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-30: drift of tag cardiology"
    for part in (plain, html):
        words = " ".join(part.split())
        assert "tag cardiology on 31 % of 210 new texts, 12 % in the 28 days before (p = 0.0003); the spec" in words
        assert "Look at new rows with the tag named" in words
        assert "failed;" not in words


def test_drift_that_a_report_found_is_mailed(catcher: MailCatcher, project: Project) -> None:
    finished_with_warnings(run_seven(project), context_of("report"), TO)

    mail, plain, html = only(catcher)
    assert mail["subject"].split(": ", 1)[1].startswith("drift of tag fruit")
    for part in (plain, html):
        assert "tag fruit on 92 % of 60 new texts, 33 % in the 28 days before (p" in " ".join(part.split())


def test_failures_and_drift_are_one_mail(catcher: MailCatcher) -> None:
    finished_with_warnings(summary("one", NIGHT, failed=2, drift=DRIFT), context_of("report"), TO)

    mail, plain, html = only(catcher)
    assert " ".join(mail["subject"].split()) == (
        "[tagger] notes, 2026-11-30: finished with failures, drift of tag cardiology, tag <b>surgery, tag oncology "
        "and 1 more"
    )
    for part in (plain, html):
        assert "2 of 10 texts failed" in part
        assert "dentistry on 31 %" in " ".join(part.split())
    assert "<b>" not in html


def test_fault_in_a_mail_does_not_reach_the_task(catcher: MailCatcher, caplog: pytest.LogCaptureFixture) -> None:
    notifier(timezone="No/Where")(context_of("plan", Unreachable("no answer")))

    assert alert_lines(caplog) == ["alerts: no mail is sent"]
    assert catcher.mails() == []


def dataset(**changes: Any) -> Any:
    content = merged(MINIMAL, {"storage": "s3://bucket", "timezone": "Asia/Tokyo", "alerts": {"to": TO}})
    return parse_dataset(merged(content, changes), "notes.yaml")


@pytest.mark.parametrize(
    ("changes", "interval", "words"),
    [
        ({"alerts": {"deadline": "2h"}}, timedelta(hours=2), "2h"),
        ({"alerts": {"deadline": "90m"}}, timedelta(minutes=90), "90m"),
        ({"alerts": {"deadline": "90s"}}, timedelta(seconds=90), "90s"),
        ({"llm": {"mode": "batch"}}, timedelta(hours=26), "26h"),
        ({"llm": {"mode": "batch"}, "alerts": {"deadline": "2h"}}, timedelta(hours=2), "2h"),
    ],
)
def test_deadline_counts_from_the_queue(changes: dict[str, Any], interval: timedelta, words: str) -> None:
    alert = deadline_alert(dataset(**changes))

    assert alert is not None
    assert alert.reference is DeadlineReference.DAGRUN_QUEUED_AT
    assert alert.interval == interval
    assert alert.callback.kwargs["deadline"] == words
    with DAG("tag_notes", schedule=None, deadline=alert) as dag:
        EmptyOperator(task_id="snapshot")
    assert "mail_not_finished" in json.dumps(DagSerialization.to_dict(dag))


@pytest.mark.parametrize("changes", [{}, {"alerts": {"to": [], "deadline": "2h"}}])
def test_without_deadline_or_recipients_there_is_no_alert(changes: dict[str, Any]) -> None:
    assert deadline_alert(dataset(**changes)) is None


def missed(**run: Any) -> None:
    """Let the triggerer tell of a missed deadline, with the context that the scheduler gives it."""
    alert = deadline_alert(dataset(alerts={"deadline": "2h"}))
    assert alert is not None
    fields = {
        "dag_run_id": RUN_ID,
        "dag_id": "tag_notes",
        "logical_date": "2026-11-21T16:00:00Z",
        "queued_at": "2026-11-21T16:00:03.456789Z",
        "start_date": "2026-11-21T16:00:05Z",
        "run_after": "2026-11-21T16:00:00Z",
        "run_type": "scheduled",
        "state": "running",
        "conf": {},
    }
    context = {"dag_run": fields | run, "deadline": {"id": str(uuid4()), "deadline_time": NIGHT}}

    async def trigger() -> list[Any]:
        callback = CallbackTrigger(alert.callback.path, alert.callback.kwargs | {"context": context})
        return [event.payload["state"] async for event in callback.run()]

    assert asyncio.run(trigger()) == ["running", "success"]


@pytest.mark.parametrize(
    ("run", "state"),
    [
        ({}, "running since 2026-11-22 01:00 JST"),
        ({"state": "queued", "start_date": None}, "queued since 2026-11-22 01:00 JST"),
        ({"run_type": "asset_triggered", "logical_date": None, "conf": None}, "running since 2026-11-22 01:00 JST"),
    ],
)
def test_unfinished_run_is_mailed_from_the_triggerer(catcher: MailCatcher, run: dict[str, Any], state: str) -> None:
    missed(**run)

    mail, plain, html = only(catcher)
    assert mail["subject"] == "[tagger] notes, 2026-11-22: not finished 2h after its start"
    for part in (plain, html):
        assert state in part
        assert RUN_ID in part
        url = "http://localhost:8080/dags/tag_notes/runs/scheduled__2026-11-21T16%3A00%3A00%2B00%3A00"
        assert url in part


@pytest.mark.parametrize("run", [{"run_type": "backfill"}, {"state": "failed"}, {"state": "success"}])
def test_deadline_of_a_backfill_or_of_an_ended_run_is_silent(catcher: MailCatcher, run: dict[str, Any]) -> None:
    missed(**run)

    assert catcher.mails() == []


def test_triggerer_survives_a_server_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    connect(monkeypatch, unencrypted(port))

    missed()

    assert alert_lines(caplog) == [f"alerts: no mail is sent: {LOOPBACK}:{port}: ConnectionRefusedError"]


def test_sent_mail_is_logged(catcher: MailCatcher, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tagger.airflow.mails.smtp")

    notifier()(context_of("plan", Unreachable("no answer")))

    subject = "[tagger] notes, 2026-11-22: run failed at plan"
    assert alert_lines(caplog) == [f"alerts: mailed “{subject}” to team@example.com, night@example.com"]


Connected = Callable[[str], Any]


@pytest.mark.parametrize(
    ("to", "connections", "line"),
    [
        (TO, {}.get, "alerts: mails are off: no connection `smtp_default`"),
        (TO, {"smtp_default": object()}.get, None),
        ([], {}.get, None),
    ],
)
def test_missing_connection_is_told_where_there_are_recipients(
    to: list[str], connections: Connected, line: str | None
) -> None:
    assert mails_off(to, connections) == line


def run_python(code: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment, timeout=120)


def test_missing_connection_is_told_outside_airflow() -> None:
    run_python(
        "import sys\n"
        "from tagger.airflow.mails import mails_off\n"
        "assert mails_off(['a@example.com'], {}.get).endswith('`our_mails`')\n"
        "assert 'airflow' not in sys.modules\n",
        AIRFLOW__EMAIL__EMAIL_CONN_ID="our_mails",
    )


def test_alerts_are_light_to_import() -> None:
    run_python(
        "import sys, airflow.sdk\n"
        "import tagger.airflow.alerts\n"
        "heavy = {'aiosmtplib', 'boto3', 'gokart', 'openai', 'pandas', 'pyarrow'}\n"
        "heavy |= {'tagger.airflow.mails.smtp', 'tagger.report', 'tagger.storage', 'tagger.tag'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
