"""A dataset's history: what its runs did and spent, by day and by month of the dataset's time zone."""

import csv
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Literal, NamedTuple

from tagger.dataset import Dataset
from tagger.price import usd
from tagger.report import Summary
from tagger.spend import THREADS, RunFiles, Spend

By = Literal["day", "month"]

DAYS_SHOWN = 14
"""The latest ones, where the history follows the latest run."""

_FORMAT = {"day": "%Y-%m-%d", "month": "%Y-%m"}


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


class Entry(NamedTuple):
    """What is to be counted, and when it happened."""

    at: datetime
    figures: Figures


class Period(NamedTuple):
    """A day, `2026-11-30`, or a month, `2026-11`."""

    dataset: str
    period: str
    figures: Figures


def read_entries(runs: Iterable[RunFiles], summaries: Iterable[Summary]) -> list[Entry]:
    """Return what the runs of a dataset did and spent: attempts when they ended, texts when their run did.

    Raises:
        StorageError: an attempt's file is damaged.
    """
    by_run = {summary.run_id: summary for summary in summaries}

    def read(files: RunFiles) -> list[Entry]:
        summary = by_run.get(files.run.run_id)
        spends = files.spends(summary.attempts if summary else [])
        spent = [Entry(spend.ended_at, _spent(spend)) for spend in spends]
        if summary is not None and not summary.dry_run:
            return [*spent, Entry(summary.finished_at, _done(summary))]
        return [*spent, Entry(max(entry.at for entry in spent), Figures(runs=1))] if spent else []

    with ThreadPoolExecutor(THREADS) as threads:
        return [entry for entries in threads.map(read, runs) for entry in entries]


def _spent(spend: Spend) -> Figures:
    return Figures(
        requests=spend.requests,
        input_tokens=spend.input_tokens,
        cached_input_tokens=spend.cached_input_tokens,
        output_tokens=spend.output_tokens,
        spent_usd=spend.cost_usd,
    )


def _done(summary: Summary) -> Figures:
    return Figures(
        runs=1,
        texts=summary.texts,
        cached=summary.cached,
        tagged=summary.tagged,
        refused=summary.refused,
        failed=summary.failed,
        skipped=summary.skipped,
        pending=summary.pending,
        total_saved_usd=summary.total_saved_usd,
        estimated_usd=summary.estimated_usd,
    )


def history(dataset: Dataset, entries: Iterable[Entry], by: By) -> list[Period]:
    """Return the days, or the months, on which anything happened, oldest first."""
    found: dict[str, Figures] = {}
    for at, figures in entries:
        period = f"{at.astimezone(dataset.zone):{_FORMAT[by]}}"
        found[period] = found.get(period, Figures()) + figures
    return [Period(dataset.dataset, period, figures) for period, figures in sorted(found.items())]


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
