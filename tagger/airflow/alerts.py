"""Mails about runs: that one failed, finished with failures or drift, or is not finished in time.

No alert changes what becomes of a task: what goes wrong with a mail is logged.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

from airflow.sdk import BaseNotifier, Context
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.exceptions import AirflowException, AirflowTaskTimeout

from tagger.airflow.connections import connections_from_airflow
from tagger.airflow.mails import Mail
from tagger.dataset import Dataset
from tagger.exceptions import BUDGET_REACHED, TaggerError

if TYPE_CHECKING:
    from tagger.report import Summary

logger = logging.getLogger(__name__)

BATCH_DEADLINE = timedelta(hours=26)
"""Of a dataset in batch mode that sets none: the Batch API may take 24 hours."""

LONGEST_REASON = 500

MAILED = "failure_mailed"
"""The XCom by which a failed task tells that its mail went out."""

DIED = "the worker that ran it died, or was killed"

NEXT_STEPS = {
    "snapshot": "Mend what the reason names, then clear the task snapshot. Nothing has been paid for yet.",
    "plan": "Mend what the reason names, then clear the task plan. Nothing has been paid for yet.",
    "report": "Mend what the reason names, then clear the failed task with those after it: no answered text is paid "
    "for again. Left alone, the next run asks again for the texts that failed or were skipped.",
    "dataset_file": "Mend the dataset file. Its DAG is back a minute later; until then nothing of it is tagged.",
}
NEXT_STEP_DIED = (
    "See what ended it (memory, a lost machine, somebody), then clear the task: no answered text is paid for again."
)
NEXT_STEP_BUDGET = (
    "The next run asks first for the texts that were skipped, up to its own limit. To have them now, raise the limit "
    "that the reason names in the dataset file and clear the task snapshot, which reads the file again; or trigger the "
    "DAG with another max_cost_usd, or with a limit."
)
NEXT_STEP_FAILURES = "Nothing: the next run asks for these texts again. Where refusals repeat, look at the rows named."
NEXT_STEP_DRIFT = (
    "Look at new rows with the tag named: if they are right, the texts changed, and nothing is to be done. If they are "
    "wrong, look at what changed in the dataset file, the model or the source, and measure with `tagger evaluate`."
)
NEXT_STEP_LATE = (
    "See what it waits for: a run before it, a free slot of its pool, the LLM. It is not stopped, and mails again if "
    "it fails."
)


class RunFailedMail(BaseNotifier):
    """Mails that a run failed, as the `on_failure_callback` of tasks and of their DAG: one mail a run.

    The task's runs in the worker and knows the exception. Where the task's process was killed there is none to run it;
    then the DAG's, which runs in the dag-processor after all tasks, finds that no mail went out. Where the whole worker
    died the task's runs in the dag-processor, perhaps twice, and leaves it to the DAG's if there is one.

    Args:
        to: the recipients.
        dataset: the dataset's name.
        timezone: that of the day which the mail names.
    """

    def __init__(self, *, to: list[str], dataset: str, timezone: str) -> None:
        super().__init__()
        self.to = to
        self.dataset = dataset
        self.timezone = timezone

    def notify(self, context: Context) -> None:
        """Send the mail, unless another call has sent it or will."""
        with _logged():
            from tagger.airflow.mails.smtp import send

            ti, in_worker = context["ti"], context.get("exception") is not None
            if "reason" in context:  # called for the DAG
                if any(ti.xcom_pull(task_ids=list(NEXT_STEPS), key=MAILED)):
                    return
            elif not in_worker and context["dag"].on_failure_callback:
                return
            send(self._mail(context), self.to)
            if in_worker:
                ti.xcom_push(MAILED, True)

    def _mail(self, context: Context) -> Mail:
        ti, dag_run, error = context["ti"], context["dag_run"], context.get("exception")
        step = ti.task_id
        summary = _summary(context) if step == "report" else None
        reason = DIED if error is None else _reason(error)
        headline = "dataset file cannot be used" if step == "dataset_file" else f"run failed at {step}"
        next_step = NEXT_STEP_DIED if error is None else NEXT_STEPS[step]
        if over := step == "report" and BUDGET_REACHED in reason:
            headline, next_step = "budget reached", NEXT_STEP_BUDGET
        day = _day(dag_run.conf, dag_run.logical_date or dag_run.run_after, self.timezone)
        return Mail(
            dataset=self.dataset,
            day=summary.day if summary else day,
            headline=headline,
            tone="warning" if over else "failure",
            message=reason,
            facts={"Step": step} | _facts(dag_run.run_id, dag_run.run_type),
            next_step=next_step,
            page=f"Log of {step}",
            url=ti.log_url,
            counts=_counts(summary) if summary else {},
            errors=summary.errors if summary else {},
            drift=_drift(summary) if summary else [],
        )


def finished_with_warnings(summary: "Summary", context: Context, to: list[str]) -> None:
    """Mail that a run succeeded, but that single texts failed or shares of tags jumped. A backfill mails nothing."""
    with _logged():
        from tagger.airflow.mails.smtp import send

        ti, dag_run = context["ti"], context["dag_run"]
        if not to or not (summary.failed or summary.drift) or dag_run.run_type == "backfill":
            return
        headlines, messages, next_steps = [], [], []
        if summary.failed:
            headlines.append("finished with failures")
            of_all = f"{summary.failed:,} of {summary.texts:,} texts"
            messages.append(f"{of_all} failed; the others are in the target table.")
            next_steps.append(NEXT_STEP_FAILURES)
        if summary.drift:
            headlines.append(f"drift of {_names(summary)}")
            messages.append("The tags of the newly answered texts are not spread as in the 28 days before.")
            next_steps.append(NEXT_STEP_DRIFT)
        mail = Mail(
            dataset=summary.dataset,
            day=summary.day,
            headline=", ".join(headlines),
            tone="warning",
            message=" ".join(messages),
            facts=_facts(summary.run_id, dag_run.run_type),
            next_step=" ".join(next_steps),
            page=f"Log of {ti.task_id}",
            url=ti.log_url,
            counts=_counts(summary),
            errors=summary.errors,
            drift=_drift(summary),
        )
        send(mail, to)


def _names(summary: "Summary") -> str:
    """Return what jumped, in as few words as a subject has room for."""
    names = [shift.name for shift in summary.drift]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _drift(summary: "Summary") -> list[str]:
    return [str(shift) for shift in summary.drift]


def deadline_alert(dataset: Dataset) -> DeadlineAlert | None:
    """Return the alert for a run that is not finished in time; None where nobody wants to know."""
    deadline = dataset.alerts.deadline or (BATCH_DEADLINE if dataset.llm.mode == "batch" else None)
    if not dataset.alerts.to or deadline is None:
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=deadline,
        callback=AsyncCallback(
            mail_not_finished,
            {
                "to": dataset.alerts.to,
                "dataset": dataset.dataset,
                "deadline": _duration(deadline),
                "timezone": dataset.timezone,
            },
        ),
    )


async def mail_not_finished(
    to: list[str], dataset: str, deadline: str, timezone: str, context: Mapping[str, Any]
) -> None:
    """Mail that a run is not finished in time. Called in the triggerer, with a context that holds the run as JSON.

    A backfill mails nothing, nor does a run that has ended: Airflow drops the deadlines of those that succeeded, but
    not of those that failed, and these have mailed already.
    """
    dag_run = context["dag_run"]
    if dag_run["run_type"] == "backfill" or dag_run["state"] not in ("queued", "running"):
        return
    # In a thread, for the provider's asynchronous hook begins STARTTLS twice, which fails.
    await asyncio.to_thread(_mail_not_finished, dag_run, to, dataset, deadline, timezone)


def _mail_not_finished(dag_run: Mapping[str, Any], to: list[str], dataset: str, deadline: str, timezone: str) -> None:
    with _logged():
        from airflow.sdk.configuration import conf

        from tagger.airflow.mails.smtp import send

        run_id, queued, started = dag_run["dag_run_id"], dag_run["queued_at"], dag_run["start_date"]
        day = _day(dag_run["conf"], datetime.fromisoformat(dag_run["logical_date"] or dag_run["run_after"]), timezone)
        since = datetime.fromisoformat(started or queued).astimezone(ZoneInfo(timezone))
        state = f"{dag_run['state']} since {since:%Y-%m-%d %H:%M %Z}"
        base_url = conf.get("api", "base_url", fallback="http://localhost:8080/").rstrip("/")
        mail = Mail(
            dataset=dataset,
            day=day,
            headline=f"not finished {deadline} after its start",
            tone="warning",
            message=f"The run has been {state}.",
            facts={"State": state, "Deadline": f"{deadline} after its start"} | _facts(run_id, dag_run["run_type"]),
            next_step=NEXT_STEP_LATE,
            page="The run in Airflow",
            url=f"{base_url}/dags/{dag_run['dag_id']}/runs/{quote(run_id)}",
        )
        send(mail, to)


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("alerts: no mail is sent")


def _summary(context: Context) -> "Summary | None":
    """Return the run's summary if there is one; a mail is worth sending without it."""
    from tagger.report import Summary
    from tagger.runs import Run
    from tagger.storage import Storage

    try:
        where = context["ti"].xcom_pull(task_ids="snapshot")
        storage = Storage.connect(where["storage"], where["conn_id"], connections_from_airflow)
        return Run(storage, where["dataset"], context["dag_run"].run_id).read("summary.json", Summary)
    except Exception as e:
        logger.info("alerts: no counts for the mail: %s", type(e).__name__)
        return None


