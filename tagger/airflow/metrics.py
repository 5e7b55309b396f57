"""A run's figures as metrics, through Airflow's own channel: StatsD, DogStatsD or OpenTelemetry.

All of them are gauges of the run that was reported last. A report that is done again says the same once more, where a
counter would count the run twice; and counters of a process as short as a task's mean nothing in OpenTelemetry.
`docs/api-and-metrics.md` lists the names.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from tagger.exceptions import RunFailed

if TYPE_CHECKING:
    from tagger.report import Summary
    from tagger.runs import Run

logger = logging.getLogger(__name__)

OUTCOMES = ("cached", "tagged", "refused", "failed", "skipped", "pending")


class Gauge(NamedTuple):
    """One figure of a dataset; where it is not known, nothing is sent. `part` tells the figures of a name apart."""

    name: str
    value: float | None
    part: tuple[str, str] | None = None


@contextmanager
def sent(run: "Run") -> Iterator[None]:
    """Send the metrics of a run that the block reports, acceptable or not. A fault in sending is logged, no more."""
    try:
        yield
    except RunFailed:
        _send(run)
        raise
    _send(run)


def _send(run: "Run") -> None:
    try:
        names = _names()
        if names is None:
            return
        from airflow.sdk.observability import stats

        for gauge in _gauges(run):
            if gauge.value is None:
                continue
            tags = {"dataset": run.dataset_name} | (dict([gauge.part]) if gauge.part else {})
            name = gauge.name if names == "tagged" else ".".join([gauge.name, *tags.values()])
            stats.gauge(name, round(gauge.value, 6), tags=tags)
    except Exception as e:
        logger.warning("metrics: not all are sent: %s; the run's summary has the figures", type(e).__name__)


def _names() -> Literal["tagged", "dotted"] | None:
    """Return how the channel tells datasets apart: by tags, or as plain StatsD by names alone; None without one.

    The order is that in which Airflow looks for its channel.
    """
    from airflow.sdk.configuration import conf

    def is_on(key: str) -> bool:
        return bool(conf.getboolean("metrics", key, fallback=False))

    if is_on("statsd_datadog_enabled"):
        return "tagged" if is_on("statsd_datadog_metrics_tags") else "dotted"
    if is_on("statsd_on"):
        return "tagged" if is_on("statsd_influxdb_enabled") else "dotted"
    return "tagged" if is_on("otel_on") else None


def _gauges(run: "Run") -> Iterator[Gauge]:
    from tagger.report import Summary

    summary = run.read("summary.json", Summary)
    if summary is None or summary.dry_run:
        return
    yield from _of_run(summary)
    yield from _of_month(run)


def _of_run(s: "Summary") -> Iterator[Gauge]:
    yield Gauge("tagger.run.success", s.state == "success")
    yield Gauge("tagger.run.rows", s.rows)
    for outcome in OUTCOMES:
        yield Gauge("tagger.run.texts", getattr(s, outcome), ("outcome", outcome))
    yield Gauge("tagger.run.requests", s.llm_requests)
    tokens = {"input": s.input_tokens, "cached_input": s.cached_input_tokens, "output": s.output_tokens}
    for kind, number in tokens.items():
        yield Gauge("tagger.run.tokens", number, ("kind", kind))
    yield Gauge("tagger.run.cost_usd", s.cost_usd)
    yield Gauge("tagger.run.estimated_usd", s.estimated_usd)
    saved = {
        "cache": s.saved_usd,
        "duplicates": s.saved_by_duplicates_usd,
        "batch": s.saved_by_batch_usd,
        "prompt_caching": s.saved_by_prompt_caching_usd,
    }
    for by, amount in saved.items():
        yield Gauge("tagger.run.saved_usd", amount, ("by", by))
    for step, seconds in s.seconds.items():
        yield Gauge("tagger.run.seconds", seconds, ("step", step))


def _of_month(run: "Run") -> Iterator[Gauge]:
    from tagger.pages.data import card_of
    from tagger.rollup import read_rollup

    rollup = read_rollup(run.storage, run.dataset_name)
    if rollup is None:
        return
    card = card_of(rollup, datetime.now(UTC))
    yield Gauge("tagger.month.spent_usd", card.spent_month_usd)
    yield Gauge("tagger.month.saved_usd", card.saved_month_usd)
    yield Gauge("tagger.month.budget_left_usd", card.budget_left_usd)
