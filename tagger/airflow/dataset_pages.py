"""The cards and pages of datasets: their rollups, and over them what Airflow knows of their runs."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from tagger.airflow.page_storage import Clients, Readers
from tagger.airflow.tagged_dags import NO_XCOM, AirflowRun, TaggedDag, Where
from tagger.exceptions import InputError
from tagger.pages.data import Card, DatasetPage, card_of, page_of
from tagger.rollup import Rollup, read_rollup

DAYS_SHOWN, MOST_DAYS = 90, 1200

NO_ROLLUP = "{storage} has no history of it yet: the next report writes it"


class DatasetPages:
    """Makes cards and pages. One dataset's storage, or file, that cannot be read takes no other down."""

    def __init__(self, clients: Clients, readers: Readers) -> None:
        self._clients = clients
        self._readers = readers

    def cards(self, dags: Sequence[TaggedDag]) -> list[Card]:
        """Return the cards of datasets."""
        return [card for card, _ in self._read(dags)]

    def page(self, dag: TaggedDag, start: date | None, end: date | None) -> DatasetPage:
        """Return the page of a dataset, by default with the last 90 days.

        Raises:
            InputError: there are no days from `start` to `end`, or too many.
        """
        [(card, rollup)] = self._read([dag])
        zone = rollup.zone if rollup else ZoneInfo("UTC")
        first, last = days(start, end, datetime.now(zone).date())
        return page_of(rollup, first, last, card) if rollup else DatasetPage(card=card)

    def _read(self, dags: Sequence[TaggedDag]) -> list[tuple[Card, Rollup | None]]:
        found = self._readers.read({dag.dag_id: partial(self._rollup, dag.where) for dag in dags if dag.where})
        cards = []
        for dag in dags:
            rollup, problem = found.get(dag.dag_id, (None, None))
            if problem and dag.where:
                self._clients.forget(dag.where.conn_id)
            cards.append((card(dag, rollup, problem or _missing(dag, rollup)), rollup))
        return cards

    def _rollup(self, where: Where) -> Rollup | None:
        return read_rollup(self._clients.storage(where.storage, where.conn_id), where.dataset)


def days(start: date | None, end: date | None, today: date) -> tuple[date, date]:
    """Return the first and the last day to show.

    Raises:
        InputError: there are no such days, or too many.
    """
    last = end or today
    first = start or last - timedelta(days=DAYS_SHOWN - 1)
    if first > last:
        raise InputError(f"`start` {first} is after `end` {last}: expected the earlier day first")
    if (last - first).days >= MOST_DAYS:
        raise InputError(f"`start` {first} to `end` {last}: more than {MOST_DAYS:,} days; ask for fewer")
    return first, last


def card(dag: TaggedDag, rollup: Rollup | None, problem: str | None) -> Card:
    """Return a dataset's card: by its rollup, and where Airflow has a later word on the last run, by that."""
    told = (
        card_of(rollup, datetime.now(UTC), dag_id=dag.dag_id)
        if rollup
        else Card(dag_id=dag.dag_id, dataset=dag.dataset)
    )
    problems = [each for each in (dag.problem, problem, told.problem) if each]
    update: dict[str, Any] = {"next_run_at": dag.next_run_at, "problem": "; ".join(problems) or None}
    if (latest := dag.latest) and _is_later(latest, told, rollup):
        update |= {
            "state": latest.state,
            "reason": latest.reason,
            "last_run_id": latest.run_id,
            "last_run_at": latest.at,
        }
    return told.model_copy(update=update)


def _is_later(latest: AirflowRun, told: Card, rollup: Rollup | None) -> bool:
    """Return whether Airflow's last run is another than the card's, or has become something else since its report."""
    if latest.is_at_work or told.last_run_id is None:
        return True
    if latest.run_id == told.last_run_id:
        return latest.state != told.state
    is_rolled_up = rollup is not None and any(run.run_id == latest.run_id for run in rollup.runs)  # a dry run
    return not is_rolled_up and (told.last_run_at is None or (latest.at is not None and latest.at > told.last_run_at))


def _missing(dag: TaggedDag, rollup: Rollup | None) -> str | None:
    if rollup is not None or dag.latest is None or dag.latest.state != "success":
        return None
    return NO_XCOM if dag.where is None else NO_ROLLUP.format(storage=dag.where.storage)
