"""Connections as Airflow has them: environment, secrets backends, metadata database."""

from typing import Any

from tagger.connections import Connection


def connections_from_airflow(conn_id: str) -> Connection | None:
    """Look a connection up in Airflow; None where there is none."""
    from airflow.sdk import Connection as AirflowConnection
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        return converted(conn_id, AirflowConnection.get(conn_id))
    except AirflowNotFoundException:
        return None


def converted(conn_id: str, found: Any) -> Connection:
    """Return an Airflow connection as ours."""
    return Connection(
        conn_id,
        found.conn_type,
        found.host or None,
        found.port,
        found.login or None,
        found.password or None,
        found.schema or None,
        found.extra_dejson,
    )
