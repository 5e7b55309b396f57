"""The steps as Airflow's tasks call them: with Airflow's connections and the run's own dates.

Only counts and shard numbers are returned, for they go into XCom.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from tagger.airflow import metrics
from tagger.airflow.alerts import finished_with_warnings
from tagger.airflow.connections import connections_from_airflow
from tagger.airflow.mails import mails_off
from tagger.dataset import Dataset
from tagger.dataset_files import load_dataset
from tagger.exceptions import InputError, LLMStopped, LLMUnreachable, RunFailed, Unreachable
from tagger.window import Options, RunKind, Selection, run_options, select_rows

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tagger.runs import Run


def snapshot(path: Path) -> dict[str, Any]:
    """Take the run's rows out of the source; return where they are, so that a later edit of the file moves nothing."""
    from tagger import snapshot as step

    with _airflow_errors():
        dataset = load_dataset(path)
        where = {"dataset": dataset.dataset, "storage": dataset.storage, "conn_id": dataset.storage_conn_id}
        taken = step.snapshot(dataset, _run_in(where), _selection(dataset), connections_from_airflow, _options())
        return {**where, "rows": taken.rows}


def plan() -> list[dict[str, Any]]:
    """Write the shards, and return what the tag step is mapped over."""
    from tagger import plan as step

    with _airflow_errors():
        run = _run()
        planned = step.plan(run, connections_from_airflow)
        if off := mails_off(run.dataset().alerts.to, connections_from_airflow):
            logger.warning("%s", off)
        return [{"shard": shard.shard, "name": shard.name} for shard in planned.shards]


def hand_over(shard: int) -> tuple[str, list[str]]:
    """Hand a shard to the Batch API; return the LLM's connection, and the batches that have not ended."""
    from tagger.batch import shard_batches

    with _airflow_errors():
        run = _run()
        with shard_batches(run, shard, connections_from_airflow) as batches:
            batches.hand_over()
            waiting = batches.waiting()
        return run.dataset().llm.conn_id, [batch.remote for batch, _ in waiting if batch.remote is not None]


def tag(shard: int) -> dict[str, int]:
    """Tag a shard; return the number of its texts by status."""
    from tagger import tag as step

    with _airflow_errors():
        return step.tag(_run(), shard, connections_from_airflow)


def load_back(target: Asset) -> dict[str, int]:
    """Write the tags into the target table, whose asset is updated with the counts.

    Raises:
        AirflowSkipException: no row of it changed, so that the asset did not.
    """
    from tagger import load as step

    with _airflow_errors():
        loaded = step.load_back(_run(), connections_from_airflow)
    if not loaded.written and not loaded.deleted:
        raise AirflowSkipException("no row of the target table changed")
    counts = loaded.model_dump(include={"written", "deleted", "tagged", "refused", "failed", "skipped", "pending"})
    get_current_context()["outlet_events"][target].extra = counts
    return counts


def report() -> dict[str, Any]:
    """Write the summary, and fail the run if it is not acceptable."""
    from tagger import report as step

    with _airflow_errors():
        run = _run()
        with metrics.sent(run):
            summary = step.report(run)
        finished_with_warnings(summary, get_current_context(), run.dataset().alerts.to)
        counts = ("rows", "texts", "cached", "tagged", "refused", "failed", "skipped", "cost_usd", "saved_usd")
        return summary.model_dump(include=set(counts))


def _run() -> "Run":
    return _run_in(get_current_context()["ti"].xcom_pull(task_ids="snapshot"))


def _run_in(where: dict[str, str]) -> "Run":
    from tagger.runs import Run
    from tagger.storage import Storage

    storage = Storage.connect(where["storage"], where["conn_id"], connections_from_airflow)
    return Run(storage, where["dataset"], get_current_context()["dag_run"].run_id)


def _options() -> Options:
    params = get_current_context()["params"]
    known = {"target_date", "rows", *Options.model_fields}
    if unknown := sorted(set(params) - known):  # a mistyped `dry_run` must not cost money
        raise InputError(f"parameter `{unknown[0]}`: unknown; expected one of {', '.join(sorted(known))}")
    return run_options(**{name: params[name] for name in Options.model_fields if name in params})


def _selection(dataset: Dataset) -> Selection:
    """Return the rows of the present run. A run without a logical date (API, assets) counts from its `run_after`.

    A run by assets takes rows up to now: while it waits for the run before it, Airflow lets it stand for later changes
    of the assets too, and dates it by the first.
    """
    context = get_current_context()
    dag_run, params = context["dag_run"], context["params"]
    kind: RunKind = "backfill" if dag_run.run_type == "backfill" else "regular"
    day = params.get("target_date")
    return select_rows(
        dataset,
        end=dag_run.logical_date or dag_run.run_after,
        kind=kind,
        day=date.fromisoformat(day) if day else None,
        all_rows=params.get("rows") == "all",
        waited_until=datetime.now(UTC) if dag_run.run_type == "asset_triggered" else None,
    )


@contextmanager
def _airflow_errors() -> Iterator[None]:
    """Let Airflow try again what may pass, and nothing else."""
    try:
        yield
    except (Unreachable, LLMUnreachable):
        raise
    except (InputError, LLMStopped, RunFailed) as e:
        raise AirflowFailException(str(e)) from None
