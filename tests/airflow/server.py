"""Airflow's API server in this process, and rows in Airflow's database as its scheduler would have written them."""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.models.dag import DagModel, DagTag
from airflow.models.dagbundle import DagBundleModel
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from sqlalchemy import delete, insert, select
from starlette.testclient import TestClient

from tests.project import Project

GUEST, GUESTS_DAG = "guest", "tag_open"
BUNDLE = "tests"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
RUN = "manual__1"
SECRET = "the patient ate an apple in the storm"


class Guarded(SimpleAuthManager):
    """Airflow's simple auth manager, which denies nobody a single DAG: here a guest may read the runs of one only."""

    def is_authorized_dag(
        self,
        *,
        method: Any,
        user: SimpleAuthManagerUser,
        access_entity: DagAccessEntity | None = None,
        details: DagDetails | None = None,
    ) -> bool:
        """Return what the manager says, the guest aside."""
        if (
            user.username == GUEST
            and access_entity == DagAccessEntity.RUN
            and (not details or details.id != GUESTS_DAG)
        ):
            return False
        return super().is_authorized_dag(method=method, user=user, access_entity=access_entity, details=details)


class Server:
    """A client of the API server, and the rows that its pages are made of."""

    def __init__(self, client: TestClient) -> None:
        self._client = client
        self._runs = 0

    def get(self, path: str, user: str | None = "team", *, method: str = "GET", **headers: str) -> httpx2.Response:
        """Ask for a path below `/tagger` as a user with a token of Airflow's; None: without one."""
        if user is not None:
            token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username=user, role="viewer", teams=[]))
            headers["Authorization"] = f"Bearer {token}"
        return self._client.request(method, f"/tagger{path}", headers=headers)

    def card(self, dag_id: str = "tag_notes") -> dict[str, Any]:
        """Return the card of a dataset."""
        [card] = (card for card in self.get("/api/v1/datasets").json()["datasets"] if card["dag_id"] == dag_id)
        return dict(card)

    def dag(self, dag_id: str = "tag_notes", *, tags: Sequence[str] = ("tagger",), **fields: Any) -> None:
        """Add a DAG."""
        known: dict[str, Any] = {
            "is_stale": False,
            "is_paused": False,
            "max_active_tasks": 16,
            "max_consecutive_failed_dag_runs": 0,
        }
        known |= {"has_task_concurrency_limits": False, "bundle_name": BUNDLE, "timetable_type": ""} | fields
        with create_session() as session:
            if session.get(DagBundleModel, BUNDLE) is None:
                session.add(DagBundleModel(name=BUNDLE))
                session.flush()
            session.execute(insert(DagModel).values(dag_id=dag_id, **known))
            session.execute(insert(DagTag), [{"name": tag, "dag_id": dag_id} for tag in tags])

    def run(
        self,
        run_id: str,
        dag_id: str = "tag_notes",
        *,
        state: str = "success",
        steps: Mapping[str, str] | None = None,
        shards: Sequence[str | None] = (),
        where: Any = None,
        at: datetime | None = None,
        conf: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a run: states of its steps and of the tasks of its shards, and what its snapshot step returned."""
        self._runs += 1
        at = at or NOON + timedelta(minutes=self._runs)  # a DAG has no two runs of one date
        run: dict[str, Any] = {"dag_id": dag_id, "run_id": run_id}
        ended = state in ("success", "failed")
        dates = {
            "logical_date": at,
            "run_after": at,
            "queued_at": at,
            "start_date": at,
            "end_date": at if ended else None,
        }
        states = {"snapshot": "success"} | dict(steps or {})
        tasks: list[tuple[str, int, str | None]] = [(step, -1, each) for step, each in states.items()]
        tasks += [("tag", number, each) for number, each in enumerate(shards)]
        with create_session() as session:
            session.execute(insert(DagRun).values(run_type="manual", _state=state, conf=conf, **run, **dates))
            number = session.scalar(select(DagRun.id).filter_by(**run))
            for step, map_index, each in tasks:
                task = {"task_id": step, "map_index": map_index, **run}
                session.execute(
                    insert(TaskInstance).values(
                        id=uuid.uuid4(), state=each, try_number=1 if each else 0, pool="default_pool", **task
                    )
                )
            if where is not None:
                session.execute(
                    insert(XComModel).values(
                        dag_run_id=number, task_id="snapshot", key="return_value", value=where, timestamp=at, **run
                    )
                )

    def clear(self) -> None:
        """Forget all DAGs."""
        with create_session() as session:
            for model in (XComModel, TaskInstance, DagRun, DagTag, DagModel):
                session.execute(delete(model))


def connect(monkeypatch: pytest.MonkeyPatch, conn_id: str, endpoint: str) -> None:
    """Set an `aws` connection of Airflow's."""
    fields = {"conn_type": "aws", "login": "moto", "password": "moto", "extra": {"endpoint_url": endpoint}}
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))


def where(project: Project, **changes: str) -> dict[str, Any]:
    """Return what the snapshot step returns."""
    return {"dataset": "notes", "storage": project.dataset.storage, "conn_id": "aws_default", "rows": 1, **changes}


def tagged(server: Server, project: Project, run_id: str = RUN) -> None:
    """Tag two rows, as a run that ended."""
    project.put(1, SECRET)
    project.put(2, f"{SECRET}, twice")
    project.run(run_id)
    server.dag()
    server.run(run_id, where=where(project), shards=["success"])
