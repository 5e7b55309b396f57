"""One DAG for each dataset file: snapshot → plan → tag (mapped over shards) → load_back → report."""

import logging
import re
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, TriggerRule, task
from airflow.sdk.exceptions import AirflowFailException
from airflow.timetables.trigger import CronTriggerTimetable

from tagger.airflow import docs, steps
from tagger.airflow.alerts import RunFailedMail, deadline_alert
from tagger.airflow.batch import TagBatch
from tagger.airflow.params import params
from tagger.dataset import Alerts, AssetSchedule, Dataset
from tagger.dataset_files import dataset_files, load_datasets, read_yaml
from tagger.exceptions import DatasetError, InputError

logger = logging.getLogger(__name__)


def tagging_dags(folder: Path) -> dict[str, DAG]:
    """Return the DAGs of all dataset files in a folder by DAG id. A wrong file gives a DAG that says so."""
    dags: dict[str, DAG] = {}
    datasets = load_datasets(dataset_files(folder))
    others = sorted({to for loaded in datasets.values() if isinstance(loaded, Dataset) for to in loaded.alerts.to})
    for path, loaded in datasets.items():
        try:
            dag = (
                broken_dag(path, str(loaded), others) if isinstance(loaded, DatasetError) else tagging_dag(loaded, path)
            )
        except InputError as e:
            dag = broken_dag(path, f"{path}: {e}", others)
        except Exception as e:  # a fault of ours: one file must not take the other DAGs down
            logger.exception("%s cannot be made a DAG", path)
            dag = broken_dag(path, f"{path}: unexpected {type(e).__name__}; the dag-processor's log has more", others)
        if dag.dag_id in dags:
            message = f"{path}: `dataset`: another file gives the DAG `{dag.dag_id}` too"
            dag = broken_dag(path, message, others, unique=True)
        dags[dag.dag_id] = dag
    return dags


def tagging_dag(dataset: Dataset, path: Path) -> DAG:
    """Return the DAG of a dataset."""
    with DAG(
        f"tag_{dataset.dataset}",
        schedule=_schedule(dataset),
        start_date=datetime.combine(dataset.start_date, time(), dataset.zone),
        catchup=dataset.source.updated_at is not None,
        max_active_runs=dataset.max_active_runs,
        deadline=deadline_alert(dataset),
        on_failure_callback=_mail(dataset.dataset, dataset.alerts.to, dataset.timezone),
        params=params(dataset),
        tags={"tagger"},
        doc_md=docs.of_dag(dataset),
    ) as dag:
        _tasks(dataset, path)
    return dag


def _tasks(dataset: Dataset, path: Path) -> None:
    source, target = Asset(dataset.source_asset), Asset(dataset.target_asset)
    mail = _mail(dataset.dataset, dataset.alerts.to, dataset.timezone)

    @task(**_settings(dataset, "snapshot"), inlets=[source], on_failure_callback=mail)
    def snapshot() -> dict[str, Any]:
        return steps.snapshot(path)

    @task(**_settings(dataset, "plan"), on_failure_callback=mail)
    def plan() -> list[dict[str, Any]]:
        return steps.plan()

    of_tag = _settings(dataset, "tag") | {"pool": dataset.llm.pool}

    @task(**of_tag, map_index_template="{{ task.op_kwargs['shard']['name'] }}")
    def tag(shard: dict[str, Any]) -> dict[str, int]:
        return steps.tag(shard["shard"])

    @task(**_settings(dataset, "load_back"), outlets=[target])
    def load_back() -> dict[str, int]:
        return steps.load_back(target)

    @task(**_settings(dataset, "report"), on_failure_callback=mail)
    def report() -> dict[str, Any]:
        return steps.report()

    # No run has more than one of the three tasks that mail fail: what breaks in between fails the report.
    planned = plan()
    loaded = load_back()
    snapshot() >> planned
    ended = _join("shards_ended")
    if dataset.llm.mode == "batch":
        batch = TagBatch.partial(task_id="tag", map_index_template="{{ task.shard['name'] }}", **of_tag)
        batch.expand(shard=planned) >> ended
    else:
        tag.expand(shard=planned) >> ended
    ended >> loaded
    planned >> loaded >> _join("load_ended") >> (reported := report())
    planned >> reported


