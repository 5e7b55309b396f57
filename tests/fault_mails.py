"""The mails in the fault campaign: whatever the SMTP server does, a step ends as it would have, and soon."""

import json
import logging
import time
from pathlib import Path
from typing import Any, Self

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from demo.mail import MailCatcher
from tagger.airflow.alerts import RunFailedMail, finished_with_warnings
from tests.airflow.test_alerts import context_of
from tests.fault_campaign import Case, Result
from tests.fault_proxy import OF_WRITES, SMTP_ANSWERS, Fault, StreamProxy
from tests.fault_site import MARK, text
from tests.test_history import NOON, summary

LONGEST_SECONDS = 10.0


class Mails:
    """Mails of failed steps and of runs with failures, through a proxy to an SMTP server."""

    def __init__(self, folder: Path) -> None:
        self._catcher = MailCatcher(folder)
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        """Start the SMTP server, and be Airflow's connection to it."""
        self._catcher.__enter__()
        connection = self._catcher.airflow_connection
        self._proxy = StreamProxy(connection["port"], SMTP_ANSWERS, "(?i)^(MAIL|RCPT|DATA)").__enter__()
        connection["port"] = self._proxy.port
        connection["extra"]["timeout"] = 1
        self._patch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps(connection))
        self._patch.setattr(RuntimeTaskInstance, "xcom_pull", lambda *_, **__: None)
        self._patch.setattr(RuntimeTaskInstance, "xcom_push", lambda *_, **__: None)
        self._proxy.arm(None)
        self._send()
        self._requests, self._writes = self._proxy.requests, self._proxy.writes
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop it."""
        self._patch.undo()
        self._proxy.__exit__()
        self._catcher.__exit__(None, None, None)

    def cases(self, cell: str) -> list[Case]:
        """Return all cases of a cell."""
        kind: Any = cell.split("-")[2]
        moments = range(1, (self._writes if kind in OF_WRITES else self._requests) + 1)
        lasting = [True] if kind == "full" else [False, True]
        return [Case("mail", "smtp", Fault(kind, at, each)) for at in moments for each in lasting]

    def try_(self, case: Case) -> Result:
        """Send both mails while a fault happens."""
        self._proxy.arm(case.fault)
        clock = time.monotonic()
        lines, error = self._send()
        seconds = time.monotonic() - clock
        struck = bool(self._proxy.struck)
        self._proxy.arm(None)
        problems = [f"it raised {type(error).__name__}"] if error else []
        if seconds > LONGEST_SECONDS:
            problems.append(f"it took {seconds:.0f} s")
        if len(lines) != 2:
            problems.append(f"two mails, and the log has {lines}")
        shown = "".join(lines) + "".join(map(str, self._catcher.mails()))
        if MARK in shown or "Traceback" in shown:
            problems.append("a text or a traceback is in the log or a mail")
        failed = [line.removeprefix("alerts: ") for line in lines if "no mail is sent" in line]
        says = failed[0].replace(f"127.0.0.1:{self._proxy.port}", "HOST:PORT") if failed else ""
        return Result(str(case), case.cell, 0, seconds, says, struck, 0, problems)

    def _send(self) -> tuple[list[str], BaseException | None]:
        """Mail that a step failed, by an error that quotes a text, and that a run had failures; return the log."""
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
        logger = logging.getLogger("tagger.airflow.mails.smtp")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            failed = RunFailedMail(to=["team@example.com"], dataset="notes", timezone="UTC")
            failed(context_of("plan", ValueError(text(1))))
            finished_with_warnings(summary("run", NOON), context_of("report"), ["team@example.com"])
        except Exception as e:
            return lines, e
        finally:
            logger.removeHandler(handler)
        return lines, None
