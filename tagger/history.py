"""A dataset's history: what its runs did and spent, by day and by month of the dataset's time zone."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from tagger.price import usd
from tagger.rollup import RolledRun, RolledSummary, Rollup, Spent
from tagger.runs import is_trial
from tagger.spend import total_usd

By = Literal["day", "month"]

DAYS_SHOWN = 14
"""The latest ones, where the history follows the latest run."""

_FORMAT = {"day": "%Y-%m-%d", "month": "%Y-%m"}

_FIRST, _LAST = (instant.replace(tzinfo=UTC) for instant in (datetime.min, datetime.max))


@dataclass(frozen=True)
class Figures:
    """What runs did and spent. Texts are those of the summaries; money, requests and tokens those of the attempts.

    Money of None is not known, and makes every sum with it so.
    """

    runs: int = 0
    """Dry runs aside."""
    texts: int = 0
    cached: int = 0
    tagged: int = 0
    refused: int = 0
    failed: int = 0
    skipped: int = 0
    pending: int = 0
    requests: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    spent_usd: float | None = 0.0
    total_saved_usd: float | None = 0.0
    estimated_usd: float | None = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        total: dict[str, Any] = {}
        for name, mine in vars(self).items():
            theirs = vars(other)[name]
            total[name] = None if mine is None or theirs is None else mine + theirs
        return Figures(**total)


class Period(NamedTuple):
    """A day, `2026-11-30`, or a month, `2026-11`."""

    dataset: str
    period: str
    figures: Figures


class Event(NamedTuple):
    """What is to be counted, and when it happened."""

    at: datetime
    what: Spent | RolledSummary | RolledRun
    """Money that was spent, a run that was summed up, or one that never was."""


def events(runs: Iterable[RolledRun]) -> Iterator[Event]:
    """Yield what happened: money when attempts ended, to the quarter hour; texts when their run did."""
    for run in runs:
        for spent in run.spent:
            yield Event(spent.at, spent)
        if run.summary is not None and not run.summary.dry_run:
            yield Event(run.summary.finished_at, run.summary)
        elif run.spent and not is_trial(run.run_id):
            yield Event(max(spent.at for spent in run.spent), run)


def history(rollup: Rollup, by: By, start: datetime = _FIRST, end: datetime = _LAST) -> list[Period]:
    """Return the days, or the months, in [`start`, `end`) on which anything happened, oldest first."""
    zone, found = rollup.zone, dict[str, Figures]()
    for at, what in events(rollup.runs):
        if start <= at < end:
            period = f"{at.astimezone(zone):{_FORMAT[by]}}"
            found[period] = found.get(period, Figures()) + _figures(what)
    return [Period(rollup.dataset, period, figures) for period, figures in sorted(found.items())]


def unfinished(rollup: Rollup) -> Iterator[str]:
    """Yield a line for each run that asked something after the latest one was summed up, and is not summed up."""
    for run in takewhile(lambda run: run.summary is None, reversed(rollup.runs)):
        if run.problem is None and not is_trial(run.run_id):
            yield (
                f"run {run.run_id} is at work, or was killed before its report: "
                f"{sum(spent.requests for spent in run.spent):,} requests and "
                f"{usd(total_usd(spent.cost_usd for spent in run.spent))} until {run.ended_at:%Y-%m-%d %H:%M} UTC"
            )


def _figures(what: Spent | RolledSummary | RolledRun) -> Figures:
    if isinstance(what, RolledRun):
        return Figures(runs=1)
    if isinstance(what, Spent):
        return Figures(
            requests=what.requests,
            input_tokens=what.input_tokens,
            cached_input_tokens=what.cached_input_tokens,
            output_tokens=what.output_tokens,
            spent_usd=what.cost_usd,
        )
    return Figures(
        runs=1,
        texts=what.texts,
        cached=what.cached,
        tagged=what.tagged,
        refused=what.refused,
        failed=what.failed,
        skipped=what.skipped,
        pending=what.pending,
        total_saved_usd=what.total_saved_usd,
        estimated_usd=what.estimated_usd,
    )


def as_rows(periods: Iterable[Period], by: By) -> list[dict[str, Any]]:
    """Return periods as JSON has them; what is not known is null."""
    return [{"dataset": dataset, by: period, **asdict(figures)} for dataset, period, figures in periods]


def as_csv(periods: Iterable[Period], by: By) -> str:
    """Return periods as CSV with a header; what is not known is left empty."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["dataset", by, *(each.name for each in fields(Figures))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_rows(periods, by))
    return lines.getvalue()


def as_table(periods: Iterable[Period], by: By) -> list[str]:
    """Return periods as lines to read, with a header."""
    counts = ("runs", "texts", "cached", "tagged", "refused", "failed", "skipped", "pending", "requests")
    rows = [["dataset", by, *counts, "tokens", "spent", "saved", "estimated"]]
    for dataset, period, figures in periods:
        numbers = [*(getattr(figures, name) for name in counts), figures.input_tokens + figures.output_tokens]
        money = (figures.spent_usd, figures.total_saved_usd, figures.estimated_usd)
        amounts = ("unknown" if amount is None else usd(amount) for amount in money)
        rows.append([dataset, period, *(f"{number:,}" for number in numbers), *amounts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    return ["  ".join(a(cell, width) for a, cell, width in zip(aligned, row, widths, strict=True)) for row in rows]