def _join(task_id: str) -> EmptyOperator:
    """Return a task that succeeds when those before it have ended, in whatever state; Airflow starts nothing for it."""
    return EmptyOperator(task_id=task_id, trigger_rule=TriggerRule.ALL_DONE, doc_md=docs.STEPS[task_id])


def _settings(dataset: Dataset, step: str) -> dict[str, Any]:
    """Return a step's settings as arguments of its task. Wrong input and refusals are not tried again."""
    settings = dataset.tasks.of(step)
    arguments: dict[str, Any] = {
        "doc_md": docs.STEPS[step],
        "execution_timeout": settings.timeout,
        "retries": settings.retries,
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": 2,
        "max_retry_delay": timedelta(minutes=10),
    }
    if settings.queue is not None:
        arguments["queue"] = settings.queue
    if settings.executor_config:
        arguments["executor_config"] = _executor_config(settings.executor_config, step)
    return arguments


def _executor_config(config: dict[str, Any], step: str) -> dict[str, Any]:
    """Return an executor's settings, `pod_override` as the object that the Kubernetes executor wants.

    Raises:
        InputError: it is no pod, or there is nothing that reads pods.
    """
    if "pod_override" not in config:
        return config
    key = f"`tasks.{step}.executor_config.pod_override`"
    try:
        from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
        from kubernetes.client import ApiClient
    except ImportError:
        raise InputError(f"{key} needs the package apache-airflow-providers-cncf-kubernetes") from None
    try:
        pod = PodGenerator.deserialize_model_dict(config["pod_override"])
        understood = ApiClient().sanitize_for_serialization(pod)
    except Exception as e:
        raise InputError(f"{key}: no pod as Kubernetes knows it ({type(e).__name__})") from None
    if understood != config["pod_override"]:
        raise InputError(f"{key}: of this, Kubernetes understands {understood} only")
    return {**config, "pod_override": pod}


def _mail(name: str, to: list[str], timezone: str) -> list[Any]:
    """Return what mails that a run failed; the DAG has it as well as its tasks, for whose process may be dead."""
    return [RunFailedMail(to=to, dataset=name, timezone=timezone)] if to else []


def _schedule(dataset: Dataset) -> Any:
    if isinstance(dataset.schedule, AssetSchedule):
        try:
            return [Asset(uri) for uri in dataset.schedule.assets]
        except ValueError as e:
            raise InputError(f"`schedule.assets`: {e}") from None
    if dataset.schedule is None:
        return None
    return CronTriggerTimetable(dataset.schedule, timezone=dataset.timezone)


def broken_dag(path: Path, message: str, others: list[str], *, unique: bool = False) -> DAG:
    """Return the DAG of a dataset file that cannot be used: it keeps its id, and its one task fails with the reason.

    Where the file does not even tell whom to mail, it is those of the `others`.
    """
    content: Any = None
    try:
        content = read_yaml(path)
    except DatasetError:
        logger.debug("%s is no YAML", path)
    content = content if isinstance(content, dict) else {}
    name = content.get("dataset")
    if unique or not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)
    mail = _mail(name, _readable_recipients(content) or others, "UTC")
    with DAG(
        f"tag_{name}",
        schedule=CronTriggerTimetable(_readable_schedule(content), timezone="UTC"),
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        on_failure_callback=mail,
        tags={"tagger", "broken"},
        doc_md=f"**This dataset file cannot be used, so nothing is tagged.**\n\n```\n{message}\n```\n",
    ) as dag:

        @task(retries=0, doc_md=docs.STEPS["dataset_file"], on_failure_callback=mail)
        def dataset_file() -> None:
            raise AirflowFailException(message)

        dataset_file()
    return dag


def _readable_recipients(content: dict[str, Any]) -> list[str]:
    try:
        return Alerts.model_validate(content["alerts"]).to
    except (KeyError, ValueError):
        return []


def _readable_schedule(content: dict[str, Any]) -> str:
    from croniter import croniter

    schedule = content.get("schedule")
    return schedule if isinstance(schedule, str) and croniter.is_valid(schedule) else "@daily"
