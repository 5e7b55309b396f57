"""What `tagger check` tells of Airflow's own things: the pool and the mails."""

import os
from collections.abc import Iterator
from pathlib import Path

from tagger.airflow.mails import email_conn_id, mails_off
from tagger.connections import Connections
from tagger.dataset import Dataset
from tagger.exceptions import InputError

DEFAULT_POOL = "default_pool"
"""Airflow makes it itself."""


def check_airflow(dataset: Dataset, connections: Connections) -> Iterator[str]:
    """Yield a line for each thing that is in order, or cannot be seen from here.

    Raises:
        InputError: the pool is missing.
    """
    pool = dataset.llm.pool
    if pool != DEFAULT_POOL:
        there = _has_pool(pool)
        if there is False:
            raise InputError(f"`llm.pool`: {_without_pool(pool)}")
        yield f"pool {pool}: there" if there else f"pool {pool}: not checked, no Airflow here; {_without_pool(pool)}"
    if dataset.alerts.to:
        to = ", ".join(dataset.alerts.to)
        yield mails_off(dataset.alerts.to, connections) or f"alerts: mails to {to} through `{email_conn_id()}`"


def _without_pool(pool: str) -> str:
    return f"without the pool `{pool}` the tag step waits for ever; make it: airflow pools set {pool} 16 'tag steps'"


def _has_pool(name: str) -> bool | None:
    """Return whether Airflow's database has the pool; None where there is no Airflow to ask."""
    home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()
    if not home.exists():  # importing Airflow would make it
        return None
    try:
        from airflow.models.pool import Pool
        from airflow.utils.session import create_session
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return None
    try:
        with create_session() as session:
            return Pool.get_pool(name, session=session) is not None
    except SQLAlchemyError:
        return None
