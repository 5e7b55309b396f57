"""The tagging DAGs as Airflow's database knows them. For the API server: nothing else may ask that database."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from airflow.models.dag import DagModel, DagTag
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import ColumnElement, Select, and_, case, func, or_, select, tuple_
from sqlalchemy.orm import Session

from tagger.airflow.page_storage import Place
from tagger.pages.data import RUNS_SHOWN

TAG, BROKEN = "tagger", "broken"
AT_WORK = ("running", "queued")

_AT = func.coalesce(DagRun.end_date, DagRun.start_date, DagRun.queued_at)

NO_XCOM = "Airflow no longer knows where its files are, for the XComs are gone: the next run tells"

RunState = Literal["queued", "running", "success", "failed"]


class Where(BaseModel):
    """Where a dataset's runs lie, as the snapshot step returned it."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    storage: str
    conn_id: str

    @property
    def place(self) -> Place:
        """The storage, as pages read it."""
        return Place(self.conn_id, self.storage)


@dataclass(frozen=True)
class AirflowRun:
    """A run as Airflow's database knows it."""

    run_id: str
    state: RunState
    at: datetime | None
    """When it ended; of one that is at work, when it started or was queued."""
    date: datetime
    """Its logical date, or where it has none, `run_after`."""
    conf: dict[str, Any] | None
    """The parameters that were given."""
    failed_at: tuple[str, ...] = ()
    """The steps at which it failed."""

    @property
    def is_at_work(self) -> bool:
        """Whether it has not ended."""
        return self.state in AT_WORK

    @property
    def reason(self) -> str | None:
        """Why it failed, as far as Airflow knows."""
        if self.state != "failed":
            return None
        steps = ", ".join(f"`{step}`" for step in self.failed_at)
        return f"failed at {steps}: the log says why" if steps else "failed, though none of its steps did: see Airflow"


@dataclass(frozen=True)
class TaggedDag:
    """A DAG with the tag `tagger`, and so a dataset."""

    dag_id: str
    is_broken: bool
    """Its dataset file cannot be used."""
    is_stale: bool
    """Airflow no longer finds it: the dataset file is gone, or no dag-processor runs."""
    next_run_at: datetime | None
    """None for a paused one."""
    where: Where | None
    """By the newest run that tells; None where none does."""
    latest: AirflowRun | None
    """The run that is at work, or else the one that ended last."""

    @property
    def dataset(self) -> str:
        """The name of the dataset."""
        return dataset_of(self.dag_id)

    @property
    def problem(self) -> str | None:
        """What is wrong with the dataset file."""
        if self.is_stale:
            return "its dataset file is gone, or the dag-processor does not run: what follows is history"
        if self.is_broken:
            return "its dataset file cannot be used, so nothing is tagged: the docs of its DAG say what to mend"
        return None


def dataset_of(dag_id: str) -> str:
    """Return the name of the dataset of a DAG."""
    return dag_id.removeprefix("tag_")


def tagged_dag_ids(session: Session) -> set[str]:
    """Return the ids of the DAGs with the tag `tagger`."""
    return set(session.scalars(select(DagTag.dag_id).where(DagTag.name == TAG)))


def tagged_dags(session: Session, dag_ids: Collection[str]) -> list[TaggedDag]:
    """Return those of the DAGs that have the tag `tagger`, by id."""
    wanted = tagged_dag_ids(session) & set(dag_ids)
    broken = set(session.scalars(select(DagTag.dag_id).where(DagTag.name == BROKEN, DagTag.dag_id.in_(wanted))))
    where, latest = _where(session, wanted), _latest(session, wanted)
    columns = (DagModel.dag_id, DagModel.is_paused, DagModel.is_stale, DagModel.next_dagrun_create_after)
    found = session.execute(select(*columns).where(DagModel.dag_id.in_(wanted)).order_by(DagModel.dag_id))
    return [
        TaggedDag(
            dag_id=dag_id,
            is_broken=dag_id in broken,
            is_stale=is_stale,
            next_run_at=None if is_paused or is_stale else next_run_at,
            where=where.get(dag_id),
            latest=latest.get(dag_id),
        )
        for dag_id, is_paused, is_stale, next_run_at in found
    ]


def _where(session: Session, dag_ids: Collection[str], *of_runs: ColumnElement[bool]) -> dict[str, Where]:
    returned = and_(
        XComModel.task_id == "snapshot", XComModel.key == "return_value", XComModel.dag_id.in_(dag_ids), *of_runs
    )
    newest = select(XComModel.dag_id, func.max(XComModel.timestamp)).where(returned).group_by(XComModel.dag_id)
    is_newest = tuple_(XComModel.dag_id, XComModel.timestamp).in_(newest)
    found = session.execute(select(XComModel.dag_id, XComModel.value).where(returned, is_newest))
    read = {row.dag_id: _read_where(row) for row in found}
    return {dag_id: where for dag_id, where in read.items() if where is not None}


