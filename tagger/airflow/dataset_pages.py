"""The cards and pages of datasets: their rollups, and over them what Airflow knows of their runs."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from tagger.airflow.page_storage import Readers, Reading
from tagger.airflow.tagged_dags import NO_XCOM, AirflowRun, TaggedDag, Where
from tagger.exceptions import InputError
from tagger.pages.data import NO_SUMMARY, RUNS_SHOWN, Card, DatasetPage, RunLine, card_of, page_of
from tagger.rollup import Rollup, read_rollup
from tagger.storage import Storage

DAYS_SHOWN, MOST_DAYS = 90, 1200

CARDS_KEPT = 2048
"""Each is small."""

NO_ROLLUP = "{storage} has no history of it yet: the next report writes it"


class Told(NamedTuple):
    """What a rollup tells at a glance. It is kept: a rollup itself takes megabytes, and a tenth of a second to read."""

    card: Card
    month: str
    """The month that the card is of."""
    run_ids: frozenset[str]
    """Of the newest runs, dry ones too."""


class DatasetPages:
    """Makes cards and pages. One dataset's storage, or file, that cannot be read takes no other down."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._kept: OrderedDict[Where, tuple[str, Told]] = OrderedDict()
        self._lock = threading.Lock()

    def cards(self, dags: Sequence[TaggedDag]) -> list[Card]:
        """Return the cards of datasets. Only rollups that changed since they were last looked at are read."""
        until = self._readers.until()
        versions = self._versions(dags, until)
        found = {where: Reading(self._known(where, each.found), each.problem) for where, each in versions.items()}
        reads = {
            where: (where.place, partial(self._tell, where, version.found))
            for where, version in versions.items()
            if found[where].found is None and version.found is not None
        }
        found |= self._readers.read(reads, until, "cards")
        return [card(dag, found[dag.where] if dag.where else Reading()) for dag in dags]

    def page(
        self,
        dag: TaggedDag,
        start: date | None,
        end: date | None,
        runs_of: Callable[[datetime, datetime], Sequence[AirflowRun]],
    ) -> DatasetPage:
        """Return the page of a dataset, by default with the last 90 days.

        Args:
            dag: Its DAG.
            start: The first day.
            end: The last day, included.
            runs_of: Returns the newest runs from one instant to another, as Airflow knows them.

        Raises:
            InputError: there are no days from `start` to `end`, or too many.
        """
        until = self._readers.until()
        read = self._rollup(dag, until)
        told, rollup = read.found or (None, None)
        shown = card(dag, Reading(told, read.problem))
        zone = ZoneInfo(shown.timezone)
        first, last = days(start, end, datetime.now(zone).date())
        between = datetime.combine(first, time(), zone), datetime.combine(last + timedelta(days=1), time(), zone)
        runs = runs_of(*between)
        page = DatasetPage(card=shown)
        if dag.where and rollup:
            made = self._readers.read(
                {"page": (dag.where.place, lambda _: page_of(rollup, first, last, shown))}, until, "page"
            )["page"]
            page = made.found or DatasetPage(card=shown.model_copy(update={"problem": made.problem}))
        return page.model_copy(update={"runs": run_lines(page.runs, rollup, runs, between, zone)})

    def _versions(self, dags: Sequence[TaggedDag], until: float) -> dict[Where, Reading[str]]:
        """Return the ETags of rollups; None where there is no rollup."""
        wheres = [dag.where for dag in dags if dag.where]
        listed = self._readers.read({where.place: (where.place, _listed) for where in wheres}, until)
        return {
            where: Reading((listed[where.place].found or {}).get(where.dataset), listed[where.place].problem)
            for where in wheres
        }

    def _rollup(self, dag: TaggedDag, until: float) -> Reading[tuple[Told, Rollup]]:
        if dag.where is None:
            return Reading()
        version = self._versions([dag], until)[dag.where]
        if version.found is None:
            return Reading(problem=version.problem)
        reads = {dag.where: (dag.where.place, partial(self._read, dag.where, version.found))}
        return self._readers.read(reads, until, "page")[dag.where]

    def _tell(self, where: Where, version: str, storage: Storage) -> Told | None:
        if known := self._known(where, version):  # another page was sooner
            return known
        read = self._read(where, version, storage)
        return read[0] if read else None

    def _read(self, where: Where, version: str, storage: Storage) -> tuple[Told, Rollup] | None:
        rollup = read_rollup(storage, where.dataset)
        if rollup is None:
            return None
        told = tell(rollup)
        with self._lock:
            self._kept[where] = version, told
            while len(self._kept) > CARDS_KEPT:
                self._kept.popitem(last=False)
        return told, rollup

    def _known(self, where: Where, version: str | None) -> Told | None:
        with self._lock:
            kept, told = self._kept.get(where, ("", None))
            if told is None or not version or kept != version or told.month != _month(told.card.timezone):
                return None
            self._kept.move_to_end(where)
            return told