def _reason(error: BaseException | str) -> str:
    """Return the first line of an error's message; of an unknown error, which may quote a text, only its type."""
    if not isinstance(error, AirflowException | AirflowTaskTimeout | TaggerError):
        return f"unexpected {type(error).__name__}; the log has more"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:LONGEST_REASON]


def _day(conf: Mapping[str, Any] | None, instant: datetime, timezone: str) -> str:
    return str((conf or {}).get("target_date") or f"{instant.astimezone(ZoneInfo(timezone)):%Y-%m-%d}")


def _facts(run_id: str, run_type: str) -> dict[str, str]:
    return {"Run": run_id, "Kind": run_type.split("_")[0]}  # asset_triggered, operator_triggered


def _counts(summary: "Summary") -> dict[str, str]:
    from tagger.price import usd

    statuses = ("cached", "tagged", "refused", "failed", "skipped", "pending")
    return {
        "Rows": f"{summary.rows:,}",
        "Texts": f"{summary.texts:,}",
        **{f"  {status}": f"{getattr(summary, status):,}" for status in statuses},
        "Requests": f"{summary.llm_requests:,}",
        "Cost": usd(summary.cost_usd),
        "Saved": usd(summary.total_saved_usd),
    }


def _duration(length: timedelta) -> str:
    """Return a duration as a dataset file has it."""
    seconds = int(length.total_seconds())
    unit, name = next(((unit, name) for unit, name in ((3600, "h"), (60, "m")) if seconds % unit == 0), (1, "s"))
    return f"{seconds // unit}{name}"
