"""Today's rows: which rows of the source a run takes."""

from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from tagger.dataset import Dataset
from tagger.exceptions import InputError

RunKind = Literal["regular", "backfill"]
"""Every run that is not of a backfill is regular: scheduled, triggered in any way, or of the console script."""

ONE_DAY = timedelta(days=1)


class Options(BaseModel):
    """What a run does otherwise than the dataset file says, as whoever starts it wants it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    limit: int | None = Field(default=None, ge=1)
    """Ask for no more new texts than so many, in the order of the rows; the others are `skipped`."""
    dry_run: bool = False
    """Plan, and stop there: no call, and nothing written to the target."""
    retry_refused: bool = False
    """Take the rows that are `refused` too, and ask for their texts again."""
    max_cost_usd: float | None = Field(default=None, gt=0)
    """Instead of the dataset file's `limits.max_cost_usd`."""


def run_options(**options: Any) -> Options:
    """Return a run's options.

    Raises:
        InputError: one of them is out of its range.
    """
    try:
        return Options(**options)
    except ValidationError as e:
        [error, *_] = e.errors(include_url=False)
        message = str(error["msg"]).removeprefix("Input should be ")
    raise InputError(f"`{error['loc'][0]}`: found {error['input']!r}, expected {message[0].lower() + message[1:]}")


class Selection(BaseModel):
    """The rows that a run takes. Rows whose `updated_at` is NULL are always among them.

    `start` and `end` bound a half-open window of instants; both are None where the whole table is taken. With
    `unfinished`, rows whose target row is `failed`, `skipped` or `pending` are taken besides.
    """

    model_config = ConfigDict(frozen=True)

    rows: Literal["window", "day", "all"]
    start: AwareDatetime | None = None
    end: AwareDatetime | None = None
    unfinished: bool
    rollout: int | None = None
    """Of the rows whose tags come from another spec, and that the run would not take for that, as many as this."""

    def describe(self, zone: ZoneInfo) -> str:
        """Return the selection in words, with times in `zone`."""
        if self.start is None or self.end is None:
            return "all rows"
        text = f"{self.start.astimezone(zone):%Y-%m-%d %H:%M} to {self.end.astimezone(zone):%Y-%m-%d %H:%M}"
        text += ", and rows not finished before" if self.unfinished else ""
        return text + (f", and up to {self.rollout:,} of an older spec" if self.rollout else "")

    def takes(self, updated_at: datetime | date | None, zone: ZoneInfo) -> bool:
        """Return whether a row changed at `updated_at` lies in the window; naive times are of `zone`.

        A plain date stands for its whole day: it lies in the window if a moment of it does.
        """
        if updated_at is None or self.start is None or self.end is None:
            return True
        if isinstance(updated_at, datetime):
            low, high = (self.start, self.end) if updated_at.tzinfo else self.naive_bounds(zone)
            return low <= updated_at < high
        first, after = self.date_bounds(zone)
        return first <= updated_at < after

    def date_bounds(self, zone: ZoneInfo) -> tuple[date, date]:
        """Return the first date of the window, and the first one after it, in `zone`."""
        assert self.start is not None and self.end is not None
        last = (self.end - timedelta(microseconds=1)).astimezone(zone).date()
        return self.start.astimezone(zone).date(), last + ONE_DAY

    def naive_bounds(self, zone: ZoneInfo) -> tuple[datetime, datetime]:
        """Return the window as naive times of `zone`, widened where the clocks go back so that no row falls out."""
        assert self.start is not None and self.end is not None
        start, end = self.start.astimezone(zone), self.end.astimezone(zone)
        low, high = start.replace(tzinfo=None), end.replace(tzinfo=None)
        if start.fold == 0:
            low -= _repeated(low, zone)
        if end.fold == 1:
            high += _repeated(high, zone)
        return low, high


def _repeated(naive: datetime, zone: ZoneInfo) -> timedelta:
    """Return by how much the clocks go back at an ambiguous time; zero if it is not ambiguous."""
    first, second = (naive.replace(tzinfo=zone, fold=fold).utcoffset() or timedelta() for fold in (0, 1))
    return max(first - second, timedelta())


def naive_range(naive: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """Return the earliest and the latest instant that a naive time of `zone` may mean."""
    instants = [naive.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)]
    return min(instants), max(instants)


def select_rows(
    dataset: Dataset,
    *,
    end: datetime,
    kind: RunKind = "regular",
    day: date | None = None,
    all_rows: bool = False,
    waited_until: datetime | None = None,
) -> Selection:
    """Return the rows that a run takes.

    Args:
        dataset: its schedule, time zone and lookback bound the window.
        end: the run's logical date, or where it has none its `run_after`; outside Airflow, now.
        kind: backfill runs take their window and nothing else, without lookback.
        day: this calendar day of the dataset's time zone instead, without lookback.
        all_rows: the whole table.
        waited_until: where the window ends instead, while it begins as if it did not.

    Raises:
        InputError: the arguments exclude each other.
    """
    if day is not None and kind == "backfill":
        raise InputError("`target_date` cannot be set in a backfill: each of its runs has a date of its own")
    if day is not None and all_rows:
        raise InputError("a day and all rows exclude each other")
    if day is not None and not date(1900, 1, 1) <= day < date(9999, 1, 1):
        raise InputError(f"the day {day} is not between the years 1900 and 9998")
    if day is not None and dataset.source.updated_at is None:
        raise InputError(
            "`target_date` needs `source.updated_at` in the dataset file: without it every run takes all rows"
        )
    rollout = dataset.rollout.texts_per_run if dataset.rollout and kind == "regular" and not all_rows else None
    if all_rows or dataset.source.updated_at is None:
        return Selection(rows="all", unfinished=kind == "regular", rollout=rollout)
    if day is not None:
        zone = dataset.zone
        return Selection(
            rows="day",
            start=datetime.combine(day, time(), zone).astimezone(UTC),
            end=datetime.combine(day + ONE_DAY, time(), zone).astimezone(UTC),
            unfinished=False,
        )
    end = datetime.fromisoformat(end.isoformat()).astimezone(UTC)  # Airflow's pendulum times lose their zone in sums
    lookback = timedelta() if kind == "backfill" else dataset.source.lookback
    start = min(previous_firing(dataset, end), end - ONE_DAY) - lookback
    return Selection(rows="window", start=start, end=waited_until or end, unfinished=kind == "regular", rollout=rollout)


def previous_firing(dataset: Dataset, end: datetime) -> datetime:
    """Return the last firing of the schedule before `end`; `end` itself where the schedule is no cron expression."""
    if not isinstance(dataset.schedule, str):
        return end
    from croniter import croniter

    zone = dataset.zone
    firings = croniter(dataset.schedule, end.astimezone(zone).replace(tzinfo=None))
    while True:
        # On wall clock times, as Airflow counts: one that the clocks skip or repeat is still one firing.
        earliest, latest = naive_range(firings.get_prev(datetime), zone)
        if latest < end:
            return earliest