def tell(rollup: Rollup) -> Told:
    """Return what a rollup tells at a glance."""
    month = _month(rollup.timezone)
    run_ids = frozenset(run.run_id for run in rollup.runs[-RUNS_SHOWN:])
    return Told(card_of(rollup, datetime.now(UTC)), month, run_ids)


def _month(timezone: str) -> str:
    return f"{datetime.now(ZoneInfo(timezone)):%Y-%m}"


def _listed(storage: Storage) -> dict[str, str]:
    """Return the ETags of a storage's rollups, by dataset."""
    versions = storage.list_versions("history/")
    return {each.path.removeprefix("history/").removesuffix(".json.gz"): each.etag for each in versions}


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


def card(dag: TaggedDag, read: Reading[Told]) -> Card:
    """Return a dataset's card: by its rollup, and where Airflow has a later word on the last run, by that."""
    told = read.found.card if read.found else Card(dag_id=dag.dag_id, dataset=dag.dataset)
    problems = [each for each in (dag.problem, read.problem or _missing(dag, read.found), told.problem) if each]
    update: dict[str, Any] = {
        "dag_id": dag.dag_id,
        "next_run_at": dag.next_run_at,
        "problem": "; ".join(problems) or None,
    }
    if (latest := dag.latest) and _is_later(latest, told, read.found):
        update |= {
            "state": latest.state,
            "reason": latest.reason,
            "last_run_id": latest.run_id,
            "last_run_at": latest.at,
        }
    return told.model_copy(update=update)


def _is_later(latest: AirflowRun, card: Card, told: Told | None) -> bool:
    """Return whether Airflow's last run is another than the card's, or has become something else since its report."""
    if latest.is_at_work or card.last_run_id is None:
        return True
    if latest.run_id == card.last_run_id:
        return latest.state != card.state
    is_rolled_up = told is not None and latest.run_id in told.run_ids  # a dry run
    return not is_rolled_up and (card.last_run_at is None or (latest.at is not None and latest.at > card.last_run_at))


def _missing(dag: TaggedDag, told: Told | None) -> str | None:
    if told is not None or dag.latest is None or dag.latest.state != "success":
        return None
    return NO_XCOM if dag.where is None else NO_ROLLUP.format(storage=dag.where.storage)


def run_lines(
    lines: Sequence[RunLine],
    rollup: Rollup | None,
    runs: Sequence[AirflowRun],
    between: tuple[datetime, datetime],
    zone: ZoneInfo,
) -> list[RunLine]:
    """Return the lines of a page as Airflow has their runs, and with them those runs that the rollup does not have."""
    ended = {run.run_id: run.ended_at for run in rollup.runs} if rollup else {}
    by_id = {run.run_id: run for run in runs}
    since, until = between
    found = [(ended[line.run_id], _line(line, by_id.get(line.run_id))) for line in lines]
    for run in runs:
        if run.run_id not in ended and run.at is not None and since <= run.at < until:
            found.append((run.at, _new_line(run, zone)))
    return [line for _, line in sorted(found, key=itemgetter(0), reverse=True)][:RUNS_SHOWN]


def _line(line: RunLine, run: AirflowRun | None) -> RunLine:
    """Return a line as Airflow has its run: at work, killed, or marked by somebody after its report."""
    if run is None or (run.state == line.state and line.reason != NO_SUMMARY):
        return line
    return line.model_copy(update={"state": run.state, "reason": run.reason})


def _new_line(run: AirflowRun, zone: ZoneInfo) -> RunLine:
    """Return the line of a run that was not reported."""
    day = (run.at or run.date).astimezone(zone).date()
    dry_run = (run.conf or {}).get("dry_run") is True
    return RunLine(run_id=run.run_id, day=day, state=run.state, reason=run.reason, dry_run=dry_run, spent_usd=None)
