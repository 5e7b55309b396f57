"""Airflow's API server, which the tests of the pages share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.project import Project

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from tests.airflow.server import Server


@pytest.fixture(scope="session")
def api_server() -> Iterator[TestClient]:
    """The API server's app with the plugins folder's plugins, over an empty database."""
    from airflow.api_fastapi.app import create_app, purge_cached_app
    from airflow.utils.db import initdb
    from starlette.testclient import TestClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "a secret of the tests" * 4)
        patch.setenv("AIRFLOW__CORE__AUTH_MANAGER", "tests.airflow.server.Guarded")
        initdb()
        with TestClient(create_app("core"), raise_server_exceptions=False) as client:
            yield client
        purge_cached_app()


@pytest.fixture
def server(api_server: TestClient, project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The API server without a DAG, with the project's storage as `aws_default`."""
    from airflow.sdk.execution_time import task_runner

    from tests.airflow.server import Server, connect

    connect(monkeypatch, "aws_default", project.store.endpoint)
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")  # as `airflow api-server` has it
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", None, raising=False)  # which `dag.test()` leaves behind
    server = Server(api_server)
    server.clear()
    yield server
    server.clear()
