"""A source that is a replica: what it has not replayed yet is missing in a snapshot."""

from datetime import datetime, timedelta

import sqlalchemy as sa

from tagger import mysql
from tagger.dataset import Dataset
from tagger.window import Selection

_REPLAYED_UNTIL = sa.text("""
SELECT CASE
    WHEN NOT pg_is_in_recovery() THEN NULL
    WHEN pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN NULL
    ELSE pg_last_xact_replay_timestamp()
END
""")
"""While the replica receives, and has replayed what it received, the last commit may be old: there was none since."""


def replayed_until(connection: sa.Connection) -> datetime | None:
    """Return when the last commit was that a PostgreSQL replica has replayed.

    None where there is nothing behind it: no replica, one that is not behind, one that does not tell (Aurora's does
    not), another database.
    """
    if connection.dialect.name != "postgresql":
        return None
    try:
        with connection.begin_nested():
            until: datetime | None = connection.execute(_REPLAYED_UNTIL).scalar()
            return until
    except sa.exc.DBAPIError as e:
        if e.connection_invalidated:
            raise
        return None


def missed_rows(
    connection: sa.Connection, dataset: Dataset, now: datetime, selection: Selection | None = None
) -> str | None:
    """Return which rows a run of a selection misses for good, because the source is a replica that is behind.

    What a run misses, the next one takes as long as it lies within `source.lookback`; no other takes what a backfill or
    a run of one day misses.

    Args:
        connection: to the source.
        dataset: the source's.
        now: the database's time.
        selection: what the run takes; None for a run that would start now.
    """
    until = replayed_until(connection)
    if until is None or dataset.source.updated_at is None:
        return None
    end, again = now, dataset.source.lookback
    if selection is not None:
        end = min(selection.end or now, now)
        again = again if selection.unfinished else timedelta()
    if until >= end - again:
        return None
    behind = timedelta(seconds=round((now - until).total_seconds()))
    return (
        f"a replica that is {behind} behind, with `source.lookback` {dataset.source.lookback}: rows that changed since "
        f"{until:%Y-%m-%d %H:%M %Z} are missing, and no later run's window takes them; run with `rows: all` when it "
        "has caught up"
    )


def takes_writes(connection: sa.Connection) -> bool:
    """Return whether a database takes writes, which a replica does not."""
    if connection.dialect.name == "mysql":
        return mysql.takes_writes(connection)
    if connection.dialect.name != "postgresql":
        return True
    read_only: str = connection.execute(sa.text("SELECT current_setting('transaction_read_only')")).scalar_one()
    return read_only == "off"