def _read_where(row: Any) -> Where | None:
    """Return what a snapshot step returned, if it is what this DAG's step returns: an XCom can be edited."""
    try:
        where = Where.model_validate(XComModel.deserialize_value(row))
    except ValidationError:
        return None
    return (
        where if where.dataset == dataset_of(row.dag_id) and re.fullmatch(r"[a-z][a-z0-9_]*", where.dataset) else None
    )


def _latest(session: Session, dag_ids: Collection[str]) -> dict[str, AirflowRun]:
    newest = select(DagRun.dag_id, func.max(DagRun.end_date)).where(DagRun.dag_id.in_(dag_ids)).group_by(DagRun.dag_id)
    ended = _runs().where(tuple_(DagRun.dag_id, DagRun.end_date).in_(newest))
    at_work = (
        _runs()
        .where(DagRun.dag_id.in_(dag_ids), DagRun.state.in_(AT_WORK))
        .order_by(case((DagRun.state == "running", 1), else_=0), DagRun.start_date)
    )
    # a later row counts more
    found = {row[0]: AirflowRun(*row[1:]) for statement in (ended, at_work) for row in session.execute(statement)}
    steps = _failed_steps(session, [(dag_id, run.run_id) for dag_id, run in found.items() if run.state == "failed"])
    return {dag_id: replace(run, failed_at=steps.get((dag_id, run.run_id), ())) for dag_id, run in found.items()}


def _runs() -> Select[Any]:
    """Select the DAG's id, and what an `AirflowRun` has."""
    date = func.coalesce(DagRun.logical_date, DagRun.run_after)
    return select(DagRun.dag_id, DagRun.run_id, DagRun.state, _AT, date, DagRun.conf)


def _failed_steps(session: Session, runs: Collection[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the steps that failed, by DAG and run."""
    of_runs = tuple_(TaskInstance.dag_id, TaskInstance.run_id).in_(runs)
    columns = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id)
    steps: dict[tuple[str, str], tuple[str, ...]] = {}
    for dag_id, run_id, step in session.execute(
        select(*columns).where(of_runs, TaskInstance.state == "failed").group_by(*columns).order_by(*columns)
    ):
        steps[dag_id, run_id] = (*steps.get((dag_id, run_id), ()), step)
    return steps


@dataclass(frozen=True)
class TagTask:
    """A mapped instance of the step `tag`: that of shard `map_index + 1`."""

    map_index: int
    state: str | None
    try_number: int
    started_at: datetime | None


def airflow_run(session: Session, dag_id: str, run_id: str) -> AirflowRun | None:
    """Return a run; None where Airflow has none."""
    row = session.execute(_runs().where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)).one_or_none()
    if row is None:
        return None
    steps = _failed_steps(session, [(dag_id, run_id)])
    return replace(AirflowRun(*row[1:]), failed_at=steps.get((dag_id, run_id), ()))


def airflow_runs(session: Session, dag_id: str, since: datetime, until: datetime) -> list[AirflowRun]:
    """Return the newest runs of a time, as many as a page shows; and of those at work, all that are among them."""
    in_time = or_(DagRun.state.in_(AT_WORK), and_(since <= _AT, until > _AT))
    found = session.execute(_runs().where(DagRun.dag_id == dag_id, in_time).order_by(_AT.desc()).limit(RUNS_SHOWN))
    runs = [AirflowRun(*row[1:]) for row in found]
    steps = _failed_steps(session, [(dag_id, run.run_id) for run in runs if run.state == "failed"])
    return [replace(run, failed_at=steps.get((dag_id, run.run_id), ())) for run in runs]


def tag_tasks(session: Session, dag_id: str, run_id: str) -> list[TagTask]:
    """Return the instances of a run's step `tag`, in order of its shards."""
    columns = (TaskInstance.map_index, TaskInstance.state, TaskInstance.try_number, TaskInstance.start_date)
    of_run = (TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id, TaskInstance.task_id == "tag")
    found = session.execute(
        select(*columns).where(*of_run, TaskInstance.map_index >= 0).order_by(TaskInstance.map_index)
    )
    return [TagTask(*row) for row in found]


def where_of(session: Session, dag_id: str, run_id: str) -> Where | None:
    """Return where a run's files lie; of one whose snapshot has not ended, where those of the run before do."""
    return (_where(session, [dag_id], XComModel.run_id == run_id) or _where(session, [dag_id])).get(dag_id)
