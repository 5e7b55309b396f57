"""The report step: the run in figures, and the verdict on it."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Literal

from pydantic import AwareDatetime

from tagger.cache import Cache
from tagger.dataset import Dataset
from tagger.exceptions import RunFailed
from tagger.ledger import Attempt, Latest, latest_outcomes, read_attempts
from tagger.price import usd
from tagger.runs import File, Loaded, Plan, Run, utc_now
from tagger.storage import Storage

logger = logging.getLogger(__name__)


class ErrorCount(File):
    """How many texts ended so, and one row that has such a text."""

    count: int
    row_id: str


class Window(File):
    """The instants between which rows were taken; None where all rows were."""

    start: AwareDatetime | None
    end: AwareDatetime | None


class Summary(File):
    """`summary.json`: one run in figures. `texts = cached + tagged + refused + failed + skipped + pending`."""

    dataset: str
    run_id: str
    day: str
    window: Window
    spec_id: str
    model: str
    mode: str
    dry_run: bool = False
    state: Literal["success", "failed"]
    reason: str | None
    started_at: AwareDatetime
    finished_at: AwareDatetime
    rows: int
    blank: int
    texts: int
    cached: int
    tagged: int
    refused: int
    failed: int
    skipped: int
    pending: int
    llm_requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    estimated_usd: float | None = None
    """What the plan expected the new texts to cost."""
    cost_usd: float | None
    """None where the price is not known."""
    saved_usd: float | None
    """Cached texts times the mean cost of a record of the spec."""
    seconds: dict[str, float]
    tags: dict[str, int]
    errors: dict[str, ErrorCount]


def report(run: Run) -> Summary:
    """Sum the run up, write its summary, and log it.

    Raises:
        InputError: the run has no plan.
        RunFailed: a shard broke, load_back did not succeed, or too many texts failed.
    """
    clock = utc_now()
    dataset, taken, planned = run.dataset(), run.snapshot(), run.plan()
    loaded = run.read("load.json", Loaded)
    attempts = read_attempts(run)
    costs = list(chain.from_iterable(attempt.values("cost_usd") for attempt in attempts))
    present = [attempt for attempt in attempts if attempt.plan_id == planned.plan_id]
    outcomes = latest_outcomes(present).values()
    errors = _errors(planned, loaded, outcomes)
    reasons = list(_problems(dataset, planned, loaded, present, outcomes))
    damaged = loaded.damaged if loaded else 0
    cached = planned.cached - damaged
    new = _new_texts(planned, loaded, outcomes)
    seconds = {"snapshot": taken.seconds, "plan": planned.seconds, "tag": 0.0, "load": loaded.seconds if loaded else 0}
    if present:
        started = min(attempt.started_at for attempt in present)
        seconds["tag"] = (max(attempt.ended_at for attempt in present) - started).total_seconds()
    day = taken.selection.end if taken.selection.rows == "window" else taken.selection.start
    mean_cost = Cache(run.storage, planned.spec_id, dataset.llm.model).mean_cost() if cached else 0.0
    seconds["report"] = (utc_now() - clock).total_seconds()
    summary = Summary(
        dataset=dataset.dataset,
        run_id=run.run_id,
        day=f"{(day or taken.taken_at).astimezone(dataset.zone):%Y-%m-%d}",
        window=Window(start=taken.selection.start, end=taken.selection.end),
        spec_id=planned.spec_id,
        model=dataset.llm.model,
        mode=dataset.llm.mode,
        dry_run=taken.options.dry_run,
        state="failed" if reasons else "success",
        reason="; ".join(reasons) or None,
        started_at=taken.started_at,
        finished_at=utc_now(),
        rows=planned.rows,
        blank=planned.blank,
        texts=planned.texts,
        cached=cached,
        tagged=new["tagged"],
        refused=new["refused"] + planned.too_long,
        failed=new["failed"] + damaged,
        skipped=new["skipped"],
        pending=new["pending"],
        llm_requests=_total(attempts, "requests"),
        input_tokens=_total(attempts, "input_tokens"),
        cached_input_tokens=_total(attempts, "cached_input_tokens"),
        output_tokens=_total(attempts, "output_tokens"),
        estimated_usd=planned.estimated_usd,
        cost_usd=None if None in costs else sum(cost or 0.0 for cost in costs),
        saved_usd=None if mean_cost is None else cached * mean_cost,
        seconds={step: round(value, 3) for step, value in seconds.items()},
        tags=loaded.tags if loaded else {},
        errors=errors,
    )
    run.write("summary.json", summary)
    for line in describe(summary):
        logger.info("%s", line)
    if reasons:
        raise RunFailed(f"{dataset.dataset}: {summary.reason}")
    return summary


def _total(attempts: list[Attempt], column: str) -> int:
    return sum(sum(attempt.values(column)) for attempt in attempts)


def _new_texts(planned: Plan, loaded: Loaded | None, outcomes: Collection[Latest]) -> dict[str, int]:
    """Return the plan's new texts by status: as loaded, or where nothing was loaded, as the shards left them."""
    statuses = ("tagged", "refused", "failed", "skipped", "pending")
    if loaded is not None:
        return {status: getattr(loaded, status) for status in statuses}
    counts = Counter(outcome.status for outcome in outcomes)
    ended = {status: counts[status] for status in ("tagged", "refused", "failed")}
    return {**ended, "skipped": planned.new - sum(ended.values()), "pending": 0}


