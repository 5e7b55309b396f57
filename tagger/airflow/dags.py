"""One DAG for each dataset file: snapshot → plan → tag (mapped over shards) → load_back → report."""

import logging
import re
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, Param, TriggerRule, task
from airflow.sdk.exceptions import AirflowFailException
from airflow.timetables.trigger import CronTriggerTimetable

from tagger.airflow import steps
from tagger.dataset import AssetSchedule, Dataset
from tagger.dataset_files import dataset_files, load_datasets, read_yaml
from tagger.exceptions import DatasetError

logger = logging.getLogger(__name__)

RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2,
    "max_retry_delay": timedelta(minutes=10),
}
"""Of each step; wrong input and refusals are not tried again."""

PARAMS = {
    "target_date": Param(
        None,
        type=["null", "string"],
        format="date",
        title="Target date",
        description="Take the rows changed on this calendar day of the dataset's time zone, instead of the run's "
        "window. Not in a backfill.",
    ),
    "rows": Param(
        "window",
        type="string",
        enum=["window", "all"],
        title="Rows",
        description="`all` takes the whole table: to load it first, or to bring a new prompt to old rows. "
        "The cache makes unchanged texts free.",
    ),
}

DOCS = """Tags the new and changed texts of `{source}` with {model} and writes the tags to `{target}`.

| step | what it does | when it fails |
|---|---|---|
| snapshot | takes the run's rows out of the source to `{storage}` | the message names the connection, table or column |
| plan | finds out which texts the cache lacks | as above; nothing is paid for yet |
| tag | asks the LLM, one gokart task per text; answers are kept at once | clear it: no answered text is asked again |
| load_back | writes the tags in one transaction | clear it: it is idempotent |
| report | sums the run up and fails it if too much failed | its log says why |

A text that failed is asked again by the next run, however old its row is.
"""


def tagging_dags(folder: Path) -> dict[str, DAG]:
    """Return the DAGs of all dataset files in a folder by DAG id. A wrong file gives a DAG that says so."""
    dags: dict[str, DAG] = {}
    for path, loaded in load_datasets(dataset_files(folder)).items():
        try:
            dag = broken_dag(path, str(loaded)) if isinstance(loaded, DatasetError) else tagging_dag(loaded, path)
        except Exception as e:  # a fault of ours: one file must not take the other DAGs down
            logger.exception("%s cannot be made a DAG", path)
            dag = broken_dag(path, f"{path}: unexpected {type(e).__name__}; the dag-processor's log has more")
        if dag.dag_id in dags:
            dag = broken_dag(path, f"{path}: `dataset`: another file gives the DAG `{dag.dag_id}` too", unique=True)
        dags[dag.dag_id] = dag
    return dags


def tagging_dag(dataset: Dataset, path: Path) -> DAG:
    """Return the DAG of a dataset."""
    with DAG(
        f"tag_{dataset.dataset}",
        schedule=_schedule(dataset),
        start_date=datetime.combine(dataset.start_date, time(), dataset.zone),
        catchup=dataset.source.updated_at is not None,
        max_active_runs=1,
        default_args=RETRIES,
        params=PARAMS,
        tags={"tagger"},
        doc_md=DOCS.format(
            source=dataset.source.table,
            model=dataset.llm.model,
            target=dataset.target.table,
            storage=dataset.storage,
        ),
    ) as dag:
        _tasks(dataset, path)
    return dag


def _tasks(dataset: Dataset, path: Path) -> None:
    @task
    def snapshot() -> dict[str, Any]:
        return steps.snapshot(path)

    @task
    def plan() -> list[dict[str, Any]]:
        return steps.plan()

    @task(pool=dataset.llm.pool, map_index_template="{{ task.op_kwargs['shard']['name'] }}")
    def tag(shard: dict[str, Any]) -> dict[str, int]:
        return steps.tag(shard["shard"])

    @task
    def load_back() -> dict[str, int]:
        return steps.load_back()

    @task(trigger_rule=TriggerRule.ALL_DONE_MIN_ONE_SUCCESS)
    def report() -> dict[str, Any]:
        return steps.report()

    planned = plan()
    loaded = load_back()
    snapshot() >> planned
    tag.expand(shard=planned) >> EmptyOperator(task_id="shards_ended", trigger_rule=TriggerRule.ALL_DONE) >> loaded
    planned >> loaded
    [planned, loaded] >> report()


def _schedule(dataset: Dataset) -> Any:
    if isinstance(dataset.schedule, AssetSchedule):
        return [Asset(uri) for uri in dataset.schedule.assets]
    if dataset.schedule is None:
        return None
    return CronTriggerTimetable(dataset.schedule, timezone=dataset.timezone)


def broken_dag(path: Path, message: str, *, unique: bool = False) -> DAG:
    """Return the DAG of a dataset file that cannot be used: it keeps its id, and its one task fails with the reason."""
    content: Any = None
    try:
        content = read_yaml(path)
    except DatasetError:
        logger.debug("%s is no YAML", path)
    content = content if isinstance(content, dict) else {}
    name = content.get("dataset")
    if unique or not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)
    with DAG(
        f"tag_{name}",
        schedule=CronTriggerTimetable(_readable_schedule(content), timezone="UTC"),
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        tags={"tagger", "broken"},
        doc_md=f"**This dataset file cannot be used, so nothing is tagged.**\n\n```\n{message}\n```\n",
    ) as dag:

        @task(retries=0)
        def dataset_file() -> None:
            raise AirflowFailException(message)

        dataset_file()
    return dag


def _readable_schedule(content: dict[str, Any]) -> str:
    from croniter import croniter

    schedule = content.get("schedule")
    return schedule if isinstance(schedule, str) and croniter.is_valid(schedule) else "@daily"