def _problems(
    dataset: Dataset, planned: Plan, loaded: Loaded | None, attempts: list[Attempt], outcomes: Collection[Latest]
) -> Iterator[str]:
    """Yield why the run is not acceptable."""
    latest = {attempt.shard: attempt for attempt in attempts}
    for shard in planned.shards:
        attempt = latest.get(shard.shard)
        if attempt is None:
            yield f"{shard.name}: did not start"
        elif attempt.state == "broken":
            yield attempt.reason if shard.of == 1 and attempt.reason else f"{shard.name}: {attempt.reason}"
        elif attempt.state == "running":
            yield f"{shard.name}: was killed"
    if loaded is None:
        yield "load_back did not finish"
        return
    if loaded.problem:
        yield loaded.problem
    asked = loaded.tagged + loaded.refused + loaded.failed
    if loaded.failed > dataset.limits.max_failed_fraction * asked:
        failures = _by_kind(outcome for outcome in outcomes if outcome.status == "failed")
        kinds = ", ".join(f"{kind} {e.count} (row {e.row_id})" for kind, e in failures.items())
        yield (
            f"{loaded.failed} of {asked} texts failed, more than `limits.max_failed_fraction` "
            f"{dataset.limits.max_failed_fraction:g} allows: {kinds}"
        )


def _errors(planned: Plan, loaded: Loaded | None, outcomes: Collection[Latest]) -> dict[str, ErrorCount]:
    errors = _by_kind(outcomes)
    if planned.too_long_row is not None:
        errors["too_long"] = ErrorCount(count=planned.too_long, row_id=planned.too_long_row)
    if loaded is not None and loaded.damaged_row is not None:
        errors["damaged_record"] = ErrorCount(count=loaded.damaged, row_id=loaded.damaged_row)
    return errors


def _by_kind(outcomes: Iterable[Latest]) -> dict[str, ErrorCount]:
    errors: dict[str, ErrorCount] = {}
    for outcome in outcomes:
        if outcome.kind is not None:
            count = errors[outcome.kind].count if outcome.kind in errors else 0
            errors[outcome.kind] = ErrorCount(count=count + 1, row_id=outcome.row_id)
    return errors


def describe(summary: Summary) -> list[str]:
    """Return a summary as lines to read."""
    s = summary
    errors = ", ".join(f"{kind} {e.count} (such as row {e.row_id})" for kind, e in s.errors.items())
    tags = ", ".join(f"{tag} {count}" for tag, count in list(s.tags.items())[:12])
    lines = [
        f"{s.dataset} {s.day} · {s.run_id} · {s.state}"
        + (" (dry run)" if s.dry_run else "")
        + (f": {s.reason}" if s.reason else ""),
        f"  rows     {s.rows:,} with a text, {s.blank:,} blank",
        f"  texts    {s.texts:,} distinct: {s.cached:,} cached, {s.tagged:,} tagged, {s.refused:,} refused, "
        f"{s.failed:,} failed, {s.skipped:,} skipped, {s.pending:,} pending",
        f"  LLM      {s.llm_requests:,} requests, {s.input_tokens:,} tokens in ({s.cached_input_tokens:,} cached), "
        f"{s.output_tokens:,} out, {s.model}",
        f"  cost     {usd(s.cost_usd)} spent"
        + ("" if s.estimated_usd is None else f" ({usd(s.estimated_usd)} estimated)")
        + f", {usd(s.saved_usd)} saved by the cache",
        "  seconds  " + ", ".join(f"{step} {value:.1f}" for step, value in s.seconds.items()),
    ]
    lines += [f"  tags     {tags}"] if tags else []
    lines += [f"  errors   {errors}"] if errors else []
    return lines


def summaries(storage: Storage, dataset_name: str) -> list[Summary]:
    """Return the summaries of a dataset's runs, oldest first."""
    prefix = f"runs/{dataset_name}/"
    run_ids = [
        path.removeprefix(prefix).rsplit("/", 1)[0]
        for path, _ in storage.list(prefix)
        if path.endswith("/summary.json")
    ]
    found = (Run(storage, dataset_name, run_id).read("summary.json", Summary) for run_id in run_ids)
    return sorted((summary for summary in found if summary is not None), key=lambda summary: summary.finished_at)
